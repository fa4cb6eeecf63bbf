"""How far an evaluation is, told as training tells its steps."""

from collections.abc import Mapping
from datetime import UTC, datetime

from tunewright_crds.pod import PodConfig
from tunewright_crds.status import Progress
from tunewright_trainer.train.metrics import Reporter

Part = tuple[str, str]
"""Who does what: a model or the judge, and a task."""


class Telling:
    """Counts prompts over all parts of an evaluation, each of which is answered, put or judged. ``sizes``: how many there are, as far as is known before."""

    def __init__(self, config: PodConfig, sizes: Mapping[Part, int]) -> None:
        self._sizes, self._done = dict(sizes), dict.fromkeys(sizes, 0)
        self._reporter = Reporter(config.progress_url, config.job)

    def at(self, part: Part, done: int) -> None:
        """So many of the part are done."""
        self._done[part] = min(done, self._sizes[part])
        evaluated, total = sum(self._done.values()), sum(self._sizes.values())
        self._reporter.report(Progress(evaluated=evaluated, to_evaluate=total, last_updated=datetime.now(UTC)), None)

    def finished(self, part: Part, size: int) -> None:
        """The part is done, and was so large."""
        self._sizes[part] = size
        self.at(part, size)

    def close(self) -> None:
        """Send the last report."""
        self._reporter.close()
