"""Order and shared fixtures. Each file's tests run one after another in one process; those on the whole cluster are together in one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.stack import IMPATIENT, Stack, installed_stack
from tests.support.tenant import Tenant

ORDER = ("unit", "security", "integration", "faults", "cluster", "e2e")
TESTS = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Quick kinds first, so that a plain mistake is told within seconds; but of two processes, one begins with the cluster, which mostly waits."""
    for item in items:
        group = "stack" if needs_stack(item) else str(item.path.relative_to(TESTS))
        item.add_marker(pytest.mark.xdist_group(group))
    shared = hasattr(config, "workerinput")
    items.sort(key=lambda item: -1 if shared and needs_stack(item) else ORDER.index(item.path.relative_to(TESTS).parts[0]))


def needs_stack(item: pytest.Item) -> bool:
    """Whether a test uses the whole cluster."""
    return "stack" in getattr(item, "fixturenames", ())


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
