"""What is left out of the imports: not needed while a model trains, there when it is asked for. Each case needs a process that has imported nothing yet."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.models import tiny_model
from tests.support.training import documents, packed, publish_data
from tunewright_trainer.storage import LocalStore

FIRST_STEP = """
import sys
from pathlib import Path
from tests.support.training import a_job, train_here
from tunewright_trainer.cli import load_no_more_than
from tunewright_trainer.storage import LocalStore
from tunewright_trainer.train import metrics

place, model = map(Path, sys.argv[1:])
job = a_job(model, method={"lora": {"rank": 4}}, hyperparameters={"maxSteps": 1, "batchSize": 2})
load_no_more_than(job)
metrics.History.add = lambda *_: sys.exit(" ".join(sys.modules))
train_here(job, LocalStore(place / "store"), place)
"""
LEAN = "from transformers import AutoTokenizer; from tunewright_trainer.lean import import_lean; import_lean(); import_lean()"  # as after preparing


def _run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120, check=False)


def _said(program: str) -> str:
    done = _run(program)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_first_step_comes_without_what_takes_long_to_import_and_is_not_used(tmp_path: Path) -> None:
    publish_data(LocalStore(tmp_path / "store"), tmp_path, train=packed(documents(8), 2))
    imported = _run(FIRST_STEP, str(tmp_path), str(tiny_model())).stderr.splitlines()[-1].split()
    assert {"torch", "peft", "transformers.modeling_utils"} <= {*imported}
    assert {"torch._dynamo.eval_frame", "torch._inductor", "triton", "scipy", "pandas", "pytest"} & {*imported} == set()


@pytest.mark.parametrize(
    "use",
    [
        pytest.param("assert torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)).item() == 2", id="compiling"),
        pytest.param("from torch._dynamo.utils import counters; assert torch._dynamo.utils.counters is counters", id="a-part"),
        pytest.param(
            "import scipy.optimize; torch._dynamo.reset(); assert torch._dynamo.disable(print) is not print", id="its-decorators-then"
        ),
    ],
)
def test_what_was_left_out_is_there_for_whoever_uses_it(use: str) -> None:
    _said(f"{LEAN}; import torch; assert torch._dynamo.disable(print) is print; {use}")


def test_transformers_knows_the_same_models() -> None:
    names = "import transformers.models; print(*sorted(transformers.models._class_to_module.items()))"
    assert _said(f"{LEAN}; {names}") == _said(names)
