"""The definitions on a real API server: every rule passing and failing, strict about names, and ``kubectl explain`` reads like a manual."""

import copy
import json
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster import facts
from tests.support.control import define
from tests.support.stack import ROOT, CommandFailed, Kubectl, cluster
from tests.support.tenant import a_dataset, a_job


@pytest.fixture(scope="module")
def kubectl() -> Kubectl:
    cluster("up", "--name", "control", "--control-plane-only")
    kubectl = Kubectl(facts("control").kubeconfig)
    define(kubectl)
    return kubectl


@pytest.fixture
def namespace(kubectl: Kubectl) -> Iterator[str]:
    name = f"definitions-{uuid.uuid4().hex[:8]}"
    kubectl("create", "namespace", name)
    yield name
    kubectl("delete", "itj,ids", "--all", "-n", name, "--wait=false")


def job_with(path: str, value: Any, namespace: str) -> dict[str, Any]:
    """A good job with one field set."""
    job = copy.deepcopy(a_job("rules", model="s3://bucket/model/", data="s3://bucket/rows.jsonl"))
    job["metadata"]["namespace"] = namespace
    set_field(job, path, value)
    return job


def set_field(job: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    node = job["spec"]
    for parent in parents:
        node = node[int(parent)] if isinstance(node, list) else node.setdefault(parent, {})
    node[last] = value


FIELDS = {
    "learning rate below 0": ("hyperparameters.learningRate", -1, "learningRate"),
    "learning rate 0": ("hyperparameters.learningRate", 0, "learningRate"),
    "learning rate above 1": ("hyperparameters.learningRate", 1.5, "learningRate"),
    "learning rate in other words": ("hyperparameters.learningRate", "fast", "learningRate"),
    "micro-batch 0": ("hyperparameters.microBatchSize", 0, "microBatchSize"),
    "micro-batch in other words": ("hyperparameters.microBatchSize", "big", "microBatchSize"),
    "unknown field": ("method.lora.rnak", 8, 'unknown field "spec.method.lora.rnak"'),
    "unknown objective": ("method.objective", "orpo", "method.objective"),
    "dpo's options with another objective": ("method.dpo.beta", 0.2, "dpo holds options of objective dpo"),
    "a reward model over 4 bits": ("method", {"objective": "reward", "tuner": "qlora"}, "needs tuner lora or full"),
    "kto's options with another objective": ("method.kto.desirableWeight", 2, "kto holds options of objective kto"),
    "unpaired answers with another objective": ("dataset.sources.0.format", "unpaired", "format unpaired is for objective kto"),
    "preferences with another objective": ("dataset.sources.0.format", "preference", "format preference is for objective dpo or reward"),
    "prompts alone with another objective": ("dataset.sources.0.format", "prompt", "format prompt is for objective ppo, grpo or rloo"),
    "an architecture that nobody knows": ("model.architecture", "rnn", "model.architecture"),
    "options of galore with another optimizer": ("hyperparameters.galore", {"rank": 8}, "galore holds options of optimizer galore"),
    "a split batch for lomo": (
        "hyperparameters",
        {"optimizer": "lomo", "batchSize": 8, "microBatchSize": 4},
        "takes the whole batch at once",
    ),
    "adapters within the backward pass": ("hyperparameters.optimizer", "lomo", "it is for tuner full"),
    "rewards with another objective": ("method.rewards", [{"type": "exact-match"}], "rewards holds options of objective ppo, grpo or rloo"),
    "nothing that is rewarded": ("method.objective", "rloo", "an objective that learns from rewards needs some"),
    "more mini-batches than prompts": (
        "method",
        {"objective": "ppo", "rewards": [{"type": "exact-match"}], "ppo": {"miniBatches": 17}},
        "miniBatches is above batchSize",
    ),
    "a tracker without its server": ("tracking", {"mlflow": {"credentialsSecret": "keys"}}, "tracking.mlflow is sent to a server"),
    "a tracker without a project": ("tracking", {"wandb": {"entity": "team"}}, "tracking.wandb is sent to a project"),
    "a copy on the hub to nowhere": ("output", {"hub": {"private": False}}, "output.hub is sent to a repository"),
    "a reward of no pattern": ("method", {"objective": "grpo", "rewards": [{"type": "regex"}]}, "pattern is for type regex"),
    "a reward of no length": ("method", {"objective": "grpo", "rewards": [{"type": "length", "min": 2, "max": 1}]}, "min is above max"),
    "options of lora with another tuner": (
        "method",
        {"tuner": "ia3", "lora": {"rank": 8}},
        "lora holds options of tuner lora, qlora or dora",
    ),
    "biases of a reward model": ("method", {"objective": "reward", "tuner": "bitfit"}, "tuner bitfit is for objective sft"),
    "options of a hypernetwork with another tuner": ("method.hint.fusion", False, "hint holds options of tuner hint"),
    "a reward model that may change": ("method", {"objective": "grpo", "rewardModel": "hf://org/judge"}, "pin a commit"),
    "a reward model with another objective": ("method.rewardModel", "s3://models/judge/", "rewardModel holds options of objective"),
    "unknown tuner": ("method.tuner", "magic", "method.tuner"),
    "another scheme": ("model.uri", "ftp://bucket/x", "model.uri"),
    "a tuned model of another namespace": ("model.uri", "model://team-b/helper", "of this namespace only"),
    "keys for a tuned model": ("model", {"uri": "model://helper", "credentialsSecret": "keys"}, "leave credentialsSecret out"),
    "neither sources nor ref": ("dataset.sources", [], "give at least one of sources, or ref"),
    "sources beside ref": ("dataset.ref", "support-v1", "with ref, nothing else may be set"),
    "options beside ref": ("dataset", {"ref": "support-v1", "maxLength": 64}, "with ref, nothing else may be set"),
    "deep options beside ref": (
        "dataset",
        {"ref": "support-v1", "cleaning": {"nearDuplicates": {"threshold": 0.9}}},
        "with ref, nothing else may be set",
    ),
    "no train source": ("dataset.sources.0.split", "test", "at least one source must have split: train"),
    "a language that nobody tells apart": ("dataset.cleaning.languages", ["en", "klingon"], "dataset.cleaning.languages[1]"),
    "nothing to compare with": ("dataset.cleaning.decontaminate.enabled", True, "needs something to compare with"),
    "comparing that is not enabled": ("dataset.cleaning.decontaminate.against", ["s3://data/x"], "for a decontamination that is enabled"),
    "comparing with what may change": (
        "dataset.cleaning.decontaminate",
        {"enabled": True, "against": ["hf://datasets/org/name/x.jsonl"]},
        "pin a commit",
    ),
    "weight 0": ("dataset.sources.0.weight", 0, "dataset.sources[0].weight"),
    "rows to test with, twice": (
        "dataset.sources",
        [{"uri": "s3://data/x"}, {"uri": "s3://data/y", "split": "test", "weight": 2}],
        "weight is for rows to train on",
    ),
    "nothing left to train on": ("dataset.testFraction", 0.95, "together must be below 1"),
    "a name that no model may have": ("output.modelName", "Big Model", "modelName"),
    "more nodes than there may be": ("resources.nodes", 65, "resources.nodes"),
    "more GPUs than a node has": ("resources.gpusPerNode", 17, "resources.gpusPerNode"),
}


@pytest.mark.parametrize(("path", "value", "said"), FIELDS.values(), ids=FIELDS)
def test_what_cannot_work_is_refused_on_apply(kubectl: Kubectl, namespace: str, path: str, value: Any, said: str) -> None:
    with pytest.raises(CommandFailed) as refusal:
        kubectl.apply(job_with(path, value, namespace))
    assert said in str(refusal.value)


def test_an_encoder_decoder_is_tuned_by_answers_only(kubectl: Kubectl, namespace: str) -> None:
    job = job_with("model.architecture", "seq2seq", namespace)
    for part, value, said in (
        ("method", {"objective": "dpo"}, "objective sft only"),
        ("dataset", {"trainOn": "all"}, "learns answers only"),
        ("method", {"tuner": "p-tuning"}, "is not tuned by"),
        ("hyperparameters", {"optimizer": "lomo"}, "is not trained with optimizer"),
        ("output", {"formats": ["gguf"]}, "is published as adapter or merged"),
    ):
        wrong = copy.deepcopy(job)
        wrong["spec"].setdefault(part, {}).update(value)
        with pytest.raises(CommandFailed, match=said):
            kubectl.apply(wrong)
    kubectl.apply(job)


HINT = {
    "a decoder alone": ("model", {"architecture": "causal"}, "is for encoder-decoders"),
    "serving": ("deploy", {"enabled": True}, "is not served yet"),
    "measuring": ("evaluation", {"enabled": True}, "is not measured yet"),
    "a merged model": ("output", {"formats": ["merged"]}, "cannot be merged"),
    "data that is not told apart": ("dataset", {"ref": "support-v1", "sources": []}, "tell instruction and input apart"),
}


def test_a_hypernetwork_is_tuned_by_instructions_with_inputs(kubectl: Kubectl, namespace: str) -> None:
    job = job_with("method", {"tuner": "hint", "hint": {"prefixTokens": 8}}, namespace)
    job["spec"]["evaluation"] = {"enabled": False}
    for part, value, said in HINT.values():
        wrong = copy.deepcopy(job)
        wrong["spec"].setdefault(part, {}).update(value)
        with pytest.raises(CommandFailed, match=said):
            kubectl.apply(wrong)
    kubectl.apply(job)


def test_kto_compares_the_answers_of_a_batch(kubectl: Kubectl, namespace: str) -> None:
    job = job_with("hyperparameters.batchSize", 1, namespace)
    job["spec"]["method"] = {"objective": "kto"}
    with pytest.raises(CommandFailed, match="compares each answer with the others of its batch"):
        kubectl.apply(job)
    job["spec"]["method"]["kto"] = {"loss": "apo_zero_unpaired"}
    kubectl.apply(job)


RIGHT = {
    "a learning rate": ("hyperparameters.learningRate", 0.003),
    "auto": ("hyperparameters.learningRate", "auto"),
    "a micro-batch": ("hyperparameters.microBatchSize", 4),
    "halves held out": ("dataset.testFraction", 0.5),
    "languages": ("dataset.cleaning.languages", ["en", "de"]),
    "benchmarks": (
        "dataset.cleaning.decontaminate",
        {"enabled": True, "words": 8, "against": ["s3://data/x", "hf://datasets/o/n@abc/x.jsonl"]},
    ),
    "preferences": ("method", {"objective": "dpo", "dpo": {"beta": 0.05, "labelSmoothing": 0.1}}),
    "a loss of its own": (
        "method",
        {"objective": "dpo", "dpo": {"loss": "exo_pair", "labelSmoothing": 0.001, "fDivergence": "js_divergence"}},
    ),
    "several losses": (
        "method",
        {"objective": "dpo", "dpo": {"ldAlpha": 0.5, "losses": [{"type": "aot", "weight": 0.5}, {"type": "sft", "weight": 1}]}},
    ),
    "what is measured": (
        "evaluation",
        {"fewShot": [0, 4], "maxExamples": 50, "classification": "always", "maxNewTokens": 16, "compareWithBase": False},
    ),
    "options of PEFT": ("method", {"options": {"layers_to_transform": [0, 1], "rank_pattern": {"q_proj": 8}, "ensure_weight_tying": True}}),
    "marked answers": ("method", {"objective": "kto", "kto": {"loss": "apo_zero_unpaired", "desirableWeight": 2}}),
    "where results go": ("tracking", {"mlflow": {"uri": "https://m.example"}, "wandb": {"project": "p", "credentialsSecret": "keys"}}),
    "a copy on the hub": ("output", {"hub": {"repository": "team/helper", "credentialsSecret": "keys"}}),
    "a reward model": ("method", {"objective": "reward", "reward": {"centerRewardsCoefficient": 0.01}}),
    "several nodes": ("resources", {"nodes": 4, "gpusPerNode": 8}),
    "rewards": (
        "method",
        {
            "objective": "grpo",
            "grpo": {"generations": 4},
            "rewards": [{"type": "regex", "pattern": "a", "weight": 2}, {"type": "length", "max": 9}],
        },
    ),
    "a model that rewards": ("method", {"objective": "rloo", "rewardModel": "s3://models/judge/"}),
    "half of the rows": ("dataset.sources.0.weight", 0.5),
    "a tuned model": ("model.uri", "model://helper@20260301-12345678"),
    "columns": ("dataset.sources.0.columns", {"output": "answer"}),
    "an InstructionDataset": ("dataset", {"ref": "support-v1"}),
    "an InstructionDataset, with defaults written out": ("dataset", {"ref": "support-v1", "validationFraction": 0.05, "testFraction": 0}),
}


def holds(node: Any, value: Any) -> bool:
    """Whether what is stored is what was applied, with more fields in its objects."""
    if isinstance(value, dict):
        return all(name in node and holds(node[name], inner) for name, inner in value.items())
    if isinstance(value, list):
        return len(node) == len(value) and all(map(holds, node, value))
    return bool(node == value)


@pytest.mark.parametrize(("path", "value"), RIGHT.values(), ids=RIGHT)
def test_what_works_is_taken_and_filled_in(kubectl: Kubectl, namespace: str, path: str, value: Any) -> None:
    kubectl.apply(job_with(path, value, namespace))
    spec = kubectl.get("itj", "rules", "-n", namespace)["spec"]
    assert (spec["method"]["tuner"], spec["method"]["lora"]["rank"], spec["retries"]["infrastructure"]) == ("lora", 16, 5)
    node: Any = spec
    for part in path.split("."):
        node = node[int(part)] if isinstance(node, list) else node[part]
    assert holds(node, value)


def _dpo(**options: Any) -> dict[str, Any]:
    return {"method": {"objective": "dpo", "dpo": options}}


def _required(**requirement: Any) -> dict[str, Any]:
    """A job that requires something of its model, and has rows to test it with."""
    return {"evaluation": {"require": [requirement]}, "dataset.testFraction": 0.1}


TOGETHER: dict[str, tuple[dict[str, Any], str]] = {
    "losses beside loss": (_dpo(loss="ipo", losses=[{"type": "sft"}]), "dpo.losses stands for dpo.loss"),
    "smoothing of a loss that has none": (_dpo(loss="ipo", labelSmoothing=0.1), "dpo.labelSmoothing has an effect with losses"),
    "exo_pair without smoothing": (_dpo(losses=[{"type": "sft"}, {"type": "exo_pair"}]), "loss exo_pair needs dpo.labelSmoothing"),
    "robust against chance": (_dpo(loss="robust", labelSmoothing=0.5), "loss robust needs dpo.labelSmoothing below 0.5"),
    "tails of no comparison": (_dpo(loss="sft", ldAlpha=0.5), "dpo.ldAlpha has no effect"),
    "a divergence of sums": (
        _dpo(losses=[{"type": "sigmoid"}, {"type": "aot"}], fDivergence="forward_kl"),
        "dpo.fDivergence is defined for",
    ),
    "alpha of another divergence": (_dpo(fAlphaDivergenceCoef=0.7), "is for fDivergence alpha_divergence"),
    "temperature of another loss": (_dpo(discopopTau=0.5), "dpo.discopopTau is for loss discopop"),
    "options of dpo with another objective": ({"method": {"dpo": {"ldAlpha": 0.5}}}, "dpo holds options of objective dpo"),
    "a reward model that is served": ({"method": {"objective": "reward"}, "deploy": {"enabled": True}}, "judges answers and gives none"),
    "prompts that are learned from pairs": ({"method": {"objective": "reward"}, "dataset.trainOn": "all"}, "only answers count"),
    "a requirement without a bound": (_required(metric="loss"), "give min, max or betterThanBase"),
    "bounds the wrong way round": (_required(metric="loss", min=2, max=1.5), "min must not be above max"),
    "a metric that nobody measures": (_required(metric="taste", min=1), "on the test rows a metric is one of loss"),
    "a metric of a task that is not there": (_required(metric="acc", task="signs", min=0.5), "none of evaluation.tasks"),
    "a task that is called like the test rows": ({"evaluation.tasks": [{"name": "test", "uri": "s3://b-1/t/"}]}, "is not called test"),
    "two tasks of one name": ({"evaluation.tasks": [{"name": "x", "uri": f"s3://b-1/{at}/"} for at in "ab"]}, "have one name"),
    "a rule without its pattern": ({"evaluation.rules": [{"type": "regex"}]}, "pattern is for type regex"),
    "a verdict that is required without a judge": (_required(metric="win_rate", min=0.5), "evaluation.judge must be given"),
    "criteria for no judge": ({"evaluation.judge": {"criteria": "Be brief."}}, "a judge needs endpoint and model"),
    "a judge of one model": (
        {"evaluation.judge": {"endpoint": "https://j.example/v1", "model": "m"}, "evaluation.compareWithBase": False},
        "it needs compareWithBase",
    ),
    "rules that are required and not there": (_required(metric="inst_level_loose_acc", min=0.5), "evaluation.rules must be given"),
    "a task that is not measured": (_required(metric="f1", min=0.5, fewShot=4), "takes a fewShot that is not measured"),
    "required and not enabled": (_required(metric="f1", min=0.5) | {"evaluation.enabled": False}, "for an evaluation that is enabled"),
    "better than a base that is not measured": (
        _required(metric="f1", betterThanBase=True) | {"evaluation.compareWithBase": False},
        "needs compareWithBase",
    ),
    "required without test rows": (_required(metric="f1", min=0.5) | {"dataset.testFraction": 0}, "require needs rows to test with"),
    "preferences of conversations": (_required(metric="preference_accuracy", min=0.5), "is not measured by preference_accuracy"),
    "answers of a reward model": (_required(metric="f1", min=0.5) | {"method": {"objective": "reward"}}, "can name preference_accuracy"),
    "smoothing of tokens in pairs": ({"method": {"objective": "dpo"}, "hyperparameters.labelSmoothing": 0.1}, "is for objective sft"),
}


@pytest.mark.parametrize(("fields", "said"), TOGETHER.values(), ids=TOGETHER)
def test_what_does_not_fit_together_is_refused_on_apply(kubectl: Kubectl, namespace: str, fields: dict[str, Any], said: str) -> None:
    job = job_with("suspend", False, namespace)
    for path, value in fields.items():
        set_field(job, path, value)
    with pytest.raises(CommandFailed) as refusal:
        kubectl.apply(job)
    assert said in str(refusal.value)


FIXED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "model": ({"model": {"uri": "s3://bucket/other/"}}, {"model": {"uri": "s3://bucket/third/"}}),
    "data": ({"dataset": {"maxLength": 64}}, {"dataset": {"maxLength": 65}}),
    "method": ({"method": {"lora": {"rank": 4}}}, {"method": {"lora": {"rank": 5}}}),
    "hyper-parameters": ({"hyperparameters": {"seed": 7}}, {"hyperparameters": {"seed": 8}}),
    "resources": ({"resources": {"cpu": "3"}}, {"resources": {"cpu": "4"}}),
    "checkpointing": ({"checkpointing": {"keep": 3}}, {"checkpointing": {"keep": 4}}),
    "evaluation": ({"evaluation": {"maxExamples": 3}}, {"evaluation": {"maxExamples": 4}}),
    "output": ({"output": {"modelName": "other"}}, {"output": {"modelName": "third"}}),
}


