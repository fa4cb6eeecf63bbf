"""A stand-in for a judging model: a real HTTP server with OpenAI's chat API, whose replies are scripted."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.support.server import LocalServer

Reply = tuple[int, dict[str, str], str]
_ANSWER = re.compile(r"Start of Assistant ([AB])'s Answer\]\n(.*?)\n\[The End", re.DOTALL)


def says(text: str) -> Reply:
    """A completion with this text."""
    return 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


def by(better: Callable[[str, str], str]) -> Callable[[int, dict[str, Any]], Reply]:
    """Verdicts by a function of the two answers, as they are read, that gives A, B or C."""

    def reply(_: int, body: dict[str, Any]) -> Reply:
        answers = dict(_ANSWER.findall(body["messages"][1]["content"]))
        return says(f"One is better than the other. [[{better(answers['A'], answers['B'])}]]")

    return reply


@dataclass
class StandIn:
    """``url`` to give as the endpoint; what was asked in ``bodies`` and ``keys``."""

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)


@contextmanager
def a_judge(reply: Callable[[int, dict[str, Any]], Reply]) -> Iterator[StandIn]:
    """``reply``: status, headers and body for the number of a question (from 0) and its JSON."""
    asked, lock = StandIn(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(asked.bodies)
                asked.bodies.append(body)
                asked.keys.append(self.headers.get("Authorization", ""))
            status, headers, text = reply(number, body) if self.path == "/v1/chat/completions" else (404, {}, "")
            data = text.encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    with LocalServer(Handler) as server:
        asked.url = f"{server.address}/v1"
        yield asked
