"""The model card: what a person needs to know before using the model."""

from typing import Any, Final

_OBJECTIVES: Final = {
    "sft": "sft (supervised fine-tuning)",
    "dpo": "dpo (direct preference optimisation: Rafailov et al. 2023, arXiv:2305.18290)",
}
_TOLD: Final = (
    "loss",
    "eval_loss",
    "eval_mean_token_accuracy",
    "rewards/accuracies",
    "rewards/margins",
    "eval_rewards/accuracies",
    "epoch",
    "num_tokens",
)


def model_card(source: dict[str, Any], metrics: dict[str, float], *, seq2seq: bool = False) -> str:
    """Markdown with the Hub's front matter. `seq2seq`: it is an encoder-decoder."""
    base, job = source["base"], source["job"]
    licenses = source["licenses"] or ["not stated"]
    rows = "\n".join(f"| {name} | {metrics[name]:.6g} |" for name in _TOLD if name in metrics)
    library = "peft" if source["kind"] == "adapter" else "transformers"
    return f"""---
base_model: {base}
library_name: {library}
pipeline_tag: {"text2text-generation" if seq2seq else "text-generation"}
tags: [tunewright, instruction-tuning]
---

# {source["model"]} {source["version"]}

An instruction-tuned model ({source["kind"]}) over `{base}`, made by Tunewright.

- Job: `{job["namespace"]}/{job["name"]}` (`{job["uid"]}`), step {source["step"]}
- Objective: {_OBJECTIVES[source["objective"]]}
- Data: `{source["dataset"]}`; licences: {", ".join(licenses)}
- Libraries: {", ".join(f"{name} {number}" for name, number in source["libraries"].items())}

| metric | last value |
|---|---|
{rows}

transformers loads {"the base, to which PEFT adds the adapter," if source["kind"] == "adapter" else "the model"} with `{"AutoModelForSeq2SeqLM" if seq2seq else "AutoModelForCausalLM"}`.
The chat template in `chat_template.jinja` is the one that the model was tuned with. `manifest.json` names every file with its SHA-256.
"""
