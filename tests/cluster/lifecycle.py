"""Bring a cluster up, repair it, take it down, and stop and start single services of it."""

import dataclasses
import os
import secrets
import shutil
from pathlib import Path

from . import build, cleanup, control_plane, network, node, record, services, storage
from .control_plane import Ports
from .network import Addresses
from .places import RUN_ROOT, ClusterError, Places, places
from .record import S3, Facts
from .services import Service

EXTERNAL_IMAGES = {"operator": "TUNEWRIGHT_OPERATOR_IMAGE", "api": "TUNEWRIGHT_API_IMAGE", "trainer": "TUNEWRIGHT_TRAINER_IMAGE"}


def up(name: str, *, control_plane_only: bool = False, controllers: bool = False) -> Facts:
    """Make sure that the cluster works, and return its facts.

    A healthy one is used as it is; services of it that died are started again; one that cannot be repaired, or was made
    for less than is asked now, is removed and made anew.
    """
    at = places(name)
    if build.external():
        return external(at)
    build.need_root()
    at.state.mkdir(parents=True, exist_ok=True)
    with build.locked(at.state / "lock"):
        controllers = controllers or not control_plane_only
        if usable := existing(at, control_plane_only=control_plane_only, controllers=controllers):
            try:
                return bring_up(usable, at)
            except ClusterError as problem:
                print(f"         cluster {name!r} cannot be repaired, it is made anew: {problem}", flush=True)
        with build.locked(RUN_ROOT / "tunewright-orphans.lock"):
            cleanup.destroy_orphans()
        cleanup.destroy(at)
        shutil.rmtree(at.logs, ignore_errors=True)
        return bring_up(fresh(at, control_plane_only=control_plane_only, controllers=controllers), at)


def down(name: str) -> None:
    """Take the cluster down, also after everything crashed. Its logs stay."""
    at = places(name)
    if not at.state.exists() and not at.run.exists():
        return
    if at.facts.exists() and record.facts(name).external:
        at.facts.unlink()
        return
    build.need_root()
    at.state.mkdir(parents=True, exist_ok=True)
    with build.locked(at.state / "lock"):
        cleanup.destroy(at)


def existing(at: Places, *, control_plane_only: bool, controllers: bool) -> Facts | None:
    """The cluster that is there, if it has what is asked and this boot of the machine made it."""
    if not at.facts.exists() or not (at.run / "owner.json").exists():
        return None
    found = record.facts(at.name)
    enough = (control_plane_only or not found.control_plane_only) and (found.controllers or not controllers)
    return found if enough and not found.external else None


def fresh(at: Places, *, control_plane_only: bool, controllers: bool) -> Facts:
    """Choose ports, keys and addresses for a new cluster."""
    build.packages(build.CONTROL_PLANE_PACKAGES if control_plane_only else {**build.CONTROL_PLANE_PACKAGES, **build.NODE_PACKAGES})
    build.link_tools()
    cleanup.claim(at)
    addresses = None if control_plane_only else network.create(at)
    taken: set[int] = set()
    ports = {port: network.free_port(taken=taken) for port in ("etcd", "etcd_peer", "apiserver", "s3")}
    host = addresses.host if addresses else "127.0.0.1"
    s3 = S3(
        endpoint=f"http://127.0.0.1:{ports['s3']}",
        endpoint_in_cluster=f"http://{host}:{ports['s3']}",
        access_key=f"TW{secrets.token_hex(9).upper()}",
        secret_key=secrets.token_hex(20),
        region=storage.REGION,
    )
    chosen = Facts(
        name=at.name,
        kubeconfig=at.kubeconfig,
        s3=s3,
        control_plane_only=control_plane_only,
        controllers=controllers,
        node_address=addresses.node if addresses else None,
        runtime_class=node.RUNTIME_CLASS if addresses else None,
        ports=ports,
    )
    record.write(chosen, at)
    return chosen


