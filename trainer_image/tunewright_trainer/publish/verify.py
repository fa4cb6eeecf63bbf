"""Is the artefact what was trained? Its files are loaded again, and must give the trained model's logits."""

from pathlib import Path
from typing import Any, Final

import torch

from tunewright_trainer.architecture import auto_model
from tunewright_trainer.train import attention
from tunewright_trainer.train.data import Row, SourceTarget
from tunewright_trainer.train.model import Tuned

# Greatest difference of a logit, as a share of the greatest logit.
SAME: Final = 1e-4  # the same arithmetic in another order
ROUNDED: Final = 5e-2  # weights rounded to the base's own half precision
PROBE_TOKENS: Final = 256
_AGAIN: Final = "verified"


class Probe:
    """The first document of a row, as far as `PROBE_TOKENS`; of an encoder-decoder's row source and target, each as far."""

    def __init__(self, row: Row) -> None:
        self._ids = torch.from_numpy(row.input_ids[: min(row.lengths[0], PROBE_TOKENS)])[None]
        self._labels = torch.from_numpy(row.labels[:PROBE_TOKENS])[None] if isinstance(row, SourceTarget) else None

    @torch.no_grad()
    def logits(self, network: Any) -> torch.Tensor:
        """Logits [tokens, vocabulary] in fp32; of an encoder-decoder for each token of the target."""
        network.eval()
        if self._labels is not None:
            begun = network.prepare_decoder_input_ids_from_labels(labels=self._labels.to(network.device))
            written: torch.Tensor = network(input_ids=self._ids.to(network.device), decoder_input_ids=begun, use_cache=False).logits
            return written[0].float().cpu()
        with attention.documents([self._ids.shape[1]]):
            answer: torch.Tensor = network(input_ids=self._ids.to(network.device), use_cache=False).logits[0].float().cpu()
        return answer


def adapter_logits(tuned: Tuned, folder: Path, probe: Probe) -> torch.Tensor:
    """What an adapter's files give over the base in memory, which training has not changed. Leaves ``tuned`` as it was."""
    assert tuned.peft is not None
    tuned.peft.load_adapter(folder, _AGAIN)
    tuned.peft.set_adapter(_AGAIN)
    try:
        return probe.logits(tuned.network)
    finally:
        tuned.peft.set_adapter("default")
        tuned.peft.delete_adapter(_AGAIN)


def model_logits(folder: Path, probe: Probe, *, device: torch.device) -> torch.Tensor:
    """What a whole model's files give, with the attention that other programs use."""
    network = auto_model(folder).from_pretrained(folder, dtype=torch.float32, use_safetensors=True, local_files_only=True)
    return probe.logits(network.to(device))


def difference(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Greatest difference as a share of the greatest logit; infinite where they are not even comparable."""
    if expected.shape != found.shape or not bool(torch.isfinite(found).all()):
        return float("inf")
    return float((expected - found).abs().max() / expected.abs().max().clamp(min=1e-6))
