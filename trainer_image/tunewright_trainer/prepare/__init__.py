"""Preparing: from the job's sources to token ids with labels, packed, in storage under an address made of everything that they depend on.

    outcome = prepare.run(config, work=Path("/scratch"), store=store)

Reads rows (`rows`), makes conversations of them (`convert`), cleans, renders and tokenises them (`cleaning`, `template`, `encode`), decides what
becomes of each (`keys`, `near`), packs and writes them (`spill`, `pack`). With `dataset.shards` the reading is done by several pods before (`shards`).
"""

from pathlib import Path

from tunewright_crds.pod import Outcome, PodConfig
from tunewright_trainer.storage import Store


def run(config: PodConfig, *, work: Path, store: Store, key: str | None = None) -> Outcome:
    """Prepare the job's data, unless the same data lies there already.

    `work` is a local folder for what is on its way. `key` is where the data goes; default: its address in the namespace. Raises `Refusal`, with
    the outcome so far attached (`process.telling`), or `Stopped` after SIGTERM; then nothing is published.
    """
    from tunewright_trainer.prepare.recipe import prepare

    return prepare(config, work=work, store=store, key=key)


def run_shard(config: PodConfig, number: int, *, work: Path, store: Store) -> Outcome:
    """Read share `number` (from 0) of `dataset.shards`, unless it was read before, and leave it in storage for `run`. Raises as that does."""
    from tunewright_trainer.prepare.shards import prepare_shard

    return prepare_shard(config, number, work=work, store=store)