def bring_up(cluster: Facts, at: Places) -> Facts:
    """Start what does not run, in order, each as soon as what it needs is ready."""
    addresses = None if cluster.control_plane_only else network.create(at)
    if addresses and addresses.node != cluster.node_address:
        raise ClusterError("the node's network is gone")
    control_plane.prepare(at, Ports(**cluster.ports), addresses)
    if addresses:
        node.prepare(at, addresses)
    for service in all_services(cluster, at):
        if services.running(service.name, at) and services.works(service):
            continue
        with build.step(f"start {service.name}"):
            services.start(service, at)
            services.wait_ready(service, at)
            if service.name == "apiserver" and addresses:
                node.add_objects(at)
    return cluster


def all_services(cluster: Facts, at: Places) -> list[Service]:
    """Every service of the cluster, in the order of their start."""
    ports = Ports(**cluster.ports)
    addresses = Addresses(int((at.run / "slot").read_text())) if cluster.node_address else None
    s3 = storage.service(at, ports.s3, cluster.s3, reachable_from_pods=addresses is not None)
    return [
        *control_plane.services(at, ports, addresses, controllers=cluster.controllers),
        s3,
        *(node.services(at, addresses) if addresses else []),
    ]


def service_of(cluster: Facts, at: Places, name: str) -> Service:
    found = {service.name: service for service in all_services(cluster, at)}
    if name not in found:
        raise ClusterError(f"{name!r} is no service of cluster {cluster.name!r}; it has {', '.join(found)}")
    return found[name]


def stop_service(name: str, service: str) -> None:
    """Stop one service, as a fault; `start_service` or `up` ends the fault."""
    at = places(name)
    services.stop(service_of(record.facts(name), at, service).name, at)


def start_service(name: str, service: str) -> None:
    """Start a service that was stopped or died, and wait until it works."""
    at = places(name)
    found = service_of(record.facts(name), at, service)
    services.start(found, at)
    services.wait_ready(found, at)


def status(name: str) -> dict[str, str]:
    """How each service does: `works`, `runs` (but does not answer), or `stopped`."""
    at = places(name)
    cluster = record.facts(name)
    if cluster.external:
        return {"cluster": "external, not managed here"}
    states = {}
    for service in all_services(cluster, at):
        if not services.running(service.name, at):
            states[service.name] = "stopped"
        else:
            states[service.name] = "works" if services.works(service) else "runs"
    return states


def external(at: Places) -> Facts:
    """The facts of a cluster that somebody else runs, from the environment."""
    needed = ["TUNEWRIGHT_S3_ENDPOINT", "TUNEWRIGHT_S3_ACCESS_KEY", "TUNEWRIGHT_S3_SECRET_KEY", *EXTERNAL_IMAGES.values()]
    missing = [name for name in needed if not os.environ.get(name)]
    if missing:
        raise ClusterError(f"to use a cluster of your own, set {', '.join(missing)} too")
    kubeconfig = Path(os.environ["TUNEWRIGHT_KUBECONFIG"]).resolve()
    if not kubeconfig.exists():
        raise ClusterError(f"TUNEWRIGHT_KUBECONFIG names {kubeconfig}, which does not exist")
    endpoint = os.environ["TUNEWRIGHT_S3_ENDPOINT"]
    s3 = S3(
        endpoint=endpoint,
        endpoint_in_cluster=os.environ.get("TUNEWRIGHT_S3_ENDPOINT_IN_CLUSTER", endpoint),
        access_key=os.environ["TUNEWRIGHT_S3_ACCESS_KEY"],
        secret_key=os.environ["TUNEWRIGHT_S3_SECRET_KEY"],
        region=os.environ.get("TUNEWRIGHT_S3_REGION", storage.REGION),
    )
    build.link_tools()
    images = {image: os.environ[variable] for image, variable in EXTERNAL_IMAGES.items()}
    found = Facts(name=at.name, kubeconfig=kubeconfig, s3=s3, external=True, images=images)
    record.write(found, at)
    return found


def remember_images(name: str, images: dict[str, str]) -> Facts:
    """Add the names of images that the cluster has to its facts."""
    at = places(name)
    cluster = record.facts(name)
    updated = dataclasses.replace(cluster, images={**cluster.images, **images})
    record.write(updated, at)
    return updated
