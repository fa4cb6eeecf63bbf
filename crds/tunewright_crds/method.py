"""How a model is tuned: the objective, the tuner, and their options."""

from collections.abc import Sequence
from enum import StrEnum
from typing import Any, Final, NamedTuple

from pydantic import Field, model_validator

from tunewright_crds.fields import Part, RewardModelUri
from tunewright_crds.hyperparameters import WITHIN_BACKWARD, Optimizer
from tunewright_crds.preference import Dpo, Kto, Reward
from tunewright_crds.reinforcement import MAX_REWARDS, Grpo, Ppo, RewardTerm, Rloo
from tunewright_crds.rules import RuleType


class Objective(StrEnum):
    SFT = "sft"
    DPO = "dpo"
    KTO = "kto"
    REWARD = "reward"
    PPO = "ppo"
    GRPO = "grpo"
    RLOO = "rloo"


class Tuner(StrEnum):
    """Each but full, qlora, dora, bitfit and hint is a method of PEFT; most are called there as they are here."""

    FULL = "full"
    LORA = "lora"
    QLORA = "qlora"
    DORA = "dora"
    ADALORA = "adalora"
    ADAMSS = "adamss"
    ADAPTION_PROMPT = "adaption-prompt"
    BEFT = "beft"
    BITFIT = "bitfit"
    BOFT = "boft"
    C3A = "c3a"
    DEFT = "deft"
    DELORA = "delora"
    FOURIERFT = "fourierft"
    FROD = "frod"
    GLORA = "glora"
    GRALORA = "gralora"
    HINT = "hint"
    HIRA = "hira"
    HRA = "hra"
    IA3 = "ia3"
    LILY = "lily"
    LN_TUNING = "ln-tuning"
    LOHA = "loha"
    LOKR = "lokr"
    MISS = "miss"
    OFT = "oft"
    OSF = "osf"
    P_TUNING = "p-tuning"
    PEANUT = "peanut"
    PREFIX = "prefix"
    PROMPT = "prompt"
    PSOFT = "psoft"
    PVERA = "pvera"
    RANDLORA = "randlora"
    ROAD = "road"
    SHIRA = "shira"
    SUPERTUNING = "supertuning"
    TINYLORA = "tinylora"
    UNILORA = "unilora"
    VBLORA = "vblora"
    VERA = "vera"
    WAVEFT = "waveft"


WHOLE: Final = (Tuner.FULL, Tuner.BITFIT)  # they change weights of the model itself, and publish all of it
OWN: Final = (*WHOLE, Tuner.HINT)  # none of PEFT
LORA_FAMILY: Final = (Tuner.LORA, Tuner.QLORA, Tuner.DORA)
PROMPT_LEARNING: Final = (Tuner.PREFIX, Tuner.PROMPT, Tuner.P_TUNING)  # they train tokens, or keys and values, that go before each document
# Their adapters cannot be added into the weights.
UNMERGED: Final = (Tuner.ADAPTION_PROMPT, Tuner.BEFT, Tuner.LILY, Tuner.HINT, *PROMPT_LEARNING)
# Their adapters can be written as LoRA matrices. PEFT offers it for dora too, but leaves out what dora adds to lora.
CONVERTIBLE: Final = (
    Tuner.C3A,
    Tuner.DELORA,
    Tuner.FOURIERFT,
    Tuner.GRALORA,
    Tuner.LOHA,
    Tuner.LOKR,
    Tuner.MISS,
    Tuner.PSOFT,
    Tuner.RANDLORA,
    Tuner.TINYLORA,
    Tuner.UNILORA,
    Tuner.VBLORA,
    Tuner.VERA,
    Tuner.WAVEFT,
)
MAX_OPTIONS: Final = 32


class Examples(StrEnum):
    """What an objective learns from."""

    CONVERSATIONS = "conversations"
    PREFERENCES = "preferences"  # a chosen and a rejected answer to one prompt
    UNPAIRED = "unpaired answers"  # each marked as good or bad
    PROMPTS = "prompts"  # what comes before the last answer of a conversation; the answer is what rewards may compare with


LEARNS_FROM: Final[dict[Objective, Examples]] = {
    Objective.SFT: Examples.CONVERSATIONS,
    Objective.DPO: Examples.PREFERENCES,
    Objective.REWARD: Examples.PREFERENCES,
    Objective.KTO: Examples.UNPAIRED,
    Objective.PPO: Examples.PROMPTS,
    Objective.GRPO: Examples.PROMPTS,
    Objective.RLOO: Examples.PROMPTS,
}
REINFORCED: Final = tuple(objective for objective, examples in LEARNS_FROM.items() if examples is Examples.PROMPTS)
"""The objectives that learn from rewards for answers of the model's own."""


