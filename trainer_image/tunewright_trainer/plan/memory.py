"""How much memory training takes, by part: a pure function of the model's shapes, the job and a few facts of its data. Loads no torch.

Tensors are counted as autograd and the allocator see them. Of a micro-batch with T tokens, N of them learned, d wide, with queries a wide, an MLP
f wide and V tokens of vocabulary, a layer in fp32 holds until its backward pass:

    both norms' inputs          2 d, and again 2 d where RMS norms learn
    queries, keys, values, out  4 a (keys and values repeated for grouped queries)
    inside the MLP              3 f gated, 4 f for GPT-2's GELU
    what linear layers read     once for those that learn and read the same: d, a, d, f
    LoRA                        its rank for each layer that has one; with dropout two tensors as wide as what it reads (mask, result) instead of one

With bf16 everything but the norms' inputs halves, and each linear layer that learns holds a copy of its own. The loss holds the log-probabilities,
N V in fp32, and its backward pass twice as much again; the last layer's backward pass takes about 2 f + d. The peak is the larger of the two moments.
With gradient checkpointing a layer holds its input alone, and one layer at a time is computed again.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tunewright_crds.hyperparameters import Precision
from tunewright_crds.job import JobSpec, OutputForm
from tunewright_crds.method import Objective, Tuner
from tunewright_trainer.plan.layouts import Family, Geometry, Reads
from tunewright_trainer.plan.shapes import Weight

AUTO_MICRO_TOKENS: Final = 4096  # as in train/data.py, which this module must not load
KNOWN_OBJECTIVES: Final = (Objective.SFT, Objective.DPO, Objective.REWARD)
KNOWN_TUNERS: Final = (Tuner.FULL, Tuner.LORA, Tuner.QLORA)

_MIB: Final = 2**20
# The process with torch, transformers and PEFT loaded (690 MiB on processors), and what the heap keeps however small the passes are; measured. With CUDA: its
# context and cuBLAS's workspaces; by NVIDIA's figures.
LIBRARIES_CPU: Final = 900 * _MIB
LIBRARIES_GPU: Final = 1000 * _MIB
# glibc's heap keeps holes between tensors that come and go: what the process held over what its tensors took, in benchmarks/memory.py.
HEAP: Final = 0.6
CACHE_GPU: Final = 0.05  # the same of torch's caching allocator on GPUs
# NF4 with doubly quantised scales: 4 bits, 8 bits for 64 elements, 32 bits for 64 x 256 (Dettmers et al. 2023).
NF4_BYTES: Final = 0.5 + 1 / 64 + 4 / (64 * 256)
_FP32: Final = 4
_ADAM_STATES: Final = 2


@dataclass(frozen=True)
class DataFacts:
    """What of the data decides: tokens of the longest row, and the share of the tokens that is learned (of the densest rows)."""

    longest: int
    learned: float


@dataclass(frozen=True)
class Estimate:
    """Bytes by part at the moment that takes most, `moment`, with micro-batches of `tokens` tokens."""

    tokens: int
    moment: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def tensors(self) -> int:
        """Without libraries and what allocators keep beside."""
        return sum(size for name, size in self.parts.items() if name not in ("libraries", "allocator"))


def micro_batch_tokens(spec: JobSpec, facts: DataFacts, *, halvings: int = 0) -> int:
    """The most tokens that `train.data.grouped` puts into a micro-batch."""
    wanted = spec.hyperparameters
    if isinstance(wanted.micro_batch_size, int):
        return max(1, wanted.micro_batch_size >> halvings) * facts.longest
    most = AUTO_MICRO_TOKENS >> halvings
    if spec.dataset.packing and spec.method.objective is Objective.SFT:  # rows are about equally long
        most = most // facts.longest * facts.longest
    return max(facts.longest, min(most, wanted.batch_size * facts.longest))


def halvings_possible(spec: JobSpec, facts: DataFacts) -> Iterator[int]:
    """0, 1, ... as long as another halving makes the micro-batch smaller."""
    halvings = 0
    while True:
        yield halvings
        if micro_batch_tokens(spec, facts, halvings=halvings) == facts.longest:
            return
        halvings += 1


def estimate(weights: Sequence[Weight], shape: Geometry, spec: JobSpec, facts: DataFacts, *, halvings: int = 0) -> Estimate:
    """What training takes at its peak: within a step, while a checkpoint is written, or when the model is published."""
    return _Counted(weights, shape, spec, facts, halvings).peak()


class _Counted:
    """One estimate, part by part. Sizes are bytes."""

    def __init__(self, weights: Sequence[Weight], shape: Geometry, spec: JobSpec, facts: DataFacts, halvings: int) -> None:
        self.shape = shape
        self.spec = spec
        self.full = spec.method.tuner is Tuner.FULL
        self.gpu = bool(spec.resources.gpus_per_node)
        self.element = 2 if _half(spec) else _FP32
        self.tokens = micro_batch_tokens(spec, facts, halvings=halvings)
        self.targets = 0 if spec.method.objective is Objective.REWARD else round(self.tokens * facts.learned)
        self.several = spec.hyperparameters.batch_size * facts.longest > self.tokens
        self.weights = [weight for weight in weights if weight.dtype in ("F32", "F16", "BF16", "F64")]
        if shape.tied:
            self.weights = [weight for weight in self.weights if not weight.name.startswith("lm_head.")]
        self.linear = dict(_linear(self.weights, shape.family))
        self.adapted = {} if self.full else {name: found for name, found in self.linear.items() if _is_target(name, spec)}
        self.largest = max((weight.elements for weight in self.weights), default=0)

    @property
    def elements(self) -> int:
        return sum(weight.elements for weight in self.weights)

    @property
    def trained(self) -> int:
        """Elements that learn."""
        if self.full:
            return self.elements
        return self.spec.method.lora.rank * sum(sum(weight.shape) for weight, _ in self.adapted.values())

    @property
    def base(self) -> int:
        """The base model."""
        if self.full:
            return _FP32 * self.elements
        if self.spec.method.tuner is not Tuner.QLORA:
            return self.element * self.elements
        quantised = sum(weight.elements for weight, _ in self.linear.values())
        return round(NF4_BYTES * quantised) + self.element * (self.elements - quantised)

    @property
    def casts(self) -> int:
        """Copies in bf16 of what learns in fp32, held until their backward pass; of 4-bit weights the largest layer's as it is computed with."""
        quantised = self.spec.method.tuner is Tuner.QLORA
        whole = self.element * max(weight.elements for weight, _ in self.linear.values()) if quantised else 0
        if self.element == _FP32:
            return whole
        layers = sum(weight.elements for weight, _ in self.linear.values()) if self.full else self.trained
        if self.spec.hyperparameters.gradient_checkpointing:
            layers //= max(1, self.shape.layers)  # those of the layer that is computed again
        return 2 * layers + whole

    def layer(self) -> int:
        """What one layer holds until its backward pass."""
        shape, family, element = self.shape, self.shape.family, self.element
        dropout = bool(self.spec.method.lora.dropout) and not self.full
        count = self.linear if self.full else self.adapted
        each = max(1, shape.layers)
        kept = 2 * _FP32 * shape.width * (2 if self.full and family.rms_norm else 1)
        kept += 4 * element * shape.heads + family.mlp_kept * element * shape.inner
        if family.head_norms:
            kept += _FP32 * (shape.heads + shape.key_heads) * (2 if self.full else 1)
        reading = [reads for _, reads in count.values()]
        own = [shape.reads(reads) for reads in reading]
        if element == _FP32 and not dropout:
            kept += sum(_FP32 * shape.reads(reads) for reads in set(reading))
        elif element == _FP32:
            kept += 2 * _FP32 * sum(own) // each
        else:
            kept += (element + (_FP32 if dropout else 0)) * sum(own) // each
        if not self.full:
            kept += element * self.spec.method.lora.rank * len(own) // each
        return self.tokens * kept

    @property
    def stream(self) -> int:
        """The states that go from layer to layer, once."""
        return self.tokens * self.shape.width * (_FP32 if self.full else self.element)

    @property
    def backward(self) -> int:
        """What the backward pass of a layer takes beside what is held. LoRA computes it in fp32."""
        wide = 3 if self.element == 2 and self.spec.method.lora.dropout and not self.full else 2
        return self.tokens * (wide * (self.element if self.full else _FP32) * self.shape.inner + _FP32 * self.shape.width)

    @property
    def loss(self) -> int:
        """At the beginning of the backward pass: log-probabilities and two gradients of their size; or one, and the gradient of a head that learns."""
        once = _FP32 * self.targets * self.shape.vocabulary
        head = self.shape.vocabulary * self.shape.width if self.full and self.targets else 0
        cast = 2 * head if self.element == 2 else 0
        return cast + max(3 * once, once + _FP32 * head if self.several else 0)

    def step(self, *, checkpointing: bool) -> dict[str, int]:
        """The peak of the passes over a micro-batch."""
        if checkpointing:
            held = self.shape.layers * self.stream
            once = self.layer() + self.backward
        else:
            held = self.shape.layers * self.layer()
            once = self.backward
        held += self.tokens * self.shape.width * _FP32 + self.casts  # the last norm's input
        return {"activations": held + max(0, once - self.loss) if once > self.loss else held, "logits": self.loss}

    def standing(self) -> dict[str, int]:
        """What is there all the time."""
        adapter = 0 if self.full else _FP32 * self.trained
        return {"weights": self.base, "adapter": adapter, "optimizer": _ADAM_STATES * _FP32 * self.trained}

    def training(self) -> dict[str, int]:
        gradients, passes = _FP32 * self.trained, self.step(checkpointing=self.spec.hyperparameters.gradient_checkpointing)
        if not self.several and sum(passes.values()) > gradients:
            gradients = 0  # they grow as the activations go
        elif not self.several:
            passes = {}
        parts = self.standing() | {"gradients": gradients} | passes
        return parts if self.gpu else parts | {"checkpoint": self.copies()}

    def copies(self) -> int:
        """The copy that a checkpoint is written from while training goes on, in the processor's memory; and of the best weights."""
        best = self.spec.hyperparameters.early_stopping.enabled
        return _FP32 * self.trained * (1 + _ADAM_STATES + best)

    def publishing(self) -> dict[str, int]:
        """The published model is loaded again beside the trained one, in fp32, and compared."""
        best = 0 if self.gpu else _FP32 * self.trained * self.spec.hyperparameters.early_stopping.enabled
        whole = self.full or OutputForm.MERGED in self.spec.output.formats
        again = _FP32 * (self.elements if whole else self.trained)
        return self.standing() | {"published copy": again, "checkpoint": best}

    def peak(self) -> Estimate:
        moments = {"training": self._with_overhead(self.training()), "publishing": self._with_overhead(self.publishing())}
        moment = max(moments, key=lambda name: sum(moments[name].values()))
        return Estimate(self.tokens, moment, {name: size for name, size in moments[moment].items() if size})

    def _with_overhead(self, parts: dict[str, int]) -> dict[str, int]:
        # The heap keeps as much where layers are computed again: the same tensors come and go, only not all at one time.
        coming_and_going = self.step(checkpointing=False) if "activations" in parts else {}
        kept = CACHE_GPU * sum(parts.values()) if self.gpu else HEAP * sum(coming_and_going.values())
        return parts | {"libraries": LIBRARIES_GPU if self.gpu else LIBRARIES_CPU, "allocator": round(kept)}


def _half(spec: JobSpec) -> bool:
    """Whether the forward pass is computed in bf16. `auto` means so on GPUs: all of the last five years have it."""
    wanted = spec.hyperparameters.precision
    return wanted is Precision.BF16 or (wanted is Precision.AUTO and bool(spec.resources.gpus_per_node))


def _linear(weights: Iterable[Weight], family: Family) -> Iterator[tuple[str, tuple[Weight, Reads]]]:
    """The linear layers: their names, weights, and what each reads."""
    for weight in weights:
        name = weight.name.removesuffix(".weight")
        reads = next((reads for end, reads in family.linear.items() if name.endswith(f".{end}")), None)
        if reads is not None and name != weight.name and len(weight.shape) == 2:
            yield name, (weight, reads)


def _is_target(name: str, spec: JobSpec) -> bool:
    """Whether LoRA goes there, by PEFT's rule."""
    targets = spec.method.lora.target_modules
    return targets == "all-linear" or any(name == target or name.endswith(f".{target}") for target in targets.split(","))
