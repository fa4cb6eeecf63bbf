"""Order and shared fixtures. Everything runs in one process, one test after another: from the quick and narrow to the slow and whole."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.stack import IMPATIENT, Stack, cluster, installed_stack
from tests.support.tenant import Tenant

ORDER = ("unit", "security", "integration", "faults", "cluster", "e2e")
TESTS = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Quick kinds first, so that a plain mistake is told within seconds."""
    items.sort(key=lambda item: ORDER.index(item.path.relative_to(TESTS).parts[0]))


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """The installed platform on the cluster ``test``. The cluster stays up for the next run unless this is CI's."""
    yield installed_stack("test", IMPATIENT)
    if os.environ.get("CI"):
        cluster("down", "--name", "test", timeout=120)


@pytest.fixture
def tenant(stack: Stack) -> Iterator[Tenant]:
    """A namespace of its own for each test."""
    here = Tenant(stack).arrive()
    yield here
    here.leave()
