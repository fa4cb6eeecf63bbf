"""The quick start's scripts as modules: they lie in a folder of examples, outside the import path."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

QUICKSTART = Path(__file__).parents[3] / "examples" / "quickstart"


@pytest.fixture(scope="session")
def make_data() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(QUICKSTART)
        yield importlib.import_module("make_data")


@pytest.fixture(scope="session")
def make_model(make_data: ModuleType) -> ModuleType:
    return importlib.import_module("make_model")


@pytest.fixture(scope="session")
def quickstart() -> Path:
    return QUICKSTART
