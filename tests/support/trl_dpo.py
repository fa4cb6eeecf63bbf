"""TRL's own DPO loss as a process of its own, since TRL leaves threads and settings behind.

``python -m tests.support.trl_dpo FOLDER...``: each folder holds `case.json` (model, beta, rank, alpha, and pairs of prompt, chosen and rejected token ids) and
`adapter.safetensors`; it gets `metrics.json` and `gradient.safetensors`.
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
    command = [sys.executable, "-m", "tests.support.trl_dpo", *map(str, folders)]
    told = subprocess.run(command, cwd=_ROOT, env=os.environ | offline, timeout=LIMIT_SECONDS, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr[-4000:]


def _compute(folder: Path) -> None:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    case = json.loads((folder / "case.json").read_text())
    trainer: Any = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(case["model"], dtype=torch.float32),
        args=DPOConfig(
            str(folder), beta=case["beta"], max_length=None, use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False
        ),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),  # it wants one, and never looks at it
        processing_class=AutoTokenizer.from_pretrained(case["model"]),
        peft_config=LoraConfig(
            r=case["rank"], lora_alpha=case["alpha"], lora_dropout=0, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    weights = dict(trainer.model.named_parameters())
    adapter = load_file(folder / "adapter.safetensors")
    with torch.no_grad():
        for name, weight in adapter.items():
            weights[_PREFIX + name].copy_(weight)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(case["pairs"]))
    loss.backward()
    means = {name: sum(trainer._metrics["train"][name]) / len(trainer._metrics["train"][name]) for name in METRICS}
    (folder / "metrics.json").write_text(json.dumps(means | {"loss": loss.item()}))
    save_file({name: weights[_PREFIX + name].grad.contiguous() for name in adapter}, folder / "gradient.safetensors")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        _compute(Path(argument))
