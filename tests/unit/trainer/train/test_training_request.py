"""A checkpoint at its owner's wish, which comes back with the answer to a progress report."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.support.training import NAMESPACE, UID, a_job, documents, packed, publish_data, train_here
from tunewright_trainer.storage import LocalStore
from tunewright_trainer.train import recipe


@contextmanager
def front_end(answer: bytes, reports: list[dict[str, Any]]) -> Iterator[str]:
    """A server that gives each report the same answer; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            reports.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(202)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


ANSWERS = {
    "nobody asks": (b'{"written": true, "checkpoint": ""}', [6], ""),
    "somebody does": (b'{"written": true, "checkpoint": "now", "more": 1}', [2, 6], "now"),
    "a front end of before": (b'{"written": true}', [6], ""),
}


@pytest.mark.parametrize(("answer", "saved", "request_"), ANSWERS.values(), ids=ANSWERS)
def test_one_checkpoint_is_saved_at_the_next_step_for_a_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes, saved: list[int], request_: str
) -> None:
    store = LocalStore(tmp_path / "store")
    publish_data(store, tmp_path, train=packed(documents(24), 2))
    plain = recipe.Run.step
    reports: list[dict[str, Any]] = []

    def patient(run: recipe.Run) -> None:
        """The second step is done when the first report is answered, and the third when what the answer asks for is saved."""
        plain(run)
        deadline = time.monotonic() + 60
        while run.counters.step == 2 and not (reports and run.reporter.asked == request_):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        run.checkpoints.wait()

    monkeypatch.setattr(recipe.Run, "step", patient)
    job = a_job(hyperparameters={"batchSize": 4, "epochs": 2}, checkpointing={"everySteps": 100, "keep": 9})
    with front_end(answer, reports) as url:
        outcome = train_here(job.model_copy(update={"progress_url": url}), store, tmp_path)
    folders = sorted((tmp_path / "store" / NAMESPACE / "jobs" / UID / "checkpoints").glob("step-*"))
    assert [int(folder.name.removeprefix("step-")) for folder in folders] == saved
    assert outcome.last_checkpoint is not None
    assert outcome.last_checkpoint.request == request_
    assert (reports[-1]["last_checkpoint"] or {"request": ""})["request"] == request_
