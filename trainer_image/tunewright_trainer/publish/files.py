"""The files of an artefact, in the layouts that the field's other tools read."""

import json
import shutil
from pathlib import Path
from typing import Any, Final

import torch

from tunewright_trainer.architecture import auto_model
from tunewright_trainer.train import attention, hint
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
CONFIG_FILE: Final = "adapter_config.json"
ENERGY: Final = 0.9999999  # share of the squared singular values that a conversion keeps
TEMPLATE_FILE: Final = "chat_template.jinja"


def write_adapter(tuned: Tuned, folder: Path, *, base_uri: str) -> None:
    """PEFT's layout: adapter_model.safetensors and adapter_config.json, which names the base by its address rather than by a local folder."""
    assert tuned.peft is not None
    tuned.peft.save_pretrained(folder, safe_serialization=True)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's own card has gaps to fill in; ours comes later
    _name_base(folder, base_uri)


def write_converted(tuned: Tuned, folder: Path, *, base_uri: str) -> None:
    """The adapter as LoRA matrices that make up nearly all of its changes (`ENERGY`), all of the rank that the widest of them needs."""
    from peft import convert_to_lora
    from safetensors.torch import save_file

    config, weights = convert_to_lora(tuned.peft, rank=ENERGY)
    rank = max(weight.shape[0] for name, weight in weights.items() if name.endswith("lora_A.weight"))
    config.r = config.lora_alpha = rank
    config.rank_pattern, config.alpha_pattern = {}, {}
    config.task_type = "CAUSAL_LM"
    save_file({name: _padded(name, weight, rank) for name, weight in weights.items()}, folder / "adapter_model.safetensors")
    config.save_pretrained(folder)
    _name_base(folder, base_uri)


def _padded(name: str, weight: torch.Tensor, rank: int) -> torch.Tensor:
    """With zeros up to the rank: the product stays the same, and programs that know but one rank can read it."""
    missing = rank - weight.shape[0 if name.endswith("lora_A.weight") else 1]
    sides = (0, 0, 0, missing) if name.endswith("lora_A.weight") else (0, missing)
    return torch.nn.functional.pad(weight.detach().cpu(), sides).contiguous()


def adapter_config(folder: Path) -> dict[str, Any]:
    """What PEFT says of a written adapter."""
    found: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    return found


def _name_base(folder: Path, base_uri: str) -> None:
    settings = adapter_config(folder) | {"base_model_name_or_path": base_uri, "inference_mode": True}
    (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_hypernetwork(tuned: Tuned, folder: Path, *, base_uri: str) -> None:
    """The layout of `tunewright_trainer.train.hint`, which no other program reads."""
    hint.save(tuned.network, folder, base_uri=base_uri)


def write_whole(network: Any, folder: Path, *, dtype: torch.dtype) -> None:
    """Safetensors and config.json of a whole model, in the base's own precision. Training's attention is not written: no other program has it.

    Rounds ``network`` itself, to hold it in memory once.
    """
    if network.config._attn_implementation == attention.NAME:
        network.config._attn_implementation = "sdpa"
    rounded(network, dtype).save_pretrained(folder)


def rounded(network: Any, dtype: torch.dtype) -> Any:
    """``network`` itself with its weights in ``dtype``. Buffers stay as they are: rotations of positions in half precision would be another model."""
    for weight in network.parameters():
        weight.data = weight.data.to(dtype)
    return network


def merged(tuned: Tuned, base_folder: Path) -> Any:
    """The model with the adapter added into its weights. Consumes the adapter of ``tuned``.

    Weights in 4 bits are not merged into: rounding again would lose what was learned, so the adapter goes into the base as it was published.
    """
    assert tuned.peft is not None
    if not getattr(tuned.network, "is_quantized", False):
        return tuned.peft.merge_and_unload()
    from peft import get_peft_model

    adapter = {name: weight.detach() for name, weight in tuned.trainable.items() if not name.startswith(f"{HEAD}.")}
    base = auto_model(base_folder).from_pretrained(base_folder, dtype=torch.float32, use_safetensors=True, local_files_only=True)
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
