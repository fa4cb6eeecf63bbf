"""One run of `benchmarks.training`, in a process of its own."""

import json
import sys
import time
from pathlib import Path
from typing import Any

Marks = list[tuple[float, float, int]]  # wall clock, CPU clock, tokens so far, after each step


def ours(documents: list[Any], model: Path, place: Path, *, packed: bool, steps: int, threads: int) -> Marks:
    """Tunewright's recipe, as `tunewright-trainer train` calls it."""
    from benchmarks.training import DOCUMENTS_A_STEP, LORA, ROW_TOKENS, ROWS_A_STEP
    from tests.support.training import a_job, publish_data, train_here
    from tunewright_trainer.prepare.pack import best_fit_decreasing
    from tunewright_trainer.storage import LocalStore
    from tunewright_trainer.train import recipe

    rows = best_fit_decreasing([len(ids) for ids, _ in documents], ROW_TOKENS) if packed else [[at] for at in range(len(documents))]
    store = LocalStore(place / "store")
    publish_data(store, place, train=[[documents[at] for at in row] for row in rows])
    marks: Marks = []
    plain = recipe.Run.step

    def marked(run: Any) -> None:
        plain(run)
        marks.append((time.time(), time.process_time(), run.counters.tokens))

    recipe.Run.step = marked  # type: ignore[method-assign, assignment]
    wanted = {"batchSize": ROWS_A_STEP if packed else DOCUMENTS_A_STEP, "maxSteps": steps, "learningRate": 1e-4}
    job = a_job(model, hyperparameters=wanted, method={"lora": LORA}, resources={"cpu": str(threads)}, checkpointing={"everySteps": 1000})
    train_here(job, store, place)
    return marks


def trainer(documents: list[Any], model: Path, place: Path, *, steps: int) -> Marks:
    """transformers' Trainer over PEFT's adapter, with padding to the longest of a batch."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    from benchmarks.training import DOCUMENTS_A_STEP, LORA

    options = LoraConfig(
        r=int(LORA["rank"]), lora_alpha=LORA["alpha"], lora_dropout=LORA["dropout"], target_modules="all-linear", task_type="CAUSAL_LM"
    )
    network = get_peft_model(AutoModelForCausalLM.from_pretrained(model), options)
    marks: Marks = []
    tokens = 0
    collate = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(model))

    def counted(rows: list[Any]) -> Any:
        nonlocal tokens
        batch = collate(rows)
        tokens += int(batch["attention_mask"].sum())
        return batch

    class Marker(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append((time.time(), time.process_time(), tokens))

    arguments = TrainingArguments(
        output_dir=str(place),
        per_device_train_batch_size=DOCUMENTS_A_STEP,
        max_steps=steps,
        learning_rate=1e-4,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
    )
    rows = [{"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)} for ids, labels in documents]
    Trainer(model=network, args=arguments, train_dataset=rows, data_collator=counted, callbacks=[Marker()]).train()
    return marks


def main() -> None:
    """Print the run's numbers as one JSON line."""
    kind, work, model, place, steps, threads, started = sys.argv[1:]
    documents = json.loads((Path(work) / "documents.json").read_text())
    if kind == "trainer":
        marks = trainer(documents, Path(model), Path(place), steps=int(steps))
    else:
        marks = ours(documents, Path(model), Path(place), packed=kind == "packed", steps=int(steps), threads=int(threads))
    (first, cpu_first, tokens_first), (last, cpu_last, tokens_last) = marks[0], marks[-1]
    status = Path("/proc/self/status").read_text().splitlines()
    print()
    print(
        json.dumps(
            {
                "pace": (tokens_last - tokens_first) / (last - first),
                "cpu_pace": (tokens_last - tokens_first) / (cpu_last - cpu_first),
                "first_step": first - float(started),
                "peak": next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:")),
            }
        )
    )


if __name__ == "__main__":
    main()
