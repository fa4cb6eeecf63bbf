"""The built-in engine over encoder-decoders answers what transformers itself answers, with and without adapters."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSeq2SeqLM

from tests.support.models import CONTEXT, Layout, tiny_model
from tunewright_trainer.prepare.template import chat_template, load_tokenizer
from tunewright_trainer.serve.adapters import Adapters
from tunewright_trainer.serve.app import Draining, make_app
from tunewright_trainer.serve.decoding import RELATIVE_CONTEXT
from tunewright_trainer.serve.engine import Engine
from tunewright_trainer.serve.server import load_engine
from tunewright_trainer.storage import LocalStore

QUESTION = [{"role": "user", "content": "What is it?"}]
CHAT = [*QUESTION, {"role": "assistant", "content": "A day"}, {"role": "user", "content": "Which?"}]


@asynccontextmanager
async def serving(folder: Path, work: Path) -> AsyncIterator[tuple[Engine, httpx.AsyncClient]]:
    engine = load_engine(folder, model_id="base")
    adapters = Adapters(engine, LocalStore(work), namespace="team-a", base_uri="", work=work)
    transport = httpx.ASGITransport(make_app(engine, adapters, Draining()))
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
            yield engine, client
    finally:
        engine.close()


async def chat(client: httpx.AsyncClient, messages: list[dict[str, str]], **wanted: Any) -> httpx.Response:
    body = {"model": "base", "messages": messages, "temperature": 0, "max_tokens": 12} | wanted
    return await client.post("/v1/chat/completions", json=body, timeout=60)


def answer(network: Any, tokenizer: Any, ids: list[int]) -> str:
    """What transformers writes."""
    with torch.no_grad():
        made = network.eval().generate(input_ids=torch.tensor([ids]), max_new_tokens=12, do_sample=False)
    return str(tokenizer.decode(made[0], skip_special_tokens=True))


def an_adapter(folder: Path, layout: Layout, *, target: str) -> Path:
    """A LoRA adapter whose weights are random, and large enough to change every answer."""
    torch.manual_seed(1)
    options = LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=target, r=4, lora_alpha=64, init_lora_weights=False)
    get_peft_model(plain(layout), options).save_pretrained(folder)
    return folder


def plain(layout: Layout) -> Any:
    return AutoModelForSeq2SeqLM.from_pretrained(tiny_model(layout), dtype=torch.float32)


LAYOUTS: list[Layout] = ["t5", "bart"]


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_base_and_adapter_answer_as_transformers_does(tmp_path: Path, layout: Layout) -> None:
    folder = tiny_model(layout)
    tokenizer, template = load_tokenizer(folder), chat_template(folder)
    adapter = an_adapter(tmp_path / "adapter", layout, target="all-linear")

    def told(network: Any, messages: list[dict[str, str]]) -> str:
        prompt = tokenizer.apply_chat_template(messages, chat_template=template, add_generation_prompt=True, return_dict=False)
        return answer(network, tokenizer, prompt)

    base, tuned = plain(layout), PeftModel.from_pretrained(plain(layout), adapter)
    async with serving(folder, tmp_path) as (engine, client):
        engine.load("tuned", adapter, version="1", uri="x", template=template)
        for messages in (QUESTION, CHAT):
            for model, network in (("base", base), ("tuned", tuned), ("base", base)):
                found = (await chat(client, messages, model=model)).json()["choices"][0]["message"]["content"]
                assert found == told(network, messages), (model, messages)
        assert told(base, CHAT) != told(tuned, CHAT)
        plainly = (
            await client.post("/v1/completions", json={"model": "base", "prompt": "once", "temperature": 0, "max_tokens": 12})
        ).json()
        assert plainly["choices"][0]["text"] == answer(base, tokenizer, tokenizer("once").input_ids)
        assert plainly["usage"]["prompt_tokens"] == 4


async def test_a_beginning_that_is_forced_is_forced(tmp_path: Path) -> None:
    tokenizer, network = load_tokenizer(tiny_model("bart")), plain("bart")
    network.generation_config.forced_bos_token_id = 5
    network.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    async with serving(tmp_path / "model", tmp_path) as (_, client):
        made = await client.post("/v1/completions", json={"model": "base", "prompt": "once", "temperature": 0, "max_tokens": 11})
    expected = answer(network, tokenizer, tokenizer("once").input_ids)
    assert expected == tokenizer.decode([5]) + made.json()["choices"][0]["text"]


LENGTHS: dict[str, tuple[Layout, Callable[[int], tuple[int, int]], int]] = {
    "prompt and answer each fill the positions": ("bart", lambda context: (context - 2, context), 200),
    "a prompt that is longer": ("bart", lambda context: (context - 1, 1), 400),
    "an answer that is longer": ("bart", lambda context: (1, context + 1), 400),
    "relative positions take more than the tokenizer says": ("t5", lambda _: (CONTEXT, 1), 200),
    "but not any length": ("t5", lambda _: (RELATIVE_CONTEXT, 1), 400),
}


@pytest.mark.parametrize(("layout", "lengths", "status"), LENGTHS.values(), ids=LENGTHS)
async def test_prompt_and_answer_have_a_length_each(
    tmp_path: Path, layout: Layout, lengths: Callable[[int], tuple[int, int]], status: int
) -> None:
    """The prompt also has a token at its beginning and one at its end."""
    prompt, most = lengths(CONTEXT)
    async with serving(tiny_model(layout), tmp_path) as (_, client):
        found = await chat(client, [{"role": "user", "content": "x" * prompt}], max_tokens=most)
    assert found.status_code == status, found.text
