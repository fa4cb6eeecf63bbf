"""Numbers of the optimisation."""

from enum import StrEnum
from typing import Final

from pydantic import Field, model_validator

from tunewright_crds.fields import AutoCount, AutoRate, Part


class Precision(StrEnum):
    AUTO = "auto"
    BF16 = "bf16"
    FP32 = "fp32"


class Optimizer(StrEnum):
    ADAMW = "adamw"
    ADAFACTOR = "adafactor"
    SGD = "sgd"
    GALORE = "galore"
    LOMO = "lomo"
    ADALOMO = "adalomo"

    @property
    def within_backward(self) -> bool:
        """Whether weights are updated within the backward pass, so that there is one for the whole batch."""
        return self in WITHIN_BACKWARD


WITHIN_BACKWARD: Final = (Optimizer.LOMO, Optimizer.ADALOMO)
MISPLACED_GALORE: Final = "hyperparameters.galore holds options of optimizer galore: set optimizer: galore, or leave them out"
BATCH_AT_ONCE: Final = "optimizer lomo or adalomo takes the whole batch at once: microBatchSize is auto, or batchSize"


class Scheduler(StrEnum):
    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"


class EarlyStopping(Part):
    """Stop when validation no longer improves, and return the best weights seen."""

    enabled: bool = Field(False, description="Needs validation rows.")
    patience: int = Field(3, ge=1, le=1000, description="So many evaluations in a row without improvement.")
    min_delta: float = Field(0.0, alias="minDelta", ge=0, description="An evaluation loss lower by more than this counts as improvement.")


class DivergenceAction(StrEnum):
    ROLLBACK = "rollback"
    FAIL = "fail"


class Divergence(Part):
    """What becomes of a loss that goes astray: that is no number, or has risen and stays high."""

    action: DivergenceAction = Field(
        DivergenceAction.ROLLBACK,
        description="rollback: go back to the weights before, and leave out the batches that led astray; fail: end the job as LossDiverged.",
    )
    max_rollbacks: int = Field(
        3,
        alias="maxRollbacks",
        ge=0,
        le=100,
        description="So many in a row (within ten steps; where the loss has risen, 64); then, or when half of all steps would be left out, the job ends as LossDiverged.",
    )
    spike_factor: float = Field(
        5.0,
        alias="spikeFactor",
        ge=0,
        le=1000,
        description="A loss has risen too high when in five steps it exceeds the median of the last 64 by so many times the distance from there to their 90th percentile; "
        "0: only what is no number is noticed. Objectives that learn from rewards have no such loss.",
    )


class Galore(Part):
    """Options of optimizer galore (Zhao et al. 2024, arXiv:2403.03507)."""

    rank: int = Field(128, ge=1, le=65_536, description="Rank that gradients are projected to.")
    update_every: int = Field(200, alias="updateEvery", ge=1, le=1_000_000, description="Steps between new projections.")
    scale: float = Field(0.25, gt=0, le=1000, description="Factor of the update.")


class Hyperparameters(Part):
    """Numbers of the optimisation."""

    epochs: float = Field(3.0, gt=0, le=10_000, description="Passes over the train rows. maxSteps wins where it is set.")
    max_steps: int | None = Field(None, alias="maxSteps", ge=1, le=100_000_000, description="Optimizer steps, instead of epochs.")
    learning_rate: AutoRate = Field(
        "auto",
        alias="learningRate",
        description="Peak learning rate: a number above 0 and at most 1, or auto (2e-4 for adapters, 2e-5 for full; with objectives dpo and kto 5e-6 and 1e-6; with objective reward 1e-4 and 1e-5; with rewards 1e-5 and 1e-6).",
    )
    batch_size: int = Field(
        16,
        alias="batchSize",
        ge=1,
        le=65_536,
        description="Sequences per optimizer step, whatever fits into memory at once (with packing: packed sequences; with objectives dpo and reward: pairs; with ppo, grpo and rloo: prompts).",
    )
    micro_batch_size: AutoCount = Field(
        "auto",
        alias="microBatchSize",
        description="Sequences per forward pass; must divide batchSize. auto: as many as keep within about 4,096 tokens.",
    )
    optimizer: Optimizer = Field(
        Optimizer.ADAMW,
        description="adamw, adafactor (less memory), sgd (momentum 0.9); for tuner full also galore (AdamW on gradients of low rank), lomo and adalomo "
        "(SGD and Adafactor within the backward pass: no gradients are held, and clipping them costs a second pass; maxGradNorm 0 saves it).",
    )
    galore: Galore = Field(default_factory=Galore, description="Options of optimizer galore.")
    scheduler: Scheduler = Field(Scheduler.COSINE, description="How the learning rate falls after the warm-up.")
    warmup_ratio: float = Field(
        0.03, alias="warmupRatio", ge=0, lt=1, description="Share of the steps in which the learning rate rises from 0."
    )
    weight_decay: float = Field(0.0, alias="weightDecay", ge=0, le=1, description="Decoupled weight decay of matrices.")
    max_grad_norm: float = Field(
        1.0, alias="maxGradNorm", ge=0, le=1000, description="Gradients are clipped to this norm; 0: they are not."
    )
    label_smoothing: float = Field(
        0.0, alias="labelSmoothing", ge=0, lt=1, description="Share of the target spread evenly over the vocabulary (objective sft)."
    )
    precision: Precision = Field(
        Precision.AUTO, description="Numbers of the forward pass: bf16, fp32, or auto (bf16 where the hardware is fast at it)."
    )
    gradient_checkpointing: bool = Field(
        False, alias="gradientCheckpointing", description="Recompute activations in the backward pass: less memory, about a third slower."
    )
    seed: int = Field(
        42, ge=0, le=2**31 - 1, description="Seed of split, order, initialisation and dropout: the same seed and data give the same model."
    )
    early_stopping: EarlyStopping = Field(
        default_factory=EarlyStopping, alias="earlyStopping", description="Stop when validation no longer improves."
    )
    divergence: Divergence = Field(default_factory=Divergence, description="What to do when the loss goes astray.")
    evaluations_per_epoch: float = Field(
        1.0, alias="evaluationsPerEpoch", gt=0, le=1000, description="How often the validation loss is measured."
    )

    @model_validator(mode="after")
    def _optimizer_and_options(self) -> "Hyperparameters":
        if self.optimizer is not Optimizer.GALORE and self.galore != Galore():
            raise ValueError(MISPLACED_GALORE)
        if self.optimizer.within_backward and self.micro_batch_size not in ("auto", self.batch_size):
            raise ValueError(BATCH_AT_ONCE)
        return self

    @model_validator(mode="after")
    def _micro_batch(self) -> "Hyperparameters":
        if isinstance(self.micro_batch_size, int) and self.batch_size % self.micro_batch_size:
            raise ValueError(f"microBatchSize {self.micro_batch_size} does not divide batchSize {self.batch_size}")
        return self