class Lora(Part):
    """Options of the LoRA tuners (Hu et al. 2021, arXiv:2106.09685; with dora: Liu et al. 2024, arXiv:2402.09353)."""

    rank: int = Field(16, ge=1, le=1024, description="Rank of the adapter matrices.")
    alpha: float = Field(
        32.0, gt=0, le=65_536, description="Scale: the adapter's output is multiplied by alpha / rank (alpha / sqrt(rank) with rslora)."
    )
    dropout: float = Field(0.05, ge=0, lt=1, description="Dropout on the adapter's input while training.")
    target_modules: str = Field(
        "all-linear",
        alias="targetModules",
        max_length=1024,
        pattern=r"^[A-Za-z0-9_.-]+(,[A-Za-z0-9_.-]+)*$",
        description="Which layers get an adapter: `all-linear` (all but the output head), or names joined by commas such as q_proj,v_proj.",
    )
    rslora: bool = Field(False, description="Rank-stabilised scale (Kalajdzievski 2023, arXiv:2312.03732).")


class Hint(Part):
    """Options of tuner hint, a hypernetwork that reads the instruction and writes weights (Ivison et al. 2023, arXiv:2212.10315)."""

    prefix_tokens: int = Field(
        30, alias="prefixTokens", ge=1, le=512, description="Keys and values that are written in front of each layer's self-attention."
    )
    adapter_rank: int = Field(
        64, alias="adapterRank", ge=1, le=1024, description="Width of the adapter that is written beside each layer's feed-forward part."
    )
    hidden_size: int = Field(
        128, alias="hiddenSize", ge=1, le=8192, description="Width of the small networks that write them, which all layers share."
    )
    fusion: bool = Field(True, description="The decoder also looks at what the encoder read of the instruction, in front of the input.")


def either(names: Sequence[str]) -> str:
    """`a`, `a or b`, `a, b or c`."""
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


NEEDS_REWARDS: Final = "an objective that learns from rewards needs some: give method.rewards or method.rewardModel"


class Apart(NamedTuple):
    """Two fields of the spec whose values do not go together: not these of the one with those of the other."""

    field: str
    values: Sequence[str | bool]
    other: str
    others: Sequence[str | bool]
    because: str


def every(names: type[StrEnum], *, but: Sequence[StrEnum]) -> tuple[str, ...]:
    """The values of an enumeration without some."""
    return tuple(name.value for name in names if name not in but)


# Pairs of objective and tuner that cannot be, and why.
UNFIT: Final[dict[tuple[Objective, Tuner], str]] = {
    (
        Objective.REWARD,
        Tuner.QLORA,
    ): "objective reward needs tuner lora or full: a reward model is published whole, over weights that are not in 4 bits",
}