@pytest.mark.parametrize(("before", "after"), FIXED.values(), ids=FIXED)
def test_what_an_attempt_goes_on_with_is_fixed_once_the_job_has_started(
    kubectl: Kubectl, namespace: str, before: dict[str, Any], after: dict[str, Any]
) -> None:
    def patch(body: dict[str, Any], *more: str) -> str:
        return kubectl("patch", "itj", "rules", "-n", namespace, "--type=merge", "-p", json.dumps(body), *more)

    kubectl.apply(job_with("suspend", False, namespace))
    patch({"spec": before})
    patch({"status": {"phase": "Training", "startTime": "2026-01-01T00:00:00Z"}}, "--subresource=status")
    patch({"spec": before | {"suspend": True}})  # the same value again, and what may always change
    with pytest.raises(CommandFailed, match="fixed once the job has started"):
        patch({"spec": after})


def dataset_with(namespace: str, **fields: Any) -> dict[str, Any]:
    """A good InstructionDataset with some fields set."""
    body = a_dataset("rules", model="s3://bucket/model/", data="s3://bucket/rows.jsonl")
    body["metadata"]["namespace"] = namespace
    body["spec"] |= fields
    return body


def test_an_instruction_dataset_is_fixed_from_the_start_but_for_how_long_it_stays(kubectl: Kubectl, namespace: str) -> None:
    with pytest.raises(CommandFailed, match="names its own sources"):
        kubectl.apply(dataset_with(namespace, dataset={"ref": "other"}))
    with pytest.raises(CommandFailed, match="holds conversations only: name a source of format preference, unpaired or prompt"):
        kubectl.apply(dataset_with(namespace, dataset={"sources": [{"uri": "s3://bucket/rows.jsonl", "format": "preference"}]}))
    kubectl.apply(dataset_with(namespace))
    kubectl.apply(dataset_with(namespace, ttlSecondsAfterLastUse=60, deletionPolicy="Delete"))
    kubectl.apply(dataset_with(namespace, deletionPolicy="Retain"))
    changes: dict[str, Any] = {
        "model": {"uri": "s3://bucket/other/"},
        "dataset": {"sources": [{"uri": "s3://bucket/other.jsonl"}]},
        "seed": 7,
        "resources": {"cpu": "3"},
        "retries": {"infrastructure": 0},
    }
    for field, value in changes.items():
        with pytest.raises(CommandFailed, match=f"spec.{field} is fixed: apply an InstructionDataset of another name"):
            kubectl.apply(dataset_with(namespace, **{field: value}))
    assert "PHASE" in kubectl("get", "ids", "-n", namespace)


