"""One run of TRL's data preparation for `benchmarks.data`, in a process of its own: all that SFTTrainer does before the first step."""

import sys
from typing import Any


def main() -> None:
    """Arguments: rows, model, output folder, processes."""
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    from benchmarks.data import ROW_TOKENS

    data, model, output, processes = sys.argv[1:5]

    def conversation(row: dict[str, str]) -> dict[str, Any]:
        question = f"{row['instruction']}\n\n{row['input']}"
        return {"prompt": [{"role": "user", "content": question}], "completion": [{"role": "assistant", "content": row["output"]}]}

    rows = load_dataset("json", data_files=data, split="train")
    rows = rows.map(conversation, remove_columns=["instruction", "input", "output"], num_proc=int(processes))
    options = SFTConfig(
        output_dir=output, max_length=ROW_TOKENS, packing=True, dataset_num_proc=int(processes), report_to=[], use_cpu=True, bf16=False
    )
    trainer = SFTTrainer(model=model, args=options, train_dataset=rows)
    print(len(trainer.train_dataset), "packed rows")


if __name__ == "__main__":
    main()
