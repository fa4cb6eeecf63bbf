"""The typed job: what is refused, by which name, and what is filled in."""

import re
from contextlib import nullcontext
from typing import Any

import pytest
from pydantic import ValidationError

from tunewright_crds.hyperparameters import Precision
from tunewright_crds.job import InstructionTuningJob, JobSpec, read_spec
from tunewright_crds.method import Tuner
from tunewright_crds.references import references, with_addresses
from tunewright_crds.tuned_model import Artifact, Base, TunedModelSpec

SMALLEST = {"model": {"uri": "s3://b-1/models/x/"}, "dataset": {"sources": [{"uri": "s3://b-1/rows.jsonl"}]}}


def spec_with(path: str, value: object) -> dict[str, object]:
    """``SMALLEST`` with one field set: ``dataset.sources.0.uri``."""
    root: dict[str, object] = {"model": dict(SMALLEST["model"]), "dataset": {"sources": [{"uri": "s3://b-1/rows.jsonl"}]}}
    *parents, last = path.split(".")
    node: object = root
    for parent in parents:
        node = node[int(parent)] if isinstance(node, list) else node.setdefault(parent, {})  # type: ignore[attr-defined]
    node[last] = value  # type: ignore[index]
    return root


REFUSED = {
    "an unknown field at the top": ("modle", {}, "modle"),
    "an unknown field deep inside": ("method.lora.rnak", 8, "method.lora.rnak"),
    "a negative learning rate": ("hyperparameters.learningRate", -1, "hyperparameters.learningRate"),
    "a learning rate in words other than auto": ("hyperparameters.learningRate", "high", "hyperparameters.learningRate"),
    "no epochs": ("hyperparameters.epochs", 0, "hyperparameters.epochs"),
    "a micro-batch that does not divide the batch": ("hyperparameters.microBatchSize", 5, "hyperparameters"),
    "an address of another kind": ("model.uri", "ftp://x/y", "model.uri"),
    "a path of the machine": ("model.uri", "/models/x", "model.uri"),
    "a source without a bucket": ("dataset.sources.0.uri", "s3:///x", "dataset.sources.0.uri"),
    "a model of the hub without a revision": ("model.uri", "hf://org/name", "model.uri"),
    "data of the hub as a model": ("model.uri", "hf://datasets/org/name@main", "model.uri"),
    "a model of the hub as data": ("dataset.sources.0.uri", "hf://org/name@main/rows.jsonl", "dataset.sources.0.uri"),
    "data of the hub with the revision after the path": (
        "dataset.sources.0.uri",
        "hf://datasets/org/name/rows@main",
        "dataset.sources.0.uri",
    ),
    "a data set of the hub without an owner": ("dataset.sources.0.uri", "hf://datasets/name@main", "dataset.sources.0.uri"),
    "neither sources nor ref": ("dataset.sources", [], "dataset.sources"),
    "sources beside ref": ("dataset.ref", "support-v1", "dataset"),
    "a ref that is no name": ("dataset", {"ref": "Support V1"}, "dataset.ref"),
    "options beside ref": ("dataset", {"ref": "support-v1", "cleaning": {"nearDuplicates": {"threshold": 0.9}}}, "dataset"),
    "no train source": ("dataset.sources.0.split", "test", "dataset"),
    "everything held out": ("dataset.validationFraction", 1.0, "dataset.validationFraction"),
    "fractions that leave nothing": ("dataset.testFraction", 0.96, "dataset"),
    "rank zero": ("method.lora.rank", 0, "method.lora.rank"),
    "an objective that is not built": ("method.objective", "orpo", "method.objective"),
    "dpo's options with another objective": ("method.dpo", {"beta": 0.2}, "method"),
    "dpo that is told the wrong thing for sure": (
        "method",
        {"objective": "dpo", "dpo": {"labelSmoothing": 0.6}},
        "method.dpo.labelSmoothing",
    ),
    "options of galore with another optimizer": ("hyperparameters.galore", {"rank": 8}, "hyperparameters"),
    "a split batch for lomo": ("hyperparameters", {"optimizer": "lomo", "batchSize": 8, "microBatchSize": 4}, "hyperparameters"),
    "options of lora with another tuner": ("method", {"tuner": "ia3", "lora": {"rank": 8}}, "method"),
    "options of a tuner that has none": ("method", {"tuner": "bitfit", "options": {"r": 8}}, "method"),
    "too many options": ("method.options", {f"o{index}": 1 for index in range(33)}, "method.options"),
    "a reward model over 4 bits": ("method", {"objective": "reward", "tuner": "qlora"}, "method"),
    "options of a reward model with another objective": ("method.reward", {"centerRewardsCoefficient": 0.1}, "method"),
    "options of kto with another objective": ("method.kto", {"beta": 0.2}, "method"),
    "unpaired answers with another objective": ("dataset.sources.0.format", "unpaired", ""),
    "preferences with another objective": ("dataset.sources.0.format", "preference", ""),
    "more nodes than there may be": ("resources.nodes", 65, "resources.nodes"),
    "more GPUs than a node has": ("resources.gpusPerNode", 17, "resources.gpusPerNode"),
    "a quantity that is none": ("resources.memory", "lots", "resources.memory"),
    "a tracker without its server": ("tracking.mlflow", {"experiment": "a"}, "tracking.mlflow"),
    "a tracker at no address": ("tracking.mlflow.uri", "mlflow.example", "tracking.mlflow.uri"),
    "a tracker without a project": ("tracking.wandb", {"entity": "team"}, "tracking.wandb"),
    "a copy on the hub to nowhere": ("output.hub", {"private": False}, "output.hub"),
    "a repository without its owner": ("output.hub.repository", "helper", "output.hub.repository"),
    "a model name that Kubernetes would refuse": ("output.modelName", "Big Model", "output.modelName"),
}


