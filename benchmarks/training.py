"""Training side by side with transformers' Trainer and PEFT: the same model, data, LoRA options, precision and threads, each run a process of its own.

    python -m benchmarks.training [--runs 3] [--steps 8] [--threads 2] [--hidden 256] [--layers 4]

Documents are random tokens, 150 of prompt and 60 of answer on average; a step is about 2,000 tokens for everybody. Speeds count real tokens, never
padding, after the first step. Printed are medians.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import numpy as np

IGNORED: Final = -100
VOCABULARY: Final = 32_000
ROW_TOKENS: Final = 1024
DOCUMENTS_A_STEP: Final = 10
ROWS_A_STEP: Final = 2
LORA: Final = {"rank": 16, "alpha": 32, "dropout": 0.0}
VARIANTS: Final = {
    "Tunewright, packed": "packed",
    "Tunewright, one document a row": "rows",
    "transformers Trainer + PEFT": "trainer",
}

Document = tuple[list[int], list[int]]


def main() -> None:
    """Run every variant in turn, so often; print a table."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        work = Path(folder)
        model = _make_model(work / "model", hidden=options.hidden, layers=options.layers)
        documents = _documents(DOCUMENTS_A_STEP * options.steps)
        (work / "documents.json").write_text(json.dumps(documents))
        found: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
        for run in range(options.runs):
            for name, kind in VARIANTS.items():
                found[name].append(_measured(kind, work, model, run=run, steps=options.steps, threads=options.threads))
    print(
        f"{options.layers} layers of {options.hidden}, vocabulary {VOCABULARY}, {options.threads} threads, {options.steps} steps, ", end=""
    )
    print(f"median of {options.runs} runs\n")
    print("| | tokens/s | tokens per CPU second | first step done after | peak memory |\n|---|---|---|---|---|")
    for name, runs in found.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        print(
            f"| {name} | {middle['pace']:,.0f} | {middle['cpu_pace']:,.0f} | {middle['first_step']:.1f} s | {middle['peak'] / 2**20:,.0f} MiB |"
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("runs", 3), ("steps", 8), ("threads", 2), ("hidden", 256), ("layers", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    return parser.parse_args()


def _documents(count: int) -> list[Document]:
    rng = np.random.default_rng(0)
    made = []
    for prompt, answer in zip(rng.lognormal(4.9, 0.5, count), rng.lognormal(4.0, 0.5, count), strict=True):
        prompt_tokens, answer_tokens = (int(min(max(length, 4), 400)) for length in (prompt, answer))
        ids = rng.integers(0, VOCABULARY, prompt_tokens + answer_tokens).tolist()
        made.append((ids, [IGNORED] * prompt_tokens + ids[prompt_tokens:]))
    return made


def _make_model(folder: Path, *, hidden: int, layers: int) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.support.models import byte_tokenizer

    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 64,
            max_position_embeddings=2048,
        )
    ).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def _measured(kind: str, work: Path, model: Path, *, run: int, steps: int, threads: int) -> dict[str, float]:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    place = work / f"{kind}-{run}"
    place.mkdir()
    command = [sys.executable, "-m", "benchmarks.training_run", kind, str(work), str(model), str(place), str(steps), str(threads)]
    done = subprocess.run([*command, str(time.time())], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{kind} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
