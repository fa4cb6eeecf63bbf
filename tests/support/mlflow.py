"""A stand-in for an MLflow server: what MLflow's own client asks for of its REST API, over HTTP on a free port.

with Mlflow() as server: ... uri = server.address; server.runs
"""

import json
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.support.server import LocalServer


@dataclass
class Run:
    """One run, as it was told."""

    id: str
    experiment: str
    name: str
    tags: dict[str, str]
    status: str = "RUNNING"
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, dict[int, float]] = field(default_factory=dict)  # by name and step

    def as_json(self) -> dict[str, Any]:
        info = {"run_id": self.id, "run_uuid": self.id, "experiment_id": self.experiment, "run_name": self.name, "status": self.status}
        times = {"start_time": 1, "artifact_uri": "", "lifecycle_stage": "active", "user_id": ""}
        return {"run": {"info": info | times, "data": {"tags": [{"key": k, "value": v} for k, v in self.tags.items()]}}}


class Mlflow(LocalServer):
    """The server. ``asked`` are the headers of authorization that it saw."""

    def __init__(self) -> None:
        self.experiments: list[str] = []
        self.runs: list[Run] = []
        self.asked: set[str] = set()
        super().__init__(_handler(self))

    def answer(self, what: str, asked: dict[str, Any]) -> dict[str, Any] | None:
        """What the API says; None where there is nothing of that name."""
        if what == "experiments/get-by-name":
            name = asked["experiment_name"]
            found = {"experiment_id": str(self.experiments.index(name)), "name": name} if name in self.experiments else None
            return {"experiment": found | {"lifecycle_stage": "active", "artifact_location": ""}} if found else None
        if what == "experiments/create":
            self.experiments.append(asked["name"])
            return {"experiment_id": str(len(self.experiments) - 1)}
        if what == "runs/create":
            tags = {one["key"]: one["value"] for one in asked.get("tags", [])}
            self.runs.append(Run(f"run{len(self.runs)}", asked["experiment_id"], asked["run_name"], tags))
            return self.runs[-1].as_json()
        if what == "runs/search":
            wanted = [f"tags.`{k}` = '{v}'" for run in self.runs for k, v in run.tags.items()]
            assert not wanted or asked["filter"].startswith("tags.`")
            return {
                "runs": [
                    one.as_json()["run"] for one in self.runs if any(asked["filter"] == f"tags.`{k}` = '{v}'" for k, v in one.tags.items())
                ]
            }
        run = next(one for one in self.runs if one.id == asked["run_id"])
        if what == "runs/log-batch":
            for param in asked.get("params", []):
                assert run.params.setdefault(param["key"], param["value"]) == param["value"], "a parameter does not change"
            for metric in asked.get("metrics", []):
                run.metrics.setdefault(metric["key"], {})[int(metric.get("step", 0))] = float(metric["value"])
        elif what == "runs/set-tag":
            run.tags[asked["key"]] = asked["value"]
        elif what == "runs/update":
            run.status = asked.get("status", run.status)
            return {"run_info": run.as_json()["run"]["info"]}
        elif what == "runs/get":
            return run.as_json()
        else:
            return None
        return {}


def _handler(server: Mlflow) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"

        def do_GET(self) -> None:
            self._answer({name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()})

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _answer(self, asked: dict[str, Any]) -> None:
            server.asked.add(self.headers.get("Authorization", ""))
            found = server.answer(urlsplit(self.path).path.partition("/mlflow/")[2], asked)
            body = json.dumps({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "none"} if found is None else found).encode()
            self.send_response(404 if found is None else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler
