"""Who waits for data is told how far it is."""

import logging
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.models import tiny_model
from tests.support.preparing import a_data_job, prepare_here, write_lines
from tests.support.rows import alpaca_rows
from tunewright_trainer.prepare import progress

MANIFEST = """
apiVersion: tunewright.dev/v1alpha1
kind: InstructionTuningJob
metadata: {{name: tune}}
spec:
  model: {{uri: {model}}}
  dataset: {{sources: [{{uri: {data}}}], maxLength: 512}}
"""


def test_a_terminal_shows_a_bar(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "data.jsonl", alpaca_rows(1200))
    (tmp_path / "job.yaml").write_text(MANIFEST.format(model=tiny_model("llama", chat_template=True), data=data))
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "tunewright_trainer", "prepare", str(tmp_path / "job.yaml"), "--output", str(tmp_path / "out")]
    with subprocess.Popen(command, stderr=theirs, stdout=subprocess.DEVNULL, env=os.environ | {"TERM": "xterm", "COLUMNS": "120"}) as run:
        os.close(theirs)
        said = _all_of(ours)
        assert run.wait(timeout=120) == 0, said
    for part in ("reading", "1,200 rows", "writing", "INFO read "):
        assert part in said


def _all_of(terminal: int) -> str:
    said = b""
    with os.fdopen(terminal, "rb", buffering=0) as file:
        while True:
            try:
                said += (some := file.read(65_536))
            except OSError:  # the other side is closed
                some = b""
            if not some:
                return said.decode(errors="replace")


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz", "data.jsonl.zst"])
def test_a_log_tells_the_share_that_is_read(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "TELL_SECONDS", 0)
    with caplog.at_level(logging.INFO, logger=progress.__name__):
        prepare_here(a_data_job(write_lines(tmp_path / name, alpaca_rows(1200))), tmp_path)
    lines = [record.getMessage() for record in caplog.records if record.name == progress.__name__]
    assert any(line.startswith("reading: 100 %, 1200 rows, ") for line in lines), lines
    assert any(line.startswith("writing: 100 %, 1200 rows, ") for line in lines), lines
