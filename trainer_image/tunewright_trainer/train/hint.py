"""HINT: a hypernetwork reads an instruction once and writes weights for the model that then reads inputs (Ivison et al. 2023, arXiv:2212.10315).

The model's own encoder reads the instruction. For every layer of encoder and decoder, learned queries look at what it read and are turned, by small
networks that all layers share, into keys and values in front of the layer's self-attention (a prefix), and into the two matrices of an adapter beside its
feed-forward part. The input is then read without the instruction, and what was read of the instruction may stand before it for the decoder (fusion).

    network = load(base, folder)                            # a model as it was published
    answers = generate(network, instructions, inputs)       # token ids; the instruction is read once for all of its inputs
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import nn

from tunewright_crds.method import Hint
from tunewright_trainer.train.data import Padded, filled

PART: Final = "hypernetwork"  # the name of the hypernetwork among the parts of the model
WEIGHTS: Final = "hint_model.safetensors"
SETTINGS: Final = "hint_config.json"
ATTENTION: Final = "tunewright_prefixed"


@dataclass(frozen=True)
class Written:
    """What the hypernetwork has written for one layer, for each row."""

    keys: torch.Tensor
    """[rows, heads, prefix, width of a head]"""
    values: torch.Tensor
    down: torch.Tensor
    """[rows, rank, width]: the adapter is gelu(x · downᵀ) · up."""
    up: torch.Tensor


class Hypernetwork(nn.Module):
    """From the states of instructions to `Written` for each of ``layers`` layers. Begins by writing adapters and prefix values of zero."""

    def __init__(self, config: Any, options: Hint) -> None:
        super().__init__()
        self.options = options
        self.layers = config.num_layers + config.num_decoder_layers
        self.heads, self.head_width, width = config.num_heads, config.d_kv, config.d_model
        self.queries = nn.Parameter(torch.randn(self.layers, options.prefix_tokens + options.adapter_rank, width) * width**-0.5)
        self.look = nn.MultiheadAttention(width, config.num_heads if width % config.num_heads == 0 else 1, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.prefix = _generator(width, options.hidden_size, 2 * self.heads * self.head_width)
        self.adapter = _generator(width, options.hidden_size, 2 * width)
        with torch.no_grad():  # the second halves: values, and the way up
            for part, half in ((self.prefix, self.heads * self.head_width), (self.adapter, width)):
                last = cast("nn.Linear", part[-1])
                last.weight[half:].zero_()

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> list[Written]:
        """For each layer. ``states`` are [instructions, tokens, width], ``mask`` [instructions, tokens] is 1 where there is a token."""
        count = len(states)
        queries = self.queries.flatten(0, 1)[None].expand(count, -1, -1)
        seen, _ = self.look(queries, states, states, key_padding_mask=mask == 0, need_weights=False)
        rows = self.norm(queries + seen).view(count, self.layers, -1, states.shape[-1])
        prefix, adapter = rows.split([self.options.prefix_tokens, self.options.adapter_rank], dim=2)
        keys, values = self.prefix(prefix).view(count, self.layers, -1, 2 * self.heads, self.head_width).transpose(2, 3).chunk(2, dim=2)
        down, up = self.adapter(adapter).chunk(2, dim=-1)
        return [Written(keys[:, layer], values[:, layer], down[:, layer], up[:, layer]) for layer in range(self.layers)]


def _generator(width: int, hidden: int, out: int) -> nn.Sequential:
    last = nn.Linear(hidden, out, bias=False)
    nn.init.normal_(last.weight, std=hidden**-0.5)
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), last)


def attach(network: Any, options: Hint, *, seed: int) -> None:
    """Give a T5 a hypernetwork, drawn from ``seed``, in fp32, and have its layers use what that writes."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(ATTENTION, _prefixed_attention)
    AttentionMaskInterface.register(ATTENTION, eager_mask)
    network.set_attn_implementation(ATTENTION)
    torch.manual_seed(seed)
    network.add_module(PART, Hypernetwork(network.config, options).to(network.device))
    for block in _blocks(network):
        block.layer[-1].register_forward_hook(_beside)


def is_attached(network: Any) -> bool:
    """Whether the model has a hypernetwork."""
    return hasattr(network, PART)


def _blocks(network: Any) -> list[Any]:
    """The layers of encoder and decoder, in the order of the hypernetwork."""
    return [*network.encoder.block, *network.decoder.block]


def _use(network: Any, written: Sequence[Written | None]) -> None:
    """Have the layers use these; they do until told otherwise, so that a backward pass may compute them anew."""
    for block, one in zip(_blocks(network), written, strict=True):
        block.layer[0].SelfAttention.written = block.layer[-1].written = one