def test_the_example_of_shared_data_is_taken(kubectl: Kubectl, namespace: str) -> None:
    kubectl("apply", "-n", namespace, "-f", str(ROOT / "examples" / "shared"))
    data = kubectl.get("ids", "support-v1", "-n", namespace)["spec"]
    jobs = kubectl.get("itj", "-n", namespace)["items"]
    assert {job["spec"]["dataset"]["ref"] for job in jobs} == {"support-v1"}
    assert {job["spec"]["model"]["uri"] for job in jobs} == {data["model"]["uri"]}


def test_a_cancelled_job_stays_cancelled(kubectl: Kubectl, namespace: str) -> None:
    kubectl.apply(job_with("cancel", True, namespace))
    with pytest.raises(CommandFailed, match="cannot be taken back"):
        kubectl("patch", "itj", "rules", "-n", namespace, "--type=merge", "-p", '{"spec":{"cancel":false}}')


def test_kubectl_explains_every_field_like_a_manual(kubectl: Kubectl, namespace: str) -> None:
    told = kubectl("explain", "instructiontuningjob.spec.method", "--recursive")
    assert "How the model is tuned." in told
    assert all(field in told for field in ("objective", "tuner", "lora", "rank", "alpha", "dropout", "targetModules", "rslora"))
    assert "Rank of the adapter matrices." in kubectl("explain", "itj.spec.method.lora.rank")
    kubectl.apply(job_with("suspend", True, namespace))
    assert "PHASE" in kubectl("get", "itj", "-n", namespace)
