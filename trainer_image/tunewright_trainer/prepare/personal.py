"""Personal data in texts: what its form, and where there is one its checksum, makes sure. Names and addresses are not looked for."""

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final, NamedTuple

import stdnum.be.nn
import stdnum.br.cpf
import stdnum.cn.ric
import stdnum.de.idnr
import stdnum.fi.hetu
import stdnum.fr.nir
import stdnum.iban
import stdnum.it.codicefiscale
import stdnum.luhn
import stdnum.se.personnummer
from phonenumbers import Leniency, PhoneNumberMatcher


class Kind(NamedTuple):
    """One kind of personal data: how it is told, what it is replaced by, what may be it, and which part of that is (as a span, or none)."""

    name: str
    word: str
    pattern: re.Pattern[str]
    holds: Callable[[str], tuple[int, int] | None]


# National ids that hardly one in a hundred other numbers of the same form passes for, by the name of their group below.
_IDS: Final[dict[str, Callable[[str], bool]]] = {
    "be": stdnum.be.nn.is_valid,
    "br": stdnum.br.cpf.is_valid,
    "cn": stdnum.cn.ric.is_valid,
    "de": stdnum.de.idnr.is_valid,
    "fr": stdnum.fr.nir.is_valid,
    "it": stdnum.it.codicefiscale.is_valid,
    "north": lambda number: stdnum.fi.hetu.is_valid(number) or stdnum.se.personnummer.is_valid(number),
}
_ID: Final = re.compile(
    r"(?<![\w.+-])(?:(?P<be>\d\d\.\d\d\.\d\d-\d{3}\.\d\d)|(?P<br>\d{3}\.\d{3}\.\d{3}-\d\d)|(?P<cn>\d{17}[\dX])"
    r"|(?P<north>(?:\d\d)?\d{6}[-+A]\d{3}[\dA-Y])|(?P<it>[A-Z]{6}\d\d[A-Z]\d\d[A-Z]\d{3}[A-Z])"
    r"|(?P<fr>[12] ?\d\d ?\d\d ?\d[\dAB] ?\d{3} ?\d{3} ?\d\d)|(?P<de>\d\d ?\d{3} ?\d{3} ?\d{3}))(?![\w-])"
)
_CARD: Final = re.compile(
    r"(?<![\w.+-])(?:4(?:\d{12}|\d{15}|\d{18})|5[1-5]\d{14}|2[2-7]\d{14}|3[47]\d{13}|3[068]\d{12}|35\d{14}|6(?:011|4[4-9]\d|5\d\d)\d{12}|62\d{14,17}"
    r"|[2-6]\d{3}([ -])\d{4}\1\d{4}\1\d{4}|3[47]\d\d([ -])\d{6}\2\d{5})(?![\w-])"
)
# A national number is looked for where it is written with separators, and begins with a 0 or is of the form of North America.
_ABROAD: Final = re.compile(r"(?<![\w+])(?:\+|00)\(?[1-9](?:[ ().\-/]{0,2}\d){6,16}(?!\w)")
_FIRST: Final = r"(?<![\w.+/$€£-])(?<!\d )(?!\d\d?[./-]\d\d?[./-](?:19|20)\d\d)"  # neither the rest of a number nor a date
_HERE: Final = re.compile(_FIRST + r"\(?0[1-9]\d{0,3}\)?[ \-/.](?:\d[ \-/.]?){4,10}\d(?!\w)")
_NORTH_AMERICA: Final = re.compile(_FIRST + r"(?:1[ -])?(?:\([2-9]\d\d\)[ .-]?\d{3}[ .-]\d{4}|[2-9]\d\d([ .-])\d{3}\1\d{4})(?!\w)")
_REGIONS: Final = ("GB", "DE", "FR", "IT", "NL", "AT", "CH", "JP", "AU")
_FEW_DIGITS: Final = 4  # with fewer there is nothing but e-mail addresses


def _whole(valid: Callable[[str], bool], candidate: str) -> tuple[int, int] | None:
    return (0, len(candidate)) if valid(candidate) else None


def _iban(candidate: str) -> tuple[int, int] | None:
    """Words in capitals may follow."""
    ends = [len(candidate), *(at for at in range(len(candidate) - 1, 14, -1) if candidate[at] == " ")]
    return next(((0, end) for end in ends if stdnum.iban.is_valid(candidate[:end])), None)


def _id(candidate: str) -> bool:
    found = _ID.fullmatch(candidate)
    return found is not None and found.lastgroup is not None and _IDS[found.lastgroup](candidate)


def _public(candidate: str) -> bool:
    """Whether it is an address that others can reach: a private one leads to nobody, and a clock's time is none."""
    try:
        return ipaddress.ip_address(candidate).is_global and (":" not in candidate or len(re.findall(r"\w+", candidate)) > 2)
    except ValueError:
        return False


def _phone(regions: Sequence[str], leniency: int, candidate: str) -> tuple[int, int] | None:
    """The number, as one of the countries writes it."""
    found = (one for region in regions for one in PhoneNumberMatcher(candidate, region, leniency=leniency))
    return next(((one.start, one.end) for one in found), None)


EMAIL: Final = Kind(
    "e-mail address",
    "<EMAIL>",
    re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}(?![\w-])"),
    partial(_whole, lambda _: True),
)
# What is sure goes before what is less so: once replaced, it is not looked at again.
KINDS: Final = (
    EMAIL,
    Kind("IBAN", "<IBAN>", re.compile(r"\b[A-Z]{2}\d\d(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?\b"), _iban),
    Kind("payment card", "<CARD>", _CARD, partial(_whole, lambda number: stdnum.luhn.is_valid(re.sub(r"\D", "", number)))),
    Kind("national id", "<ID>", _ID, partial(_whole, _id)),
    Kind(
        "IP address",
        "<IP>",
        re.compile(r"(?<![\w.:])(?:(?:\d{1,3}\.){3}\d{1,3}(?!\.?\w)|(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:]))"),
        partial(_whole, _public),
    ),
    Kind("phone number", "<PHONE>", _ABROAD, partial(_phone, ["DE"], Leniency.VALID)),
    Kind("phone number", "<PHONE>", _HERE, partial(_phone, _REGIONS, Leniency.STRICT_GROUPING)),
    Kind("phone number", "<PHONE>", _NORTH_AMERICA, partial(_phone, ["US"], Leniency.STRICT_GROUPING)),
)


def first_kind(text: str) -> str:
    """The name of a kind that a text holds; empty where it holds none."""
    return next((kind.name for kind in _possible(text) if any(kind.holds(found[0]) for found in kind.pattern.finditer(text))), "")


def _possible(text: str) -> Iterator[Kind]:
    """The kinds that a look at the characters does not rule out."""
    digits = sum(map(text.count, "0123456789")) >= _FEW_DIGITS
    return (kind for kind in KINDS if (digits if kind is not EMAIL else "@" in text))


def masked(text: str, counts: Counter[str]) -> str:
    """The text with personal data replaced by the fixed words, and counted by its kind."""
    for kind in _possible(text):
        text = kind.pattern.sub(partial(_word, kind, counts), text)
    return text


def _word(kind: Kind, counts: Counter[str], found: re.Match[str]) -> str:
    span = kind.holds(found[0])
    if span is None:
        return found[0]
    counts[kind.name] += 1
    return found[0][: span[0]] + kind.word + found[0][span[1] :]
