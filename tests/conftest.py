"""Order and shared fixtures. The tests of a file run one after another in one process, and so do all on the whole cluster."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from tests.support.stack import IMPATIENT, Stack, installed_stack
from tests.support.tenant import Tenant

WHOLE_CLUSTER = "e2e"
ORDER = ("unit", "security", "integration", "faults", "cluster", WHOLE_CLUSTER)
TESTS = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Quick kinds first, so that a plain mistake is told within seconds; but of two processes, one begins with the cluster, which mostly waits."""
    order = (WHOLE_CLUSTER, *ORDER) if hasattr(config, "workerinput") else ORDER
    items.sort(key=lambda item: order.index(item.path.relative_to(TESTS).parts[0]))


class Scheduling(LoadScopeScheduling):
    """What one process takes as a whole."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return WHOLE_CLUSTER if Path(file).parts[1] == WHOLE_CLUSTER else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling:
    """See `Scheduling`."""
    return Scheduling(config, log)


@pytest.fixture(scope="session")
def stack() -> Stack:
    """The installed platform on the cluster ``test``."""
    return installed_stack("test", IMPATIENT)


@pytest.fixture
def tenant(stack: Stack) -> Iterator[Tenant]:
    """A namespace of its own for each test."""
    here = Tenant(stack).arrive()
    yield here
    here.leave()