def _beside(layer: Any, given: tuple[torch.Tensor, ...], answer: torch.Tensor) -> torch.Tensor:
    """The adapter beside a feed-forward layer (in parallel: He et al. 2022); it reads what that reads."""
    written = getattr(layer, "written", None)
    if written is None:
        return answer
    read = layer.layer_norm(given[0])
    adapted: torch.Tensor = answer + nn.functional.gelu(read @ written.down.mT) @ written.up
    return adapted


def _prefixed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float = 1.0,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """T5's attention, with the prefix before keys and values: any query sees it, at no distance. Shapes [rows, heads, tokens, width of a head]."""
    scores = query @ key.mT * scaling
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None:
        scores = scores + attention_mask
    written = getattr(module, "written", None)
    if written is not None:
        scores = torch.cat([query @ written.keys.mT.to(query.dtype) * scaling, scores], dim=-1)
        value = torch.cat([written.values.to(value.dtype), value], dim=2)
    weights = nn.functional.dropout(scores.softmax(dim=-1), p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), None


@dataclass(frozen=True)
class Read:
    """What the decoder looks at: [rows, tokens, width], with a mask [rows, tokens]."""

    states: torch.Tensor
    mask: torch.Tensor

    def inputs(self) -> dict[str, Any]:
        """As transformers' models take it in place of token ids."""
        from transformers.modeling_outputs import BaseModelOutput

        return {"encoder_outputs": BaseModelOutput(last_hidden_state=self.states), "attention_mask": self.mask}


def read(network: Any, batch: Padded) -> Read:
    """Read each instruction once, write its weights, have the layers use them, and read the inputs."""
    assert batch.instructions is not None
    assert batch.of_instruction is not None
    return _read(network, batch.instructions, batch.of_instruction, batch.input_ids, batch.attention_mask)


def _read(network: Any, instructions: torch.Tensor, which: torch.Tensor, inputs: torch.Tensor, mask: torch.Tensor) -> Read:
    """``instructions`` [instructions, tokens] are filled up with -1; ``which`` [rows] is the instruction of each row of ``inputs`` [rows, tokens]."""
    network_of: Hypernetwork = getattr(network, PART)
    _use(network, [None] * network_of.layers)
    told = (instructions >= 0).long()
    with torch.no_grad():  # the model itself is frozen
        states = network.encoder(input_ids=instructions.clamp(min=0), attention_mask=told).last_hidden_state
    written = network_of(states, told)
    _use(network, [Written(one.keys[which], one.values[which], one.down[which], one.up[which]) for one in written])
    found = network.encoder(input_ids=inputs, attention_mask=mask).last_hidden_state
    if not network_of.options.fusion:
        return Read(found, mask)
    return Read(torch.cat([states[which].to(found.dtype), found], dim=1), torch.cat([told[which], mask], dim=1))


@torch.no_grad()
def generate(
    network: Any, instructions: Sequence[Sequence[int]], inputs: Sequence[Sequence[int]], *, longest: int = 128
) -> list[list[int]]:
    """The likeliest answers, token by token, to an input each under its instruction, as token ids."""
    import numpy as np

    network.eval()
    order = {tuple(one): None for one in instructions}
    numbers = {one: number for number, one in enumerate(order)}
    told, given = (
        torch.from_numpy(filled([np.array(one, dtype=np.int64) for one in some], -1)).to(network.device) for some in (list(order), inputs)
    )
    which = torch.tensor([numbers[tuple(one)] for one in instructions], device=network.device)
    found = _read(network, told, which, given.clamp(min=0), (given >= 0).long())
    made = network.generate(**found.inputs(), max_new_tokens=longest, do_sample=False)
    return cast("list[list[int]]", made.tolist())


def save(network: Any, folder: Path, *, base_uri: str) -> None:
    """The hypernetwork's weights and its settings, which name the base by its address."""
    from safetensors.torch import save_file

    own: Hypernetwork = getattr(network, PART)
    weights = {name: weight.detach().cpu().contiguous() for name, weight in own.state_dict().items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    settings = {"base_model_name_or_path": base_uri, "hint": own.options.model_dump(mode="json", by_alias=True)}
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_hypernetwork(network: Any, folder: Path) -> None:
    """Give the model, which has one, the hypernetwork that `save` wrote; raises what torch raises where it does not fit."""
    from safetensors.torch import load_file

    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    made = Hypernetwork(network.config, Hint.model_validate(settings["hint"])).to(network.device)
    made.load_state_dict(load_file(folder / WEIGHTS))
    network.add_module(PART, made)


def load(base: Path, folder: Path) -> Any:
    """A T5 with the hypernetwork that was published in ``folder``, ready for `generate`."""
    from transformers import AutoModelForSeq2SeqLM

    network = AutoModelForSeq2SeqLM.from_pretrained(
        base, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, local_files_only=True
    )
    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    attach(network, Hint.model_validate(settings["hint"]), seed=0)
    load_hypernetwork(network, folder)
    return network.eval()
