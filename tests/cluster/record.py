"""What the users of a cluster need to know about it, kept in `.tunewright/<name>/cluster.json`."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .places import ClusterError, Places, places


@dataclass(frozen=True)
class S3:
    """An S3 server: `endpoint` is for programs on this machine, `endpoint_in_cluster` for pods."""

    endpoint: str
    endpoint_in_cluster: str
    access_key: str = field(repr=False)
    secret_key: str = field(repr=False)
    region: str = "us-east-1"


@dataclass(frozen=True)
class Facts:
    """One cluster. `images` and `runtime_class` are filled by `images` and by a cluster with a node."""

    name: str
    kubeconfig: Path
    s3: S3
    control_plane_only: bool = False
    controllers: bool = True
    external: bool = False
    node_address: str | None = None
    runtime_class: str | None = None
    ports: dict[str, int] = field(default_factory=dict)
    images: dict[str, str] = field(default_factory=dict)


def facts(name: str = "test") -> Facts:
    """The facts of a cluster that was brought up.

    Raises ClusterError when there is none of that name.
    """
    at = places(name).facts
    try:
        read = json.loads(at.read_text())
    except FileNotFoundError:
        raise ClusterError(f"no cluster {name!r} is up: run `python3 -m tests.cluster up --name {name}`") from None
    s3 = read["s3"]
    return Facts(
        name=read["name"],
        kubeconfig=Path(read["kubeconfig"]),
        s3=S3(s3["endpoint"], s3["endpoint_in_cluster"], s3["accessKey"], s3["secretKey"], s3["region"]),
        control_plane_only=read["controlPlaneOnly"],
        controllers=read["controllers"],
        external=read["external"],
        node_address=read["nodeAddress"],
        runtime_class=read["runtimeClass"],
        ports=read["ports"],
        images=read["images"],
    )


def write(known: Facts, at: Places) -> None:
    """Store the facts in one step, so that a reader never sees half of them."""
    s3 = asdict(known.s3)
    content: dict[str, Any] = {
        "name": known.name,
        "kubeconfig": str(known.kubeconfig),
        "s3": {
            "endpoint": s3["endpoint"],
            "endpoint_in_cluster": s3["endpoint_in_cluster"],
            "accessKey": s3["access_key"],
            "secretKey": s3["secret_key"],
            "region": s3["region"],
        },
        "controlPlaneOnly": known.control_plane_only,
        "controllers": known.controllers,
        "external": known.external,
        "nodeAddress": known.node_address,
        "runtimeClass": known.runtime_class,
        "ports": known.ports,
        "images": known.images,
    }
    at.state.mkdir(parents=True, exist_ok=True)
    fresh = at.facts.with_suffix(".new")
    fresh.touch(mode=0o600)
    fresh.write_text(json.dumps(content, indent=2) + "\n")
    fresh.replace(at.facts)


def environment(known: Facts) -> dict[str, str]:
    """The variables with which kubectl, helm, the AWS tools and our own tests find the cluster."""
    return {
        "KUBECONFIG": str(known.kubeconfig),
        "TUNEWRIGHT_S3_ENDPOINT": known.s3.endpoint,
        "TUNEWRIGHT_S3_ENDPOINT_IN_CLUSTER": known.s3.endpoint_in_cluster,
        "AWS_ENDPOINT_URL_S3": known.s3.endpoint,
        "AWS_ACCESS_KEY_ID": known.s3.access_key,
        "AWS_SECRET_ACCESS_KEY": known.s3.secret_key,
        "AWS_REGION": known.s3.region,
    }
