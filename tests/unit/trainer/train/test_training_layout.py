"""Documents that begin alike share their beginning: fewer tokens are computed, and nothing else comes of it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.models import Layout, tiny_model
from tests.support.training import IGNORED, a_job
from tunewright_trainer.train import layout as layouts
from tunewright_trainer.train import loss
from tunewright_trainer.train.attention import Segments
from tunewright_trainer.train.data import MicroBatch, Row, micro_batch
from tunewright_trainer.train.layout import LEAST_SHARED, Document, lay_out
from tunewright_trainer.train.model import load
from tunewright_trainer.train.reward_model import scores

CPU = torch.device("cpu")
TOKENS = st.lists(st.integers(1, 3), max_size=8)


@st.composite
def families(draw: Any) -> list[Document]:
    """Documents of which some begin with what others begin with."""
    beginnings = [[number] * draw(st.integers(0, 3 * LEAST_SHARED)) for number in range(1, 4)]
    made = []
    for _ in range(draw(st.integers(1, 6))):
        ids = [*draw(st.sampled_from(beginnings)), *draw(TOKENS), 1]
        made.append(Document(np.array(ids, dtype=np.int64), draw(st.integers(0, len(ids) - 1))))
    return made


@given(families())
def test_every_document_is_found_where_it_is_said_to_be(made: list[Document]) -> None:
    found = lay_out(made)
    starts = np.cumsum([0, *found.segments.lengths])
    assert starts[-1] == len(found.input_ids) <= sum(len(one.ids) for one in made)
    for document, place in zip(made, found.places, strict=True):
        at = place.of(np.arange(len(document.ids)))
        assert found.input_ids[at].tolist() == document.ids.tolist()
        assert found.positions[at].tolist() == list(range(len(document.ids)))
        # What is shared was not to be learned, and is a segment which the rest of the document continues.
        assert place.shared <= document.prompt
        assert place.shared == 0 or place.shared >= LEAST_SHARED
        segment = int(np.searchsorted(starts, place.start, side="right")) - 1
        trunk = found.segments.continues[segment]
        assert (trunk >= 0) == (place.shared > 0)
        if trunk >= 0:
            assert (starts[trunk], found.segments.lengths[trunk]) == (place.trunk, place.shared)


def test_a_document_joins_where_more_is_saved_with_it() -> None:
    """Two answers to one prompt, and another prompt behind the same system message: the prompt is worth more than the message."""
    system, prompt, other = [1] * 20, [2] * 40, [3] * 40
    made = [
        Document(np.array([*system, *asked, *answer]), 60)
        for asked, answer in ((prompt, [4, 5]), (prompt, [6]), (other, [7]), (other, [8, 9]))
    ]
    assert lay_out(made).segments == Segments([60, 2, 1, 60, 1, 2], [-1, 0, 0, -1, 3, 3])
    behind_one = lay_out([Document(np.array([*system, *asked[:30], 9]), 50) for asked in (prompt, other, [4] * 40)])
    assert behind_one.segments == Segments([20, 31, 31, 31], [-1, 0, 0, 0])


def test_a_beginning_that_is_little_of_its_documents_is_not_shared() -> None:
    """Attention that looks back into it would cost more."""
    made = [Document(np.array([1] * 20 + [end] * 41), 20) for end in (2, 3)]
    assert lay_out(made).segments == Segments([61, 61], [-1, -1])


def answered(rows: int) -> list[Row]:
    """Rows of two answers each to one prompt, as pairs of preferences are; all behind one beginning."""
    rng = np.random.default_rng(3)
    beginning = rng.integers(0, 200, 20)
    made = []
    for _ in range(rows):
        prompt = np.concatenate([beginning, rng.integers(0, 200, 12)])
        answers = [rng.integers(0, 200, length) for length in (5, 9)]
        ids = [np.concatenate([prompt, answer]) for answer in answers]
        labels = [np.concatenate([np.full(len(prompt), IGNORED), answer]) for answer in answers]
        made.append(Row(np.concatenate(ids), np.concatenate(labels), [len(one) for one in ids]))
    return made


def apart(rows: Sequence[Row], monkeypatch: pytest.MonkeyPatch) -> MicroBatch:
    with monkeypatch.context() as patch:
        patch.setattr(layouts, "LEAST_SHARED", 10**6)
        return micro_batch(rows, CPU)


@pytest.mark.parametrize("layout", ["llama", "gpt2", "qwen3", "gemma", "mistral", "phi3"])
def test_loss_and_gradients_are_those_of_documents_one_after_the_other(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = answered(3)
    tuned = load(tiny_model(layout), a_job(tiny_model(layout), method={"tuner": "full"}).spec)
    shared, plain = micro_batch(rows, CPU), apart(rows, monkeypatch)
    assert (shared.tokens, plain.tokens) == (20 + 3 * (2 * 12 + 5 + 9), 3 * (2 * 32 + 5 + 9))
    assert shared.targets.tolist() == plain.targets.tolist()
    found = []
    for batch in (shared, plain):
        tuned.network.zero_grad()
        total = loss.backward(tuned, batch, share_of=len(batch.targets), smoothing=0.0)
        found.append((total, torch.cat([weight.grad.flatten() for weight in tuned.trainable.values() if weight.grad is not None])))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-6, rtol=1e-4)


def test_a_sliding_window_reaches_back_into_the_shared_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = answered(1)
    tuned = load(tiny_model("mistral"), a_job(tiny_model("mistral"), method={"tuner": "full"}).spec)
    tuned.network.config.sliding_window = 6
    for layer in tuned.network.base_model.layers:
        layer.self_attn.sliding_window = 6
    narrow, plain = (loss.evaluate(tuned, batch)[0] for batch in (micro_batch(rows, CPU), apart(rows, monkeypatch)))
    for layer in tuned.network.base_model.layers:
        layer.self_attn.sliding_window = None
    tuned.network.config.sliding_window = None
    assert narrow == pytest.approx(plain, abs=1e-4)
    assert narrow != pytest.approx(loss.evaluate(tuned, micro_batch(rows, CPU))[0], abs=1e-4)


def test_rewards_are_those_of_documents_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = answered(2)
    job = a_job(tiny_model("llama"), method={"objective": "reward"}, dataset={"sources": [{"uri": "/never/read", "format": "preference"}]})
    tuned = load(tiny_model("llama"), job.spec)
    torch.testing.assert_close(scores(tuned.network, micro_batch(rows, CPU)), scores(tuned.network, apart(rows, monkeypatch)))
