"""Reading rows from files that nobody vouches for: streaming, with every size bounded, and each error with its file and line.

An error in one row is a `Problem` in the stream of rows. What makes the rest of a file unreadable is a `BadFile`.
"""

import codecs
import csv
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import orjson

MAX_ROW_BYTES: Final = 16 * 2**20  # far above any example that a model can read; bounds memory
MAX_OBJECT_BYTES: Final = MAX_ROW_BYTES  # of a file that is one object, such as a task of Natural Instructions
MAX_EXPANSION: Final = 200  # instruction data compresses about 3 to 20 times; a bomb 1,000 times and more
FREE_EXPANSION_BYTES: Final = 64 * 2**20  # small files may be as repetitive as they like
EXTENSIONS: Final = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
COMPRESSIONS: Final = (".gz", ".zst")
_CHUNK: Final = 2**20
_ZSTD_CHUNK: Final = 1024  # a zstd block of 4 bytes may hold 128 KiB: 32 MiB at most from each chunk
_PARQUET_ROWS: Final = 64
_TEXT_KEYS: Final = frozenset(
    {"input", "output", "prompt", "completion", "instruction", "inputs", "targets", "question", "answer", "seq_in", "seq_out"}
)
_FEW_KEYS: Final = 64  # a row is searched once for each; a hostile one may have millions

_MAGIC: Final = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PAR1": "parquet", b"PK\x03\x04": "zip"}
_UTF16: Final = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True)
class Problem:
    """What is wrong with one row. Never holds its content."""

    field: str
    what: str


class BadFile(Exception):
    """The rest of the file cannot be read. `line` is 0 where it is the file as a whole."""

    def __init__(self, what: str, *, line: int = 0) -> None:
        super().__init__(what)
        self.what = what
        self.line = line


Row = dict[str, Any]
Numbered = tuple[int, Row | Problem]
"""Line of the file (jsonl, csv) or number of the row (json, parquet), from 1, and the row."""


def is_readable(name: str) -> bool:
    """Whether a file's name ends as those of data files do."""
    return _kind(name) is not None


def read_rows(path: Path, name: str, tell: Callable[[float], None] = lambda share: None) -> Iterator[Numbered]:
    """The rows of a file, whose type is told by `name`; raises `BadFile`. `tell` hears what share of the file is read."""
    kind = _kind(name)
    if kind is None:
        raise BadFile(f"is no data file: its name must end in {', '.join(EXTENSIONS)}, or one of these with .gz or .zst")
    extension, compression = kind
    if extension == ".parquet":
        if compression:
            raise BadFile("is parquet in another compression; parquet compresses by itself and is read without")
        yield from _parquet_rows(path, tell)
        return
    raw: Any = _Chunks(_chunks(path, compression, tell))
    stream: io.BufferedReader = io.BufferedReader(raw, _CHUNK)
    _check_beginning(stream)
    if extension == ".csv":
        yield from _csv_rows(stream)
    elif extension == ".tsv":
        yield from _tsv_rows(stream)
    elif extension == ".json" and stream.peek(_CHUNK).lstrip()[:1] == b"[":
        yield from _array_rows(stream)
    elif extension == ".json":
        yield from _object_rows(stream)
    else:
        yield from _line_rows(stream)


def _kind(name: str) -> tuple[str, str] | None:
    lower = name.lower()
    compression = next((ending for ending in COMPRESSIONS if lower.endswith(ending)), "")
    extension = next((ending for ending in EXTENSIONS if lower.removesuffix(compression).endswith(ending)), None)
    return None if extension is None else (extension, compression)


