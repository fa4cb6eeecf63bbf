"""What passes between operator and pods stays small and printable."""

import orjson
from hypothesis import given
from hypothesis import strategies as st

from tunewright_crds.errors import FailureCode
from tunewright_crds.pod import MAX_TERMINATION_BYTES, Failed, Outcome, clean
from tunewright_crds.status import MemoryPart, MemoryStatus


@given(st.text(max_size=6000), st.text(max_size=6000))
def test_any_message_fits_and_reads_back(message: str, param: str) -> None:
    plan = MemoryStatus(fits="no", parts=[MemoryPart(name="weights", bytes=2**40)] * 12, advice=message[:1024])
    said = Outcome(error=Failed(code=FailureCode.DATA_INVALID, message=message, param=param), memory=plan).bounded()
    assert len(said.encode()) <= MAX_TERMINATION_BYTES
    assert orjson.loads(said)
    read = Outcome.model_validate_json(said)
    assert read.error
    assert read.error.code is FailureCode.DATA_INVALID


def test_control_characters_and_lone_surrogates_go() -> None:
    assert clean("a\x1b[31mb\ud800c\u2028d\n") == "a [31mb c d"
