"""The base model's files on this machine."""

from pathlib import Path
from typing import Final

from tunewright_crds.pod import PodConfig
from tunewright_trainer.storage import Place, check_files, fetch_files, open_model, open_reward_model

# What a model is loaded from. Everything else stays where it is: pickled weights above all, but also copies in other frameworks' formats.
_WANTED: Final = (".safetensors", ".json", ".jinja", ".txt", ".model", ".tiktoken")


def fetch_base(config: PodConfig, folder: Path, *, commit: str = "") -> Path:
    """The folder with the job's base model: its own where it lies on this machine, else ``folder`` with its files downloaded.

    ``commit``: that of the hub which the data was prepared for.
    """
    return fetch_model(open_model(config, commit=commit), folder)


def fetch_judge(config: PodConfig, folder: Path) -> Path | None:
    """The folder of the job's reward model, if it names one."""
    return fetch_model(open_reward_model(config), folder) if config.spec.method.reward_model else None


def fetch_model(place: Place, folder: Path) -> Path:
    """The folder of a model's safetensors, config and tokenizer. Files in folders below are no part of a model. One that was published with hashes is checked."""
    if place.local is not None:
        place.files()
        return place.local
    top = place.key.rstrip("/") + "/"
    keys = [info.key for info in place.files() if info.key.endswith(_WANTED) and "/" not in info.key.removeprefix(top)]
    folder.mkdir(parents=True, exist_ok=True)
    fetch_files(place.store, keys, folder)
    check_files(place.store, place.key.rstrip("/"), folder)
    return folder