# More that does not go together, in terms of any two fields of a job's spec.
ARCHITECTURE: Final = "model.architecture"
APART: Final[tuple[Apart, ...]] = (
    Apart(
        ARCHITECTURE,
        ("seq2seq",),
        "method.objective",
        every(Objective, but=(Objective.SFT,)),
        "an encoder-decoder (seq2seq) is tuned by objective sft only",
    ),
    Apart(
        ARCHITECTURE,
        ("seq2seq",),
        "dataset.trainOn",
        ("all",),
        "an encoder-decoder (seq2seq) learns answers only: trainOn is response or last-response",
    ),
    Apart(
        ARCHITECTURE,
        ("seq2seq",),
        "method.tuner",
        PROMPT_LEARNING,
        f"an encoder-decoder (seq2seq) is not tuned by {either(PROMPT_LEARNING)} yet",
    ),
    Apart(
        ARCHITECTURE,
        ("seq2seq",),
        "hyperparameters.optimizer",
        (Optimizer.GALORE, *WITHIN_BACKWARD),
        "an encoder-decoder (seq2seq) is not trained with optimizer galore, lomo or adalomo yet",
    ),
    Apart(
        ARCHITECTURE,
        ("seq2seq",),
        "output.formats",
        ("lora", "onnx", "gguf"),
        "an encoder-decoder (seq2seq) is published as adapter or merged: leave formats lora, onnx and gguf out",
    ),
    Apart("method.tuner", (Tuner.HINT,), ARCHITECTURE, ("causal",), "tuner hint is for encoder-decoders: T5 and mT5"),
    Apart("method.tuner", (Tuner.HINT,), "method.objective", every(Objective, but=(Objective.SFT,)), "tuner hint is for objective sft"),
    Apart(
        "method.tuner",
        (Tuner.HINT,),
        "deploy.enabled",
        (True,),
        "what tuner hint makes is not served yet: its model is asked from Python (see the model card), so leave deploy out",
    ),
    Apart(
        "method.tuner",
        (Tuner.HINT,),
        "evaluation.enabled",
        (True,),
        "what tuner hint makes is not measured yet: set evaluation.enabled: false",
    ),
    Apart(
        "resources.sharding",
        ("full",),
        "method.objective",
        every(Objective, but=(Objective.SFT, Objective.DPO)),
        "resources.sharding: full is for objectives sft and dpo",
    ),
    Apart(
        "resources.sharding",
        ("full",),
        "method.tuner",
        every(Tuner, but=(Tuner.FULL, Tuner.LORA, Tuner.QLORA)),
        "resources.sharding: full is for tuners full, lora and qlora",
    ),
    Apart(
        "method.tuner",
        every(Tuner, but=CONVERTIBLE),
        "output.formats",
        ("lora",),
        "an adapter of this tuner is LoRA already, or cannot be converted to it: take format adapter or merged",
    ),
    Apart(
        "method.tuner",
        UNMERGED,
        "output.formats",
        ("merged", "onnx", "gguf"),
        "an adapter of this tuner cannot be merged: take format adapter",
    ),
    Apart(
        "method.objective",
        (Objective.REWARD,),
        "output.formats",
        ("onnx", "gguf"),
        "formats onnx and gguf are of models that answer: leave them out with objective reward",
    ),
    Apart(
        "method.tuner",
        (Tuner.BITFIT,),
        "method.objective",
        every(Objective, but=(Objective.SFT,)),
        "tuner bitfit is for objective sft: it has no adapter to be set aside, and trains no head",
    ),
    Apart(
        "method.tuner",
        (Tuner.ADALORA,),
        "method.objective",
        REINFORCED,
        "tuner adalora gives ranks away by the step, and an objective with rewards makes several updates in one: take lora",
    ),
    Apart(
        "method.tuner",
        PROMPT_LEARNING,
        "method.objective",
        every(Objective, but=(Objective.SFT,)),
        f"tuner {either(PROMPT_LEARNING)} is for objective sft",
    ),
    Apart(
        "method.tuner",
        (Tuner.PREFIX,),
        "hyperparameters.gradientCheckpointing",
        (True,),
        "tuner prefix keeps keys and values, which gradientCheckpointing would throw away: leave it out",
    ),
    Apart(
        "hyperparameters.optimizer",
        (Optimizer.GALORE, *WITHIN_BACKWARD),
        "method.tuner",
        every(Tuner, but=(Tuner.FULL,)),
        "optimizer galore, lomo or adalomo saves memory where all weights are trained: it is for tuner full",
    ),
    Apart(
        "hyperparameters.optimizer",
        WITHIN_BACKWARD,
        "method.objective",
        every(Objective, but=(Objective.SFT,)),
        "optimizer lomo or adalomo is for objective sft",
    ),
    Apart(
        "method.objective",
        (Objective.REWARD,),
        "method.tuner",
        every(Tuner, but=(Tuner.FULL, *LORA_FAMILY)),
        "objective reward needs tuner lora, dora or full",
    ),
)

# Fields of `method` that hold options, and the objectives that these are for.
OPTIONS: Final[dict[str, tuple[Objective, ...]]] = {
    "dpo": (Objective.DPO,),
    "kto": (Objective.KTO,),
    "reward": (Objective.REWARD,),
    "ppo": (Objective.PPO,),
    "grpo": (Objective.GRPO,),
    "rloo": (Objective.RLOO,),
    "rewards": REINFORCED,
    "reward_model": REINFORCED,
}
# The same for tuners.
TUNER_OPTIONS: Final[dict[str, tuple[Tuner, ...]]] = {"lora": LORA_FAMILY, "hint": (Tuner.HINT,)}
NO_OPTIONS: Final = f"tuner {' and '.join(OWN)} have no options of PEFT: leave method.options out"


def misplaced(field: str) -> str:
    """What is said of options of another objective than the job's."""
    names = either(OPTIONS[field])
    return f"{Method.model_fields[field].alias or field} holds options of objective {names}: set objective: {OPTIONS[field][0]}, or leave them out"


def misplaced_of_tuner(field: str) -> str:
    """What is said of options of another tuner than the job's."""
    return f"{field} holds options of tuner {either(TUNER_OPTIONS[field])}; those of other tuners stand in method.options"