@pytest.mark.parametrize(("path", "value", "blamed"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_refused_by_name(path: str, value: object, blamed: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        read_spec(spec_with(path, value))
    assert blamed in {".".join(str(part) for part in error["loc"]) for error in refusal.value.errors()}


def test_results_go_where_the_job_says() -> None:
    tracking = {"mlflow": {"uri": "https://mlflow.example/base"}, "wandb": {"project": "p", "baseUrl": "http://wandb:8080"}}
    spec = read_spec(SMALLEST | {"tracking": tracking, "output": {"hub": {"repository": "team/helper", "private": False}}})
    assert (spec.tracking.mlflow.uri, spec.tracking.wandb.project, spec.output.hub.repository) == (
        "https://mlflow.example/base",
        "p",
        "team/helper",
    )
    assert not spec.output.hub.private


DPO_REFUSED = {
    "an InstructionDataset": ("dataset", {"ref": "support-v1"}, "InstructionDataset holds conversations"),
    "a template": ("dataset.sources.0.template", "{{a}} ||| {{b}}", "every source holds preferences"),
    "another format": ("dataset.sources.0.format", "alpaca", "every source holds preferences"),
    "prompts that are learned": ("dataset.trainOn", "all", "only answers count"),
    "smoothing of tokens": ("hyperparameters.labelSmoothing", 0.1, "method.dpo.labelSmoothing"),
}


@pytest.mark.parametrize(("path", "value", "said"), DPO_REFUSED.values(), ids=DPO_REFUSED)
def test_what_preferences_cannot_do_is_refused(path: str, value: object, said: str) -> None:
    spec = spec_with(path, value)
    for objective in ("dpo", "reward", "kto"):
        with pytest.raises(ValidationError, match="unpaired answers" if objective == "kto" and "preferences" in said else said):
            read_spec(spec | {"method": {"objective": objective}})
    read_spec(spec)


def test_kto_compares_the_answers_of_a_batch() -> None:
    alone = SMALLEST | {"hyperparameters": {"batchSize": 1}}
    with pytest.raises(ValidationError, match="compares each answer with the others of its batch"):
        read_spec(alone | {"method": {"objective": "kto"}})
    read_spec(alone | {"method": {"objective": "kto", "kto": {"loss": "apo_zero_unpaired"}}})


DPO_WITHOUT_EFFECT = {
    "losses beside loss": {"loss": "ipo", "losses": [{"type": "sft"}]},
    "smoothing of a loss that has none": {"loss": "ipo", "labelSmoothing": 0.1},
    "exo_pair without smoothing": {"losses": [{"type": "sft"}, {"type": "exo_pair"}]},
    "robust against chance": {"loss": "robust", "labelSmoothing": 0.5},
    "tails of no comparison": {"loss": "sft", "ldAlpha": 0.5},
    "a divergence of sums": {"losses": [{"type": "sigmoid"}, {"type": "aot"}], "fDivergence": "forward_kl"},
    "alpha of another divergence": {"fAlphaDivergenceCoef": 0.7},
    "temperature of another loss": {"discopopTau": 0.5},
}


@pytest.mark.parametrize("options", DPO_WITHOUT_EFFECT.values(), ids=DPO_WITHOUT_EFFECT)
def test_options_of_dpo_have_an_effect(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=r"dpo\.|exo_pair|robust") as caught:
        read_spec(SMALLEST | {"method": {"objective": "dpo", "dpo": options}})
    assert {error["loc"] for error in caught.value.errors()} == {("method", "dpo")}


UNFIT_VALUES = {
    "a prefix that is thrown away": ("prefix", "prompt", {"hyperparameters": {"gradientCheckpointing": True}}, "leave it out"),
    "an optimizer for all weights": ("lora", "full", {"hyperparameters": {"optimizer": "galore"}}, "is for tuner full"),
    "an adapter that cannot be converted": ("dora", "loha", {"output": {"formats": ["lora"]}}, "or cannot be converted"),
    "an adapter that cannot be merged": ("lily", "lora", {"output": {"formats": ["adapter", "merged"]}}, "cannot be merged"),
    "an adapter of which there is no whole": ("lily", "lora", {"output": {"formats": ["adapter", "gguf"]}}, "cannot be merged"),
}


@pytest.mark.parametrize(("tuner", "other", "parts", "said"), UNFIT_VALUES.values(), ids=UNFIT_VALUES)
def test_tuners_and_fields_that_do_not_go_together_are_refused(tuner: str, other: str, parts: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        read_spec({**SMALLEST, "method": {"tuner": tuner}, **parts})
    read_spec({**SMALLEST, "method": {"tuner": other}, **parts})


def test_a_reward_model_is_not_served() -> None:
    spec = spec_with("deploy.enabled", True)
    read_spec(spec)
    with pytest.raises(ValidationError, match="judges answers and gives none"):
        read_spec(spec | {"method": {"objective": "reward"}})
    artifact, base = {"uri": "s3://b/a"}, {"uri": "s3://b/x/"}
    for kind, enabled, fits in (("reward", False, True), ("full", True, True), ("reward", True, False)):
        model = {"base": base, "artifact": artifact, "version": "1", "kind": kind, "serving": {"enabled": enabled}}
        with nullcontext() if fits else pytest.raises(ValidationError, match="cannot be served"):
            TunedModelSpec.model_validate(model)


SEQ2SEQ_REFUSED = {
    "preferences": ("method.objective", "dpo", "is tuned by objective sft only"),
    "prompts that are learned": ("dataset.trainOn", "all", "learns answers only"),
    "virtual tokens": ("method.tuner", "prefix", "is not tuned by"),
    "a form for other programs": ("output.formats", ["adapter", "onnx"], "is published as adapter or merged"),
    "another form for other programs": ("output.formats", ["gguf"], "is published as adapter or merged"),
    "examples that are shown": ("evaluation.fewShot", [0, 2], "is measured without examples"),
}


@pytest.mark.parametrize(("path", "value", "said"), SEQ2SEQ_REFUSED.values(), ids=SEQ2SEQ_REFUSED)
def test_what_an_encoder_decoder_cannot_do_is_refused_where_the_job_says_that_it_is_one(path: str, value: object, said: str) -> None:
    spec = spec_with(path, value)
    read_spec(spec)
    with pytest.raises(ValidationError, match=said):
        read_spec(spec | {"model": {"uri": "s3://b-1/models/x/", "architecture": "seq2seq"}})
    read_spec(spec_with("model.architecture", "seq2seq"))


@pytest.mark.parametrize("optimizer", ["galore", "lomo", "adalomo"])
def test_an_encoder_decoder_is_not_trained_with_optimizers_that_were_not_tried_with_one(optimizer: str) -> None:
    spec = spec_with("hyperparameters", {"optimizer": optimizer}) | {"method": {"tuner": "full"}}
    read_spec(spec)
    with pytest.raises(ValidationError, match="is not trained with optimizer"):
        read_spec(spec | {"model": {"uri": "s3://b-1/models/x/", "architecture": "seq2seq"}})


HINT_REFUSED = {
    "a decoder alone": ("model.architecture", "causal", "is for encoder-decoders"),
    "preferences": ("method.objective", "dpo", "is for objective sft"),
    "a merged model": ("output.formats", ["adapter", "merged"], "cannot be merged"),
    "serving": ("deploy.enabled", True, "is not served yet"),
    "measuring": ("evaluation.enabled", True, "is not measured yet"),
    "options of PEFT": ("method.options", {"r": 8}, "no options of PEFT"),
    "data of an InstructionDataset": ("dataset", {"ref": "support-v1"}, "tell instruction and input apart"),
    "a template": ("dataset.sources.0.template", "{{a}} ||| {{b}}", "tell instruction and input apart"),
    "conversations": ("dataset.sources.0.format", "chat", "tell instruction and input apart"),
}


@pytest.mark.parametrize(("path", "value", "said"), HINT_REFUSED.values(), ids=HINT_REFUSED)
def test_what_a_hypernetwork_cannot_do_is_refused(path: str, value: object, said: str) -> None:
    spec = spec_with(path, value)
    with pytest.raises(ValidationError, match=said):
        read_spec({"evaluation": {"enabled": False}, **spec, "method": {**spec.get("method", {}), "tuner": "hint"}})  # type: ignore[dict-item]
    read_spec(
        spec_with("dataset.sources.0.format", "natural-instructions") | {"method": {"tuner": "hint"}, "evaluation": {"enabled": False}}
    )


def test_options_of_the_hypernetwork_are_for_its_tuner() -> None:
    with pytest.raises(ValidationError, match="hint holds options of tuner hint"):
        read_spec(spec_with("method.hint", {"prefixTokens": 8}))


def test_forms_for_other_programs_stand_beside_a_model_that_answers() -> None:
    spec = spec_with("output.formats", ["onnx", "gguf"])
    read_spec(spec)
    with pytest.raises(ValidationError, match="models that answer"):
        read_spec(spec | {"method": {"objective": "reward"}})
    forms = [{"kind": kind, "uri": "s3://b/a"} for kind in ("adapter", "gguf")]
    model = {"base": {"uri": "s3://b/x/"}, "artifact": {"uri": "s3://b/a"}, "version": "1", "kind": "adapter", "forms": forms}
    TunedModelSpec.model_validate(model)
    with pytest.raises(ValidationError, match="forms beside another"):
        TunedModelSpec.model_validate(model | {"kind": "gguf"})


REWARD_REFUSED: dict[str, tuple[str, object, str]] = {
    "nothing that is rewarded": ("method.rewards", [], "learns from rewards needs some"),
    "an InstructionDataset": ("dataset", {"ref": "support-v1"}, "InstructionDataset holds conversations"),
    "plain texts": ("dataset.sources.0.format", "text", "format text has none"),
    "prompts that are learned": ("dataset.trainOn", "all", "only answers count"),
    "options of another one": ("method.rloo", {"beta": 0.2}, "rloo holds options of objective rloo"),
    "more mini-batches than prompts": ("method", {"objective": "ppo", "ppo": {"miniBatches": 17}}, "miniBatches is above batchSize"),
    "a reward model that may change": ("method", {"rewardModel": "hf://org/judge"}, "pin a commit"),
    "a reward model of an odd name": ("method", {"rewardModel": "model://Judge"}, "model://"),
    "a reward model on a volume": ("method", {"rewardModel": "pvc://claim/judge"}, "a reward model is s3"),
    "one answer to compare with none": ("method.grpo.generations", 1, "greater than or equal to 2"),
    "a pattern that is none": ("method.rewards.0", {"type": "regex", "pattern": "(a"}, "no regular expression"),
    "a pattern for another type": ("method.rewards.0", {"type": "contains", "text": "a", "pattern": "a"}, "pattern is for type regex"),
    "no pattern": ("method.rewards.0", {"type": "regex"}, "pattern is for type regex, which needs one"),
    "no text": ("method.rewards.0", {"type": "ends-with"}, "text is for types"),
    "a schema that is no JSON": ("method.rewards.0", {"type": "json-schema", "schema": "{"}, "schema is not JSON"),
    "a schema that is no object": ("method.rewards.0", {"type": "json-schema", "schema": "[]"}, "no object"),
    "a schema for another type": ("method.rewards.0", {"type": "exact-match", "schema": "{}"}, "schema is for type json-schema"),
    "no bounds": ("method.rewards.0", {"type": "length"}, "needs min or max"),
    "bounds that leave nothing": ("method.rewards.0", {"type": "length", "min": 3, "max": 2}, "min is above max"),
    "words of another type": ("method.rewards.0", {"type": "exact-match", "unit": "words"}, "are for type length"),
    "case where there is none": ("method.rewards.0", {"type": "json-schema", "ignoreCase": True}, "ignoreCase is for types"),
    "weight 0": ("method.rewards.0", {"type": "exact-match", "weight": 0}, "rewards nothing"),
}


@pytest.mark.parametrize(("path", "value", "said"), REWARD_REFUSED.values(), ids=REWARD_REFUSED)
def test_what_rewards_cannot_do_is_refused(path: str, value: object, said: str) -> None:
    method: dict[str, object] = {"objective": "grpo", "rewards": [{"type": "exact-match"}]}
    read_spec(SMALLEST | {"method": method})
    asked = spec_with(path, value) if not path.startswith("method") else dict(SMALLEST)
    if path == "method" and isinstance(value, dict):
        method |= value
    elif path.startswith("method.rewards.0"):
        method["rewards"] = [value]
    elif path.startswith("method"):
        *parents, last = path.split(".")[1:]
        inner = value if not parents else {last: value}
        method[parents[0] if parents else last] = inner
    with pytest.raises(ValidationError, match=said):
        read_spec(asked | {"method": method})


@pytest.mark.parametrize("local", [False, True], ids=["on a cluster", "on one machine"])
def test_addresses_of_the_hub_need_a_revision(local: bool) -> None:
    pinned = {
        "model.uri": ["hf://org/name@main", "hf://Org-1/n_a.me@0123456789abcdef/", "hf://org/name@v1.0"],
        "dataset.sources.0.uri": ["hf://datasets/org/name@main", "hf://datasets/org/name@refs/convert/parquet/**/*.parquet"],
    }
    for path, addresses in pinned.items():
        for address in addresses:
            read_spec(spec_with(path, address), local=local)
            with pytest.raises(ValidationError, match="pin a commit"):
                read_spec(spec_with(path, address.replace("@", "/")), local=local)


TUNED = ["model://helper", "model://helper.v2@20260301-12345678", "model://h@1.0"]
NOT_TUNED = [
    "model://",
    "model://team-b/helper",
    "model://Helper",
    "model://helper@",
    "model://helper@v1@v2",
    "model://helper/merged",
    "model://helper@-1",
]


def test_a_tuned_model_is_named_by_its_name_and_perhaps_its_version() -> None:
    for uri in TUNED:
        read_spec(spec_with("model.uri", uri))
    for uri in NOT_TUNED:
        with pytest.raises(ValidationError, match="by its name, of this namespace only"):
            read_spec(spec_with("model.uri", uri))
    with pytest.raises(ValidationError, match=r"dataset\.sources"):
        read_spec(spec_with("dataset.sources.0.uri", "model://helper"))
    with pytest.raises(ValidationError, match="leave credentialsSecret out"):
        read_spec(spec_with("model", {"uri": "model://helper", "credentialsSecret": "keys"}))


def test_names_of_tuned_models_are_found_in_any_spec_and_give_way_to_addresses() -> None:
    spec = read_spec(spec_with("model.uri", "model://helper@v2"))
    (named,) = references(spec.model_dump(by_alias=True))
    assert (named.field.name, named.name, named.version) == ("spec.model.uri", "helper", "v2")
    resolved = with_addresses(spec, {"spec.model.uri": "s3://b-1/helper"})
    assert (resolved.model.uri, spec.model.uri, references(resolved.model_dump(by_alias=True))) == (
        "s3://b-1/helper",
        "model://helper@v2",
        [],
    )
    nonsense: list[dict[str, object]] = [{}, {"model": None}, {"model": "x"}, {"model": {"uri": 7}}, {"model": {"uri": "s3://b/x"}}]
    assert [references(spec) for spec in nonsense] == [[]] * len(nonsense)


def test_a_tuned_model_may_have_its_base_on_the_hub_and_its_artefact_in_storage_only() -> None:
    Base(uri="hf://org/name@main")
    Artifact(uri="s3://bucket/models/m/1/adapter")
    for kind, uri in ((Base, "/models/x"), (Artifact, "hf://org/name@main")):
        with pytest.raises(ValidationError, match="pattern"):
            kind(uri=uri)


def test_the_definition_takes_the_addresses_that_the_types_take() -> None:
    """What is refused there for want of a revision is refused by a rule, which tells more than a pattern."""
    schema = InstructionTuningJob.model_json_schema()["$defs"]
    patterns = {name: re.compile(schema[name]["properties"]["uri"]["pattern"]) for name in ("Model", "Source")}
    assert patterns["Model"].search("hf://org/name@main/")
    assert patterns["Model"].search("hf://org/name")
    assert all(patterns["Model"].search(uri) and not patterns["Source"].search(uri) for uri in (*TUNED, *NOT_TUNED))
    assert patterns["Source"].search("hf://datasets/org/name@refs/pr/1/a b/*.jsonl")
    for name, pattern in patterns.items():
        assert pattern.search("s3://bucket/a/**/part-*.jsonl")
        assert not [uri for uri in ("/data", "x s3://bucket/a", "hf://name", "hf://datasets/", "s3://b/a\x01") if pattern.search(uri)], name


def test_early_stopping_without_validation_rows_is_refused() -> None:
    spec = spec_with("dataset.validationFraction", 0.0) | {"hyperparameters": {"earlyStopping": {"enabled": True}}}
    with pytest.raises(ValidationError, match="earlyStopping needs validation rows"):
        read_spec(spec)


def test_a_job_may_name_an_instruction_dataset_instead_of_sources() -> None:
    """Whether early stopping has rows to look at, only that one knows."""
    spec = read_spec(spec_with("dataset", {"ref": "support-v1"}) | {"hyperparameters": {"earlyStopping": {"enabled": True}}})
    assert (spec.dataset.ref, spec.dataset.sources) == ("support-v1", [])
    assert read_spec(spec.model_dump(mode="json", by_alias=True)) == spec, "defaults that an API server fills in are not `set`"


def test_the_smallest_job_gets_defaults_that_are_right_for_most() -> None:
    spec = read_spec(SMALLEST)
    assert (spec.method.tuner, spec.method.lora.rank, spec.hyperparameters.learning_rate) == (Tuner.LORA, 16, "auto")
    assert (spec.hyperparameters.precision, spec.dataset.packing, spec.resources.gpus_per_node) == (Precision.AUTO, True, 0)


def test_paths_of_this_machine_are_for_local_runs() -> None:
    assert read_spec(spec_with("model.uri", "models/x"), local=True).model.uri == "models/x"


def test_a_spec_survives_its_json() -> None:
    spec = read_spec(SMALLEST)
    assert JobSpec.model_validate_json(spec.model_dump_json(by_alias=True)) == spec
