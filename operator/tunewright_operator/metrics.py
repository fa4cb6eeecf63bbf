"""What Prometheus sees. Labels are bounded words or names of namespaces; a registry of its own, so that several can live in one process."""

from collections import Counter as Count
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_MINUTES = (10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 86400, 259200)


class Metrics:
    """The operator's metrics."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.jobs = Gauge("tunewright_jobs", "Jobs by phase.", ["namespace", "phase"], registry=r)
        self.datasets = Gauge("tunewright_datasets", "InstructionDatasets by phase.", ["namespace", "phase"], registry=r)
        self.succeeded = Counter("tunewright_jobs_succeeded_total", "Jobs that published a model.", ["namespace"], registry=r)
        self.failed = Counter("tunewright_jobs_failed_total", "Jobs that failed, by failure code.", ["namespace", "reason"], registry=r)
        self.restarted = Counter(
            "tunewright_jobs_restarted_total", "Attempts after the first, by why the one before ended.", ["namespace", "reason"], registry=r
        )
        self.prepare = Histogram("tunewright_prepare_seconds", "From a job's start to its first attempt.", buckets=_MINUTES, registry=r)
        self.train = Histogram("tunewright_train_seconds", "Length of ended attempts.", buckets=_MINUTES, registry=r)
        self.passes = Histogram("tunewright_reconcile_seconds", "Length of one pass over a job or an InstructionDataset.", registry=r)
        self.errors = Counter("tunewright_reconcile_errors_total", "Passes that failed and are tried again.", ["queue"], registry=r)
        self.depth = Gauge("tunewright_reconcile_queue_depth", "Keys that wait for a worker.", ["queue"], registry=r)
        self.writes = Gauge("tunewright_api_writes", "Writes sent to the API server since the start.", registry=r)
        self.corrections = Counter(
            "tunewright_resync_corrections_total", "Objects that a full list knew better than the watch.", registry=r
        )
        self.leader = Gauge("tunewright_leader", "1 while this replica may write.", registry=r)

    def page(self) -> bytes:
        """The text format."""
        return generate_latest(self.registry)


def count_phases(gauge: Gauge, things: Iterable[tuple[str, str]]) -> None:
    """Sets the number of things by (namespace, phase); what is no more is gone from the page too."""
    gauge.clear()
    for (namespace, phase), number in Count(things).items():
        gauge.labels(namespace, phase).set(number)
