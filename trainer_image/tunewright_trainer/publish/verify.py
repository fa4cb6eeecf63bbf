"""Is the artefact what was trained? Its files are loaded again, and must give the trained model's logits."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

from tunewright_trainer.train import attention, hint, seq2seq
from tunewright_trainer.train.data import Padded, Row, SourceTarget, micro_batch
from tunewright_trainer.train.model import Tuned
from tunewright_trainer.train.reward_model import judged

# Greatest difference of a logit, as a share of the greatest logit.
SAME: Final = 1e-4  # the same arithmetic in another order
CONVERTED: Final = 1e-2  # what was left out as too small to matter
ROUNDED: Final = 5e-2  # weights rounded to the base's own half precision
OTHER_PROGRAM: Final = 5e-3  # another program's arithmetic, with tables for some functions
PROBE_TOKENS: Final = 256
_AGAIN: Final = "verified"


class Probe:
    """The first document of a row, as far as `PROBE_TOKENS`; of an encoder-decoder's row source and target, each as far.

    ``autocast`` brings weights of several precisions together.
    """

    def __init__(self, row: Row, autocast: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
        self._autocast = autocast
        self.ids = torch.from_numpy(row.input_ids[: min(row.lengths[0], PROBE_TOKENS)])[None]
        self._row = row.shortened(PROBE_TOKENS) if isinstance(row, SourceTarget) else None

    @torch.no_grad()
    def logits(self, network: Any) -> torch.Tensor:
        """Logits [tokens, vocabulary] in fp32; of an encoder-decoder for each token of the target, of a reward model its number at each token, [tokens, 1]."""
        network.eval()
        if self._row is not None:
            batch = micro_batch([self._row], network.device)
            assert isinstance(batch, Padded)
            with self._autocast():
                return seq2seq.logits(network, batch).float().cpu()
        with attention.documents(attention.Segments()), self._autocast():
            ids = self.ids.to(network.device)
            if hasattr(network, "score"):
                answer = judged(network, network.base_model(input_ids=ids, use_cache=False).last_hidden_state[0])[:, None]
            else:
                answer = network(input_ids=ids, use_cache=False).logits[0].float()
        return answer.cpu()


def adapter_logits(tuned: Tuned, folder: Path, probe: Probe) -> torch.Tensor:
    """What an adapter's files give over the base in memory, which training has not changed. Leaves ``tuned`` as it was."""
    if tuned.peft is None:
        trained = getattr(tuned.network, hint.PART)
        hint.load_hypernetwork(tuned.network, folder)
        try:
            return probe.logits(tuned.network)
        finally:
            tuned.network.add_module(hint.PART, trained)
    tuned.peft.load_adapter(folder, _AGAIN)
    tuned.peft.set_adapter(_AGAIN)
    try:
        return probe.logits(tuned.network)
    finally:
        tuned.peft.set_adapter("default")
        tuned.peft.delete_adapter(_AGAIN)


def converted_logits(base_folder: Path, folder: Path, probe: Probe, *, device: torch.device) -> torch.Tensor:
    """What an adapter of another kind than the trained one gives over a base of its own."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32, use_safetensors=True, local_files_only=True)
    return probe.logits(PeftModel.from_pretrained(base.to(device), folder).base_model.model)


def model_logits(folder: Path, probe: Probe, *, like: Any) -> torch.Tensor:
    """What a whole model's files give, with the attention that other programs use; ``like`` is the model that they are of."""
    network = type(like).from_pretrained(folder, dtype=torch.float32, use_safetensors=True, local_files_only=True)
    return probe.logits(network.to(like.device))


def difference(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Greatest difference as a share of the greatest logit; infinite where they are not even comparable."""
    if expected.shape != found.shape or not bool(torch.isfinite(found).all()):
        return float("inf")
    return float((expected - found).abs().max() / expected.abs().max().clamp(min=1e-6))
