"""Where a process is told that it stands, on one machine and on several."""

import errno

import pytest

from tunewright_crds import names
from tunewright_crds.errors import ExitCode, FailureCode, Refusal
from tunewright_trainer import launch
from tunewright_trainer.process import as_refusal

TOLD = {names.NODES: "3", names.NODE_RANK: "2", names.MASTER_ADDR: "a-0.peers", names.MASTER_PORT: "29500", names.PROCESSES_PER_NODE: "4"}
VARIABLES = (*TOLD, "RANK", "LOCAL_RANK", "WORLD_SIZE")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_processes_of_several_nodes_are_numbered_through(told: pytest.MonkeyPatch) -> None:
    for name, value in TOLD.items():
        told.setenv(name, value)
    node = launch.this_node(None, 4)
    assert (node.size, node.leader) == (12, ("a-0.peers", 29500))
    assert node.environment(3, ("a-0.peers", 29500)) == {
        "MASTER_ADDR": "a-0.peers",
        "MASTER_PORT": "29500",
        "WORLD_SIZE": "12",
        "RANK": "11",
        "LOCAL_RANK": "3",
    }
    told.setenv("RANK", "11")  # as in what it starts, where the pod's own variables still are
    assert launch.this_node(None, 4).size == 1


ALONE: dict[str, tuple[dict[str, str], int | None, int, int]] = {
    "on processors": ({}, None, 0, 1),
    "a process a GPU": ({}, None, 4, 4),
    "as many as are asked for": ({}, 2, 0, 2),
    "one of one node": ({names.NODES: "1"}, None, 2, 2),
    "started by torchrun": ({"RANK": "1", "WORLD_SIZE": "2"}, None, 2, 1),
}


@pytest.mark.parametrize(("variables", "processes", "gpus", "size"), ALONE.values(), ids=ALONE)
def test_one_machine_by_itself(told: pytest.MonkeyPatch, variables: dict[str, str], processes: int | None, gpus: int, size: int) -> None:
    for name, value in variables.items():
        told.setenv(name, value)
    assert launch.this_node(processes, gpus) == launch.Node(size)


MISTAKES = {
    "a rank that is none": {names.NODE_RANK: "first"},
    "a rank beyond the last": {names.NODE_RANK: "3"},
    "no rank": {names.NODE_RANK: ""},
    "no leader": {names.MASTER_ADDR: ""},
    "no nodes": {names.NODES: "0"},
    "no process": {names.PROCESSES_PER_NODE: "0"},
    "a port that is none": {names.MASTER_PORT: "http"},
}


@pytest.mark.parametrize("wrong", MISTAKES.values(), ids=MISTAKES)
def test_what_makes_no_sense_is_refused_by_name(told: pytest.MonkeyPatch, wrong: dict[str, str]) -> None:
    for name, value in (TOLD | wrong).items():
        told.setenv(name, value)
    with pytest.raises(Refusal) as caught:
        launch.this_node(None, 0)
    assert (caught.value.code, [caught.value.param]) == (FailureCode.CONFIG_INVALID, list(wrong))


GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:544] Connection closed by peer [10.0.0.7]:33345"
NCCL = "NCCL error: remote process exited or there was a network problem\nncclRemoteError: A call failed possibly due to a network error"
BROKEN: dict[str, tuple[Exception, FailureCode]] = {
    "gloo lost a peer": (RuntimeError(GLOO), FailureCode.PEER_LOST),
    "NCCL lost a peer": (RuntimeError(NCCL), FailureCode.PEER_LOST),
    "an error of its own": (RuntimeError("shapes cannot be multiplied"), FailureCode.INTERNAL),
    "memory of its own": (RuntimeError("CUDA out of memory"), FailureCode.OUT_OF_MEMORY),
    "a file of its own": (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), FailureCode.INTERNAL),
}


@pytest.mark.parametrize(("error", "code"), BROKEN.values(), ids=BROKEN)
def test_a_lost_peer_is_told_apart_from_faults_of_ones_own(error: Exception, code: FailureCode) -> None:
    refusal = as_refusal("train", error)
    assert refusal.code is code
    assert (refusal.exit_code is ExitCode.PEER_LOST) == (code is FailureCode.PEER_LOST)
