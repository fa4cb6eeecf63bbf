"""The built-in engine over real storage, asked by OpenAI's own client: a base model, adapters that come and go, answers that stream."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from safetensors.torch import load_file, save_file

from tests.support.engine import EngineProcess
from tests.support.models import CONTEXT, tiny_model
from tests.support.s3 import REGION, S3Server
from tests.support.training import IGNORED, NAMESPACE, a_job, publish_data, train_here
from tunewright_crds.names import ENGINE_BASE_ID
from tunewright_crds.pod import StorageSettings
from tunewright_trainer.prepare.template import chat_template, load_tokenizer, render_prompt_ids, tokenize
from tunewright_trainer.storage import S3Store, fetch_folder, publish_folder

BUCKET = "platform"
BASE = f"s3://{BUCKET}/base/"
ANSWERS = {"v1": "a" * 24, "v2": "b" * 24}  # a model as tiny as this one learns no more than a letter
QUESTION: list[Any] = [{"role": "user", "content": "What is it?"}]


@dataclass
class Setting:
    """The engine, its storage, and the addresses of two versions of an adapter."""

    engine: EngineProcess
    store: S3Store
    versions: dict[str, str]

    def load(self, name: str = "tuned", version: str = "v1", path: str = "") -> tuple[int, dict[str, Any]]:
        return self.engine.post(
            "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path or self.versions[version], "version": version}
        )

    def unload(self, name: str = "tuned") -> int:
        return self.engine.post("/v1/unload_lora_adapter", {"lora_name": name})[0]

    def answer(self, model: str, **options: Any) -> str:
        made = self.engine.client().chat.completions.create(
            **{"model": model, "messages": QUESTION, "temperature": 0, "max_tokens": 24, **options}
        )
        return str(made.choices[0].message.content)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    work = tmp_path_factory.mktemp("engine")
    with S3Server(work) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.keys.items():
            patch.setenv(name, value)
        server.client().create_bucket(Bucket=BUCKET)
        store = S3Store(BUCKET, endpoint=server.endpoint, region=REGION, keys=server.keys)
        for file in tiny_model("llama", chat_template=True).iterdir():
            store.upload(file, f"base/{file.name}")
        versions = {version: _tuned(store, server, work, version) for version in ("v1", "v2")}
        with EngineProcess(base=BASE, namespace=NAMESPACE, server=server, bucket=BUCKET, work=work) as engine:
            yield Setting(engine, store, versions)


def _tuned(store: S3Store, server: S3Server, work: Path, version: str) -> str:
    """Address of an adapter that is trained and published as in a pod: it answers with one letter."""
    model = tiny_model("llama", chat_template=True)
    tokenizer = load_tokenizer(model)
    prompt = render_prompt_ids(tokenizer, QUESTION, chat_template(model))
    answer = tokenize(tokenizer, [ANSWERS[version]])[0]
    publish_data(store, work, train=[[(prompt + answer, [IGNORED] * len(prompt) + answer)]] * 4)
    settings = StorageSettings(bucket=BUCKET, endpoint=server.endpoint, region=REGION)
    wanted = {"maxSteps": 30, "batchSize": 1, "learningRate": 0.02, "warmupRatio": 0}
    job = a_job(BASE, storage=settings, hyperparameters=wanted)
    job = job.model_copy(update={"version": version, "job": job.job.model_copy(update={"uid": f"uid-{version}"})})
    artifact = train_here(job, store, work).artifact
    assert artifact is not None
    return artifact.uri


def test_an_adapter_is_loaded_beside_its_base_and_both_answer(setting: Setting) -> None:
    assert setting.load()[0] == 200
    assert setting.load()[0] == 200  # again: nothing to do
    models = {model.id: model.model_dump() for model in setting.engine.client().models.list()}
    assert set(models) == {ENGINE_BASE_ID, "tuned"}
    assert (models["tuned"]["version"], models["tuned"]["parent"]) == ("v1", ENGINE_BASE_ID)
    base = setting.answer(ENGINE_BASE_ID)
    assert base
    assert setting.answer("tuned") == ANSWERS["v1"]
    assert setting.answer(ENGINE_BASE_ID) == base
    assert "tunewright_engine_adapters 1.0" in setting.engine.metrics()


def test_a_stream_is_the_answer_in_pieces(setting: Setting) -> None:
    setting.load()
    client = setting.engine.client()
    whole = client.chat.completions.create(model="tuned", messages=QUESTION, max_tokens=24, temperature=0)
    chunks = list(
        client.chat.completions.create(
            model="tuned", messages=QUESTION, max_tokens=24, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason] == [
        whole.choices[0].finish_reason
    ]
    assert chunks[-1].usage == whole.usage
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert whole.usage.completion_tokens <= 24
    # Bytes are tokens here, so the prompt's can be counted: the template's words, and a marker before and after each turn.
    assert whole.usage.prompt_tokens == len("user\nWhat is it?\n") + len("assistant\n") + 3


def test_sampling_is_repeated_by_its_seed_and_ended_by_its_stops(setting: Setting) -> None:
    one, two = (setting.answer(ENGINE_BASE_ID, temperature=1, seed=5) for _ in range(2))
    assert one == two
    assert setting.answer(ENGINE_BASE_ID, temperature=1, seed=6) != one
    stop = one[4:6]
    made = setting.engine.client().chat.completions.create(
        model=ENGINE_BASE_ID, messages=QUESTION, max_tokens=24, temperature=1, seed=5, stop=[stop]
    )
    assert made.choices[0].finish_reason == "stop"
    assert made.choices[0].message.content == one[: one.index(stop)]


def test_plain_completions(setting: Setting) -> None:
    made = setting.engine.client().completions.create(model=ENGINE_BASE_ID, prompt="once", max_tokens=8, temperature=0)
    assert made.usage is not None
    assert (made.usage.prompt_tokens, made.choices[0].finish_reason in ("stop", "length")) == (4, True)
    pieces = setting.engine.client().completions.create(model=ENGINE_BASE_ID, prompt="once", max_tokens=8, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == made.choices[0].text


BAD: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "a field that is not supported": ({"tools": []}, 400, "tools", "unsupported_parameter"),
    "more than one answer": ({"n": 2}, 400, "n", "invalid_value"),
    "a penalty": ({"presence_penalty": 1}, 400, "presence_penalty", "invalid_value"),
    "a temperature out of bounds": ({"temperature": 3}, 400, "temperature", "invalid_value"),
    "no messages": ({"messages": []}, 400, "messages", "invalid_value"),
    "a role that nobody knows": ({"messages": [{"role": "robot", "content": "a"}]}, 400, "messages.0.role", "invalid_value"),
    "a model that is not there": ({"model": "other"}, 404, "model", "model_not_found"),
    "more tokens than the context has": ({"max_tokens": CONTEXT}, 400, "messages", "context_length_exceeded"),
    "a prompt longer than the context": (
        {"messages": [{"role": "user", "content": "x" * CONTEXT}]},
        400,
        "messages",
        "context_length_exceeded",
    ),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}]},
        400,
        "messages.0.content.0.type",
        "invalid_value",
    ),
}


@pytest.mark.parametrize(("fields", "status", "param", "code"), BAD.values(), ids=BAD)
def test_what_cannot_be_done_is_refused_by_name(setting: Setting, fields: dict[str, Any], status: int, param: str, code: str) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        setting.answer(**({"model": ENGINE_BASE_ID} | fields))
    assert (caught.value.status_code, caught.value.param, caught.value.code) == (status, param, code), caught.value.message


def test_a_new_version_takes_the_place_of_the_old_one(setting: Setting) -> None:
    setting.load(version="v1")
    running = setting.engine.client().chat.completions.create(model="tuned", messages=QUESTION, max_tokens=24, temperature=0, stream=True)
    text = next(running).choices[0].delta.content or ""
    assert setting.load(version="v2")[0] == 200
    text += "".join(chunk.choices[0].delta.content or "" for chunk in running)
    assert text == ANSWERS["v1"]  # what ran on the old version ended on it
    assert setting.answer("tuned") == ANSWERS["v2"]
    (entry,) = [model for model in setting.engine.client().models.list() if model.id == "tuned"]
    assert entry.model_dump()["version"] == "v2"
    assert setting.load(version="v1")[0] == 200
    assert setting.answer("tuned") == ANSWERS["v1"]


def test_an_adapter_that_is_unloaded_is_gone(setting: Setting) -> None:
    setting.load(name="short-lived")
    assert setting.unload("short-lived") == 200
    assert setting.unload("short-lived") == 404
    with pytest.raises(openai.NotFoundError):
        setting.answer("short-lived")


def test_only_whole_adapters_of_this_namespace_and_base_are_loaded(setting: Setting, tmp_path: Path) -> None:
    setting.load()
    before = setting.answer(ENGINE_BASE_ID), setting.answer("tuned")
    root = f"s3://{BUCKET}/{NAMESPACE}/models"
    for path, status in (
        (f"s3://{BUCKET}/team-b/models/tuned/v1/adapter", 400),
        (f"s3://elsewhere/{NAMESPACE}/models/tuned/v1/adapter", 400),
        (f"{root}/../../team-b/models/tuned/v1/adapter", 400),
        (f"{root}/nothing/v1/adapter", 404),
    ):
        assert setting.load(name="other", path=path)[0] == status, path
    key = setting.versions["v1"].removeprefix(f"s3://{BUCKET}/")
    manifest = fetch_folder(setting.store, key, tmp_path / "adapter")
    assert manifest is not None
    lineage = {name: value for name, value in manifest.items() if name != "files"}
    shutil.copytree(tmp_path / "adapter", tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / "adapter_model.safetensors")
    save_file({name: weight[:, :3].contiguous() for name, weight in weights.items()}, tmp_path / "broken" / "adapter_model.safetensors")
    publish_folder(setting.store, tmp_path / "broken", f"{NAMESPACE}/models/broken/v1/adapter", manifest=lineage)
    publish_folder(setting.store, tmp_path / "adapter", f"{NAMESPACE}/models/alien/v1/adapter", manifest=lineage | {"base": "s3://x/y"})
    for name, said in (("broken", "cannot be loaded"), ("alien", "belongs over s3://x/y")):
        status, body = setting.load(name=name, path=f"{root}/{name}/v1/adapter")
        assert (status, said in body["error"]["message"]) == (400, True), body
    assert (setting.answer(ENGINE_BASE_ID), setting.answer("tuned")) == before


def test_stop_finishes_the_answers_that_run_and_takes_no_more(setting: Setting) -> None:
    """Also: health answers while a long answer is being made."""
    engine = setting.engine
    client = engine.client()
    running = client.completions.create(model=ENGINE_BASE_ID, prompt="once", max_tokens=400, temperature=0, stream=True)
    first = next(running)
    assert engine.health() == 200
    engine.ask_to_stop()
    while engine.health() == 200:
        pass
    with pytest.raises((openai.InternalServerError, openai.APIConnectionError)):
        setting.answer(ENGINE_BASE_ID)
    rest = list(running)
    assert rest[-1].choices[0].finish_reason in ("stop", "length")
    text = first.choices[0].text + "".join(piece.choices[0].text for piece in rest)
    assert text
    assert engine.exit_code() == 0
