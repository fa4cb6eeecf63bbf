"""Preparing data side by side with others: the same generated alpaca rows, tokenizer, chat format and processors, each a process of its own.

    python -m benchmarks.data [--rows 1000000] [--runs 3] [--processes 2] [--only ours trl llamafactory]
    python -m benchmarks.data --memory [--rows 1000000]

All read the JSON lines, apply the chat format, tokenise, mask the prompt and pack into rows of 1,024 tokens; ours also checks every row, removes
duplicates, draws a validation split, hashes what it writes and makes the report. Clocks run from the start of the process to its end; memory is the
proportional share (PSS) of the process and its children, sampled, at its highest. Processor time is what others on the machine change least.
LLaMA-Factory needs other versions of our libraries: it is installed (6 GB, with uv) into an environment of its own in the cache, at its first use.
`--memory` compares ours with itself at a tenth of the rows.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

ROW_TOKENS: Final = 1024
SAMPLE_SECONDS: Final = 0.2
TEMPLATE: Final = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
JOB: Final = """
apiVersion: tunewright.dev/v1alpha1
kind: InstructionTuningJob
metadata: {{name: benchmark, namespace: benchmark}}
spec:
  model: {{uri: {model}}}
  dataset: {{sources: [{{uri: {data}}}], maxLength: {length}}}
  resources: {{cpu: "{processes}"}}
"""
VARIANTS: Final = {"ours": "Tunewright", "trl": "TRL SFTTrainer", "llamafactory": "LLaMA-Factory"}
LLAMAFACTORY: Final = ("llamafactory==0.9.5", "torch==2.11.0", "torchaudio==2.11.0")
"""The newest torchaudio that it takes loads with no newer torch."""


def main() -> None:
    """Run every variant in turn, so often; print a table."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        if options.memory:
            _compare_memory(Path(folder), options)
        else:
            _compare(Path(folder), options)


def _compare(work: Path, options: argparse.Namespace) -> None:
    data, model = _made(work, options.rows, options.words)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in options.only}
    for run in range(options.runs):
        for name in options.only:
            found[name].append(_measured(name, work / f"{name}-{run}", data, model, processes=options.processes))
            print(f"{VARIANTS[name]}, run {run + 1}: {found[name][-1]}", file=sys.stderr, flush=True)
    print(f"{options.rows:,} rows, {options.processes} processes, median of {options.runs} runs\n")
    print("| | seconds | rows/s | processor µs a row | highest memory |\n|---|---|---|---|---|")
    for name, runs in found.items():
        seconds, processor, memory = (statistics.median(run[key] for run in runs) for key in ("seconds", "processor", "memory"))
        each = processor / options.rows * 1e6
        print(f"| {VARIANTS[name]} | {seconds:,.1f} | {options.rows / seconds:,.0f} | {each:,.0f} | {memory / 2**20:,.0f} MiB |")


def _compare_memory(work: Path, options: argparse.Namespace) -> None:
    highest = []
    for rows in (options.rows // 10, options.rows):
        place = work / str(rows)
        place.mkdir()
        data, model = _made(place, rows, options.words)
        highest.append(_measured("ours", place / "run", data, model, processes=options.processes)["memory"])
        print(f"{rows:,} rows: {highest[-1] / 2**20:,.0f} MiB", flush=True)
    print(f"{highest[1] / highest[0]:.2f} times the memory for ten times the rows")


def _made(work: Path, rows: int, length: int) -> tuple[Path, Path]:
    """Rows and a model."""
    data = work / "data.jsonl"
    _write_rows(data, rows, length)
    return data, _make_model(work / "model", data)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--words", type=int, default=90, help="of a row, on average")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", choices=list(VARIANTS), nargs="+", default=["ours", "trl"])
    parser.add_argument("--memory", action="store_true", help="highest memory of ours at a tenth of the rows and at all of them")
    return parser.parse_args()


def _write_rows(path: Path, count: int, length: int) -> None:
    """Rows of so many words on average, out of 5,000: two ninths instruction, three input, four output."""
    chance = random.Random(1)
    words = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(2, 9))) for _ in range(5000)]

    def text(average: int) -> str:
        return " ".join(chance.choices(words, k=chance.randint(average // 2, average * 3 // 2)))

    with path.open("w") as file:
        for _ in range(count):
            file.write(
                json.dumps({"instruction": text(length * 2 // 9), "input": text(length * 3 // 9), "output": text(length * 4 // 9)}) + "\n"
            )


def _make_model(folder: Path, data: Path) -> Path:
    """A tiny Llama with a byte-level BPE tokenizer of 8,000 tokens, trained on some of the rows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    with data.open() as file:
        lines = [line for line, _ in zip(file, range(5000), strict=False)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=8000, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=ROW_TOKENS,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _measured(variant: str, place: Path, data: Path, model: Path, *, processes: int) -> dict[str, float]:
    """Seconds, seconds of processors and highest memory in bytes of one run."""
    place.mkdir()
    environment = os.environ | {"HF_HOME": str(place / "cache"), "TMPDIR": str(place), "TOKENIZERS_PARALLELISM": "true"}
    python = sys.executable
    if variant == "ours":
        (place / "job.yaml").write_text(JOB.format(model=model, data=data, length=ROW_TOKENS, processes=processes))
        command = ["-m", "tunewright_trainer", "prepare", str(place / "job.yaml"), "--output", str(place / "out")]
    else:
        command = ["-m", f"benchmarks.data_{variant}", str(data), str(model), str(place / "out"), str(processes)]
        python = str(llamafactory()) if variant == "llamafactory" else python
    began, used = time.monotonic(), _processor_seconds()
    with (place / "log").open("w") as log, subprocess.Popen([python, *command], env=environment, stdout=log, stderr=log) as run:
        highest = 0
        while run.poll() is None:
            highest = max(highest, _memory(run.pid))
            time.sleep(SAMPLE_SECONDS)
    seconds, processor = time.monotonic() - began, _processor_seconds() - used
    if run.returncode:
        sys.exit(f"{variant} failed:\n{(place / 'log').read_text()[-3000:]}")
    subprocess.run(["rm", "-rf", str(place)], check=True)
    return {"seconds": seconds, "processor": processor, "memory": float(highest)}


def _processor_seconds() -> float:
    """Of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def llamafactory() -> Path:
    """The Python of an environment with LLaMA-Factory, which is made where it is missing."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "tunewright" / "benchmarks" / "-".join(LLAMAFACTORY).replace("==", "-")
    if not (folder / ".ready").exists():
        subprocess.run(["uv", "venv", "--clear", "--python", "3.11", str(folder)], check=True)
        subprocess.run(["uv", "pip", "install", "--python", str(folder / "bin/python"), *LLAMAFACTORY], check=True)
        (folder / ".ready").touch()
    return folder / "bin/python"


def _memory(process: int) -> int:
    """Proportional set size of a process and its descendants, in bytes."""
    total = 0
    waiting = [process]
    while waiting:
        pid = waiting.pop()
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            waiting += [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
        except OSError:  # it ended meanwhile
            continue
        total += next((int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:")), 0)
    return total


if __name__ == "__main__":
    main()
