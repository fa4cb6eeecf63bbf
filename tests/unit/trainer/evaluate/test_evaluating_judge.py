"""Another model as the judge, over real HTTP: both orders, whatever it says, and however it fails."""

import socket
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.judge import Reply, StandIn, a_judge, by, says
from tunewright_crds.errors import FailureCode
from tunewright_crds.evaluation import Judge as Wanted
from tunewright_trainer.evaluate.comparison import Judged
from tunewright_trainer.evaluate.judging import Away, Judge, Pair, verdict_of

GOOD = Pair("Say hello.", base="no", tuned="good")
BAD = Pair("Say hello.", base="good", tuned="no")

VERDICTS = {
    "at the end": ("A is short. B is right. [[B]]", "second"),
    "the last of several": ("[[A]] would be wrong, so [[B]]", "second"),
    "a tie": ("Both fail.\n[[C]]", "tie"),
    "in small letters and with room": ("[[ a ]]", "first"),
    "thought aloud before": ("<think>[[A]]? no.</think> [[B]]", "second"),
    "only thought": ("<think>[[A]]</think> I cannot say", None),
    "a letter alone": ("B", "second"),
    "a letter in a last line": ("Because it greets.\n**Verdict: A**", "first"),
    "nothing of the kind": ("Assistant A is better", None),
    "empty": ("", None),
}


@pytest.mark.parametrize(("reply", "verdict"), VERDICTS.values(), ids=VERDICTS)
def test_a_verdict_is_read_from_what_a_judge_says(reply: str, verdict: str | None) -> None:
    assert verdict_of(reply) == verdict


def asking(
    reply: Callable[[int, dict[str, Any]], Reply], *pairs: Pair, key: str = "", **more: Any
) -> tuple[list[float | None], StandIn, list[float]]:
    """What comes of the pairs, what was asked, and the waits."""
    waits: list[float] = []
    with a_judge(reply) as stand_in:
        wanted = Wanted.model_validate({"endpoint": stand_in.url, "model": "judge-1", "parallel": 1, **more})
        with Judge(wanted, key=key, patience=60, wait=waits.append) as judge:
            return list(judge.wins(pairs)), stand_in, waits


JUDGES: dict[str, tuple[Callable[[str, str], str], float]] = {
    "one that knows": (lambda first, _: "A" if first == "good" else "B", 1.0),
    "one that is wrong": (lambda first, _: "B" if first == "good" else "A", 0.0),
    "one that likes what it reads first": (lambda *_: "A", 0.5),
    "one that likes what it reads last": (lambda *_: "B", 0.5),
    "one that never decides": (lambda *_: "C", 0.5),
    "one that decides once": (lambda first, _: "A" if first == "good" else "C", 0.5),
}


@pytest.mark.parametrize(("better", "expected"), JUDGES.values(), ids=JUDGES)
def test_one_wins_only_if_both_orders_agree(better: Callable[[str, str], str], expected: float) -> None:
    wins, asked, _ = asking(by(better), GOOD)
    assert wins == [expected]
    assert len(asked.bodies) == 2


def test_what_is_sent_and_what_need_not_be() -> None:
    wins, asked, waits = asking(by(JUDGES["one that knows"][0]), GOOD, Pair("p", "same", "same"), BAD, key="k-1", criteria="Be brief.")
    assert (wins, waits) == ([1.0, 0.5, 0.0], [])
    assert len(asked.bodies) == 4, "of answers that are the same nobody is asked"
    assert set(asked.keys) == {"Bearer k-1"}
    body = asked.bodies[0]
    assert (body["model"], body["temperature"]) == ("judge-1", 0)
    assert "Be brief." in body["messages"][0]["content"]
    assert body["messages"][1]["content"].startswith("[User Question]\nSay hello.")
    assert body["messages"][1]["content"].index("no") < body["messages"][1]["content"].index("good")


