"""Learning from rewards: drawing answers, the losses against TRL's, and whole attempts on tiny models."""

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch

from tests.support import trl_rewards
from tests.support.models import END, byte_tokenizer, decided_model, tiny_model
from tests.support.training import IGNORED, a_job, documents, history, publish_data, stop_in_step, train_here, weights_digest
from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.pod import PodConfig
from tunewright_crds.reinforcement import Grpo, ScaleRewards
from tunewright_trainer import process
from tunewright_trainer.storage import LocalStore
from tunewright_trainer.train import divergence, grpo, metrics, recipe, rloo
from tunewright_trainer.train.attention import NAME
from tunewright_trainer.train.checkpoints import Counters
from tunewright_trainer.train.data import Row
from tunewright_trainer.train.model import Tuned, load
from tunewright_trainer.train.reinforced import Answering, Experience, Reference, Setting
from tunewright_trainer.train.rollouts import Drawing, Prompt, Sample, prompt_of, seeds

KL: Final = {"grpo": "kl", "rloo": "kl", "ppo": "objective/kl"}
VOWELS: Final = {"type": "regex", "pattern": "[aeiou]"}
RISING: Final = {"batchSize": 4, "learningRate": 0.01, "warmupRatio": 0, "scheduler": "constant", "maxSteps": 12}
SHORT: Final[dict[str, dict[str, Any]]] = {
    "grpo": {"maxNewTokens": 5, "generations": 4, "beta": 0.1, "iterations": 2},
    "rloo": {"maxNewTokens": 5, "generations": 4, "beta": 0.1, "iterations": 2},
    "ppo": {"maxNewTokens": 5, "epochs": 2, "miniBatches": 2, "klHorizon": 10, "missingEndPenalty": 0.5},
}


def job(objective: str, model: Path | None = None, *, options: dict[str, Any] | None = None, **parts: Any) -> PodConfig:
    method = {"objective": objective, objective: options or SHORT[objective], "rewards": [VOWELS]}
    return a_job(model or decided_model(), **parts | {"method": method | parts.get("method", {})})


def published(folder: Path) -> LocalStore:
    store = LocalStore(folder)
    train, validation = ([[document] for document in documents(count, seed=seed, longest=16)] for count, seed in ((16, 0), (6, 9)))
    publish_data(store, folder.parent, train=train, validation=validation)
    return store


def tuned_of(config: PodConfig, model: Path | None = None) -> Tuned:
    return load(model or decided_model(), config.spec)


def answering(tuned: Tuned, config: PodConfig, *, halvings: int = 0) -> Answering:
    method = config.spec.method
    return Answering(tuned, Setting(config.spec, decided_model(), {}, halvings), getattr(method, method.objective.value))


def rows(count: int = 5) -> list[Row]:
    return [Row(np.array(ids), np.array(labels), [len(ids)]) for ids, labels in documents(count, longest=16)]


def test_the_prompt_is_what_comes_before_the_last_answer() -> None:
    ids = np.arange(8)
    two = prompt_of(Row(ids, np.array([IGNORED, 1, 2, IGNORED, IGNORED, 5, 6, IGNORED]), [8]))
    assert (two.ids.tolist(), two.reference.tolist()) == ([0, 1, 2, 3, 4], [5, 6])
    none = prompt_of(Row(ids, np.full(8, IGNORED), [8]))
    assert (none.ids.tolist(), none.reference.tolist()) == (ids.tolist(), [])


def test_answers_are_drawn_by_their_seeds_alone() -> None:
    """However many go through the model at once; and with other seeds, or in another step, others are drawn."""
    config = job("grpo", hyperparameters={"batchSize": 4})
    tuned = tuned_of(config)
    found = answering(tuned, config).draw(rows(), step=3, each=2).samples
    one_by_one = answering(tuned, job("grpo", hyperparameters={"microBatchSize": 1})).draw(rows(), step=3, each=2).samples
    assert [sample.input_ids.tolist() for sample in one_by_one] == [sample.input_ids.tolist() for sample in found]
    later = answering(tuned, config).draw(rows(), step=4, each=2).samples
    assert not set(texts(found)) & set(texts(later))
    assert len(set(texts(found))) == 10, "also those to one prompt"
    assert len({one for step in range(50) for one in seeds(7, step, 40)}) == 2000


