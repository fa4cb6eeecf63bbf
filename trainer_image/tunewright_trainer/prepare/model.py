"""What preparing needs of the base model, and the mistakes in it that can be found before a GPU is asked for. Weights are not downloaded."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.job import Architecture
from tunewright_crds.pod import PodConfig
from tunewright_trainer.architecture import architecture_of, check_seq2seq, check_stated
from tunewright_trainer.plan.shapes import PARAM, Weight, parse_config, read_shapes
from tunewright_trainer.storage import ObjectMissing, Place, fetch_files, open_model
from tunewright_trainer.storage.folders import sha256_of

PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_TOKENIZERS: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
# Each is as long as a tokenizer and its settings may need, and no weights.
_SMALL: Final = (".json", ".jinja", ".txt", ".model", ".tiktoken")
_CAUSAL: Final = ("ForCausalLM", "LMHeadModel")
_CONTEXT_KEYS: Final = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")


@dataclass(frozen=True)
class BaseModel:
    """A base model's config and tokenizer on this machine."""

    folder: Path
    config: dict[str, Any]
    hashes: dict[str, str]
    commit: str = ""
    """The hub's version of it, if it is from there."""
    weights: tuple[Weight, ...] = ()
    """Shapes of its weights, where they were read."""

    @property
    def context(self) -> int | None:
        """Longest text in tokens that its positions allow, if it says; relative positions, as T5 has them, allow any."""
        if "relative_attention_num_buckets" in self.config:
            return None
        inner = self.config.get("text_config")
        both = {**(inner if isinstance(inner, dict) else {}), **self.config}
        found = [both[key] for key in _CONTEXT_KEYS if isinstance(both.get(key), int) and both[key] > 0]
        return found[0] if found else None

    @property
    def seq2seq(self) -> bool:
        """Whether an encoder reads the prompt and a decoder answers."""
        return architecture_of(self.config) is Architecture.SEQ2SEQ

    @property
    def vocabulary(self) -> int | None:
        """How many token ids it has, if it says."""
        size = self.config.get("vocab_size")
        return size if isinstance(size, int) else None


def fetch_base_model(config: PodConfig, folder: Path) -> BaseModel:
    """Check the files of the job's base model and bring the small ones here.

    Raises `Refusal`: ModelNotFound (also for weights that are cut off), ModelUnsafe (only pickles), ModelUnsupported.
    """
    place = open_model(config)
    names = _names(place)
    _check_names(place, names)
    if place.local is not None:
        folder = place.local
    else:
        top = place.key.rstrip("/")
        folder.mkdir(parents=True, exist_ok=True)
        fetch_files(place.store, [f"{top}/{name}" if top else name for name in names if _is_small(name)], folder)
    return replace(read_model(folder, commit=place.store.commit), weights=read_shapes(place))


def read_model(folder: Path, *, commit: str = "") -> BaseModel:
    """The model whose files are in `folder`."""
    small = sorted(path.name for path in folder.iterdir() if _is_small(path.name) and path.is_file())
    return BaseModel(folder, _config(folder), {name: sha256_of(folder / name) for name in small}, commit)


def _is_small(name: str) -> bool:
    return name.endswith(_SMALL) and not name.endswith(".safetensors.index.json")


def check_supported(model: BaseModel, wanted: Architecture) -> None:
    """Refuse a model of another kind than is `wanted`, or that is no language model known to transformers."""
    if check_stated(wanted, model.config) is Architecture.SEQ2SEQ:
        check_seq2seq(model.config, param=PARAM)
    else:
        _check_causal(model)


def _check_causal(model: BaseModel) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = model.config.get("model_type")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        said = f"model_type {str(kind)[:64]!r}" if kind else "a config.json without model_type"
        raise Refusal(
            FailureCode.MODEL_UNSUPPORTED,
            f"{said} is no causal language model that transformers knows without the model's own code",
            param=PARAM,
        )
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    known = [known] if isinstance(known, str) else known
    # Some encoders, such as BERT, have a causal form beside their own: what the weights are is in `architectures`.
    named = [str(name) for name in model.config.get("architectures") or []]
    if named and not any(name in known or name.endswith(_CAUSAL) for name in named):
        raise Refusal(
            FailureCode.MODEL_UNSUPPORTED, f"the weights are those of {', '.join(named)[:128]}, no causal language model", param=PARAM
        )


def _names(place: Place) -> set[str]:
    """Names of the files in the folder itself; files in folders below are no part of a model."""
    top = place.key.rstrip("/")
    return {name for info in place.files() if "/" not in (name := info.key.removeprefix(f"{top}/" if top else ""))}


def _check_names(place: Place, names: set[str]) -> None:
    if not any(name.endswith(".safetensors") for name in names):
        if any(name.endswith(PICKLES) for name in names):
            raise Refusal(FailureCode.MODEL_UNSAFE, f"{place.uri} holds pickled weights and no *.safetensors", param=PARAM)
        raise ObjectMissing(FailureCode.MODEL_NOT_FOUND, f"{place.uri} holds no *.safetensors", param=PARAM)
    if "config.json" not in names:
        raise ObjectMissing(FailureCode.MODEL_NOT_FOUND, f"{place.uri} holds no config.json", param=PARAM)
    if not names.intersection(_TOKENIZERS):
        raise ObjectMissing(FailureCode.MODEL_NOT_FOUND, f"{place.uri} holds no tokenizer ({', '.join(_TOKENIZERS)})", param=PARAM)


def _config(folder: Path) -> dict[str, Any]:
    return parse_config((folder / "config.json").read_bytes())
