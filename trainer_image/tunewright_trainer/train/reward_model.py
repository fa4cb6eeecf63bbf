"""Reward models: language models with a head of one number in place of their vocabulary, as transformers' sequence classification with one label has it.

The reward of a document is read at its last token that is no padding, as transformers reads it.

    network = load_reward_model(folder, device=device, dtype=torch.bfloat16)
    rewards = scores(network, micro_batch(rows, device))  # [documents]
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from tunewright_crds.errors import FailureCode, Refusal
from tunewright_trainer.train import attention
from tunewright_trainer.train.attention import documents
from tunewright_trainer.train.data import MicroBatch, Row, grouped, micro_batch

HEAD: Final = "score.weight"  # transformers' name of the head, a linear layer without bias


def scores(network: Any, batch: MicroBatch) -> torch.Tensor:
    """[documents]: the reward of each in fp32, by a network of `load_reward_model` or one in training.

    A backward pass must lie within `attention.documents` too.
    """
    with documents(batch.segments):
        hidden = network.base_model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).last_hidden_state[0]
    return judged(network, hidden[_last_tokens(batch, network.config.pad_token_id)])


@torch.no_grad()
def rewards_of(
    network: Any, rows: Sequence[Row], *, device: torch.device, micro_batch_size: int | str = "auto", halvings: int = 0
) -> torch.Tensor:
    """[rows], on the processor: the reward of each answer with its prompt, which is the one document of its row."""
    groups = grouped(rows, micro_batch_size, halvings=halvings)
    return torch.cat([scores(network, micro_batch(group, device)).cpu() for group in groups])


def judged(network: Any, hidden: torch.Tensor) -> torch.Tensor:
    """[positions]: the head's number at each, in fp32, of hidden states [positions, width]."""
    rewards: torch.Tensor = network.score(hidden.to(network.score.weight.dtype))[:, 0]
    return rewards.float()


def _last_tokens(batch: MicroBatch, padding: int | None) -> torch.Tensor:
    """[documents]: positions of the last tokens that are no padding; of a document of padding alone the first."""
    last = [int(max(np.flatnonzero(document.input_ids != padding), default=0)) for document in batch.documents]
    return torch.tensor([int(place.of(at)) for place, at in zip(batch.places, last, strict=True)], device=batch.input_ids.device)


def load_reward_model(folder: Path, *, device: torch.device, dtype: torch.dtype) -> Any:
    """A published reward model, frozen, for `scores`. Raises `Refusal` with code ModelUnsupported where the folder holds another kind of model."""
    from transformers import AutoModelForSequenceClassification

    attention.register()
    try:
        network, told = AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention.NAME,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (ValueError, KeyError, OSError, ImportError, RuntimeError) as error:
        raise _no_judge(f"it cannot be loaded: {str(error).splitlines()[0][:300]}") from error
    if absent := sorted(told["missing_keys"]):
        raise _no_judge(f"its safetensors files lack {absent[0]}")
    if network.config.num_labels != 1:
        raise _no_judge(f"it gives {network.config.num_labels} numbers instead of one")
    return network.requires_grad_(False).eval().to(device)


def _no_judge(why: str) -> Refusal:
    return Refusal(FailureCode.MODEL_UNSUPPORTED, f"the reward model is none: {why}", param="spec.method.rewardModel")


def padding_of(folder: Path) -> tuple[int, str]:
    """The padding token of a reward model over the base in ``folder``: one that documents do not end with, so that the last token is what is read.

    The tokenizer's own where it is not also the end of texts; else a token that no text ends with, if there is one.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    known = [token for token in (tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token) if token and token != tokenizer.eos_token]
    token = str([*known, tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)][0])
    return int(tokenizer.convert_tokens_to_ids(token)), token


def begin_head(network: Any, *, seed: int) -> None:
    """Draw the head of a base that has none, as transformers would, but from the job's seed."""
    head = network.score.weight
    drawn = torch.randn(head.shape, generator=torch.Generator().manual_seed(seed)) * getattr(network.config, "initializer_range", 0.02)
    with torch.no_grad():
        head.copy_(drawn)