def texts(samples: Sequence[Sample]) -> list[str]:
    return [sample.text for sample in samples]


def drawing(tuned: Tuned, *, longest: int, temperature: float = 1.0) -> Drawing:
    return Drawing(tuned, byte_tokenizer(), chat_template(), longest=longest, temperature=temperature, micro_batch_size="auto", halvings=0)


def chat_template() -> str:
    return (decided_model() / "chat_template.jinja").read_text()


def test_answers_are_drawn_as_likely_as_the_model_says_and_the_temperature_makes_them(tmp_path: Path) -> None:
    """Whatever the model's own settings for answering say."""
    model = tmp_path / "model"
    shutil.copytree(decided_model(), model)
    settings = {"do_sample": True, "top_k": 2, "repetition_penalty": 9.0, "suppress_tokens": [1]}
    (model / "generation_config.json").write_text(json.dumps(settings))
    tuned = tuned_of(job("grpo"), model)
    prompt = Prompt(np.array([3, 70, 4]), np.array([], dtype=np.int64))
    draw = drawing(tuned, longest=1, temperature=0.7)
    drawn = torch.tensor([sample.input_ids[-1] for sample in draw.draw([prompt] * 4000, seeds(1, 1, 4000))])
    with torch.no_grad():
        likely = torch.softmax(tuned.network(input_ids=torch.tensor([prompt.ids.tolist()])).logits[0, -1] / 0.7, dim=-1)
    top = likely.topk(8).indices
    shares = torch.stack([(drawn == token).float().mean() for token in top])
    torch.testing.assert_close(shares, likely[top], atol=0.03, rtol=0)
    assert int(draw.draw([prompt])[0].input_ids[-1]) == int(likely.argmax()), "without a seed the likeliest"
    assert tuned.network.generation_config.repetition_penalty == 9
    assert tuned.network.config._attn_implementation == NAME


def test_an_answer_ends_with_its_turn() -> None:
    """Here every answer is: the end of the turn and nothing else."""
    tuned = tuned_of(job("grpo"))
    tokenizer = byte_tokenizer()
    end = tokenizer.convert_tokens_to_ids(END)
    with torch.no_grad():
        tuned.network.lm_head.weight.zero_()
        tuned.network.lm_head.weight[end] = tuned.network.model.norm.weight  # likeliest wherever the hidden state points that way
    prompts = [Prompt(np.array(ids), np.array([*tokenizer.encode(" so"), end])) for ids in ([1, 2], [3, 4, 5])]
    found = drawing(tuned, longest=6).draw(prompts)
    assert any(sample.ended for sample in found)
    for prompt, sample in zip(prompts, found, strict=True):
        answer = sample.input_ids[len(prompt.ids) :].tolist()
        assert sample.ended == (end in answer)
        assert end not in answer[:-1]
        assert sample.labels.tolist() == [IGNORED] * len(prompt.ids) + answer
        assert sample.reference == "so"
        assert END not in sample.text


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused() -> None:
    config = job("grpo", options={"maxNewTokens": 510})
    with pytest.raises(Refusal, match=r"a prompt of \d+ tokens and an answer of up to 510") as refusal:
        answering(tuned_of(config), config).draw(rows(), step=1, each=1)
    assert (refusal.value.code, refusal.value.param) == (FailureCode.CONFIG_INVALID, "spec.dataset.maxLength")


