"""A stand-in for the Hugging Face hub: what huggingface_hub asks for, over HTTP on a free port.

with Hub() as hub:
    commit = hub.commit("dataset", "org/name", {"rows.jsonl": b"..."})   # `main` is this commit from now on
    ... HF_ENDPOINT = hub.address

With a `writer`'s token it also takes uploads (repositories, large files by LFS, commits); Xet, which the real hub prefers, it does not know.
Listings have pages of `PAGE` files, as the hub's have of 1,000; files of `LARGE` bytes and more are told by their SHA-256, as the hub's large ones are.
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml

from tests.support.server import LocalServer
from tunewright_crds import names

PAGE: Final = 2
LARGE: Final = 10_000
PREFIXES: Final = {"model": "", "dataset": "datasets/"}

Files = Mapping[str, bytes]


@dataclass
class Repo:
    """One repository."""

    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    token: str = ""
    """What it is read with; empty: public."""
    gated: bool = False
    """Whether its files, not its listing, need a token."""
    private: bool = False


class Hub(LocalServer):
    """The server. `broken` makes it answer 503; `tampered` maps paths to what is sent instead of their content; `forgetful` makes it answer 503 to
    the next commit, which it made."""

    def __init__(self) -> None:
        self.writer = ""
        self.forgetful = False
        self.large: dict[str, bytes] = {}
        self.repos: dict[str, Repo] = {}
        self.broken = False
        self.tampered: dict[str, bytes] = {}
        super().__init__(_handler(self))

    def commit(self, kind: str, name: str, files: Files, *, ref: str = "main") -> str:
        """A new commit with these files, which a branch or tag names from now on."""
        repo = self.repo(kind, name)
        commit = hashlib.sha1(json.dumps([name, len(repo.commits)]).encode()).hexdigest()
        repo.commits[commit] = dict(files)
        repo.refs[ref] = commit
        return commit

    def repo(self, kind: str, name: str) -> Repo:
        """A repository, made when it is first asked for."""
        return self.repos.setdefault(f"{PREFIXES[kind]}{name}", Repo())


def clean_client(patch: pytest.MonkeyPatch, work: Path, *mounted: str, patience: int) -> Path:
    """Have the hub's client know nothing of this machine. The folder that these mounts of credentials, attributes of `names`, now are."""
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(work / "cache"))
    patch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(work / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        patch.delenv(name, raising=False)
    patch.setenv("TUNEWRIGHT_STORAGE_PATIENCE_SECONDS", str(patience))
    secret = work / "secret"
    secret.mkdir()
    for mount in mounted:
        patch.setattr(names, mount, str(secret))
    return secret


class _Answer(Exception):
    """Ends a request."""

    def __init__(self, status: HTTPStatus, body: bytes = b"", **headers: str) -> None:
        super().__init__(status)
        self.status = status
        self.body = body
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def _error(status: HTTPStatus, code: str) -> _Answer:
    return _Answer(status, json.dumps({"error": code}).encode(), X_Error_Code=code)


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        # One request a connection: no thread waits for another one when the server stops.
        protocol_version = "HTTP/1.0"

        def do_GET(self) -> None:
            answer = _answer(hub, self.path, self.headers.get("Authorization", ""))
            self.send_response(answer.status)
            for name, value in ({"Content-Length": str(len(answer.body))} | answer.headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(answer.body)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
            answer = _written(hub, self.path, body, self.headers.get("Authorization", ""))
            self.send_response(answer.status)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            self.wfile.write(answer.body)

        def do_PUT(self) -> None:
            self.do_POST()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


def _answer(hub: Hub, target: str, authorization: str) -> _Answer:
    if hub.broken:
        return _Answer(HTTPStatus.SERVICE_UNAVAILABLE)
    url = urlsplit(target)
    try:
        parts = url.path.lstrip("/").split("/")
        if parts[0] == "api":
            kind = {"models": "model", "datasets": "dataset"}[parts[1]]
            return _api(hub, kind, parts[2:], parse_qs(url.query), authorization)
        return _file(hub, parts, authorization)
    except _Answer as answer:
        return answer


def _written(hub: Hub, target: str, body: bytes, authorization: str) -> _Answer:
    if hub.broken:
        return _Answer(HTTPStatus.SERVICE_UNAVAILABLE)
    path = urlsplit(target).path.strip("/")
    if path.startswith("large/"):  # an address that was given with the right to write to it
        assert hashlib.sha256(body).hexdigest() == path.removeprefix("large/")
        hub.large[path.removeprefix("large/")] = body
        return _Answer(HTTPStatus.OK)
    if path == "api/validate-yaml":
        return _validated(json.loads(body)["content"])
    if not hub.writer or authorization != f"Bearer {hub.writer}":
        return _Answer(HTTPStatus.FORBIDDEN if authorization else HTTPStatus.UNAUTHORIZED)
    if path == "api/repos/create":
        return _created(hub, json.loads(body))
    if path.endswith(".git/info/lfs/objects/batch"):
        return _said({"objects": [_transfer(hub, one) for one in json.loads(body)["objects"]], "transfer": "basic"})
    _, _, organisation, name, what, _ = path.split("/")
    if what == "preupload":
        files = [{"path": one["path"], "uploadMode": "lfs" if one["size"] >= LARGE else "regular"} for one in json.loads(body)["files"]]
        return _said({"files": [one | {"shouldIgnore": False} for one in files]})
    assert what == "commit"
    return _committed(hub, f"{organisation}/{name}", [json.loads(line) for line in body.splitlines()])


def _said(answer: Any) -> _Answer:
    return _Answer(HTTPStatus.OK, json.dumps(answer).encode())


def _validated(card: str) -> _Answer:
    """As the hub has it, a base is a model of the hub."""
    metadata = yaml.safe_load(card.split("---")[1])
    if re.fullmatch(r"[\w.-]+/[\w.-]+", metadata.get("base_model", "org/name")):
        return _said({"warnings": []})
    errors = [{"message": '"base_model" is not valid'}]
    return _Answer(HTTPStatus.BAD_REQUEST, json.dumps({"errors": errors}).encode())


def _created(hub: Hub, asked: dict[str, Any]) -> _Answer:
    name = f"{asked['organization']}/{asked['name']}"
    if name in hub.repos:
        return _Answer(
            HTTPStatus.CONFLICT, json.dumps({"error": "You already created this model repo", "url": f"{hub.address}/{name}"}).encode()
        )
    hub.repo("model", name).private = asked["visibility"] == "private"
    hub.commit("model", name, {".gitattributes": b""})
    return _said({"url": f"{hub.address}/{name}", "name": name})


def _transfer(hub: Hub, one: dict[str, Any]) -> dict[str, Any]:
    upload = {} if one["oid"] in hub.large else {"actions": {"upload": {"href": f"{hub.address}/large/{one['oid']}"}}}
    return {"oid": one["oid"], "size": one["size"], **upload}


def _committed(hub: Hub, name: str, lines: list[dict[str, Any]]) -> _Answer:
    repo = hub.repos[name]
    files = dict(repo.commits[repo.refs["main"]])
    for line in lines:
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            files[value["path"]] = hub.large[value["oid"]]
    commit = hub.commit("model", name, files)
    if hub.forgetful:
        hub.forgetful = False
        return _Answer(HTTPStatus.SERVICE_UNAVAILABLE)
    return _said({"success": True, "commitOid": commit, "commitUrl": f"{hub.address}/{name}/commit/{commit}"})


def _find(hub: Hub, key: str, authorization: str) -> Repo:
    repo = hub.repos.get(key)
    if repo is None:
        raise _error(HTTPStatus.NOT_FOUND, "RepoNotFound")
    if repo.token and not repo.gated and authorization != f"Bearer {repo.token}":
        raise _error(HTTPStatus.UNAUTHORIZED, "RepoNotFound")
    return repo


def _commit(repo: Repo, revision: str) -> str:
    name = unquote(revision)
    commit = repo.refs.get(name, name)
    if commit not in repo.commits:
        raise _error(HTTPStatus.NOT_FOUND, "RevisionNotFound")
    return commit


def _api(hub: Hub, kind: str, parts: list[str], query: dict[str, list[str]], authorization: str) -> _Answer:
    """`org/name/revision/REV`, `org/name/tree/REV[/PATH]`"""
    name, what, revision = "/".join(parts[:2]), *(parts[2:4] or ("revision", "main"))
    repo = _find(hub, f"{PREFIXES[kind]}{name}", authorization)
    commit = _commit(repo, revision)
    if what == "revision":
        return _Answer(HTTPStatus.OK, json.dumps({"id": name, "sha": commit, "private": bool(repo.token)}).encode())
    folder = unquote("/".join(parts[4:]))
    found = [
        entry
        for path, data in sorted(repo.commits[commit].items())
        if path.startswith(f"{folder}/" if folder else "")
        for entry in [_entry(path, data)]
    ]
    if folder and not found:
        return _error(HTTPStatus.NOT_FOUND, "EntryNotFound")
    start = int(query.get("cursor", ["0"])[0])
    more = {}
    if start + PAGE < len(found):
        here = f"{hub.address}/api/{kind}s/{'/'.join(parts)}"
        more = {"Link": f'<{here}?recursive=true&cursor={start + PAGE}>; rel="next"'}
    return _Answer(HTTPStatus.OK, json.dumps(found[start : start + PAGE]).encode(), **more)


def _entry(path: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _blob(data)}
    if len(data) >= LARGE:
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _file(hub: Hub, parts: list[str], authorization: str) -> _Answer:
    """`[datasets/]org/name/resolve/REV/PATH`"""
    at = parts.index("resolve")
    repo = _find(hub, "/".join(parts[:at]), authorization)
    if repo.gated and authorization != f"Bearer {repo.token}":
        raise _error(HTTPStatus.FORBIDDEN if authorization else HTTPStatus.UNAUTHORIZED, "GatedRepo")
    commit = _commit(repo, parts[at + 1])
    path = unquote("/".join(parts[at + 2 :]))
    data = repo.commits[commit].get(path)
    if data is None:
        raise _error(HTTPStatus.NOT_FOUND, "EntryNotFound")
    etag = hashlib.sha256(data).hexdigest() if len(data) >= LARGE else _blob(data)
    return _Answer(HTTPStatus.OK, hub.tampered.get(path, data), ETag=f'"{etag}"', X_Repo_Commit=commit)
