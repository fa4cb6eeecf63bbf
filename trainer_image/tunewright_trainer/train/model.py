"""The model to tune: loaded from safetensors only, with its tuner, precision and device."""

import contextlib
import inspect
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from tunewright_crds.errors import FailureCode, Refusal
from tunewright_crds.hyperparameters import Precision
from tunewright_crds.job import Architecture, JobSpec
from tunewright_crds.method import PROMPT_LEARNING, Objective, Tuner
from tunewright_trainer.architecture import auto_model, check_method, check_seq2seq, check_stated, is_seq2seq
from tunewright_trainer.prepare.model import read_model
from tunewright_trainer.train import attention, reward_model, tuners
from tunewright_trainer.train.data import IGNORED, Ints, MicroBatch
from tunewright_trainer.train.layout import LEAST_SHARED, Document, lay_out

log = logging.getLogger(__name__)

# Documents apart must give the logits that they give alone, to rounding.
ISOLATION_TOLERANCE: Final = 1e-3
HEAD: Final = "tunewright_head"  # of the names of weights beside the network
_BF16_CAPABILITY: Final = (8, 0)  # Ampere, the first with bf16 tensor cores


@dataclass
class Tuned:
    """A model in training.

    ``network`` is the plain transformers model, with the adapter's layers in it; ``peft`` wraps it, if there is an adapter. What is trained by
    prompt learning (``prompted``) is in no layer: there ``network`` is the wrapper, and each document needs a pass of its own.
    """

    network: Any
    peft: Any | None
    device: torch.device
    compute: torch.dtype
    keeps_logits: bool
    prompted: bool = False
    head: torch.nn.Module | None = None
    """What is trained beside the network and not published."""

    @property
    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The weights that change, by name."""
        beside = {f"{HEAD}.{name}": weight for name, weight in self.head.named_parameters()} if self.head else {}
        return {name: weight for name, weight in self.network.named_parameters() if weight.requires_grad} | beside

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Frozen weights are held in the precision of the forward pass, trained ones always in fp32; this brings them together."""
        if self.compute is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute)

    def logits(self, batch: MicroBatch) -> torch.Tensor:
        """Logits [targets, vocabulary] in fp32 where something is learned, and nowhere else: on long prompts the output head is most of the work.

        Must be called within `attention.documents`.
        """
        with self.autocast():
            if self.prompted:
                return torch.cat([self._logits(**document) for document in _apart(batch)]).float()
            return self._logits(batch.input_ids, batch.keep, position_ids=batch.position_ids).float()

    def _logits(self, input_ids: torch.Tensor, keep: torch.Tensor, **more: Any) -> torch.Tensor:
        if self.keeps_logits:
            answer = self.network(input_ids=input_ids, use_cache=False, logits_to_keep=keep, **more)
            logits: torch.Tensor = answer.logits[0]
            return logits
        return self.network(input_ids=input_ids, use_cache=False, **more).logits[0, keep]  # type: ignore[no-any-return]

    def load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Put saved weights into the model; they must be exactly those that it trains."""
        own = self.trainable
        if weights.keys() != own.keys():
            raise ValueError("the saved weights are not those of this model")
        with torch.no_grad():
            for name, weight in own.items():
                weight.copy_(weights[name])


def choose_device(spec: JobSpec) -> torch.device:
    """The GPU where the job asks for one, the processors otherwise."""
    if spec.resources.gpus_per_node and not torch.cuda.is_available():
        raise Refusal(
            FailureCode.CONFIG_INVALID, "the job asks for a GPU and none is usable on this machine", param="spec.resources.gpusPerNode"
        )
    return torch.device("cuda" if spec.resources.gpus_per_node else "cpu")


def choose_precision(spec: JobSpec, device: torch.device) -> torch.dtype:
    """The precision of the forward pass."""
    wanted = spec.hyperparameters.precision
    if wanted is Precision.AUTO:
        fast = device.type == "cuda" and torch.cuda.get_device_capability() >= _BF16_CAPABILITY
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if wanted is Precision.BF16 else torch.float32


def load(folder: Path, spec: JobSpec, *, steps: int = 0, device: torch.device | None = None) -> Tuned:
    """The base model of ``folder`` with the job's tuner, ready to train for so many steps; an adapter begins as the seed says. ``device``: default the job's.

    Raises `Refusal`: ModelUnsupported, ModelNotFound, or ConfigInvalid naming the field.
    """
    check_kind(folder, spec)
    tuned = load_untuned(folder, spec, device=device)
    network = tuned.network
    tuned.prompted = spec.method.tuner in PROMPT_LEARNING
    if network.config.is_encoder_decoder:
        check_beginning(network.config)
    elif not tuned.prompted:
        check_isolation(network)
    tuned.peft = tuners.apply(network, spec, steps=steps)
    if tuned.prompted:
        tuned.network = tuned.peft
    if spec.hyperparameters.gradient_checkpointing:
        # Not re-entrant: the re-entrant kind needs inputs with gradients, which a frozen embedding has not.
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return tuned


def load_untuned(folder: Path, spec: JobSpec, *, device: torch.device | None = None) -> Tuned:
    """The model of ``folder`` as it is, on the job's device or ``device``, and in the job's precision. Raises `Refusal` as `load` does."""
    device = device or choose_device(spec)
    compute = choose_precision(spec, device)
    network = load_base(folder, spec, device=device, compute=compute)
    keeps_logits = "logits_to_keep" in inspect.signature(type(network).forward).parameters
    return Tuned(network=network, peft=None, device=device, compute=compute, keeps_logits=keeps_logits)


def check_kind(folder: Path, spec: JobSpec) -> None:
    """Refuse an encoder-decoder where the job wants what it cannot do; other models are checked by `load_base`."""
    config = read_model(folder).config
    if check_stated(spec.model.architecture, config) is Architecture.SEQ2SEQ:
        check_seq2seq(config, param="spec.model.uri")
        check_method(spec)


def _apart(batch: MicroBatch) -> Iterator[dict[str, torch.Tensor]]:
    """The documents in which something is learned: ids [1, tokens], and the learned positions, counted from the end as virtual tokens may stand before."""
    for document in batch.documents:
        keep = np.flatnonzero(document.labels != IGNORED) - 1 - document.tokens
        if len(keep):
            ids, kept = (torch.from_numpy(part).to(batch.input_ids.device) for part in (document.input_ids, keep))
            yield {"input_ids": ids[None], "keep": kept}


def load_base(folder: Path, spec: JobSpec, *, device: torch.device, compute: torch.dtype) -> Any:
    """The base model. Only safetensors are read and no code of the model's own is run."""
    from transformers import AutoModelForSequenceClassification
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a pod's log is lines
    attention.register()
    whole = spec.method.tuner is Tuner.FULL
    options: dict[str, Any] = {"dtype": torch.float32 if whole else compute}
    if not is_seq2seq(folder):
        options["attn_implementation"] = "sdpa" if spec.method.tuner in PROMPT_LEARNING else attention.NAME
    if spec.method.tuner is Tuner.QLORA:
        options |= _four_bits(compute, device)
    judge = spec.method.objective is Objective.REWARD
    if judge:
        options |= {"num_labels": 1, "pad_token_id": reward_model.padding_of(folder)[0]}
    kind = AutoModelForSequenceClassification if judge else auto_model(folder)
    try:
        network, told = kind.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False, local_files_only=True, output_loading_info=True, **options
        )
    except (ValueError, KeyError, OSError, ImportError, RuntimeError) as error:
        raise Refusal(
            FailureCode.MODEL_UNSUPPORTED, f"the model cannot be loaded: {str(error).splitlines()[0][:300]}", param="spec.model.uri"
        ) from error
    for layer in network.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):  # measuring would leave weights behind that compute otherwise
            layer.support_avx512bf16_for_cpu = False
    absent = sorted(told["missing_keys"])
    if judge and reward_model.HEAD in absent:  # a base that is a reward model already has one
        reward_model.begin_head(network, seed=spec.hyperparameters.seed)
        absent.remove(reward_model.HEAD)
    if absent:
        raise Refusal(
            FailureCode.MODEL_NOT_FOUND, f"the safetensors files lack {len(absent)} weights, such as {absent[0]}", param="spec.model.uri"
        )
    network = network.to(device) if spec.method.tuner is not Tuner.QLORA else network
    check_numbers(network)
    return network


