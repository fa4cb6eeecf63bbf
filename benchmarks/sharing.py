"""What it saves that documents which begin alike share their beginning: the same passes with and without, side by side in one process.

    python -m benchmarks.sharing [--runs 5] [--threads 2] [--mixes 300/60 150/150 60/300]

Measured are forward and backward pass of a micro-batch, by the clock and in turns: of objective dpo over a pair of answers to one prompt (with the
reference's forward pass), and of objective sft over eight answers to one prompt, which is what objectives that draw answers learn from.
A mix names the tokens of prompt and answer.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.training import LORA, MIXES, make_model
from tests.support.training import a_job
from tunewright_trainer.train import layout
from tunewright_trainer.train.data import IGNORED, Row, micro_batch
from tunewright_trainer.train.model import load
from tunewright_trainer.train.objective import objective_of, shares_of
from tunewright_trainer.train.world import World

ANSWERS = 8


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("runs", 5), ("threads", 2), ("hidden", 384), ("layers", 6)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--mixes", nargs="+", default=list(MIXES), help="tokens of prompt and answer")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pairs = {"sources": [{"uri": "/never/read", "format": "preference"}]}
    print("| prompt / answer | | apart | shared | |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        model = make_model(Path(folder) / "model", hidden=options.hidden, layers=options.layers)
        for mix in options.mixes:
            prompt, answer = map(int, mix.split("/"))
            for name, answers, parts in (
                ("dpo, a pair", 2, {"method": {"objective": "dpo", "lora": LORA}, "dataset": pairs}),
                (f"{ANSWERS} answers", ANSWERS, {"method": {"lora": LORA}}),
            ):
                spec = a_job(model, **parts).spec
                apart, shared = _times(load(model, spec), spec, prompt, answer, answers=answers, runs=options.runs)
                print(f"| {mix} | {name} | {apart * 1000:,.0f} ms | {shared * 1000:,.0f} ms | {apart / shared:.2f} × |", flush=True)


def _times(tuned: Any, spec: Any, prompt: int, answer: int, *, answers: int, runs: int) -> tuple[float, float]:
    """Seconds of a micro-batch without and with sharing, medians."""
    rng = np.random.default_rng(0)
    asked = rng.integers(1_000, 32_000, prompt)
    ids = [np.concatenate([asked, rng.integers(1_000, 32_000, answer)]) for _ in range(answers)]
    labels = [np.concatenate([np.full(prompt, IGNORED), one[prompt:]]) for one in ids]
    rows: Sequence[Row] = [Row(np.concatenate(ids), np.concatenate(labels), [len(one) for one in ids])]
    objective = objective_of(spec, tuned)
    ((share,),) = shares_of(objective, tuned, [[rows]], World())
    tuned.network.train()

    def timed() -> float:
        start = time.perf_counter()
        objective.backward(tuned, micro_batch(rows, tuned.device), share_of=share)
        return time.perf_counter() - start

    found: dict[int, list[float]] = {1 << 30: [], layout.LEAST_SHARED: []}
    for run in range(runs + 1):
        for least, times in found.items():
            with patch.object(layout, "LEAST_SHARED", least):
                seconds = timed()
            if run:  # the first warms up
                times.append(seconds)
    apart, shared = (statistics.median(times) for times in found.values())
    return apart, shared


if __name__ == "__main__":
    main()
