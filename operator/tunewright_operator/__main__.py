"""The operator's process: lead, watch, look after jobs and engines, until told to stop.

Exit codes: 0 stopped on request · 1 a part failed or another replica leads now (start again) · 64 settings or definitions are missing.
"""

import asyncio
import contextlib
import logging
import random
import signal
import sys
import time
from typing import Final

import kopf
from pydantic import ValidationError

from tunewright_crds import names
from tunewright_operator import health
from tunewright_operator.cluster import Cluster, ClusterError, Gone, connection
from tunewright_operator.controller import Controller
from tunewright_operator.engines import Engines
from tunewright_operator.handlers import kopf_settings, registry
from tunewright_operator.lease import Leadership, LeaseLost
from tunewright_operator.metrics import Metrics
from tunewright_operator.settings import Settings
from tunewright_operator.stores import Stores

log = logging.getLogger("tunewright_operator")

EXIT_FAILED: Final = 1
EXIT_SETTINGS: Final = 64
_PROBE_SECONDS: Final = 10.0
# Soon after the start, for what was deleted between our own first list and the watch's.
_FIRST_RESYNC_SECONDS: Final = 20.0
# Corrections in so many resyncs in a row, and no event between them, mean that watch events no longer arrive.
_STALE_RESYNCS: Final = 2


