"""Probes and metrics over HTTP.

``/healthz``: the API server was heard of lately, and the watch keeps up with it. ``/readyz``: leads, or stands by with a lease it can see.
"""

import logging
import time
from collections.abc import Callable

from aiohttp import web

log = logging.getLogger(__name__)


class Health:
    """What the probes answer from. ``heard_at``: monotonic seconds of the last answer of the API server."""

    def __init__(self, *, heard_at: Callable[[], float], limit: float) -> None:
        self._heard_at = heard_at
        self.limit = limit
        self.ready = False
        self.watch_is_stale = False

    def complaint(self) -> str:
        """What is wrong; empty if nothing is."""
        age = time.monotonic() - self._heard_at()
        if age > self.limit:
            return f"nothing was heard from the API server for {age:.0f} s"
        return "watch events no longer arrive" if self.watch_is_stale else ""


async def serve(health: Health, *, port: int, metrics_page: Callable[[], bytes]) -> tuple[web.AppRunner, int]:
    """Starts the server; returns it and its port. The caller cleans it up."""

    async def healthz(_: web.Request) -> web.Response:
        complaint = health.complaint()
        return web.Response(text=complaint or "ok", status=503 if complaint else 200)

    async def readyz(_: web.Request) -> web.Response:
        ready = health.ready and not health.complaint()
        return web.Response(text="ready" if ready else "not ready", status=200 if ready else 503)

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=metrics_page(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    app = web.Application()
    app.add_routes([web.get("/healthz", healthz), web.get("/readyz", readyz), web.get("/metrics", metrics)])
    runner = web.AppRunner(app, access_log=None, handle_signals=False)
    await runner.setup()
    site = web.TCPSite(runner, None, port)
    await site.start()
    bound: int = min(runner.addresses, key=len)[1]  # with port 0 IPv4 (a pair) and IPv6 (four parts) get a port each
    log.info("probes and metrics at port %d", bound)
    return runner, bound
