"""A real Kubernetes on this one machine, for the quick start and the tests: `python3 -m tests.cluster --help`.

Only the standard library is used, because it must run before the project's environment exists.
"""

from .facts import S3, Facts, facts
from .places import ClusterError

__all__ = ["S3", "ClusterError", "Facts", "facts"]
