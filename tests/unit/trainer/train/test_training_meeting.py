"""Processes of several nodes start when their pods do, and wait for one another."""

import logging
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tunewright_crds.errors import FailureCode, Refusal
from tunewright_trainer.train import world
from tunewright_trainer.train.world import World


@pytest.fixture
def nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """An address of this machine where nobody listens yet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))


@pytest.mark.usefixtures("nobody_there")
def test_a_leader_that_is_not_up_yet_is_waited_for(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tunewright_trainer")
    monkeypatch.setattr(world, "_TELL_SECONDS", 0.0)
    with ThreadPoolExecutor(1) as pool:
        follower = pool.submit(world._meet, World(rank=1, size=2))
        deadline = time.monotonic() + 60
        while "waiting for the process that leads" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not follower.done()
        leads = world._meet(World(rank=0, size=2))
        follows = follower.result(60)
    leads.set("said", "by one")
    assert follows.get("said") == b"by one"


@pytest.mark.usefixtures("nobody_there")
def test_a_leader_that_never_comes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "MEETING_SECONDS", 0.3)
    with pytest.raises(Refusal, match="in vain for the process that leads") as caught:
        world._meet(World(rank=1, size=2))
    assert caught.value.code is FailureCode.PEER_LOST


@pytest.mark.usefixtures("nobody_there")
def test_a_leader_gives_up_those_who_never_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "MEETING_SECONDS", 0.3)
    with pytest.raises(Refusal, match="in vain for 2 of 3 processes") as caught:
        world._meet(World(rank=0, size=3))
    assert caught.value.code is FailureCode.PEER_LOST
