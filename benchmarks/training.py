"""Training side by side with others: the same model, data, LoRA options, precision and threads, each run a process of its own.

    python -m benchmarks.training [--runs 3] [--steps 12] [--only tunewright trl] [--mixes 300/60 150/150 60/300]

The model is a Qwen2 with random weights; documents are random tokens, a mix naming the average tokens of prompt and answer. Everybody learns the
answers only, from 2 rows of up to 1,024 packed tokens a step (transformers' Trainer, which does not pack: as many documents as these rows hold on
average). Speeds count real tokens, never padding, after the first step; trained tokens are those with a label. Clocks run from the start of the
process, memory is its highest resident set. What is printed are medians, and how many times better or worse than TRL they are.

`bare` is Tunewright without metrics, reports and checkpoints, `tunewright` has metrics each step and a checkpoint every tenth. What these cost is less than two
runs differ by, so the share of the time that goes to them is measured within the run, too (`aside`, on standard error).
LLaMA-Factory needs other versions of our libraries: it is installed (6 GB, with uv) into an environment of its own in the cache, at its first use.
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
FIRST_TOKEN: Final = 1_000  # lower ones are the tokenizer's own, padding among them
ROW_TOKENS: Final = 1024
ROWS_A_STEP: Final = 2
LEARNING_RATE: Final = 1e-4
LORA: Final = {"rank": 16, "alpha": 32, "dropout": 0.0}
STORE: Final = "store"  # of prepared data, below the folder of a mix
SPREAD: Final = 0.4  # of a length's logarithm
VARIANTS: Final = {
    "tunewright": "Tunewright",
    "bare": "Tunewright, no metrics or checkpoints",
    "trl": "TRL SFTTrainer",
    "llamafactory": "LLaMA-Factory",
    "trainer": "transformers Trainer + PEFT",
}
MIXES: Final = ("300/60", "150/150", "60/300")

Document = tuple[list[int], list[int]]  # token ids, labels
Found = dict[str, list[dict[str, float]]]  # the runs of each variant


def main() -> None:
    """Run every variant on every mix in turn, so often; print one table."""
    options = _options()
    found: dict[str, Found] = {}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        model = make_model(Path(folder) / "model", hidden=options.hidden, layers=options.layers)
        for mix in options.mixes:
            work = Path(folder) / mix.replace("/", "-")
            work.mkdir()
            _write_data(work, mix, steps=options.steps)
            found[mix] = {kind: [] for kind in options.only}
            for run in range(options.runs):
                for kind in options.only:
                    measured = _measured(kind, work, model, run=run, steps=options.steps, threads=options.threads)
                    found[mix][kind].append(measured)
                    print(f"{mix}, {VARIANTS[kind]}, run {run + 1}: {measured}", file=sys.stderr, flush=True)
    print(f"{options.layers} layers of {options.hidden}, {options.threads} threads, {options.steps} steps, median of {options.runs} runs\n")
    print("| prompt / answer | | tokens/s | trained tokens/s | tokens per CPU second | first step done after | highest memory |")
    print("|---|---|---|---|---|---|---|")
    for mix, runs in found.items():
        for line in lines(mix, runs):
            print(line)


def lines(mix: str, found: Found) -> list[str]:
    """The table's lines of one mix."""
    middle = {kind: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for kind, runs in found.items()}
    rival = middle.get("trl", {})

    def cell(kind: str, key: str, text: str) -> str:
        own = middle[kind][key]
        times = f" ({own / rival[key]:.2f} ×)" if rival and kind != "trl" else ""
        return text.format(own) + times

    return [
        f"| {mix} | {VARIANTS[kind]} | {cell(kind, 'pace', '{:,.0f}')} | {cell(kind, 'trained_pace', '{:,.0f}')} | {cell(kind, 'cpu_pace', '{:,.0f}')} "
        f"| {cell(kind, 'first_step', '{:.1f} s')} | {cell(kind, 'peak', '{:,.0f} MiB')} |"
        for kind in found
    ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("runs", 3), ("steps", 12), ("threads", 2), ("hidden", 384), ("layers", 6)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--only", choices=list(VARIANTS), nargs="+", default=list(VARIANTS))
    parser.add_argument("--mixes", nargs="+", default=list(MIXES), help="average tokens of prompt and answer")
    return parser.parse_args()


def _write_data(work: Path, mix: str, *, steps: int) -> None:
    """documents.json with the documents, and with the rows that they are packed into: a list of documents' numbers each; and a store with these rows."""
    from tests.support.training import publish_data
    from tunewright_trainer.prepare.pack import best_fit_decreasing
    from tunewright_trainer.storage import LocalStore

    prompt, answer = (int(average) for average in mix.split("/"))
    # Packed rows are nearly full; with some to spare nobody begins a second pass.
    documents = _documents(int(1.2 * (steps + 1) * ROWS_A_STEP * ROW_TOKENS / (prompt + answer)), prompt, answer)
    rows = best_fit_decreasing([len(ids) for ids, _ in documents], ROW_TOKENS)
    (work / "documents.json").write_text(json.dumps({"documents": documents, "rows": rows}))
    publish_data(LocalStore(work / STORE), work, train=[[documents[at] for at in row] for row in rows])


def _documents(count: int, prompt: int, answer: int) -> list[Document]:
    """Lengths are drawn from log-normal distributions with these means."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        lengths = [average * float(rng.lognormal(-(SPREAD**2) / 2, SPREAD)) for average in (prompt, answer)]
        prompt_tokens, answer_tokens = (int(min(max(length, 4), ROW_TOKENS // 2)) for length in lengths)
        ids = rng.integers(FIRST_TOKEN, VOCABULARY, prompt_tokens + answer_tokens).tolist()
        made.append((ids, [IGNORED] * prompt_tokens + ids[prompt_tokens:]))
    return made


def make_model(folder: Path, *, hidden: int, layers: int) -> Path:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from tests.support.models import byte_tokenizer

    Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 64,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
    ).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def _measured(kind: str, work: Path, model: Path, *, run: int, steps: int, threads: int) -> dict[str, float]:
    from benchmarks.data import llamafactory

    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    place = work / f"{kind}-{run}"
    place.mkdir()
    python = str(llamafactory()) if kind == "llamafactory" else sys.executable
    if kind == "llamafactory":
        environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    command = [python, "-m", "benchmarks.training_run", kind, str(work), str(model), str(place), str(steps), str(threads)]
    done = subprocess.run([*command, str(time.time())], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{kind} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
