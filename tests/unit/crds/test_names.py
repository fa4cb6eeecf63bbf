"""Names of children are deterministic, valid, and never those of another job's."""

import re

from hypothesis import given
from hypothesis import strategies as st

from tunewright_crds import names
from tunewright_crds.errors import ADVICE, EXIT_CODES, FailureClass, FailureCode, failure_class
from tunewright_crds.names import Phase

DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
job_names = st.from_regex(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?", fullmatch=True)


@given(job_names, st.integers(1, 9999))
def test_every_child_has_a_valid_name_and_room_for_its_pods(job: str, attempt: int) -> None:
    for name in (names.prepare_name(job), names.shards_name(job), names.attempt_name(job, attempt)):
        assert DNS_LABEL.fullmatch(name)
        assert len(name) <= names.MAX_LABEL - len("-0-abcde")
    assert DNS_LABEL.fullmatch(names.config_name(job, "0123456789ab"))


@given(st.sets(job_names, min_size=2, max_size=20))
def test_two_jobs_never_share_a_child(jobs: set[str]) -> None:
    children = [child for job in jobs for child in (names.prepare_name(job), names.attempt_name(job, 1), names.attempt_name(job, 11))]
    assert len(set(children)) == len(children)


def test_long_names_that_differ_at_their_end_only_stay_apart() -> None:
    first, second = (names.attempt_name("x" * 62 + end, 1) for end in "ab")
    assert first != second


def test_every_failure_has_advice_and_a_class() -> None:
    assert set(ADVICE) == set(FailureCode)
    assert failure_class(FailureCode.DATA_INVALID) is FailureClass.USER
    assert failure_class(FailureCode.PREEMPTED) is FailureClass.FREE
    assert set(EXIT_CODES) <= set(FailureCode)


def test_terminal_phases() -> None:
    assert {phase for phase in Phase if phase.terminal} == {Phase.SUCCEEDED, Phase.FAILED, Phase.CANCELLED}
