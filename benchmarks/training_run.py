"""One run of `benchmarks.training`, in a process (and for LLaMA-Factory an environment) of its own."""

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.training import FIRST_TOKEN, IGNORED, LEARNING_RATE, LORA, ROW_TOKENS, ROWS_A_STEP, STORE, Document

CHECKPOINT_EVERY = 10


class Mark(NamedTuple):
    """How far a run is after a step: wall clock and CPU clock in seconds, tokens, tokens with a label, seconds for what is not training."""

    wall: float
    cpu: float
    tokens: int
    trained: int
    aside: float = 0.0


class Data(NamedTuple):
    """The documents, and the documents' numbers of each packed row."""

    documents: list[Document]
    rows: list[list[int]]


def tunewright(_: Data, model: Path, place: Path, *, steps: int, threads: int, bare: bool = False) -> list[Mark]:
    """Tunewright's recipe, as `tunewright-trainer train` calls it, on the rows that were prepared for this mix."""
    from tests.support.training import a_job, train_here
    from tunewright_trainer.cli import load_no_more_than
    from tunewright_trainer.storage import LocalStore
    from tunewright_trainer.train import checkpoints, metrics, recipe

    shutil.copytree(place.parent / STORE, place / STORE)
    marks: list[Mark] = []
    aside = 0.0

    def timed(plain: Callable[..., Any], clock: Callable[[], float]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            nonlocal aside
            start = clock()
            try:
                return plain(*given)
            finally:
                aside += clock() - start

        return call

    plain = timed(recipe.Run.report, time.perf_counter) if not bare else lambda _: None

    def marked(run: Any) -> None:
        plain(run)
        marks.append(Mark(time.time(), time.process_time(), run.counters.tokens, run.counters.trained_tokens, aside))

    recipe.Run.report = marked  # type: ignore[method-assign, assignment]
    # The step waits for these, and takes turns with the thread that writes a checkpoint.
    metrics.History.add = timed(metrics.History.add, time.perf_counter) if not bare else lambda *_: None  # type: ignore[method-assign]
    recipe.Run.checkpoint_if_due = timed(recipe.Run.checkpoint_if_due, time.perf_counter)  # type: ignore[method-assign]
    checkpoints.Checkpoints._write = timed(checkpoints.Checkpoints._write, time.thread_time)  # type: ignore[method-assign]
    wanted = {"batchSize": ROWS_A_STEP, "maxSteps": steps, "learningRate": LEARNING_RATE}
    every = 10 * steps if bare else CHECKPOINT_EVERY
    job = a_job(model, hyperparameters=wanted, method={"lora": LORA}, resources={"cpu": str(threads)}, checkpointing={"everySteps": every})
    load_no_more_than(job)
    train_here(job, LocalStore(place / STORE), place)
    return marks


def trl(data: Data, model: Path, place: Path, *, steps: int, **_: int) -> list[Mark]:
    """TRL at its best settings on processors: packed best-fit-decreasing and so without padding, its fused head, nothing recomputed, tokens ready made."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        max_length=ROW_TOKENS,
        packing=True,
        packing_strategy="bfd",
        per_device_train_batch_size=ROWS_A_STEP,
        gradient_checkpointing=False,
        bf16=False,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
        **_plain_arguments(place, steps),
    )
    rows = Dataset.from_list([{"input_ids": ids, "labels": labels} for ids, labels in data.documents])
    marks, callback = _marking()
    options = LoraConfig(**_lora())
    SFTTrainer(model=str(model), args=arguments, train_dataset=rows, peft_config=options, callbacks=[callback]).train()
    return marks


def trainer(data: Data, model: Path, place: Path, *, steps: int, **_: int) -> list[Mark]:
    """transformers' Trainer over PEFT's adapter, with padding to the longest of a batch."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    network = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(**_lora()))
    marks, callback = _marking()
    each = ROWS_A_STEP * len(data.documents) // len(data.rows)
    arguments = TrainingArguments(per_device_train_batch_size=each, **_plain_arguments(place, steps))
    rows = [{"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)} for ids, labels in data.documents]
    collate = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(model))
    Trainer(model=network, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[callback]).train()
    return marks


def llamafactory(data: Data, model: Path, place: Path, *, steps: int, **_: int) -> list[Mark]:
    """LLaMA-Factory on rows that are packed beforehand in its own layout (documents numbered by the attention mask: `neat_packing`)."""
    from datasets import Dataset, DatasetDict
    from llamafactory.hparams import get_train_args
    from llamafactory.train.sft import run_sft

    DatasetDict({"train": Dataset.from_list([_numbered([data.documents[at] for at in row]) for row in data.rows])}).save_to_disk(
        str(place / "rows")
    )
    options = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": str(model),
        "template": "empty",
        "dataset": "rows",
        "tokenized_path": str(place / "rows"),
        "cutoff_len": ROW_TOKENS,
        "packing": True,
        "neat_packing": True,
        "flash_attn": "sdpa",
        "finetuning_type": "lora",
        "lora_rank": LORA["rank"],
        "lora_alpha": LORA["alpha"],
        "lora_dropout": LORA["dropout"],
        "lora_target": "all",
        "disable_gradient_checkpointing": True,
        "per_device_train_batch_size": ROWS_A_STEP,
        "max_steps": steps,
        "learning_rate": LEARNING_RATE,
        "output_dir": str(place / "out"),
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    marks, callback = _marking()
    run_sft(*get_train_args(options), callbacks=[callback])
    return marks


def _numbered(row: list[Document]) -> dict[str, list[int]]:
    """A row as its own packing makes it, padded to the full length."""
    made = {
        "input_ids": [token for ids, _ in row for token in ids],
        "labels": [label for _, labels in row for label in labels],
        "attention_mask": [number for number, (ids, _) in enumerate(row, start=1) for _ in ids],
        "position_ids": [position for ids, _ in row for position in range(len(ids))],
    }
    short = ROW_TOKENS - len(made["input_ids"])
    return {name: values + [IGNORED if name == "labels" else 0] * short for name, values in made.items()}


def _lora() -> dict[str, Any]:
    plain = {"r": int(LORA["rank"]), "lora_alpha": LORA["alpha"], "lora_dropout": LORA["dropout"]}
    return plain | {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def _plain_arguments(place: Path, steps: int) -> dict[str, Any]:
    """Arguments of transformers' Trainer that leave out what is not training."""
    return {
        "output_dir": str(place),
        "max_steps": steps,
        "learning_rate": LEARNING_RATE,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
    }


def _marking() -> tuple[list[Mark], Any]:
    """Marks that a trainer over transformers' makes with this callback. Tokens are counted in the batches that it computes."""
    from transformers import Trainer, TrainerCallback

    marks: list[Mark] = []
    plain = Trainer.training_step
    tokens = trained = 0

    def counted(self: Any, network: Any, inputs: dict[str, Any], *rest: Any, **options: Any) -> Any:
        nonlocal tokens, trained
        tokens += int((inputs["input_ids"] >= FIRST_TOKEN).sum())
        trained += int((inputs["labels"] != IGNORED).sum())
        return plain(self, network, inputs, *rest, **options)

    class Marker(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append(Mark(time.time(), time.process_time(), tokens, trained))

    Trainer.training_step = counted
    return marks, Marker()


def main() -> None:
    """Print the run's numbers as one JSON line."""
    kind, work, model, place, steps, threads, started = sys.argv[1:]
    data = Data(**json.loads((Path(work) / "documents.json").read_text()))
    options: dict[str, Any] = {"steps": int(steps), "threads": int(threads)}
    if kind == "bare":
        marks = tunewright(data, Path(model), Path(place), bare=True, **options)
    else:
        run = {"tunewright": tunewright, "trl": trl, "trainer": trainer, "llamafactory": llamafactory}[kind]
        marks = run(data, Path(model), Path(place), **options)
    first, last = marks[0], marks[-1]
    seconds, cpu = last.wall - first.wall, last.cpu - first.cpu
    status = Path("/proc/self/status").read_text().splitlines()
    found = {
        "pace": (last.tokens - first.tokens) / seconds,
        "trained_pace": (last.trained - first.trained) / seconds,
        "cpu_pace": (last.tokens - first.tokens) / cpu,
        "aside": (last.aside - first.aside) / seconds,
        "first_step": first.wall - float(started),
        "peak": next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM:")),
    }
    print()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