@torch.no_grad()
def check_numbers(network: torch.nn.Module) -> None:
    """Refuse weights that are no numbers: nothing can be learned with them, or only until a row comes by that reads them."""
    for name, weight in network.named_parameters():
        if weight.is_floating_point() and weight.numel() and not all(math.isfinite(end) for end in torch.aminmax(weight)):
            raise Refusal(
                FailureCode.MODEL_NOT_FOUND,
                f"weight {name} holds NaN or infinity: the safetensors files are broken, or overflowed when they were converted",
                param="spec.model.uri",
            )


def check_beginning(config: Any) -> None:
    """Refuse an encoder-decoder of which nobody can tell what its decoder begins with."""
    for name in ("decoder_start_token_id", "pad_token_id"):
        if getattr(config, name, None) is None:
            raise Refusal(FailureCode.MODEL_UNSUPPORTED, f"config.json has no {name}, which a decoder needs", param="spec.model.uri")


def _four_bits(compute: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Options to load with frozen weights in 4 bits (NF4 with double quantisation: Dettmers et al. 2023, arXiv:2305.14314)."""
    from transformers import BitsAndBytesConfig

    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )
    # Of several processes each has a GPU of its own, which is the current one.
    return {"quantization_config": quantisation, "device_map": {"": torch.cuda.current_device() if device.type == "cuda" else "cpu"}}


@torch.no_grad()
def check_isolation(network: Any) -> None:
    """Refuse a model in which packed documents see one another, or that attends in a way that we do not compute.

    Asked of the model itself rather than of a list of architectures: documents, two of which begin alike, must give together what they give alone.
    """
    network.eval()
    vocabulary = int(network.get_input_embeddings().weight.shape[0])
    other, beginning, *ends = [np.arange(start, end) % vocabulary for start, end in ((1, 7), (11, 11 + LEAST_SHARED), (40, 43), (50, 55))]
    texts = [other, *(np.concatenate([beginning, end]) for end in ends)]
    try:
        together = _last_hidden(network, texts)
        alone = torch.cat([_last_hidden(network, [text]) for text in texts])
    except (NotImplementedError, TypeError) as error:
        raise Refusal(
            FailureCode.MODEL_UNSUPPORTED, f"the model uses what training cannot do yet: {error}", param="spec.model.uri"
        ) from error
    scale = max(1.0, float(alone.abs().max()))
    tolerance = ISOLATION_TOLERANCE if alone.dtype is torch.float32 else math.sqrt(ISOLATION_TOLERANCE)
    if float((together - alone).abs().max()) > tolerance * scale:
        raise Refusal(
            FailureCode.MODEL_UNSUPPORTED,
            "the model mixes tokens outside attention, so that examples cannot be kept apart",
            param="spec.model.uri",
        )


def _last_hidden(network: Any, texts: Sequence[Ints]) -> torch.Tensor:
    """[documents, width]: what the model makes of each at its end."""
    layout = lay_out([Document(text, len(text) - 1) for text in texts])
    ids, positions = (torch.from_numpy(part)[None].to(network.device) for part in (layout.input_ids, layout.positions))
    with attention.documents(layout.segments):
        hidden: torch.Tensor = network.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[0]
    return hidden[[int(place.of(len(text) - 1)) for place, text in zip(layout.places, texts, strict=True)]]
