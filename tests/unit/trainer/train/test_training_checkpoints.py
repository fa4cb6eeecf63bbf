"""Checkpoints: whole or not there, verified, pruned, and never in the way."""

import threading
from pathlib import Path

import pytest
import torch

from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.storage import MANIFEST, step_name
from tunewright_trainer.storage import LocalStore
from tunewright_trainer.train import optimizers
from tunewright_trainer.train.checkpoints import Checkpoints, Counters, Snapshot

KEY = "team-a/jobs/u/checkpoints"


def checkpoints(tmp_path: Path, *, store: LocalStore | None = None, keep: int = 2, dataset: str = "d1") -> Checkpoints:
    return Checkpoints(store or LocalStore(tmp_path / "store"), KEY, tmp_path / "work", keep=keep, lineage={"dataset": dataset})


def a_snapshot(step: int) -> Snapshot:
    return Snapshot(
        Counters(step=step, tokens=10 * step, best_loss=1.5, metrics={"loss": 2.0}),
        weights={"w": torch.full((2, 3), float(step))},
        optimizer={"w:exp_avg": torch.ones(2, 3) * step},
        best={"w": torch.zeros(2, 3)},
    )


def steps_there(tmp_path: Path) -> list[str]:
    return sorted(path.parent.name for path in (tmp_path / "store" / KEY).glob(f"*/{MANIFEST}"))


def test_everything_comes_back(tmp_path: Path) -> None:
    kept = checkpoints(tmp_path)
    kept.save(a_snapshot(7))
    found = checkpoints(tmp_path).newest()
    assert found is not None
    assert found.counters == a_snapshot(7).counters
    assert torch.equal(found.weights["w"], a_snapshot(7).weights["w"])
    assert torch.equal(found.optimizer["w:exp_avg"], a_snapshot(7).optimizer["w:exp_avg"])
    assert found.best is not None
    assert kept.last is not None
    assert kept.last.uri == str(tmp_path / "store" / KEY / step_name(7))


def test_nothing_there_begins_anew(tmp_path: Path) -> None:
    assert checkpoints(tmp_path).newest() is None


def test_the_last_few_are_kept_and_rests_are_cleared(tmp_path: Path) -> None:
    kept = checkpoints(tmp_path)
    half_written = tmp_path / "store" / KEY / step_name(2) / "weights.safetensors"
    half_written.parent.mkdir(parents=True)
    half_written.write_bytes(b"the pod was killed here")
    for step in (1, 3, 5):
        kept.save(a_snapshot(step))
    assert steps_there(tmp_path) == [step_name(3), step_name(5)]
    assert not half_written.exists()


@pytest.mark.parametrize(
    "harm",
    [
        pytest.param(lambda folder: (folder / "weights.safetensors").write_bytes(b""), id="truncated"),
        pytest.param(lambda folder: (folder / "optimizer.safetensors").unlink(), id="a file gone"),
        pytest.param(lambda folder: (folder / "state.json").write_text('{"step": 500}'), id="changed"),
        pytest.param(lambda folder: (folder / MANIFEST).write_text("{"), id="a broken manifest"),
        pytest.param(lambda folder: (folder / MANIFEST).unlink(), id="no manifest: half-written"),
    ],
)
def test_a_damaged_one_is_passed_over_for_the_one_before(tmp_path: Path, harm: "object") -> None:
    kept = checkpoints(tmp_path)
    kept.save(a_snapshot(3))
    kept.save(a_snapshot(5))
    harm(tmp_path / "store" / KEY / step_name(5))  # type: ignore[operator]
    found = checkpoints(tmp_path).newest()
    assert found is not None
    assert found.counters.step == 3
    assert steps_there(tmp_path) == [step_name(3)]


def test_those_of_other_data_are_not_resumed_from(tmp_path: Path) -> None:
    checkpoints(tmp_path, dataset="d1").save(a_snapshot(3))
    assert checkpoints(tmp_path, dataset="d2").newest() is None


class SlowStore(LocalStore):
    """Storage that is away until ``back`` is set."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.back = threading.Event()

    def upload(self, local_path: Path, key: str) -> None:
        assert self.back.wait(60)
        super().upload(local_path, key)


def test_one_waits_for_storage_and_newer_ones_are_left_out(tmp_path: Path) -> None:
    store = SlowStore(tmp_path / "store")
    kept = checkpoints(tmp_path, store=store)
    assert kept.ready()
    kept.begin(a_snapshot(1))
    assert not kept.ready()
    assert steps_there(tmp_path) == []
    store.back.set()
    kept.wait()
    assert steps_there(tmp_path) == [step_name(1)]
    assert kept.ready()
    kept.begin(a_snapshot(3))
    kept.wait()
    assert kept.last is not None
    assert kept.last.step == 3


class GoneStore(LocalStore):
    def upload(self, local_path: Path, key: str) -> None:
        raise Refusal(FailureCode.STORAGE_UNAVAILABLE, "object storage did not answer for 600 s")


def test_storage_that_stays_away_fails_the_run(tmp_path: Path) -> None:
    kept = checkpoints(tmp_path, store=GoneStore(tmp_path / "store"))
    kept.begin(a_snapshot(1))
    with pytest.raises(Refusal) as caught:
        kept.wait()
    assert caught.value.code is FailureCode.STORAGE_UNAVAILABLE


def test_an_optimizer_goes_on_as_if_nothing_had_happened() -> None:
    def trained(weight: torch.nn.Parameter, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for step in range(steps):
            weight.grad = torch.full_like(weight, 0.1 * (step + 1))
            optimizer.step()

    straight, paused = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2, 2))
    first = torch.optim.AdamW([straight], lr=0.1, fused=True)
    trained(straight, first, 3)
    saved = {name: value.clone() for name, value in optimizers.state_of(first, {"w": straight}).items()}
    paused.data.copy_(straight.data)
    second = torch.optim.AdamW([paused], lr=0.1, fused=True)
    optimizers.restore(second, {"w": paused}, saved)
    trained(straight, first, 2)
    trained(paused, second, 2)
    assert torch.equal(straight, paused)
