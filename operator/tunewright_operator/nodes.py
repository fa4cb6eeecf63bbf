"""How much memory a GPU has that a job may get, from what the nodes say of themselves.

GPU feature discovery labels a node with the memory of each of its GPUs in MiB: ``nvidia.com/gpu.memory``, and for slices of one
``nvidia.com/mig-1g.10gb.memory``: always the name of the resource and ``.memory``.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from tunewright_crds.fields import amount
from tunewright_crds.resources import Resources, Toleration

_MIB: Final = 2**20
# Kubernetes' own taints (not ready, cordoned, under pressure) pass: a job waits for such a node.
_PASSING: Final = "node.kubernetes.io/"
_KEEPS_AWAY: Final = ("NoSchedule", "NoExecute")


@dataclass(frozen=True, slots=True)
class Taint:
    """What keeps pods away from a node that do not tolerate it."""

    key: str
    value: str
    effect: str


@dataclass(frozen=True, slots=True)
class Node:
    """A node with devices: its labels, how many of each it has, and its taints."""

    labels: Mapping[str, str]
    devices: Mapping[str, int]
    taints: tuple[Taint, ...]

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> "Node":
        """The view of a manifest."""
        allocatable: Mapping[str, str] = (body.get("status") or {}).get("allocatable") or {}
        taints = (body.get("spec") or {}).get("taints") or ()
        return cls(
            labels=body["metadata"].get("labels") or {},
            devices={name: count for name, text in allocatable.items() if "/" in name and (count := round(amount(text)))},
            taints=tuple(Taint(taint["key"], taint.get("value", ""), taint["effect"]) for taint in taints),
        )


def gpu_memory(nodes: Iterable[Node], wanted: Resources) -> int:
    """Bytes of the largest GPU that the scheduler may choose for a pod; 0 where no node fits, or one that fits does not say."""
    fitting = [_memory(node, wanted.gpu_resource) for node in nodes if _fits(node, wanted)] if wanted.gpus_per_node else []
    return max(fitting) if fitting and all(fitting) else 0


def _memory(node: Node, resource: str) -> int:
    told = node.labels.get(f"{resource}.memory", "")
    return int(told) * _MIB if told.isdecimal() and len(told) < 10 else 0


def _fits(node: Node, wanted: Resources) -> bool:
    if node.devices.get(wanted.gpu_resource, 0) < wanted.gpus_per_node:
        return False
    if any(node.labels.get(name) != value for name, value in wanted.node_selector.items()):
        return False
    return all(_tolerated(taint, wanted) for taint in node.taints)


def _tolerated(taint: Taint, wanted: Resources) -> bool:
    """Whether the job may run there. That of the device itself is tolerated for whoever asks for one (ExtendedResourceToleration)."""
    if taint.effect not in _KEEPS_AWAY or taint.key.startswith(_PASSING) or taint.key == wanted.gpu_resource:
        return True
    return any(_matches(toleration, taint) for toleration in wanted.tolerations)


def _matches(toleration: Toleration, taint: Taint) -> bool:
    if toleration.effect not in ("", taint.effect) or toleration.key not in ("", taint.key):
        return False
    return toleration.operator == "Exists" or (toleration.key == taint.key and toleration.value == taint.value)
