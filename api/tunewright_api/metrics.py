"""Metrics for Prometheus: requests by route, and the training jobs that run now."""

from collections.abc import Iterable
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tunewright_api.cache import Collection, Object
from tunewright_crds.names import Phase

ACTIVE: Final = (Phase.TRAINING, Phase.PUBLISHING)
_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """The front end's own metrics, in a registry of their own."""

    def __init__(self, jobs: Collection) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "tunewright_api_requests", "Requests by route template.", ["method", "route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "tunewright_api_request_seconds",
            "Seconds until the end of the answer.",
            ["method", "route"],
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self.model_requests = Counter(
            "tunewright_model_requests", "Requests passed on to serving pods.", ["namespace", "model"], registry=self.registry
        )
        self.registry.register(_Jobs(jobs))


class _Jobs(Collector):
    """Gauges of the jobs that train now, read from the cache when asked: a job that ended leaves no series behind."""

    def __init__(self, jobs: Collection) -> None:
        self._jobs = jobs

    def collect(self) -> Iterable[Metric]:
        labels = ["namespace", "job"]
        gauges = {
            "step": GaugeMetricFamily("tunewright_job_step", "Optimizer steps done.", labels=labels),
            "maxSteps": GaugeMetricFamily("tunewright_job_max_steps", "Optimizer steps in all.", labels=labels),
            "loss": GaugeMetricFamily("tunewright_job_train_loss", "Last training loss.", labels=labels),
            "tokensPerSecond": GaugeMetricFamily("tunewright_job_tokens_per_second", "Pace of late.", labels=labels),
        }
        for job in self._jobs.after() if self._jobs.synced else ():
            status = job.get("status", {})
            if status.get("phase") in ACTIVE and "progress" in status:
                for name, value in numbers(status["progress"]).items():
                    gauges[name].add_metric([job["metadata"]["namespace"], job["metadata"]["name"]], value)
        return gauges.values()


def numbers(progress: Object) -> dict[str, float]:
    """The numbers of ``status.progress`` that are gauges; what the pod has not told is left out."""
    metrics: list[dict[str, Any]] = progress.get("metrics", [])
    losses = [metric["value"] for metric in metrics if metric["name"] == "loss"]
    told = {name: progress[name] for name in ("step", "maxSteps", "tokensPerSecond") if name in progress}
    return {name: float(value) for name, value in (told | ({"loss": losses[0]} if losses else {})).items()}
