"""The engine's metrics, in a registry of its own."""

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from tunewright_trainer.serve.engine import Engine


class Metrics:
    """Counted by the routes; gauges are read from the engine when asked for."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter("tunewright_engine_requests", "Answers by path and status.", ["path", "status"], registry=self._registry)
        self.prompt_tokens = Counter("tunewright_engine_prompt_tokens", "Tokens of prompts.", registry=self._registry)
        self.generated_tokens = Counter("tunewright_engine_generated_tokens", "Tokens of answers.", registry=self._registry)
        unfinished = Gauge("tunewright_engine_open_requests", "Generations running or waiting.", registry=self._registry)
        unfinished.set_function(lambda: engine.open_requests)
        adapters = Gauge("tunewright_engine_adapters", "Adapters served.", registry=self._registry)
        adapters.set_function(lambda: len(engine.adapters))

    def text(self) -> bytes:
        """Prometheus's text format."""
        return generate_latest(self._registry)
