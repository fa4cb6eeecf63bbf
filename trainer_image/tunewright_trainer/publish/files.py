"""The files of an artefact, in the layouts that the field's other tools read."""

import json
import shutil
from pathlib import Path
from typing import Any, Final

import torch

from tunewright_trainer.train.model import HEAD, Tuned

TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "generation_config.json",
)
TEMPLATE_FILE: Final = "chat_template.jinja"


def write_adapter(tuned: Tuned, folder: Path, *, base_uri: str) -> None:
    """PEFT's layout: adapter_model.safetensors and adapter_config.json, which names the base by its address rather than by a local folder."""
    assert tuned.peft is not None
    tuned.peft.save_pretrained(folder, safe_serialization=True)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's own card has gaps to fill in; ours comes later
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings |= {"base_model_name_or_path": base_uri, "inference_mode": True}
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_whole(network: Any, folder: Path, *, dtype: torch.dtype) -> None:
    """Safetensors and config.json of a whole model, in the base's own precision. Training's attention is not written: no other program has it.

    Rounds ``network`` itself, to hold it in memory once.
    """
    network.config._attn_implementation = "sdpa"
    network.to(dtype).save_pretrained(folder)


def merged(tuned: Tuned, base_folder: Path) -> Any:
    """The model with the adapter added into its weights. Consumes the adapter of ``tuned``.

    Weights in 4 bits are not merged into: rounding again would lose what was learned, so the adapter goes into the base as it was published.
    """
    assert tuned.peft is not None
    if not getattr(tuned.network, "is_quantized", False):
        return tuned.peft.merge_and_unload()
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    adapter = {name: weight.detach() for name, weight in tuned.trainable.items() if not name.startswith(f"{HEAD}.")}
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32, use_safetensors=True, local_files_only=True)
    wrapped = get_peft_model(base.to(tuned.device), tuned.peft.peft_config["default"])
    Tuned(network=base, peft=wrapped, device=tuned.device, compute=torch.float32, keeps_logits=False).load_weights(adapter)
    return wrapped.merge_and_unload()


def original_dtype(base_folder: Path) -> torch.dtype:
    """The precision that the base's weights are published in."""
    settings = json.loads((base_folder / "config.json").read_text(encoding="utf-8"))
    name = settings.get("dtype") or settings.get("torch_dtype") or "float32"
    found = getattr(torch, str(name), torch.float32)
    return found if isinstance(found, torch.dtype) else torch.float32


def write_tokenizer(base_folder: Path, folder: Path, *, job_template: str) -> None:
    """The base's tokenizer, byte by byte, and the chat template that the data was rendered with, where every reader looks for it."""
    from tunewright_trainer.prepare.template import chat_template

    for name in TOKENIZER_FILES:
        if (base_folder / name).exists() and not (folder / name).exists():
            shutil.copyfile(base_folder / name, folder / name)
    template = chat_template(base_folder, job_template)
    (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    path = folder / "tokenizer_config.json"
    if path.exists():
        settings = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(settings | {"chat_template": template}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def pad_with(folder: Path, token: str) -> None:
    """Have the tokenizer of ``folder`` pad with the token that the reward model there takes for padding."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        if path.exists():
            settings = json.loads(path.read_text(encoding="utf-8"))
            path.write_text(json.dumps(settings | {"pad_token": token}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