class _Chunks(io.RawIOBase):
    """An iterator of byte chunks as a raw stream."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        super().__init__()
        self._iterator = chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._rest:
            chunk = next(self._iterator, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def _chunks(path: Path, compression: str, tell: Callable[[float], None]) -> Iterator[bytes]:
    size = max(path.stat().st_size, 1)
    with path.open("rb") as file:
        if not compression:
            while chunk := file.read(_CHUNK):
                tell(file.tell() / size)
                yield chunk
            return
        written = 0
        for chunk in _gunzipped(file) if compression == ".gz" else _unzstd(file):
            written += len(chunk)
            tell(file.tell() / size)
            if written > FREE_EXPANSION_BYTES + MAX_EXPANSION * file.tell():
                raise BadFile(f"expands to more than {MAX_EXPANSION} times its size; store it uncompressed if that is right")
            yield chunk


def _gunzipped(file: BinaryIO) -> Iterator[bytes]:
    machine = zlib.decompressobj(wbits=31)
    started = False
    data = b""
    while True:
        data = data or file.read(_CHUNK)
        if not data:
            break
        started = True
        try:
            out = machine.decompress(data, _CHUNK)
        except zlib.error as error:
            raise BadFile("is not gzip, or damaged") from error
        if out:
            yield out
        data = machine.unconsumed_tail
        if machine.eof:  # another member may follow
            data = machine.unused_data
            started = False
            machine = zlib.decompressobj(wbits=31)
    if started:
        raise BadFile("ends in the middle of its gzip compression")


def _unzstd(file: BinaryIO) -> Iterator[bytes]:
    import zstandard

    def fresh() -> Any:
        return zstandard.ZstdDecompressor(max_window_size=2**27).decompressobj()

    machine = fresh()
    started = False
    data = b""
    while True:
        data = data or file.read(_ZSTD_CHUNK)
        if not data:
            break
        started = True
        try:
            out = machine.decompress(data)
        except zstandard.ZstdError as error:
            raise BadFile("is not zstd, or damaged") from error
        if out:
            yield out
        data = b""
        if machine.eof:
            data, started, machine = machine.unused_data, False, fresh()
    if started:
        raise BadFile("ends in the middle of its zstd compression")


def _check_beginning(stream: io.BufferedReader) -> None:
    start = stream.peek(4)[:4]
    for magic, kind in _MAGIC.items():
        if start.startswith(magic):
            raise BadFile(f"begins like {kind}; its name must say so")
    if start.startswith(_UTF16):
        raise BadFile("is UTF-16; it must be UTF-8")
    if start.startswith(codecs.BOM_UTF8):
        stream.read(len(codecs.BOM_UTF8))


def _lines(stream: io.BufferedReader) -> Iterator[tuple[int, bytes | Problem]]:
    number = 0
    while line := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) <= MAX_ROW_BYTES or line.endswith(b"\n"):
            yield number, line
            continue
        del line
        while (rest := stream.readline(_CHUNK)) and not rest.endswith(b"\n"):
            pass
        yield number, _TOO_LONG


_TOO_LONG: Final = Problem("", f"is longer than {MAX_ROW_BYTES // 2**20} MiB")


def _line_rows(stream: io.BufferedReader) -> Iterator[Numbered]:
    for number, line in _lines(stream):
        if isinstance(line, Problem):
            yield number, line
        elif line.strip():
            yield number, _parsed(line)


def _object_rows(stream: io.BufferedReader) -> Iterator[Numbered]:
    """A file that is one object over many lines; else an object a line."""
    data = stream.readline(MAX_ROW_BYTES)
    if isinstance(_parsed(data), Problem):
        data += stream.read(max(0, MAX_OBJECT_BYTES - len(data)))
        if not isinstance(row := _parsed(data), Problem) and not stream.peek(1):
            yield 1, row
            return
    rest: Any = _Chunks(itertools.chain([data], iter(lambda: stream.read(_CHUNK), b"")))
    yield from _line_rows(io.BufferedReader(rest, _CHUNK))


def _parsed(data: bytes) -> Row | Problem:
    try:
        row = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        return Problem("", f"is not JSON: {error.msg} (column {error.colno})")
    if not isinstance(row, dict):
        return Problem("", "is no JSON object")
    twice = _repeated_key(row, data)
    return row if twice is None else Problem(twice, "occurs twice in the object")


def _repeated_key(row: Row, data: bytes) -> str | None:
    """A top-level key that occurs more than once, which the fast parser does not tell."""
    if len(row) <= _FEW_KEYS and all(data.count(orjson.dumps(key)) < 2 for key in row):
        return None
    counts: dict[str, int] = {}

    def count(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts.clear()  # objects end from the inside out: what stays is the outermost
        for key, _ in pairs:
            counts[key] = counts.get(key, 0) + 1
        return {}

    try:
        json.loads(data, object_pairs_hook=count)
    except RecursionError:  # nested as deeply as no example is: not worth another parser
        return None
    return next((key for key, times in counts.items() if times > 1), None)


_OUTSIDE: Final = re.compile(rb'[\[\]{}",]')
_INSIDE: Final = re.compile(rb'["\\]')


def _array_rows(stream: io.BufferedReader) -> Iterator[Numbered]:
    """The elements of a JSON array, one at a time; each is parsed by itself."""
    for number, element in enumerate(_elements(stream), start=1):
        yield number, element if isinstance(element, Problem) else _parsed(element)


def _elements(stream: io.BufferedReader) -> Iterator[bytes | Problem]:
    while (byte := stream.read(1)) != b"[":
        assert byte.isspace()
    depth, in_string, escaped, empty, ended = 1, False, False, True, False
    kept = bytearray()
    too_long = False
    while chunk := stream.read1(_CHUNK):
        position = start = 0
        if escaped:
            position, escaped = 1, False
        while found := (_INSIDE if in_string else _OUTSIDE).search(chunk, position):
            if ended:
                break
            sign, position = found.group(), found.end()
            if sign == b"\\":
                escaped = position == len(chunk)
                position += 1
            elif sign == b'"':
                in_string = not in_string
            elif sign in b"[{":
                depth += 1
            elif sign in b"]}":
                depth -= 1
                ended = depth == 0
            if ended or (sign == b"," and depth == 1 and not in_string):
                kept += chunk[start : position - 1]
                start = position
                if kept.strip() or too_long or not (ended and empty):
                    yield _TOO_LONG if too_long else bytes(kept)
                empty, too_long = False, False
                kept.clear()
        kept += chunk[start:]
        if ended and kept.strip():
            raise BadFile("goes on after the end of its array")
        if len(kept) > MAX_ROW_BYTES:
            too_long = True
            kept.clear()
    if not ended:
        raise BadFile("ends in the middle of its array")


def _csv_rows(stream: io.BufferedReader) -> Iterator[Numbered]:
    csv.field_size_limit(MAX_ROW_BYTES)
    yield from _table_rows(csv.reader(_texts(_lines(stream)), strict=True))


def _tsv_rows(stream: io.BufferedReader) -> Iterator[Numbered]:
    """Values between tabs, without quotes. Two columns that nobody named are a text and what it becomes, as UnifiedQA has them."""
    csv.field_size_limit(MAX_ROW_BYTES)
    texts = _texts(_lines(stream))
    first = next(texts, "")
    named = first.count("\t") != 1 or any(name.strip().lower() in _TEXT_KEYS for name in first.split("\t"))
    lines = itertools.chain([first] if named else ["input\toutput\n", first], texts)
    rows = _table_rows(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    yield from rows if named else ((line - 1, row) for line, row in rows)


def _table_rows(reader: Any) -> Iterator[Numbered]:
    try:
        header = next(reader, None)
        if header is None:
            return
        if len(set(header)) != len(header):
            raise BadFile("has two columns of the same name", line=1)
        line = reader.line_num + 1
        for values in reader:
            if len(values) > len(header):
                yield line, Problem("", "has more values than the header has columns")
            elif values:
                yield line, dict(zip(header, values, strict=False))
            line = reader.line_num + 1
    except csv.Error as error:
        raise BadFile(f"is not a table of values: {error}", line=reader.line_num) from error


def _texts(lines: Iterable[tuple[int, bytes | Problem]]) -> Iterator[str]:
    for number, line in lines:
        if isinstance(line, Problem):
            raise BadFile(line.what, line=number)
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadFile("is not UTF-8", line=number) from error


def _parquet_rows(path: Path, tell: Callable[[float], None]) -> Iterator[Numbered]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as plain:
            # Texts stay in their dictionaries: one long text that occurs in every row is held once.
            texts = [field.name for field in plain.schema_arrow if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)]
        with pq.ParquetFile(path, read_dictionary=texts) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, use_threads=False):
                tell((number + batch.num_rows) / max(file.metadata.num_rows, 1))
                for index in range(batch.num_rows):
                    number += 1
                    yield number, {name: column[index].as_py() for name, column in zip(batch.schema.names, batch.columns, strict=True)}
    except (pa.ArrowException, OSError, ValueError) as error:
        # Arrow's own text may quote values.
        where = f" after row {number}" if number else ""
        raise BadFile(f"is not parquet, or damaged{where} ({type(error).__name__})") from error
