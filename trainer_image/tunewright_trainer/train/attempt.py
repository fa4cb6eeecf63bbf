"""What one attempt at training is given."""

from dataclasses import dataclass
from pathlib import Path

from tunewright_crds.job import JobSpec
from tunewright_crds.pod import PodConfig
from tunewright_trainer.storage import Store
from tunewright_trainer.train.world import World


@dataclass(frozen=True)
class Attempt:
    """``data`` and ``model`` are folders of this machine with the prepared rows and the base, ``work`` one for what is on its way to ``store``."""

    config: PodConfig
    number: int
    world: World
    dataset_digest: str
    data: Path
    model: Path
    work: Path
    store: Store
    halvings: int = 0
    """Of the micro-batch, after running out of memory."""
    planned_halvings: int = 0
    """Of the micro-batch, by the memory plan. A checkpoint's own count goes before this: other micro-batches would give other roundings."""
    judge: Path | None = None
    """The folder of the reward model, if there is one."""

    @property
    def spec(self) -> JobSpec:
        return self.config.spec
