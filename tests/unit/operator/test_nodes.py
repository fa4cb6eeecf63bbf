"""How much memory a GPU has that a job may get: what the nodes say, and which of them the scheduler may choose."""

from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest

from tests.support.builders import World, a_job
from tunewright_crds.pod import PodConfig
from tunewright_crds.resources import Resources
from tunewright_operator.cluster import ClusterError, Refused
from tunewright_operator.node_list import NodeList
from tunewright_operator.nodes import Node, gpu_memory

GIB = 2**30
TAINT = {"key": "team", "value": "a", "effect": "NoSchedule"}


def a_node(gib: int | None = 80, *, gpus: int = 8, resource: str = "nvidia.com/gpu", taints: Any = (), **labels: str) -> dict[str, Any]:
    told = {} if gib is None else {f"{resource}.memory": str(gib * 1024)}
    return {
        "metadata": {"name": "n", "labels": told | labels},
        "spec": {"taints": list(taints)} if taints else {},
        "status": {"allocatable": {"cpu": "4", "memory": "16Gi", "hugepages-2Mi": "0"} | ({resource: str(gpus)} if gpus else {})},
    }


@pytest.mark.parametrize(
    ("nodes", "wanted", "gib"),
    [
        pytest.param([a_node(24), a_node(80), a_node(40)], {}, 80, id="the largest that fits"),
        pytest.param([a_node(80, gpus=1), a_node(24)], {"gpusPerNode": 2}, 24, id="a node with too few of them"),
        pytest.param([a_node(80), a_node(24, pool="small")], {"nodeSelector": {"pool": "small"}}, 24, id="nodes that are chosen by label"),
        pytest.param([a_node(80, taints=[TAINT]), a_node(24)], {}, 24, id="a taint that is not tolerated"),
        pytest.param([a_node(80, taints=[TAINT]), a_node(24)], {"tolerations": [{"key": "team", "value": "b"}]}, 24, id="of another value"),
        pytest.param([a_node(80, taints=[TAINT])], {"tolerations": [{"key": "team", "value": "a"}]}, 80, id="a taint that is tolerated"),
        pytest.param([a_node(80, taints=[TAINT])], {"tolerations": [{"operator": "Exists"}]}, 80, id="everything is tolerated"),
        pytest.param(
            [a_node(80, taints=[TAINT])], {"tolerations": [{"operator": "Exists", "effect": "NoExecute"}]}, 0, id="another effect"
        ),
        pytest.param([a_node(80, taints=[TAINT | {"effect": "PreferNoSchedule"}])], {}, 80, id="a taint that keeps nobody away"),
        pytest.param([a_node(80, taints=[{"key": "nvidia.com/gpu", "effect": "NoSchedule"}])], {}, 80, id="the taint of GPU nodes"),
        pytest.param(
            [a_node(80, taints=[{"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}]), a_node(24)], {}, 80, id="cordoned"
        ),
        pytest.param(
            [a_node(10, resource="nvidia.com/mig-1g.10gb"), a_node(80)],
            {"gpuResource": "nvidia.com/mig-1g.10gb"},
            10,
            id="a slice of a GPU",
        ),
        pytest.param([a_node(80), a_node(None)], {}, 0, id="one that fits does not say"),
        pytest.param([a_node(80, gpus=0)], {}, 0, id="none fits"),
        pytest.param([a_node(80) | {"metadata": {"name": "n", "labels": {"nvidia.com/gpu.memory": "much"}}}], {}, 0, id="no number"),
        pytest.param([a_node(80)], {"gpusPerNode": 0}, 0, id="no GPU is asked for"),
    ],
)
def test_the_memory_of_the_gpu_that_a_job_may_get(nodes: list[dict[str, Any]], wanted: dict[str, Any], gib: int) -> None:
    found = gpu_memory([Node.of(body) for body in nodes], Resources.model_validate({"gpusPerNode": 1} | wanted))
    assert found == gib * GIB


@pytest.mark.parametrize(("gpus", "told"), [(1, 80 * GIB), (0, 0)])
def test_the_pods_of_a_job_on_gpus_are_told_and_others_need_no_look_at_the_nodes(gpus: int, told: int) -> None:
    world = World(a_job().with_spec(resources={"gpusPerNode": gpus}))
    plan = world.decide(world.family(confirmed=False) | {"nodes": (Node.of(a_node(80)),)})
    made = next(body for body in plan.create if body["kind"] == "ConfigMap")
    assert PodConfig.model_validate(orjson.loads(next(iter(made["data"].values())))).gpu_memory == told
    assert plan.on_gpus == bool(gpus)


class Listing:
    """A cluster that lists ``bodies``, or refuses to, and counts."""

    def __init__(self, bodies: list[dict[str, Any]]) -> None:
        self.bodies, self.lists, self.trouble = bodies, 0, None

    trouble: ClusterError | None

    async def list_all(self, kind: str) -> AsyncIterator[dict[str, Any]]:
        assert kind == "Node"
        self.lists += 1
        if self.trouble:
            raise self.trouble
        for body in self.bodies:
            yield body


async def test_nodes_are_listed_seldom_and_a_refusal_means_that_nothing_is_known() -> None:
    now, cluster = [0.0], Listing([a_node(80), a_node(gpus=0)])
    nodes = NodeList(cluster, seconds=300, clock=lambda: now[0])  # type: ignore[arg-type]
    assert [len(await nodes.look()) for _ in range(3)] == [1, 1, 1]
    assert cluster.lists == 1
    now[0], cluster.trouble = 301, Refused("GET /api/v1/nodes: 403 forbidden")
    assert [await nodes.look() for _ in range(3)] == [(), (), ()]
    assert cluster.lists == 2
