"""A real Kubernetes on this one machine, for the quick start and the tests: `python3 -m tests.cluster --help`.

Only the standard library is used, because it must run before the project's environment exists.
"""

from .places import ClusterError
from .record import S3, Facts, facts

__all__ = ["S3", "ClusterError", "Facts", "facts"]
