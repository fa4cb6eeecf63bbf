"""Preparing: from the job's sources to token ids with labels, packed, in storage under an address made of everything that they depend on.

    outcome = prepare.run(config, work=Path("/scratch"), store=store)

Reads rows (`rows`), makes conversations of them (`convert`), cleans, renders and tokenises them (`template`, `encode`), splits, packs and writes
them (`spill`, `pack`).
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
