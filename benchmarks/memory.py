"""The memory plan beside what training takes: models of several families, each measurement a process of its own.

    python -m benchmarks.memory [--tokens 2048] [--width 384] [--layers 6] [--only llama-lora ...]

Measured are what the tensors of a step take at most (counted as they are made and freed, with weights, gradients and optimizer), and what the process
held at most in three steps (VmHWM), which has the libraries and the heap's holes in it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

LEARNED: Final = 0.25
LORA: Final = {"method": {"lora": {"dropout": 0.05}}}
PLAIN: Final = {"method": {"lora": {"dropout": 0}}}
FULL: Final = {"method": {"tuner": "full"}}
CHECKPOINTING: Final = {"hyperparameters": {"gradientCheckpointing": True}}
PAIRS: Final = {"dataset": {"sources": [{"uri": "/never/read", "format": "preference"}]}, "method": {"objective": "dpo"}}
CASES: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "llama-lora": ("llama", LORA),
    "llama-lora-no-dropout": ("llama", PLAIN),
    "llama-full": ("llama", FULL),
    "llama-full-checkpointing": ("llama", FULL | CHECKPOINTING),
    "llama-lora-dpo": ("llama", PAIRS),
    "gpt2-lora": ("gpt2", LORA),
    "gpt2-full": ("gpt2", FULL),
    "qwen2-lora-checkpointing": ("qwen2", LORA | CHECKPOINTING),
    "mistral-lora": ("mistral", LORA),
    "gemma-full": ("gemma", FULL),
    "phi3-lora": ("phi3", LORA),
    "llama-qlora": ("llama", {"method": {"tuner": "qlora", "lora": {"dropout": 0.05}}}),
    "qwen3-lora-bf16": ("qwen3", LORA | {"hyperparameters": {"precision": "bf16"}}),
}


def main() -> None:
    """Print a table."""
    options = _options()
    if options.measure:
        print(json.dumps(_measure(options)))
        return
    print("| | tensors: planned | measured | | process: planned | measured | |\n|---|---|---|---|---|---|---|")
    for name in options.only or CASES:
        found = [_run(options, name, kind) for kind in ("tensors", "process")]
        cells = []
        for one in found:
            planned, measured = one["planned"], one["measured"]
            cells += [f"{planned / 2**20:,.0f} MiB", f"{measured / 2**20:,.0f} MiB", f"{planned / measured - 1:+.0%}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("tokens", 2048), ("width", 384), ("layers", 6), ("vocabulary", 16_000)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--only", nargs="*", choices=CASES)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def _run(options: argparse.Namespace, case: str, kind: str) -> dict[str, int]:
    sizes = [f"--{name}={getattr(options, name)}" for name in ("tokens", "width", "layers", "vocabulary")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "benchmarks.memory", *sizes, "--measure", case, kind]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{case} failed:\n{done.stderr[-3000:]}")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def _measure(options: argparse.Namespace) -> dict[str, int]:
    from tunewright_trainer.lean import import_lean

    import_lean()
    import torch

    from tests.support import memory
    from tunewright_trainer.plan.memory import LIBRARIES_CPU
    from tunewright_trainer.train.model import load
    from tunewright_trainer.train.objective import objective_of, shares_of
    from tunewright_trainer.train.optimizers import updates
    from tunewright_trainer.train.world import World

    case, kind = options.measure
    layout, parts = CASES[case]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        base = Path(folder)
        heads = options.width // 64
        sizes = {"width": options.width, "layers": options.layers, "vocabulary": options.vocabulary}
        if child := os.fork():
            os.waitpid(child, 0)  # what making the model took stays there
        else:
            memory.save_model(base, layout, inner=3 * options.width, heads=heads, key_heads=heads // 2, **sizes)
            os._exit(0)
        spec = memory.a_spec(base, **{name: dict(part) for name, part in parts.items()})
        counted = memory.estimated(base, spec, tokens=options.tokens, learned=LEARNED)
        tuned = load(base, spec)
    batch, objective, weights = memory.a_batch(tuned, tokens=options.tokens, learned=LEARNED), objective_of(spec, tuned), tuned.trainable
    optimizer, peak = updates(tuned, spec.hyperparameters).optimizer, 0
    tuned.network.train()
    ((share,),) = shares_of(objective, tuned, [[batch.rows]], World())
    for _ in range(3 if kind == "process" else 1):  # each step two micro-batches, the second with gradients that are there
        objective.backward(tuned, batch, share_of=share)
        if kind == "tensors":
            with memory.counted(tuned, batch) as live:
                objective.backward(tuned, batch, share_of=share)
            peak = live.peak
        else:
            objective.backward(tuned, batch, share_of=share)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    # A checkpoint is written by the recipe, which is not at work here.
    planned = {name: size for name, size in counted.parts.items() if name != "checkpoint"}
    if kind == "process":
        return {"planned": sum(planned.values()), "measured": _status("VmHWM")}
    standing = sum(weight.nbytes for weight in tuned.network.parameters()) + 12 * sum(weight.numel() for weight in weights.values())
    return {"planned": sum(planned.values()) - LIBRARIES_CPU - planned["allocator"], "measured": peak + standing}


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    main()
