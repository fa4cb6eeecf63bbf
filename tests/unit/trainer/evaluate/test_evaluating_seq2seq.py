"""Encoder-decoders are measured like other models, from the rows to the report."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from tests.support.models import Layout, tiny_model
from tests.support.preparing import write_lines
from tests.support.training import a_job
from tunewright_trainer import evaluate, prepare, train
from tunewright_trainer.evaluate.answers import answers
from tunewright_trainer.serve.turns import End
from tunewright_trainer.storage import LocalStore
from tunewright_trainer.train.model import load_untuned

LAYOUTS: list[Layout] = ["t5", "bart"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_base_and_tuned_are_measured(tmp_path: Path, layout: Layout) -> None:
    rows = [{"instruction": f"Say yes {number}", "input": "", "output": "y"} for number in range(40)]
    source = {"uri": str(write_lines(tmp_path / "rows.jsonl", rows))}
    job = a_job(
        tiny_model(layout),
        dataset={"sources": [source], "testFraction": 0.25, "validationFraction": 0},
        hyperparameters={"maxSteps": 25, "batchSize": 8, "learningRate": 0.03, "warmupRatio": 0},
        evaluation={"maxNewTokens": 4},
    )
    store = LocalStore(tmp_path / "store")
    data = prepare.run(job, work=tmp_path / "p", store=store).dataset
    assert data is not None
    artifact = train.run(job, attempt=1, dataset_digest=data.digest, work=tmp_path / "t", store=store).artifact
    assert artifact is not None
    outcome = evaluate.run(job, dataset_digest=data.digest, model_uri=artifact.uri, work=tmp_path / "e", store=store)
    assert outcome.evaluation is not None
    found = {one.metric: one for one in outcome.evaluation.metrics}
    loss, match = found["loss"], found["exact_match"]
    assert loss.base is not None
    assert loss.tuned < loss.base - 1
    assert match.base == 0
    assert match.tuned == 1 or layout == "bart", "an adapter on a BART as tiny as this learns the letter, not yet the end"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_answer_is_that_of_the_prompt_alone(layout: Layout) -> None:
    """However much longer the prompts beside it are."""
    spec = a_job(tiny_model(layout)).spec
    prompts = [torch.arange(start, start + length).numpy() for start, length in ((3, 4), (40, 30))]
    found = answers(load_untuned(tiny_model(layout), spec), prompts, end=End(frozenset(), ()), pad=258, most=6, context=512, name="x")
    plain = AutoModelForSeq2SeqLM.from_pretrained(tiny_model(layout)).eval()
    plain.generation_config.eos_token_id = None
    for prompt, answer in zip(prompts, found, strict=True):
        expected = plain.generate(torch.from_numpy(prompt)[None], max_new_tokens=6, min_new_tokens=6, do_sample=False)[0, 1:]
        assert answer == expected.tolist()
