"""The model card: what a person needs to know before using the model, and to make it again."""

import re
from typing import Any, Final

import yaml

from tunewright_crds.job import JobSpec
from tunewright_crds.names import API_VERSION

_OBJECTIVES: Final = {
    "sft": "sft (supervised fine-tuning)",
    "reward": "reward (Bradley-Terry likelihood of pairs: Ouyang et al. 2022, arXiv:2203.02155)",
    "kto": "kto (Kahneman-Tversky optimisation: Ethayarajh et al. 2024, arXiv:2402.01306)",
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
_HYPERNETWORK: Final = (
    "A hypernetwork (HINT: Ivison et al. 2023, arXiv:2212.10315): it reads an instruction once and writes weights for its base, which then answers inputs. "
    "It is asked from Python with `tunewright_trainer.train.hint`, all as token ids of texts that the chat template renders. No other program reads it, and no engine serves it.\n\nHypernetwork"
)
_ENCODER_DECODER: Final = "An encoder-decoder that is instruction-tuned; transformers loads it with `AutoModelForSeq2SeqLM`.\n\nTuned model"

_HYPERNETWORK_LOADED: Final = """from tunewright_trainer.train import hint

network = hint.load(BASE_FOLDER, ".")  # the folder of {base}
answers = hint.generate(network, instructions, inputs)  # token ids"""

# How each kind is loaded. {base} is the base's address; the files are in this folder.
_LOADED: Final = {
    "adapter": """from transformers import AutoModelForCausalLM, AutoTokenizer
from peft import PeftModel

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE_FOLDER), ".")  # the folder of {base}
tokenizer = AutoTokenizer.from_pretrained(".")""",
    "reward": """from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")""",
    "onnx": """import numpy, onnxruntime

session = onnxruntime.InferenceSession("model.onnx")  # weights are beside it, in fp32
[logits] = session.run(["logits"], {{"input_ids": ids, "attention_mask": numpy.ones_like(ids)}})  # ids: int64 [texts, tokens]""",
    "gguf": """# with llama.cpp, or what is built on it
llama-server --model model.gguf --jinja""",
}
_WHOLE: Final = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")"""
_SERVED: Final = {
    "": "the programs that it is for",
    "whole": "any engine, as the model that it is",
    "vllm-lora": "vLLM as LoRA, Tunewright's own engine, PEFT",
    "convert": "Tunewright's own engine, PEFT; vLLM once it is converted to LoRA (`output.formats: [lora]`) or merged",
    "merge": "Tunewright's own engine, PEFT; vLLM once it is merged (`output.formats: [merged]`)",
    "transformers": "Tunewright's own engine, PEFT; it can be neither merged nor converted to LoRA",
}
_SEQ2SEQ_SERVED: Final = {
    "adapter": "Tunewright's own engine, PEFT",
    "merged": "Tunewright's own engine, transformers",
    "full": "Tunewright's own engine, transformers",
}
_LIBRARIES: Final = {"adapter": "peft", "onnx": "onnx", "gguf": "gguf"}


def model_card(
    source: dict[str, Any], metrics: dict[str, float], spec: JobSpec, *, seq2seq: bool = False, hypernetwork: bool = False
) -> str:
    """Markdown with the Hub's front matter. ``source`` is the artefact's lineage, ``spec`` that of the job.

    ``seq2seq``: it is an encoder-decoder; ``hypernetwork``: the adapter is one that writes weights for it.
    """
    base, job, kind = source["base"], source["job"], source["kind"]
    licenses = source["licenses"] or ["not stated"]
    rows = "\n".join(f"| {name} | {metrics[name]:.6g} |" for name in _TOLD if name in metrics)
    judge = source["objective"] == "reward"
    task = "text-classification" if judge else "text2text-generation" if seq2seq else "text-generation"
    what = _JUDGE if judge else _HYPERNETWORK if hypernetwork else _ENCODER_DECODER if seq2seq else "An instruction-tuned model"
    of_data = [f"InstructionDataset `{spec.dataset.ref}`"] if spec.dataset.ref else [f"`{one.uri}`" for one in spec.dataset.sources]
    template = (
        "The chat template that the model was tuned with is in the file."
        if kind == "gguf"
        else "The chat template in `chat_template.jinja` is the one that the model was tuned with."
    )
    library = "tunewright" if hypernetwork else _LIBRARIES.get(kind, "transformers")
    served = "no engine yet" if hypernetwork else _SEQ2SEQ_SERVED[kind] if seq2seq else _SERVED[source["servability"]]
    loaded = _HYPERNETWORK_LOADED if hypernetwork else _LOADED.get(kind, _WHOLE)
    if seq2seq:
        loaded = loaded.replace("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
    return f"""---
{_of_hub(base)}license: other
license_name: those-of-base-and-data
library_name: {library}
pipeline_tag: {task}
tags: [tunewright, instruction-tuning]
---

# {source["model"]} {source["version"]}

{what} ({kind}) over `{base}`, made by Tunewright.

- Job: `{job["namespace"]}/{job["name"]}` (`{job["uid"]}`), step {source["step"]}
- Objective: {_OBJECTIVES[source["objective"]]}
- Data: {", ".join(of_data)}; as prepared: `{source["dataset"]}`; licences: {", ".join(licenses)}
- Served by: {served}
- Libraries: {", ".join(f"{name} {number}" for name, number in source["libraries"].items())}

| metric | last value |
|---|---|
{rows}

{template} `manifest.json` names every file with its SHA-256.

## Load it

{_fenced(loaded.format(base=base), "sh" if kind == "gguf" else "python")}

## The job that made it

{_fenced(_manifest(job, spec), "yaml")}
"""


def _of_hub(base: str) -> str:
    """The hub takes the name of one of its own models there, and nothing else."""
    found = re.fullmatch(r"hf://([^@]+)(@.*)?", base)
    return f"base_model: {found[1]}\n" if found else ""


def _manifest(job: dict[str, str], spec: JobSpec) -> str:
    """The job as it may be applied again; what was left to its default is left out."""
    plain = spec.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    metadata = {"name": job["name"], "namespace": job["namespace"]}
    document = {"apiVersion": API_VERSION, "kind": "InstructionTuningJob", "metadata": metadata, "spec": plain}
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)


def _fenced(text: str, language: str) -> str:
    """A block of code; its fence is longer than any in ``text``."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
