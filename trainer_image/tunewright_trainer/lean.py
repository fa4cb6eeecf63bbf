"""Importing what tuning and serving are made of, without what that brings along and nothing here uses: whoever started the process waits for it.

torch's compiler alone would take as long as torch itself (docs/benchmarks.md). None of this changes what is computed, and all of it is still there
for whoever does use it. It leans on how torch and transformers are written; where they change, tests/unit/trainer/test_lean.py tells.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Final

COMPILER: Final = "torch._dynamo"
# What transformers' masks take from the compiler's folder; it needs none of the rest.
_MASKS: Final = f"{COMPILER}._trace_wrapped_higher_order_op"
_LEFT_ALONE: Final = frozenset({"allow_in_graph", "assume_constant_result", "disable", "graph_break"})


def import_lean() -> None:
    """Import torch and the heart of transformers; comes before anything else imports them, and may be called again."""
    import torch

    if COMPILER not in sys.modules:
        _put_off_compiler(torch)
    from transformers import utils

    _import_names(utils.import_utils)
    with _replaced(utils, "is_scipy_available", lambda: False):  # its optimizers are wanted for one loss, that of object detection
        import transformers.loss.loss_utils  # noqa: F401


def _put_off_compiler(torch: ModuleType) -> None:
    """Put something in the compiler's place that turns into it as soon as it is asked for more than to leave functions alone.

    Decorators that say so have it imported by transformers and torch's optimizers, in processes that compile nothing.
    """
    stand_in = _Uncompiled(COMPILER)
    found = importlib.util.find_spec(COMPILER)
    assert found is not None
    assert found.submodule_search_locations is not None
    sys.modules[COMPILER] = torch._dynamo = stand_in  # type: ignore[attr-defined]
    stand_in.__path__ = found.submodule_search_locations
    importlib.import_module(_MASKS)
    del stand_in.__path__  # asked for by whoever imports another part, which needs the whole


class _Uncompiled(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name in _LEFT_ALONE:
            return _as_is
        if name.startswith("__") and name != "__path__":  # asked for by the import system itself
            raise AttributeError(name)
        if sys.modules.get(COMPILER) is self:
            del sys.modules[COMPILER], sys.modules["torch"]._dynamo
        return getattr(importlib.import_module(COMPILER), name)


def _as_is(function: Any = None, *_: Any, **__: Any) -> Any:
    """A decorator, with or without arguments, that changes nothing."""
    return function if callable(function) else _as_is


def _import_names(imports: ModuleType) -> None:
    """transformers reads its 1,600 files for the names in them, twice, with too small a cache; the second time it is given what it found the first time."""
    read = imports.create_import_structure_from_path
    with _replaced(imports, "create_import_structure_from_path", lambda path: read(Path(path).parent if Path(path).is_file() else path)):
        import transformers.models  # noqa: F401


@contextmanager
def _replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    plain = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, plain)