def test_log_probabilities_are_those_of_the_model_at_the_temperature_of_drawing() -> None:
    config = job("grpo", options={"maxNewTokens": 5, "temperature": 0.5})
    tuned = tuned_of(config)
    policy = answering(tuned, config)
    samples = policy.draw(rows(), step=1, each=2).samples
    for sample, found in zip(samples, policy.log_probabilities(samples, tuned), strict=True):
        with torch.no_grad():
            logits = tuned.network(input_ids=torch.from_numpy(sample.input_ids)[None]).logits[0]
        expected = torch.log_softmax(logits / 0.5, dim=-1)[torch.arange(len(logits) - 1), sample.input_ids[1:]][-sample.targets :]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_the_reference_is_the_model_as_it_was(tuner: str) -> None:
    config = job("rloo", method={"tuner": tuner})
    tuned = tuned_of(config)
    policy, reference = answering(tuned, config), Reference(tuned)
    before = policy.log_probabilities(rows(), tuned)
    with torch.no_grad():
        for weight in tuned.trainable.values():
            weight.add_(0.05)
    with reference.as_before() as model:
        found = policy.log_probabilities(rows(), model)
    after = policy.log_probabilities(rows(), tuned)
    for one, same, other in zip(before, found, after, strict=True):
        torch.testing.assert_close(same, one, atol=1e-5, rtol=0)
        assert not torch.allclose(other, one, atol=1e-2)


def cases() -> list[dict[str, Any]]:
    """Answers of several lengths, whose ratios lie on both sides of what is clipped."""
    rng = np.random.default_rng(4)
    answers = []
    for length in (1, 5, 3, 7):
        old = -rng.uniform(0.1, 4, length)
        near = {"policy": (old + rng.normal(0, 0.3, length)).tolist(), "reference": (old + rng.normal(0, 0.3, length)).tolist()}
        answers.append({"advantage": float(rng.normal()), "old": old.tolist(), **near})
    common = {"clip": 0.2, "longest": 8, "answers": answers}
    kinds = [("grpo", loss_type, beta) for loss_type in ("dapo", "grpo", "dr_grpo") for beta in (0.0, 0.3)] + [("rloo", "", 0.0)]
    return [common | {"objective": objective, "loss_type": loss_type, "beta": beta} for objective, loss_type, beta in kinds]


def ours(case: dict[str, Any]) -> dict[str, Any]:
    made = []
    for answer in case["answers"]:
        size = len(answer["old"])
        row = Row(np.arange(size + 1), np.array([IGNORED, *range(size)]), [size + 1])
        reference = torch.tensor(answer["reference"]) if case["beta"] else None
        gains = torch.full((size,), answer["advantage"])
        made.append(Experience(row.input_ids, row.labels, row.lengths, gains, torch.tensor(answer["old"]), reference))
    policy = torch.tensor([value for answer in case["answers"] for value in answer["policy"]], requires_grad=True)
    loss: grpo.Surrogate | rloo.Surrogate = rloo.Surrogate(clip=case["clip"], temperature=1, tokens=1)
    if case["objective"] == "grpo":
        options = {"maxNewTokens": case["longest"], "lossType": case["loss_type"].replace("_", "-")}
        options |= {name: case[name] for name in ("clip", "beta")}
        loss = grpo.Surrogate(Grpo.model_validate(options), temperature=1, tokens=1)
    total = loss.summed(policy, made)[0] / loss.size(made)
    total.backward()
    assert policy.grad is not None
    return {"loss": total.item(), "gradient": policy.grad.tolist()}


def test_losses_and_their_gradients_are_those_of_trl(tmp_path: Path) -> None:
    expected = trl_rewards.compute(cases(), tmp_path / "cases.json")
    for case, theirs in zip(cases(), expected, strict=True):
        found = ours(case)
        assert found["loss"] == pytest.approx(theirs["loss"], abs=1e-5), case["loss_type"]
        assert found["gradient"] == pytest.approx(theirs["gradient"], abs=1e-5), case["loss_type"]


