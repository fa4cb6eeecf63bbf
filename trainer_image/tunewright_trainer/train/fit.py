"""Whether prepared data is for the model that shall learn it: data of an InstructionDataset may have been prepared for another one."""

from pathlib import Path
from typing import Any, Final

from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.job import Architecture, Model
from tunewright_trainer.architecture import architecture_of
from tunewright_trainer.prepare.model import read_model

# What decides how a text becomes token ids, by how the names of the files begin.
_TOKENIZER: Final = ("tokenizer", "vocab", "merges", "spiece", "special_tokens", "added_tokens", "chat_template")

_VOCABULARIES: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def check_fit(manifest: dict[str, Any], folder: Path, model: Model) -> None:
    """Refuse a model whose tokenizer, chat template or context differs from what the data was prepared for.

    `manifest` is that of the prepared data, `folder` holds the model's files.
    """
    prepared = manifest.get("model")
    if prepared is None:  # by a release that knew no InstructionDataset
        return
    own = read_model(folder)
    kind = manifest.get("architecture", Architecture.CAUSAL.value)  # releases that did not say knew no other
    if kind != architecture_of(own.config).value:
        raise _unfit(f"the data was prepared for a model that is {kind}, and {model.uri} is not", "spec.model.uri")
    for name in sorted(own.hashes | prepared["files"]):
        if name.startswith(_TOKENIZER) and own.hashes.get(name) != prepared["files"].get(name):
            raise _unfit(f"{name} of {model.uri} is not that of {prepared['uri']}, which the data was prepared for", "spec.model.uri")
    if model.chat_template and model.chat_template != manifest["chatTemplate"]:
        raise _unfit("the data was prepared with another chat template; leave this one out", "spec.model.chatTemplate")
    if own.context is not None and own.context < manifest["longest"]:
        raise _unfit(
            f"the data has examples of up to {manifest['longest']} tokens, and {model.uri} reads only {own.context}", "spec.model.uri"
        )


def check_judge(judge: Path, folder: Path) -> None:
    """Refuse a reward model that reads other tokens than the model in `folder` writes."""
    own, other = read_model(folder).hashes, read_model(judge).hashes
    shared = [name for name in _VOCABULARIES if name in own and name in other]
    if not shared or any(own[name] != other[name] for name in shared):
        raise _unfit("a reward model of another tokenizer: its vocabulary must be that of spec.model", "spec.method.rewardModel")


def _unfit(message: str, param: str) -> Refusal:
    return Refusal(FailureCode.CONFIG_INVALID, message, param=param)
