"""One run of LLaMA-Factory's data preparation for `benchmarks.data`, in a process and an environment of its own."""

import json
import sys
from pathlib import Path


def main() -> None:
    """Arguments: rows, model, output folder, processes."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    from benchmarks.data import ROW_TOKENS

    data, model, output, processes = sys.argv[1:5]
    folder = Path(output)
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": data}}))
    options = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": model,
        "template": "chatml",
        "dataset": "rows",
        "dataset_dir": output,
        "cutoff_len": ROW_TOKENS,
        "packing": True,
        "neat_packing": True,
        "preprocessing_num_workers": int(processes),
        "output_dir": output,
        "report_to": "none",
        "use_cpu": True,
    }
    model_options, data_options, training_options, _, _ = get_train_args(options)
    tokenizer = load_tokenizer(model_options)["tokenizer"]
    template = get_template_and_fix_tokenizer(tokenizer, data_options)
    found = get_dataset(template, model_options, data_options, training_options, stage="sft", tokenizer=tokenizer)
    print(len(found["train_dataset"]), "packed rows")


if __name__ == "__main__":
    main()
