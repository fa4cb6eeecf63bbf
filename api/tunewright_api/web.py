"""The pages: log in with a Kubernetes token, and see the jobs that one may list."""

import hashlib
import heapq
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

from fastapi import APIRouter, Form, Query, Request
from jinja2 import Environment, FileSystemLoader, select_autoescape
from starlette.responses import HTMLResponse, RedirectResponse, Response

from tunewright_api.cache import Object
from tunewright_api.deps import Parts, PartsDep
from tunewright_api.errors import ApiError, Forbidden, Unauthenticated
from tunewright_crds import names
from tunewright_crds.names import Phase

MAX_ROWS: Final = 200  # newest first; more than that nobody reads, and /apis/v1/jobs gives them all
STATIC: Final = Path(__file__).parent / "static"
_PAGES: Final = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=select_autoescape(), trim_blocks=True, lstrip_blocks=True
)
_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}

router = APIRouter(include_in_schema=False)


@router.get("/")
async def jobs_page(request: Request, parts: PartsDep, phase: Phase | None = None) -> Response:
    try:
        table, summary = await _table(request, parts, phase)
    except Unauthenticated:
        return RedirectResponse("/login", 303)
    cookies: dict[str, str] = {}
    csrf = parts.sessions.csrf(request, cookies)
    response = _page("jobs.html", table=table, summary=summary, phases=list(Phase), phase=phase, csrf=csrf)
    parts.sessions.set_cookies(response, cookies)
    return response


@router.get("/fragments/jobs")
async def jobs_fragment(
    request: Request, parts: PartsDep, phase: Annotated[str, Query(max_length=32)] = "", seen: Annotated[str, Query(max_length=64)] = ""
) -> Response:
    """The table anew, or 204 where it is as the page shows it: a page that does not change must not disturb a screen reader."""
    try:
        table, summary = await _table(request, parts, Phase(phase) if phase in list(Phase) else None)
    except Unauthenticated:
        return Response(status_code=204, headers={"HX-Redirect": "/login"})
    version = hashlib.sha256(table.encode()).hexdigest()[:16]
    if version == seen:
        return Response(status_code=204, headers=_HEADERS)
    return _page("update.html", table=table, summary=summary, version=version)


@router.get("/login")
async def login_page(request: Request, parts: PartsDep) -> Response:
    return _login(request, parts)


@router.post("/login")
async def login(
    request: Request,
    parts: PartsDep,
    token: Annotated[str, Form(max_length=16_384)] = "",
    csrf: Annotated[str, Form(max_length=256)] = "",
) -> Response:
    if not parts.sessions.from_our_form(request, csrf):
        return _login(request, parts, error="This form is out of date. Try again; cookies must be allowed.", status=403)
    token = "".join(token.split())  # a token that was copied from a terminal may hold line breaks
    try:
        await parts.auth.identity(token)
    except ApiError as error:
        return _login(request, parts, error=error.message, status=error.status)
    response = RedirectResponse("/", 303)
    if not parts.sessions.begin(response, token):
        return _login(request, parts, error="This token is too long for a cookie. Use one of a ServiceAccount.", status=422)
    return response


@router.post("/logout")
async def logout(request: Request, parts: PartsDep, csrf: Annotated[str, Form(max_length=256)] = "") -> Response:
    if not parts.sessions.from_our_form(request, csrf):
        raise Forbidden("This form is out of date; load the page again.")
    response = RedirectResponse("/login", 303)
    parts.sessions.end(response)
    return response


def _login(request: Request, parts: Parts, *, error: str = "", status: int = 200) -> Response:
    cookies: dict[str, str] = {}
    response = _page("login.html", csrf=parts.sessions.csrf(request, cookies), error=error, status=status)
    parts.sessions.set_cookies(response, cookies)
    return response


def _page(template: str, *, status: int = 200, **values: Any) -> HTMLResponse:
    return HTMLResponse(_PAGES.get_template(template).render(**values), status, _HEADERS)


async def _table(request: Request, parts: Parts, phase: Phase | None) -> tuple[str, str]:
    """The table as HTML and a summary as text; raises Unauthenticated where there is no session."""
    who = await parts.auth.identity(parts.sessions.token(request))
    jobs = parts.cache.jobs
    shown = await parts.auth.namespaces(who, "list", names.JOBS, jobs.namespaces())
    visible = [job for job in jobs.after() if job["metadata"]["namespace"] in shown]
    wanted = [job for job in visible if phase is None or phase_of(job) == phase]
    newest = heapq.nlargest(MAX_ROWS, wanted, key=lambda job: job["metadata"]["creationTimestamp"])
    table = _PAGES.get_template("table.html").render(rows=[row(job) for job in newest], left_out=len(wanted) - len(newest), phase=phase)
    return table, summarise([phase_of(job) for job in visible])


def phase_of(job: Object) -> str:
    """The job's phase; Pending where nobody has looked at it yet."""
    return str(job.get("status", {}).get("phase", Phase.PENDING.value))


def summarise(phases: list[str]) -> str:
    """How many jobs there are of each phase, in words."""
    counts = Counter(phases)
    parts = [f"{counts[phase]} {phase.lower()}" for phase in Phase if counts[phase]]
    return f"{len(phases)} jobs: {', '.join(parts)}" if parts else "No jobs yet."


def row(job: Object) -> dict[str, Any]:
    """What the table shows of a job; texts are escaped by the template."""
    meta, status = job["metadata"], job.get("status", {})
    progress, error, model = status.get("progress", {}), status.get("error", {}), status.get("model", {})
    evaluation = status.get("evaluation", {})
    evaluating = phase_of(job) == Phase.EVALUATING and progress.get("toEvaluate")
    done, all_of_it = progress.get("evaluated", 0), progress.get("toEvaluate", 0)
    running = phase_of(job) in (Phase.TRAINING, Phase.PUBLISHING)
    return {
        "namespace": meta["namespace"],
        "name": meta["name"],
        "age": age(datetime.now(UTC) - datetime.fromisoformat(meta["creationTimestamp"])),
        "phase": phase_of(job),
        "percent": 100 * done // all_of_it if evaluating else progress.get("percent", 0),
        "evaluating": f"evaluating {done} of {all_of_it}" if evaluating else "",
        "step": progress.get("step", 0),
        "max_steps": progress.get("maxSteps", 0),
        "loss": progress.get("loss", ""),
        "remaining": progress.get("remaining", "") if running else "",
        "model": model.get("name", ""),
        "error": error,
        "measured": measured(evaluation),
        "examples": evaluation.get("examples", 0),
        "report": evaluation.get("reportUri", ""),
    }


def measured(evaluation: Object) -> list[dict[str, str]]:
    """What was measured of the job's model: of each metric the value of the base model, if it was measured, and of the tuned one."""
    return [
        {"metric": f"{one['task']}: {one['metric']}", "base": _number(one.get("base")), "tuned": _number(one["tuned"])}
        for one in evaluation.get("metrics", ())
    ]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def age(span: Any) -> str:
    """A span of time as kubectl tells it: in its largest unit. Seconds are told in tens, so that a page rests now and then."""
    seconds = max(0, int(span.total_seconds()))
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds // size}{unit}"
    return f"{seconds // 10 * 10}s"
