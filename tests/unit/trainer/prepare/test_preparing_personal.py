"""Personal data: what is found, what is not, and that nothing of it stays."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.support.preparing import a_data_job, examples, out, prepare_here, report, write_lines
from tunewright_trainer.prepare.personal import first_kind, masked
from tunewright_trainer.prepare.template import DEFAULT_CHAT_TEMPLATE

FOUND = {
    "Mail jane.doe+x@mail.example.co.uk.": "Mail <EMAIL>.",
    "müller@bücher.de": "<EMAIL>",
    "Pay DE89 3704 0044 0532 0130 00, today": "Pay <IBAN>, today",
    "GB82WEST12345698765432": "<IBAN>",
    "ES91 2100 0418 4502 0005 1332 OK": "<IBAN> OK",
    "card 4111 1111 1111 1111.": "card <CARD>.",
    "378282246310005": "<CARD>",
    "3782-822463-10005": "<CARD>",
    "CPF 123.456.789-09": "CPF <ID>",
    "11010519491231002X": "<ID>",
    "86 095 742 719": "<ID>",
    "131052-308T": "<ID>",
    "2 95 10 99 126 111 93": "<ID>",
    "RCCMNL83S18D969H": "<ID>",
    "880320-0016": "<ID>",
    "85.07.30-033.28": "<ID>",
    "from 8.8.8.8.": "from <IP>.",
    "2001:4860:4860::8888": "<IP>",
    "+49 30 901820": "<PHONE>",
    "+1 (415) 555-2671 or 415.555.2671": "<PHONE> or <PHONE>",
    "0044 20 7946 0958": "<PHONE>",
    "Tel: 030/901820": "Tel: <PHONE>",
    "06 12 34 56 78": "<PHONE>",
    "(415) 555-2671, 020 7946 0958": "<PHONE>, <PHONE>",
}
NOT_FOUND = [
    *(
        "192.168.0.1 127.0.0.1 fe80::1 ::1",
        "at 12:30:45",
        "std::vector<int> a::b",
        "version 1.2.3",
        "01.02.2024 15:30",
        "2024-01-02 10:30:45",
    ),
    *("3.14159265358979", "1 2 3 4 5 6 7 8 9 10 11 12", "1,234,567,890", "2147483647 4294967295", "1000000000000000", "100 000 000 000"),
    *("DE89 3704 0044 0532 0130 01", "4111 1111 1111 1112", "123.456.789-00", "ISBN 978-3-16-148410-0", "@someone", "f@x", "555-1234"),
    *("206.766 9894", "1.319 590 8951 e-15"),
]


@pytest.mark.parametrize(("text", "expected"), FOUND.items())
def test_personal_data_is_replaced_by_a_word(text: str, expected: str) -> None:
    assert masked(text, counts := Counter()) == expected
    assert counts.total() == expected.count("<")
    assert first_kind(text) in counts


@pytest.mark.parametrize("text", NOT_FOUND)
def test_what_only_looks_so_stays(text: str) -> None:
    assert masked(text, Counter()) == text
    assert not first_kind(text)


TEMPLATE = {"chatTemplate": DEFAULT_CHAT_TEMPLATE}  # it shows tools
EVERYWHERE: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "Write to a@example.org"},
        {"role": "user", "content": "My number is +49 30 901820."},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "mail", "arguments": {"to": ["b@example.org"]}}]},
        {"role": "tool", "name": "mail", "content": "sent to b@example.org"},
        {"role": "assistant", "content": "Done, c@example.org.", "weight": 0},
        {"role": "assistant", "content": "Bye, d@example.org."},
    ],
    "tools": [{"name": "mail", "description": "as e@example.org", "parameters": {}}],
}


def test_nothing_of_it_stays_anywhere(tmp_path: Path) -> None:
    data = [EVERYWHERE, {"text": "f@example.org"}, {"prompt": "plain", "completion": "answer"}]
    job = a_data_job(
        write_lines(tmp_path / "data.jsonl", data), dataset={"cleaning": {"personalData": "mask"}, "maxLength": 4096}, model=TEMPLATE
    )
    prepare_here(job, tmp_path)
    assert report(tmp_path)["masked"] == {"e-mail address": 7, "phone number": 1}
    assert len(examples(tmp_path)) == 3
    assert sum(told.text.count("<EMAIL>") for told in examples(tmp_path)) == 7
    for file in (path for path in (tmp_path / "out").rglob("*") if path.is_file()):
        assert b"example.org" not in file.read_bytes()
    assert "7 × e-mail address" in out(tmp_path).get_bytes("report.html").decode()


def test_rows_that_hold_it_are_dropped_or_kept_as_the_job_says(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "data.jsonl", [EVERYWHERE, {"prompt": "plain", "completion": "answer"}])
    prepare_here(a_data_job(file, dataset={"cleaning": {"personalData": "drop"}}), tmp_path)
    assert report(tmp_path)["droppedAt"] == {"holds personal data (e-mail address)": ["data.jsonl:1"]}
    assert len(examples(tmp_path)) == 1
    prepare_here(a_data_job(file, dataset={"maxLength": 4096}, model=TEMPLATE), tmp_path)
    assert report(tmp_path)["masked"] == {}
    assert any("b@example.org" in told.text for told in examples(tmp_path))