def test_advantages_are_those_of_the_papers() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 3.0], [2.0, 2.0, 2.0, 2.0]])
    plain = torch.tensor([[0.0, -1.0, -1.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(grpo.advantages(rewards, ScaleRewards.NONE), plain)
    torch.testing.assert_close(grpo.advantages(rewards, ScaleRewards.GROUP), plain / (2**0.5 + 1e-4))
    torch.testing.assert_close(grpo.advantages(rewards, ScaleRewards.BATCH), plain / (float(np.std(rewards.numpy(), ddof=1)) + 1e-4))
    torch.testing.assert_close(rloo.advantages(rewards)[0], torch.tensor([0.0, -4 / 3, -4 / 3, 8 / 3]))


@pytest.mark.parametrize("objective", ["grpo", "rloo"])
def test_answers_that_are_rewarded_become_likelier(tmp_path: Path, objective: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    store = published(tmp_path / "store")
    config = job(objective, options={"maxNewTokens": 6, "generations": 8}, hyperparameters=RISING)
    outcome = train_here(config, store, tmp_path)
    lines = [line for line in history(store) if "loss" in line]
    told = [line["reward"] for line in lines]
    assert np.mean(told[:3]) < 0.35
    assert np.mean(told[-3:]) > 0.75
    assert [line["rewards/regex"] for line in lines] == told
    assert set(lines[0]) >= {
        "loss",
        "grad_norm",
        "reward_std",
        "entropy",
        "completions/mean_length",
        "completions/clipped_ratio",
        "num_tokens",
    }
    evaluated = [line for line in history(store) if "loss" not in line]
    assert evaluated[-1]["eval_reward"] > 0.75
    assert all(line["eval_loss"] == -line["eval_reward"] for line in evaluated)
    assert outcome.best_checkpoint is not None
    assert outcome.best_checkpoint.value == min(line["eval_loss"] for line in evaluated)
    assert outcome.artifact is not None
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(decided_model()), outcome.artifact.uri)
    answered = []
    for ids, labels in documents(6, seed=9, longest=16):
        prompt = torch.tensor([ids[: labels.count(IGNORED)]])
        whole = plain.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
        answered.append(byte_tokenizer().decode(whole[0, prompt.shape[1] :], skip_special_tokens=True))
    assert np.mean([any(vowel in answer for vowel in "aeiou") for answer in answered]) == pytest.approx(evaluated[-1]["eval_reward"])
    assert f"Objective: {objective}" in (Path(outcome.artifact.uri) / "README.md").read_text()


@pytest.mark.parametrize(("objective", "tuner"), [("grpo", "lora"), ("rloo", "full"), ("ppo", "lora"), ("ppo", "full")])
def test_a_stopped_run_goes_on_at_the_exact_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str, tuner: str) -> None:
    config = job(
        objective,
        hyperparameters=RISING | {"batchSize": 2, "maxSteps": 4, "earlyStopping": {"enabled": True}},
        checkpointing={"everySteps": 100},
        method={"tuner": tuner},
    )
    store, undisturbed = published(tmp_path / "store"), published(tmp_path / "undisturbed")
    expected = weights_digest(train_here(config, undisturbed, tmp_path))
    with monkeypatch.context() as patch:
        stop_in_step(patch, 2)
        with pytest.raises(process.Stopped):
            train_here(config, store, tmp_path)
    outcome = train_here(config, store, tmp_path, attempt=2)
    assert (outcome.resumed_from_step, outcome.reached_step) == (2, 4)
    assert weights_digest(outcome) == expected
    found = {line["step"]: line["reward"] for attempt in (1, 2) for line in history(store, attempt) if "loss" in line}
    assert found == {line["step"]: line["reward"] for line in history(undisturbed) if "loss" in line}


@pytest.mark.parametrize("objective", SHORT)
def test_halved_micro_batches_compute_the_same(tmp_path: Path, objective: str) -> None:
    found = []
    for halvings in (0, 2):
        store = published(tmp_path / f"store-{halvings}")
        config = job(objective, hyperparameters=RISING | {"batchSize": 4, "microBatchSize": 4, "maxSteps": 2, "learningRate": 0.001})
        train_here(config, store, tmp_path, halvings=halvings)
        found.append([(line["loss"], line["grad_norm"], line["reward"], line[KL[objective]]) for line in history(store) if "loss" in line])
    for first, second in zip(*found, strict=True):
        assert second == pytest.approx(first, abs=1e-5, rel=1e-4)


def a_judge(folder: Path) -> Path:
    """A reward model that counts what points one way: any will do here."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(3)
    network = AutoModelForSequenceClassification.from_pretrained(tiny_model("llama"), num_labels=1)
    with torch.no_grad():
        network.score.weight.copy_(torch.randn_like(network.score.weight))
    network.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_a_reward_model_is_asked(tmp_path: Path) -> None:
    """It gives what transformers reads at the end of prompt and answer; the rules are added."""
    from transformers import AutoModelForSequenceClassification

    judge = a_judge(tmp_path / "judge")
    config = job("grpo", method={"rewardModel": str(judge)})
    tuned = tuned_of(config)
    found = Answering(tuned, Setting(config.spec, decided_model(), {}, judge=judge), config.spec.method.grpo).draw(rows(), step=1, each=2)
    plain = AutoModelForSequenceClassification.from_pretrained(judge)
    with torch.no_grad():
        expected = [float(plain(input_ids=torch.from_numpy(one.input_ids)[None]).logits) for one in found.samples]
    rules = [float(any(vowel in one.text for vowel in "aeiou")) for one in found.samples]
    assert found.rewards.tolist() == pytest.approx([one + other for one, other in zip(expected, rules, strict=True)], abs=1e-4)
    assert found.measured["rewards/model"] == pytest.approx(np.mean(expected), abs=1e-4)


def test_a_reward_model_alone_is_learned_from(tmp_path: Path) -> None:
    config = job("rloo", method={"rewards": [], "rewardModel": str(a_judge(tmp_path / "judge"))}, hyperparameters=RISING | {"maxSteps": 1})
    store = published(tmp_path / "store")
    train_here(config, store, tmp_path)
    (line, *_) = history(store)
    assert line["reward"] == pytest.approx(line["rewards/model"]) != 0


def test_a_step_that_goes_astray_in_its_second_update_is_left_out_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first has changed the weights by then, and what ppo keeps from step to step is put back too."""
    config = job("ppo", hyperparameters=RISING | {"maxSteps": 4}, checkpointing={"everySteps": 3})
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "Counters", partial(Counters, left_out=[2]))
        expected = train_here(config, published(tmp_path / "leaving-out"), tmp_path)
    plain, updates = recipe.Run._update, []

    def astray(run: recipe.Run, *given: Any) -> dict[str, float]:
        updates.append(run.counters.step + 1)
        if updates[-1] == 2 == updates.count(2):
            raise divergence.Astray("loss nan")
        return plain(run, *given)

    monkeypatch.setattr(recipe.Run, "_update", astray)
    outcome = train_here(config, published(tmp_path / "store"), tmp_path)
    assert outcome.rollbacks == 1
    assert weights_digest(outcome) == weights_digest(expected)


def test_progress_shows_what_it_has_room_for() -> None:
    told = {f"rewards/regex-{number}": 1.0 for number in range(40)} | {"reward": 0.5, "loss": 0.1, "tokens_per_second": 3.0}
    found = metrics.progress(step=1, max_steps=2, epoch=1, tokens=1, remaining=1, attempt=1, resumed_from=0, metrics=told)
    names = [metric.name for metric in found.metrics]
    assert len(names) == 32
    assert {"reward", "loss", "tokens_per_second"} <= set(names)