def main() -> None:
    """Reads the settings from the environment and runs until SIGTERM."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("kopf").setLevel(logging.WARNING)
    try:
        settings = Settings()
    except ValidationError as invalid:
        for error in invalid.errors(include_url=False, include_input=False):
            print(f"TUNEWRIGHT_{'_'.join(str(part) for part in error['loc']).upper()}: {error['msg']}", file=sys.stderr)
        sys.exit(EXIT_SETTINGS)
    sys.exit(asyncio.run(operate(settings)))


async def operate(settings: Settings) -> int:
    """Runs the operator; returns the exit code."""
    stop = asyncio.Event()
    _stop_on_signals(stop)
    info = connection()
    metrics = Metrics()
    async with Cluster(info) as cluster, Engines() as engines:
        started = time.monotonic()
        condition = health.Health(heard_at=lambda: max(cluster.heard_at, started), limit=settings.health_seconds)
        controller = Controller(settings, cluster=cluster, engines=engines, stores=Stores(), metrics=metrics)
        leadership = Leadership(
            cluster,
            namespace=settings.lease_namespace,
            name=settings.lease_name,
            identity=settings.identity,
            seconds=settings.lease_seconds,
        )
        cluster.leading_by(leadership.may_write)

        def page() -> bytes:
            controller.count()
            metrics.leader.set(leadership.may_write())
            return metrics.page()

        server, _ = await health.serve(condition, port=settings.port, metrics_page=page)
        work = asyncio.create_task(_lead_and_work(settings, controller, leadership, condition, info, stop))
        try:
            return await _first_of(work, stop)
        finally:
            await leadership.release()
            await server.cleanup()


def _stop_on_signals(stop: asyncio.Event) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)


async def _first_of(work: asyncio.Task[None], stop: asyncio.Event) -> int:
    """Waits for the end of the work or the wish to stop."""
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({work, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    asked = stop.is_set()
    work.cancel()
    try:
        await work
    except asyncio.CancelledError:
        pass
    except BaseExceptionGroup as group:
        for error in _causes(group):
            log.error("ends: %s: %s", type(error).__name__, error, exc_info=None if isinstance(error, LeaseLost) else error)
        return EXIT_FAILED
    return 0 if asked else EXIT_FAILED


def _causes(group: BaseExceptionGroup) -> list[BaseException]:
    causes: list[BaseException] = []
    for error in group.exceptions:
        causes += _causes(error) if isinstance(error, BaseExceptionGroup) else [error]
    return causes


async def _lead_and_work(
    settings: Settings,
    controller: Controller,
    leadership: Leadership,
    condition: health.Health,
    info: kopf.ConnectionInfo,
    stop: asyncio.Event,
) -> None:
    """Stands by until it leads, then everything at once; the first part that ends, ends all."""
    async with asyncio.TaskGroup() as parts:
        parts.create_task(_probe(controller.cluster, condition))
        await _wait_for_the_definitions(controller.cluster)
        condition.ready = True
        await leadership.acquire()
        parts.create_task(leadership.keep())
        await _take_stock(controller)
        parts.create_task(controller.jobs.run())
        parts.create_task(controller.datasets.run())
        parts.create_task(controller.serving.run())
        parts.create_task(_resync(settings, controller, condition))
        parts.create_task(_watch(settings, controller, info, stop))


async def _wait_for_the_definitions(cluster: Cluster) -> None:
    """kopf looks for the definitions once, at its start."""
    while True:
        try:
            served = await cluster.ask(f"/apis/{names.API_VERSION}")
            missing = {names.JOBS, names.DATASETS, names.MODELS} - {entry["name"] for entry in served.get("resources", ())}
            if not missing:
                return
            log.warning("waiting for the resources %s of %s", ", ".join(sorted(missing)), names.API_VERSION)
        except Gone:
            log.warning("waiting for the definitions of %s", names.API_VERSION)
        except ClusterError as error:
            log.warning("waiting for the API server: %s", error)
        await asyncio.sleep(2)


async def _take_stock(controller: Controller) -> None:
    """Lists everything before the first pass: a job whose children are not known yet would have them asked for one by one."""
    while True:
        try:
            await controller.resync()
            return
        except ClusterError as error:
            log.warning("waiting for the API server: %s", error)
        await asyncio.sleep(2)


async def _watch(settings: Settings, controller: Controller, info: kopf.ConnectionInfo, stop: asyncio.Event) -> None:
    """kopf, embedded. Its quiet end is a wish to stop that came while it starts, when it has the signals for itself."""
    started = asyncio.Event()
    async with asyncio.TaskGroup() as parts:
        taking_back = parts.create_task(_take_the_signals_back(started, stop))
        await kopf.operator(
            registry=registry(controller, info),
            settings=kopf_settings(),
            standalone=True,
            # kopf would look up the user's name, and a pod's user has none. Its own type of this is private.
            identity=settings.identity,  # type: ignore[arg-type]
            clusterwide=not settings.watched_namespaces,
            namespaces=settings.watched_namespaces,
            ready_flag=started,
        )
        taking_back.cancel()
    stop.set()


async def _take_the_signals_back(started: asyncio.Event, stop: asyncio.Event) -> None:
    """On its own way out kopf waits five seconds for tasks that it takes for its own; cancelled by us it ends at once."""
    await started.wait()
    _stop_on_signals(stop)


async def _probe(cluster: Cluster, condition: health.Health) -> None:
    """Asks the API server now and then, so that its silence is noticed when nothing else happens."""
    while True:
        with contextlib.suppress(ClusterError):
            await cluster.ask("/version")
        await asyncio.sleep(min(_PROBE_SECONDS, condition.limit / 4))


async def _resync(settings: Settings, controller: Controller, condition: health.Health) -> None:
    stale, events = 0, 0
    pause = min(_FIRST_RESYNC_SECONDS, settings.resync_seconds)
    while True:
        await asyncio.sleep(pause * random.uniform(0.9, 1.1))
        pause = settings.resync_seconds
        try:
            corrections = await controller.resync()
        except ClusterError as error:
            log.warning("no resync: %s", error)
            continue
        controller.metrics.corrections.inc(corrections)
        silent = controller.watch_events == events
        stale, events = (stale + 1 if corrections and silent else 0), controller.watch_events
        condition.watch_is_stale = stale >= _STALE_RESYNCS
        if corrections:
            log.info("a full list knew %d objects better than the watch", corrections)


if __name__ == "__main__":
    main()