FAULTS: dict[str, tuple[list[Reply], float]] = {
    "too many requests, with a time to come back": ([(429, {"Retry-After": "7"}, "")], 7.0),
    "too many requests, without": ([(429, {}, "")], 0.5),
    "a server's fault": ([(500, {}, "oops"), (503, {}, "")], 0.5),
    "a page in place of JSON": ([(200, {}, "<html>hello</html>")], 0.0),
    "JSON of something else": ([(200, {}, '{"choices": []}')], 0.0),
    "no verdict at first": ([says("I would rather not"), says("")], 0.0),
}


@pytest.mark.parametrize(("faults", "least"), FAULTS.values(), ids=FAULTS)
def test_faults_that_pass_are_waited_out(faults: list[Reply], least: float) -> None:
    right = by(JUDGES["one that knows"][0])
    wins, _, waits = asking(lambda number, body: faults[number] if number < len(faults) else right(number, body), GOOD)
    assert wins == [1.0]
    assert all(wait >= least for wait in waits)
    assert bool(waits) == bool(least)


def test_a_question_that_is_not_taken_or_answered_costs_its_own_pair_only() -> None:
    right = by(JUDGES["one that knows"][0])

    def reply(number: int, body: dict[str, Any]) -> Reply:
        asked = body["messages"][1]["content"]
        return (
            (400, {}, '{"error": {"code": "context_length_exceeded"}}')
            if "long" in asked
            else says("hm")
            if "odd" in asked
            else right(number, body)
        )

    wins, asked, _ = asking(reply, Pair("long", "a", "b"), Pair("odd", "a", "b"), GOOD)
    assert wins == [None, None, 1.0]
    assert len(asked.bodies) == 1 + 3 + 2


def test_a_judge_that_takes_no_temperature_is_asked_without() -> None:
    right = by(JUDGES["one that knows"][0])

    def reply(number: int, body: dict[str, Any]) -> Reply:
        return (400, {}, '{"error": {"param": "temperature"}}') if "temperature" in body else right(number, body)

    assert asking(reply, GOOD, BAD)[0] == [1.0, 0.0]


AWAY: dict[str, tuple[Reply, FailureCode, str]] = {
    "always busy": ((503, {}, ""), FailureCode.JUDGE_UNAVAILABLE, "did not answer for 60 s: HTTP 503"),
    "busy for longer than there is patience": ((429, {"Retry-After": "3600"}, ""), FailureCode.JUDGE_UNAVAILABLE, "HTTP 429"),
    "a wrong key": ((401, {}, "key sk-1 is wrong"), FailureCode.ACCESS_DENIED, "refuses the key (HTTP 401)"),
    "another address": ((404, {}, ""), FailureCode.CONFIG_INVALID, "check endpoint and model"),
    "a redirection is not followed": ((307, {"Location": "http://127.0.0.1:1/"}, ""), FailureCode.CONFIG_INVALID, "HTTP 307"),
}


@pytest.mark.parametrize(("reply", "code", "said"), AWAY.values(), ids=AWAY)
def test_a_judge_that_cannot_be_asked_is_told_with_its_code(reply: Reply, code: FailureCode, said: str) -> None:
    with pytest.raises(Away, match="judge") as away:
        asking(lambda *_: reply, GOOD)
    assert away.value.refusal.code is code
    assert said in away.value.refusal.message
    assert "sk-1" not in away.value.refusal.message


def test_nobody_at_the_address_is_told_too() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        wanted = Wanted.model_validate({"endpoint": f"http://127.0.0.1:{unused.getsockname()[1]}/v1", "model": "m"})
        with Judge(wanted, key="", patience=3, wait=lambda _: None) as judge, pytest.raises(Away, match="ConnectError"):
            list(judge.wins([GOOD]))


def test_a_win_rate_needs_verdicts_on_nearly_all_pairs() -> None:
    assert Judged([1.0] * 9 + [None]).enough
    assert not Judged([1.0] * 8 + [None] * 2).enough
    assert not Judged([1.0] * 10, "it went away").enough
    assert Judged([1.0, 0.5, 0.0, None]).told() == {"wins": 1, "ties": 1, "losses": 1, "unjudged": 1, "why": ""}
