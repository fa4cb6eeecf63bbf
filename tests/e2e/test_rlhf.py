"""The RLHF example: three jobs that are applied at once, each of which waits for the one before; the last does what people prefer."""

import json
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.stack import BUCKET, ROOT
from tests.support.tenant import Tenant

EXAMPLE = ROOT / "examples" / "rlhf"
JOBS = ("ppo", "reward", "sft")  # each before what it waits for


def downloaded(tenant: Tenant, uri: str, folder: Path) -> Path:
    """The files of a published model."""
    prefix = uri.removeprefix(f"s3://{BUCKET}/").rstrip("/")
    folder.mkdir()
    for key in tenant.keys(prefix):
        tenant.stack.s3().download_file(BUCKET, f"{prefix}{key}", str(folder / key.lstrip("/")))
    return folder


def test_three_jobs_joined_by_the_models_that_they_make(tenant: Tenant, tmp_path: Path) -> None:
    base = tenant.upload_folder("model", ROOT / "examples" / "quickstart" / "model")
    data = tenant.upload_folder("data", EXAMPLE / "data")
    for name in JOBS:
        text = (EXAMPLE / f"{name}.yaml").read_text(encoding="utf-8")
        tenant.apply(yaml.safe_load(text.replace("s3://quickstart/model/", base).replace("s3://rlhf/data/", data)))
    waiting = tenant.wait("rlhf-ppo", "it waits", lambda status: "job rlhf-sft, which makes it, is " in str(status))
    assert (waiting["phase"], waiting.get("dataset")) == ("Pending", None)
    assert "job rlhf-reward, which makes it, is pending" in str(waiting)
    done = {name: tenant.wait_phase(f"rlhf-{name}", "Succeeded") for name in reversed(JOBS)}
    taken = {name: [one["uri"] for one in done[name].get("takenModels", [])] for name in JOBS}
    uris = {name: done[name]["model"]["uri"] for name in JOBS}
    assert taken == {"sft": [], "reward": [uris["sft"]], "ppo": [uris["sft"], uris["reward"]]}
    before, after = (sentences(downloaded(tenant, uris[name], tmp_path / name)) for name in ("sft", "ppo"))
    print(f"answers in whole sentences: {before:.0%} after sft, {after:.0%} after ppo")
    assert before < 0.8
    assert after > 0.9


def sentences(folder: Path) -> float:
    """The share of sampled answers to the example's prompts that are more than a word."""
    tokenizer, network = AutoTokenizer.from_pretrained(folder, padding_side="left"), AutoModelForCausalLM.from_pretrained(folder).eval()
    rows = [json.loads(line) for line in (EXAMPLE / "data" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    asked = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", padding=True, return_dict=True)
    torch.manual_seed(0)
    said = network.generate(**inputs, max_new_tokens=12, do_sample=True)[:, inputs["input_ids"].shape[1] :]
    return sum(len(text.split()) > 2 for text in tokenizer.batch_decode(said, skip_special_tokens=True)) / len(rows)
