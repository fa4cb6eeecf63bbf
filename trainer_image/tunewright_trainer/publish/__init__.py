"""Publishing: the artefact's files, checked by loading them again, then uploaded with their manifest last."""

from tunewright_crds.pod import Published
from tunewright_trainer.publish.publishing import Result, publish

__all__ = ["Published", "Result", "publish"]
