"""The engine beside PEFT itself: whatever kind of adapter was published, both give the same tokens."""

import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import tiny_model
from tests.support.training import a_job, documents, packed, publish_data, train_here
from tunewright_crds.tuned_model import Servability
from tunewright_trainer.prepare.template import load_tokenizer
from tunewright_trainer.serve.engine import Engine, Piece, Request, Served
from tunewright_trainer.serve.protocol import Options
from tunewright_trainer.storage import LocalStore

PROMPT = [5, 17, 40, 3]
TOKENS = 6
OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {},
    "loha": {},
    "ia3": {},
    "lily": {},
    "prefix": {"num_virtual_tokens": 4},
    "prompt": {"num_virtual_tokens": 4},
}
SERVABILITY = {
    "lora": Servability.VLLM_LORA,
    "dora": Servability.MERGE,
    "loha": Servability.CONVERT,
    "ia3": Servability.MERGE,
    "lily": Servability.TRANSFORMERS,
    "prefix": Servability.TRANSFORMERS,
    "prompt": Servability.TRANSFORMERS,
}


def published(work: Path, tuner: str, **parts: Any) -> Any:
    """A few wild steps: an adapter that changes answers."""
    store = LocalStore(work / "store")
    publish_data(store, work, train=packed(documents(4), 1))
    numbers = {"maxSteps": 4, "batchSize": 1, "learningRate": 0.3, "scheduler": "constant"}
    artifact = train_here(a_job(method={"tuner": tuner, "options": OPTIONS[tuner]}, hyperparameters=numbers, **parts), store, work).artifact
    assert artifact is not None
    return artifact


@pytest.fixture
def engine() -> Iterator[Engine]:
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    made = Engine(network, load_tokenizer(tiny_model("llama")), Served(id="base", template=""))
    yield made
    made.close()


def answered(engine: Engine, model: str) -> str:
    pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
    options = Options(temperature=0, top_p=1.0, max_tokens=TOKENS, seed=None, stops=())
    engine.submit(Request(engine.find(model), PROMPT, options, frozenset(), pieces.put))
    text = ""
    while not (piece := pieces.get(timeout=60)).last:
        text += piece.text
    if piece.error is not None:
        raise piece.error
    return text + piece.text


def expected(adapter: str | None) -> str:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    if adapter is not None:
        network = PeftModel.from_pretrained(network, adapter)
    network.eval()
    ids = list(PROMPT)
    with torch.no_grad():
        for _ in range(TOKENS):
            ids.append(int(network(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return str(load_tokenizer(tiny_model("llama")).decode(ids[len(PROMPT) :], skip_special_tokens=True))


def test_every_kind_of_adapter_answers_as_in_peft_itself(engine: Engine, tmp_path: Path) -> None:
    uris = {}
    for tuner in OPTIONS:
        artifact = published(tmp_path / tuner, tuner)
        uris[tuner] = artifact.uri
        assert artifact.forms[0].servability == SERVABILITY[tuner]
        engine.load(tuner, Path(artifact.uri), version="1", uri=artifact.uri, template="")
    for tuner, uri in uris.items():
        assert answered(engine, tuner) == expected(uri), tuner
    assert answered(engine, "base") == expected(None), "adapters leave their base as it is"
    engine.unload("prefix")
    engine.unload("lora")
    engine.load("again", Path(uris["lora"]), version="1", uri=uris["lora"], template="")
    assert answered(engine, "again") == expected(uris["lora"])
    assert answered(engine, "loha") == expected(uris["loha"])


def test_an_adapter_can_be_published_as_lora_too(tmp_path: Path) -> None:
    artifact = published(tmp_path, "loha", output={"formats": ["adapter", "lora"]})
    assert [form.servability for form in artifact.forms] == [Servability.VLLM_LORA, Servability.CONVERT]
    assert artifact.uri == artifact.forms[0].uri
    assert expected(artifact.uri) == expected(artifact.forms[1].uri)
