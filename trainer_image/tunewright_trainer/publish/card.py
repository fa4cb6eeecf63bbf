"""The model card: what a person needs to know before using the model."""

from typing import Any, Final

_OBJECTIVES: Final = {
    "sft": "sft (supervised fine-tuning)",
    "reward": "reward (Bradley-Terry likelihood of pairs: Ouyang et al. 2022, arXiv:2203.02155)",
    "dpo": "dpo (direct preference optimisation: Rafailov et al. 2023, arXiv:2305.18290)",
    "ppo": "ppo (proximal policy optimisation: Schulman et al. 2017, arXiv:1707.06347)",
    "grpo": "grpo (group relative policy optimisation: Shao et al. 2024, arXiv:2402.03300)",
    "rloo": "rloo (REINFORCE leave-one-out: Ahmadian et al. 2024, arXiv:2402.14740)",
}
_TOLD: Final = (
    "loss",
    "eval_loss",
    "eval_mean_token_accuracy",
    "rewards/accuracies",
    "rewards/margins",
    "eval_rewards/accuracies",
    "reward",
    "eval_reward",
    "kl",
    "objective/kl",
    "accuracy",
    "margin",
    "eval_accuracy",
    "epoch",
    "num_tokens",
)


_JUDGE: Final = (
    "A reward model: it gives no answers but judges them, by one number for a whole conversation, the higher the better. Load it with transformers' "
    "`AutoModelForSequenceClassification` (num_labels=1), render the conversation with the chat template, and read the one logit. Only differences between "
    "answers to one prompt mean something.\n\nReward model"
)


def model_card(source: dict[str, Any], metrics: dict[str, float]) -> str:
    """Markdown with the Hub's front matter."""
    base, job = source["base"], source["job"]
    licenses = source["licenses"] or ["not stated"]
    rows = "\n".join(f"| {name} | {metrics[name]:.6g} |" for name in _TOLD if name in metrics)
    judge = source["objective"] == "reward"
    task = "text-classification" if judge else "text-generation"
    what = _JUDGE if judge else "An instruction-tuned model"
    library = "peft" if source["kind"] == "adapter" else "transformers"
    return f"""---
base_model: {base}
library_name: {library}
pipeline_tag: {task}
tags: [tunewright, instruction-tuning]
---

# {source["model"]} {source["version"]}

{what} ({source["kind"]}) over `{base}`, made by Tunewright.

- Job: `{job["namespace"]}/{job["name"]}` (`{job["uid"]}`), step {source["step"]}
- Objective: {_OBJECTIVES[source["objective"]]}
- Data: `{source["dataset"]}`; licences: {", ".join(licenses)}
- Libraries: {", ".join(f"{name} {number}" for name, number in source["libraries"].items())}

| metric | last value |
|---|---|
{rows}

The chat template in `chat_template.jinja` is the one that the model was tuned with. `manifest.json` names every file with its SHA-256.
"""
