"""Metrics for a tenant's experiment trackers, MLflow and Weights & Biases, by their own clients.

    with open_trackers(config, attempt=1, work=folder) as trackers: trackers.add(step, metrics)

Each client is a process of its own (`python -m tunewright_trainer.tracking`): it takes no time from a step, imports nothing into the training process,
and whatever it does when its server is away, at the end it is left behind.
"""

from tunewright_trainer.tracking.feed import Trackers, open_trackers

__all__ = ["Trackers", "open_trackers"]
