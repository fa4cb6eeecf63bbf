"""TRL's own losses over preferences as a process of its own, since TRL leaves threads and settings behind.

``python -m tests.support.trl_preferences FOLDER...``: each folder holds `case.json` and `weights.safetensors`, and gets `metrics.json` and
`gradient.safetensors`. A case names the `objective` (dpo, reward), the `model`, the trainer's `options`, the `metrics` to tell and the `rows` of token ids;
dpo also rank and alpha of its adapter, whose weights the safetensors are; those of reward are the whole model's.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

LIMIT_SECONDS: Final = 300.0
METRICS: Final = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")
_ROOT: Final = Path(__file__).parents[2]
_PREFIX: Final = "base_model.model."


def compute(folders: Sequence[Path]) -> None:
    """Have the process do its work."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.support.trl_preferences", *map(str, folders)]
    told = subprocess.run(command, cwd=_ROOT, env=os.environ | offline, timeout=LIMIT_SECONDS, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr[-4000:]


def _dpo(case: dict[str, Any], common: dict[str, Any]) -> tuple[Any, str]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(case["model"], dtype=torch.float32),
        args=DPOConfig(max_length=None, **common),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),  # it wants one, and never looks at it
        processing_class=AutoTokenizer.from_pretrained(case["model"]),
        peft_config=LoraConfig(
            r=case["rank"], lora_alpha=case["alpha"], lora_dropout=0, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    return trainer, _PREFIX


def _reward(case: dict[str, Any], common: dict[str, Any]) -> tuple[Any, str]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    trainer = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(case["model"], dtype=torch.float32, num_labels=1),
        args=RewardConfig(max_length=None, **common),
        train_dataset=Dataset.from_list([{"chosen": "b", "rejected": "c"}]),
        processing_class=AutoTokenizer.from_pretrained(case["model"]),
    )
    return trainer, ""


_TRAINERS: Final = {"dpo": _dpo, "reward": _reward}


def _compute(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    case = json.loads((folder / "case.json").read_text())
    common = {"output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False}
    trainer, prefix = _TRAINERS[case["objective"]](case, common | case["options"])
    weights = dict(trainer.model.named_parameters())
    given = load_file(folder / "weights.safetensors")
    with torch.no_grad():
        for name, weight in given.items():
            weights[prefix + name].copy_(weight)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(case["rows"]))
    loss.backward()
    told = trainer._metrics["train"]
    means = {name: sum(told[name]) / len(told[name]) for name in case["metrics"]}
    (folder / "metrics.json").write_text(json.dumps(means | {"loss": loss.item()}))
    save_file({name: weights[prefix + name].grad.contiguous() for name in given}, folder / "gradient.safetensors")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        _compute(Path(argument))
