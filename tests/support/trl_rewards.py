"""TRL's own losses of GRPO and RLOO as a process of its own, since TRL leaves threads and settings behind.

``python -m tests.support.trl_rewards FILE``: a list of cases in JSON, each with `objective`, `clip`, `beta`, `loss_type`, `longest` and `answers`, of which each has an
`advantage` and, token by token, log-probabilities by the `policy`, when it was drawn (`old`) and by the `reference`. Gives for each its `loss`, and the `gradient` by
the log-probabilities of the policy, answers end to end.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

LIMIT_SECONDS: Final = 300.0
_ROOT: Final = Path(__file__).parents[2]


def compute(cases: list[dict[str, Any]], file: Path) -> list[dict[str, Any]]:
    """What TRL makes of the cases."""
    file.write_text(json.dumps(cases))
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.support.trl_rewards", str(file)]
    told = subprocess.run(command, cwd=_ROOT, env=os.environ | offline, timeout=LIMIT_SECONDS, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr[-4000:]
    found: list[dict[str, Any]] = json.loads(file.read_text())
    return found


def _computed(case: dict[str, Any]) -> dict[str, Any]:
    import torch
    from torch.nn.utils.rnn import pad_sequence
    from trl import GRPOTrainer, RLOOTrainer

    answers = case["answers"]
    policy, old, reference = (
        pad_sequence([torch.tensor(answer[name]) for answer in answers], batch_first=True) for name in ("policy", "old", "reference")
    )
    mask = pad_sequence([torch.ones(len(answer["policy"]), dtype=torch.long) for answer in answers], batch_first=True)
    policy.requires_grad_(True)
    names = ("off_policy_mask_threshold", "use_vllm", "aux_loss_enabled", "_entropy_bonus_enabled", "use_liger_kernel")
    trainer: Any = SimpleNamespace(
        **dict.fromkeys(names[1:], False),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        importance_sampling_level="token",
        beta=case["beta"],
        epsilon_low=case["clip"],
        epsilon_high=case["clip"],
        loss_type=case["loss_type"],
        max_completion_length=case["longest"],
        current_gradient_accumulation_steps=1,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        model=SimpleNamespace(training=True),
        accelerator=_Accelerator(),
        _metrics={"train": _Told(), "eval": _Told()},
        _get_per_token_logps_and_entropies=lambda *_, **__: (policy, torch.zeros_like(policy), None),
    )
    grpo = case["objective"] == "grpo"
    inputs = {
        "prompt_ids": torch.zeros(len(answers), 1, dtype=torch.long),
        "prompt_mask": torch.ones(len(answers), 1, dtype=torch.long),
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": torch.tensor([answer["advantage"] for answer in answers]),
        "old_per_token_logps": old,
        "old_logps": (old * mask).sum(1),
        "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum(),
    }
    loss = (GRPOTrainer if grpo else RLOOTrainer)._compute_loss(trainer, None, inputs)
    loss.backward()
    return {"loss": loss.item(), "gradient": policy.grad[mask.bool()].tolist()}


class _Accelerator:
    """One process."""

    num_processes = 1

    def gather(self, value: Any) -> Any:
        return value

    def reduce(self, value: Any, **_: Any) -> Any:
        return value


class _Told(dict[str, list[float]]):
    def __missing__(self, name: str) -> list[float]:
        return self.setdefault(name, [])


if __name__ == "__main__":
    told = Path(sys.argv[1])
    told.write_text(json.dumps([_computed(case) for case in json.loads(told.read_text())]))
