"""The memory plan: what it counts beside what training takes, what it decides, and what it says of models that are none."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.memory import a_spec, estimated, peak_of_a_pass, save_model
from tests.support.models import tiny_model
from tests.support.training import a_job
from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.status import MemoryStatus
from tunewright_trainer.plan import plan, refuse, table
from tunewright_trainer.plan.shapes import Weight, read_shapes
from tunewright_trainer.storage import LocalStore, Place

GIB = 2**30
TOKENS = 512
LEARNED = 0.5


@pytest.mark.parametrize(
    ("layout", "parts"),
    [
        ("llama", {"method": {"tuner": "full"}}),
        ("llama", {"hyperparameters": {"precision": "bf16", "gradientCheckpointing": True}}),
        ("gpt2", {"method": {"lora": {"dropout": 0.1}}}),
        ("llama", {"method": {"tuner": "qlora"}}),
    ],
)
def test_a_step_takes_what_was_counted(layout: str, parts: dict[str, Any], tmp_path: Path) -> None:
    save_model(tmp_path / "model", layout, width=128, layers=3, inner=512, vocabulary=2000, heads=4, key_heads=2)
    spec = a_spec(tmp_path / "model", **parts)
    counted = estimated(tmp_path / "model", spec, tokens=TOKENS, learned=LEARNED).parts
    taken = peak_of_a_pass(tmp_path / "model", spec, tokens=TOKENS, learned=LEARNED)
    assert counted["activations"] + counted["logits"] == pytest.approx(taken, rel=0.15)


# Llama 3.1 8B, from its published config.json and shapes.
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
LAYER = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
WEIGHTS = [
    *(Weight(f"model.layers.{n}.{name}.weight", "BF16", shape) for n in range(32) for name, shape in LAYER.items()),
    *(Weight(name, "BF16", (128256, 4096)) for name in ("model.embed_tokens.weight", "lm_head.weight")),
]
ROWS = {"splits": {"train": {"tokens": 1000, "trainable_tokens": 300, "longest_row": 2048, "most_learned": 700}}}


def a_plan(*, gpu: int = 0, model: dict[str, Any] = LLAMA, rows: dict[str, Any] = ROWS, **parts: Any) -> MemoryStatus:
    resources = {"gpusPerNode": 1, "memory": "64Gi"} | parts.pop("resources", {})
    config = a_job("/model", resources=resources, **parts).model_copy(update={"gpu_memory": gpu * GIB})
    return plan(config, WEIGHTS, model, rows)


CHECKPOINTING = {"hyperparameters": {"gradientCheckpointing": True}}


@pytest.mark.parametrize(
    ("asked", "fits", "halvings", "advice"),
    [
        pytest.param({"gpu": 141}, "yes", 0, "", id="the whole automatic micro-batch"),
        pytest.param({"gpu": 80}, "yes", 1, "", id="half of it"),
        pytest.param({"gpu": 48}, "tight", 1, "method.tuner: qlora", id="near the limit"),
        pytest.param({"gpu": 24}, "no", 1, "hyperparameters.gradientCheckpointing: true", id="the smallest does not fit"),
        pytest.param({"gpu": 24} | CHECKPOINTING, "yes", 1, "", id="with that advice taken"),
        pytest.param({"gpu": 0}, "unknown", 0, "is not known", id="nobody knows the GPU"),
        pytest.param({"gpu": 80, "method": {"tuner": "full"}}, "no", 1, "method.tuner: lora", id="the whole model"),
        pytest.param({"gpu": 80, "hyperparameters": {"microBatchSize": 4}}, "no", 0, "microBatchSize: 1", id="a size of the owner's own"),
        pytest.param({"resources": {"gpusPerNode": 0}}, "no", 1, "resources.memory: 107Gi", id="processors, in fp32"),
        pytest.param({"gpu": 80, "model": {"model_type": "t5"}}, "unknown", 0, "no memory plan for model_type t5", id="another family"),
        pytest.param({"gpu": 80, "rows": {}}, "unknown", 0, "does not say how long", id="data of old"),
    ],
)
def test_what_is_decided(asked: dict[str, Any], fits: str, halvings: int, advice: str) -> None:
    found = a_plan(**asked)
    assert (found.fits, found.micro_batch_halvings, advice in found.advice) == (fits, halvings, True), table(found)
    assert sum(part.bytes for part in found.parts) == found.bytes


def test_a_job_that_does_not_fit_is_refused_with_its_parts_and_what_would_help() -> None:
    config = a_job("/model", resources={"gpusPerNode": 1})
    status = a_plan(gpu=24)
    with pytest.raises(Refusal) as caught:
        refuse(status, config.spec)
    assert (caught.value.code, caught.value.param) == (FailureCode.MEMORY_TOO_SMALL, "spec.resources.gpusPerNode")
    assert all(text in caught.value.message for text in ("weights 15.0 GiB", "the GPU has 24.0 GiB", "gradientCheckpointing: true"))
    refuse(status, a_job("/model", resources={"gpusPerNode": 1, "ignoreMemoryPlan": True}).spec)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def pickled(path: Path) -> None:
    path.write_bytes(b"\x80\x04\x95" + b"x" * 1000)


def renamed(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"F16"', 1))


@pytest.mark.parametrize(
    ("damage", "told"),
    [(cut, "bytes of weights, and its header names"), (pickled, "its header is missing or cut off"), (renamed, "does not fit its shape")],
)
def test_weights_that_are_none_are_named(damage: Callable[[Path], None], told: str, tmp_path: Path) -> None:
    path = tmp_path / "model" / "model.safetensors"
    path.parent.mkdir()
    path.write_bytes((tiny_model("llama") / "model.safetensors").read_bytes())
    place = Place(LocalStore(tmp_path), "model")
    assert len(read_shapes(place)) == 21
    damage(path)
    with pytest.raises(Refusal, match=told) as caught:
        read_shapes(place)
    assert caught.value.code is FailureCode.MODEL_NOT_FOUND
    assert str(path) in caught.value.message


def test_the_verb_tells_the_plan_of_a_manifest(tmp_path: Path) -> None:
    spec = {"model": {"uri": str(tiny_model("llama"))}, "dataset": {"sources": [{"uri": "/never/read"}]}, "resources": {"memory": "512Mi"}}
    document = {"apiVersion": "tunewright.dev/v1alpha1", "kind": "InstructionTuningJob", "metadata": {"name": "a"}, "spec": spec}
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(document))))
    found = subprocess.run(
        [sys.executable, "-m", "tunewright_trainer", "plan", str(path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert found.returncode == 64
    assert "fits: no" in found.stdout
    assert "libraries" in found.stdout
