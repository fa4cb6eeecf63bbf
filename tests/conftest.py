"""Order and shared fixtures. Everything runs in one process, one test after another: from the quick and narrow to the slow and whole."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.stack import IMPATIENT, Stack, installed_stack
from tests.support.tenant import Tenant

ORDER = ("unit", "security", "integration", "faults", "cluster", "e2e")
TESTS = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Quick kinds first, so that a plain mistake is told within seconds."""
    items.sort(key=lambda item: ORDER.index(item.path.relative_to(TESTS).parts[0]))


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