class Method(Part):
    """How the model is tuned.

    The tuner decides which weights change. lora, the default, trains a small adapter beside the frozen base; the base is shared by
    all adapters where they are served. qlora does the same over a base held in 4 bits, for models that would not fit otherwise.
    full trains every weight, needs about eight times the memory, and publishes a whole model. bitfit trains the biases of a
    model that has some (GPT-2, Qwen2). dora splits weights into size and direction. prefix, prompt and p-tuning train what is read before
    each text. ia3 and ln-tuning train least. The others are the methods of PEFT, by its names. hint trains a hypernetwork beside a frozen T5
    or mT5: it reads an instruction once and writes prefixes and adapters for the model, which then reads inputs without the instruction; for
    rows that tell instruction and input apart, to follow instructions never seen.

    options are those of the tuner's config class in PEFT, by its names: {r: 8} with loha, {num_virtual_tokens: 16} with prompt. What PEFT
    does not know is refused before a pod with a GPU is made.

    lora.rank sets the adapter's size and lora.alpha / lora.rank its scale: more rank for tasks far from what the base knows.
    lora.targetModules takes all linear layers but the output head; lora.dropout helps against small data being learned by heart.
    The objective is what is optimised. sft, supervised fine-tuning: the responses are learned, the prompts only read (see
    spec.dataset.trainOn). dpo, direct preference optimisation: from pairs of a chosen and a rejected answer to one prompt, to prefer the chosen
    one, without going further than need be from what the model was; usually done with a model that sft has tuned. reward: from such pairs, to judge
    answers by a number, the higher the better; what comes of it is no language model but a judge, which reinforcement learning asks. ppo,
    grpo and rloo: the model answers the prompts of the data itself, and learns to answer as it is rewarded (see rewards), for which an answer of the data
    may be compared with its own.
    """

    objective: Objective = Field(
        Objective.SFT,
        description="What is optimised: sft (supervised fine-tuning on the responses), dpo (preferring the chosen answer of a pair to the rejected one; with tuner full a frozen copy of the model is in memory beside it), kto (the same from answers that are each marked as good or bad), reward (a model that judges answers, from the same pairs; full and lora only), "
        "ppo (rewards for answers of the model's own, compared with what a value head expects), grpo or rloo (the same, each compared with others to the same prompt).",
    )
    tuner: Tuner = Field(
        Tuner.LORA,
        description="Which weights change: full (all), bitfit (biases), lora (an adapter), qlora (an adapter over a base in 4 bits), hint (a hypernetwork beside a frozen T5, which reads each instruction once), or another adapter of PEFT.",
    )
    lora: Lora = Field(default_factory=Lora, description="Options of lora, qlora and dora.")
    options: dict[str, Any] = Field(
        default_factory=dict,
        max_length=MAX_OPTIONS,
        description="Further options of an adapter, by the names of its config class in PEFT.",
        json_schema_extra={"x-kubernetes-preserve-unknown-fields": True},
    )
    hint: Hint = Field(default_factory=Hint, description="Options of tuner hint.")
    dpo: Dpo = Field(default_factory=Dpo, description="Options of objective dpo.")
    kto: Kto = Field(default_factory=Kto, description="Options of objective kto.")
    reward: Reward = Field(default_factory=Reward, description="Options of objective reward.")
    ppo: Ppo = Field(default_factory=Ppo, description="Options of objective ppo.")
    grpo: Grpo = Field(default_factory=Grpo, description="Options of objective grpo.")
    rloo: Rloo = Field(default_factory=Rloo, description="Options of objective rloo.")
    rewards: list[RewardTerm] = Field(
        default_factory=list, max_length=MAX_REWARDS, description="What answers are rewarded for, with objectives that learn from rewards."
    )

    reward_model: RewardModelUri = Field(
        "",
        alias="rewardModel",
        description="Folder of a reward model (sequence classification with one label, such as objective reward publishes) with the tokenizer of the model that is "
        "tuned: s3://bucket/path/ or hf://org/name@revision, read with spec.model.credentialsSecret, or model://<TunedModel>[@version] of this namespace, which the job "
        "waits for. What it gives an answer is added to the rewards.",
    )

    @model_validator(mode="after")
    def _fit_together(self) -> "Method":
        for field, objectives in OPTIONS.items():
            if self.objective not in objectives and (options := getattr(self, field)) != type(options)():
                raise ValueError(misplaced(field))
        for field, tuners in TUNER_OPTIONS.items():
            if self.tuner not in tuners and (options := getattr(self, field)) != type(options)():
                raise ValueError(misplaced_of_tuner(field))
        if self.options and self.tuner in OWN:
            raise ValueError(NO_OPTIONS)
        if unfit := UNFIT.get((self.objective, self.tuner)):
            raise ValueError(unfit)
        if self.objective in REINFORCED and not (self.rewards or self.reward_model):
            raise ValueError(NEEDS_REWARDS)
        return self

    @property
    def examples(self) -> Examples:
        """What the objective learns from."""
        return LEARNS_FROM[self.objective]

    @property
    def compares_answers(self) -> bool:
        """Whether a reward compares with the answer of the data, so that no prompt may lack one."""
        return any(reward.type is RuleType.EXACT_MATCH for reward in self.rewards)
