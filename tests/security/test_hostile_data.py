"""Data made to hurt: each file ends in the error that any other mistake ends in, quickly, and in little memory.

All files are read by one process of its own, whose peak of memory is the kernel's word (VmHWM).
"""

import gzip
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from tests.support.models import tiny_model
from tests.support.preparing import a_data_job, prepare_here
from tunewright_crds.errors import Refusal

MIB = 2**20
ALLOWED = 640 * MIB  # beyond what the libraries take
LONG = 400 * MIB  # who holds it whole holds it twice, as bytes and as text
DEPTH = 300_000
LIMIT_SECONDS = 900
GOOD = b'{"instruction": "a", "output": "b"}\n'
ROOT = Path(__file__).parents[2]


def plain(*parts: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(b"".join(parts))

    return write


def with_a_hole(start: bytes, hole: int, end: bytes) -> Callable[[Path], None]:
    """A file with so many NUL bytes in its middle, which take no room on the disk."""

    def write(path: Path) -> None:
        with path.open("wb") as file:
            file.write(start)
            file.seek(hole, os.SEEK_CUR)
            file.write(end)

    return write


def a_bomb(compress: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """A GiB of blanks in about a thousandth of it."""

    def write(path: Path) -> None:
        path.write_bytes(GOOD_COMPRESSED[path.suffix] + compress(b" " * (64 * MIB)) * 16)  # 16 members, one after another

    return write


GOOD_COMPRESSED = {".gz": gzip.compress(GOOD), ".zst": zstandard.ZstdCompressor().compress(GOOD)}


def parquet(table: pa.Table, *, keep: float = 1.0) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        sink = io.BytesIO()
        pq.write_table(table, sink)
        data = sink.getvalue()
        path.write_bytes(data[: int(len(data) * keep)])

    return write


def repeated_text() -> pa.Table:
    """One text of 8 MiB in each of 64 rows: 512 MiB that a dictionary holds once."""
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 64, pa.int32()), pa.array(["x" * (8 * MIB)]))
    return pa.table({"instruction": text, "output": ["y"] * 64})


def many_files(folder: Path) -> None:
    """100,000 files, of which one in a thousand holds a row; with names that nobody would choose."""
    for part in range(100):
        (folder / f"{part} 100%&?#[Ü] ").mkdir(parents=True)
        for number in range(1000):
            (folder / f"{part} 100%&?#[Ü] " / f"{number} ..jsonl").write_bytes(b"" if number else GOOD.replace(b"a", b"%d" % part))


# Name of the file: how it is made, and what must be said of it; nothing where it is read like any other.
FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "long-line.jsonl": (with_a_hole(GOOD + b'{"instruction": "', LONG, b'"}\n' + GOOD), "long-line.jsonl:2: is longer than 16 MiB"),
    "long-element.json": (with_a_hole(b'[{"instruction": "', LONG, b'"}]'), "long-element.json:1: is longer than 16 MiB"),
    "long-line.csv": (with_a_hole(b"instruction,output\n", LONG, b",b\n"), "long-line.csv:2: is longer than 16 MiB"),
    "open-quote.csv": (plain(b'instruction,output\n"', (b"a" * 1000 + b"\n") * 20_000), "open-quote.csv:"),
    "deep.jsonl": (plain(GOOD, b'{"instruction": ' + b"[" * DEPTH + b"]" * DEPTH + b"}\n"), "deep.jsonl:2: is not JSON"),
    "deep.json": (plain(b"[" * DEPTH + b"]" * DEPTH), "deep.json:1: is not JSON"),
    "deep-and-open.json": (plain(b"[" * DEPTH), "deep-and-open.json: ends in the middle of its array"),
    "many-keys.jsonl": (
        plain(b"{" + b",".join(b'"%d":1' % n for n in range(500_000)) + b"}\n"),
        "many-keys.jsonl:1: has none of the keys that tell its format",
    ),
    "many-lists.jsonl": (plain(b'{"instruction": [' + b"[]," * (3 * MIB) + b"1]}\n"), "many-lists.jsonl:1: instruction: must be a text"),
    "deep-tree.jsonl": (
        plain(
            GOOD, b'{"message_tree_id": "t", "prompt": ' + b'{"role": "prompter", "text": "a", "replies": [' * 500 + b"]}" * 500 + b"}\n"
        ),
        "deep-tree.jsonl:2: is nested too deeply",
    ),
    "many-instances.json": (
        plain(b'{\n"Definition": "d", "Instances": [' + b"{}," * (5 * MIB) + b"{}]}"),
        "many-instances.json:1: Instances[0].output: is missing",
    ),
    "too-long-an-object.json": (
        plain(b'{\n"Definition": "d", "Instances": [' + b"{}," * (6 * MIB) + b"{}]}"),
        "too-long-an-object.json:1: is not JSON",
    ),
    "many-turns.jsonl": (
        plain(b'{"input": "' + b"[|Human|] a [|AI|] b " * 500_000 + b'"}\n'),
        "no example is left to train on (1 longer than cleaning.maxCharacters)",
    ),
    "tabs.tsv": (plain(b"a\tb\tc\n", b"1\t2\t3\t4\n"), "tabs.tsv:2: has more values than the header has columns"),
    "nan.jsonl": (plain(b'{"instruction": "a", "output": NaN}\n'), "nan.jsonl:1: is not JSON"),
    "huge-number.jsonl": (plain(b'{"instruction": "a", "output": ' + b"9" * MIB + b"}\n"), "huge-number.jsonl:1: "),
    "twice.jsonl": (plain(b'{"instruction": "a", "output": "b", "output": "c"}\n'), "twice.jsonl:1: output: occurs twice in the object"),
    "surrogate.jsonl": (plain(b'{"instruction": "a", "output": "\\ud800"}\n'), "surrogate.jsonl:1: is not JSON"),
    "latin-1.jsonl": (plain(b'{"instruction": "a", "output": "\xe4"}\n'), "latin-1.jsonl:1: is not JSON"),
    "latin-1.csv": (plain(b"instruction,output\na,\xe4\n"), "latin-1.csv:2: is not UTF-8"),
    "utf-16.jsonl": (plain(b"\xff\xfe" + GOOD.decode().encode("utf-16-le")), "utf-16.jsonl: is UTF-16; it must be UTF-8"),
    "columns.csv": (plain(b"instruction,output,output\na,b,c\n"), "columns.csv:1: has two columns of the same name"),
    "more-values.csv": (plain(b"instruction,output\na,b,c\n"), "more-values.csv:2: has more values than the header has columns"),
    "bomb.jsonl.gz": (a_bomb(gzip.compress), "bomb.jsonl.gz: expands to more than 200 times its size"),
    "bomb.jsonl.zst": (a_bomb(zstandard.ZstdCompressor().compress), "bomb.jsonl.zst: expands to more than 200 times its size"),
    "cut.jsonl.gz": (plain(gzip.compress(GOOD * 99)[:-9]), "cut.jsonl.gz: ends in the middle of its gzip compression"),
    "cut.jsonl.zst": (
        plain(zstandard.ZstdCompressor().compress(GOOD * 99)[:-3]),
        "cut.jsonl.zst: ends in the middle of its zstd compression",
    ),
    "cut.json": (plain(b"[" + GOOD[:-1] + b","), "cut.json: ends in the middle of its array"),
    "rest.json": (plain(b"[" + GOOD + b"] and more"), "rest.json: goes on after the end of its array"),
    "cut.parquet": (parquet(pa.table({"instruction": ["a"], "output": ["b"]}), keep=0.7), "cut.parquet: is not parquet, or damaged"),
    "plain.jsonl.gz": (plain(GOOD), "plain.jsonl.gz: is not gzip, or damaged"),
    "plain.jsonl.zst": (plain(GOOD), "plain.jsonl.zst: is not zstd, or damaged"),
    "plain.parquet": (plain(GOOD), "plain.parquet: is not parquet, or damaged"),
    "really-gzip.jsonl": (plain(gzip.compress(GOOD)), "really-gzip.jsonl: begins like gzip; its name must say so"),
    "really-parquet.csv": (parquet(pa.table({"a": [1]})), "really-parquet.csv: begins like parquet; its name must say so"),
    "really-parquet.parquet.gz": (plain(gzip.compress(b"PAR1")), "really-parquet.parquet.gz: is parquet in another compression"),
    "program.exe": (plain(b"MZ"), "program.exe: is no data file"),
    "empty.jsonl": (plain(), "empty.jsonl holds no rows"),
    "blank.jsonl": (plain(b"\n \r\n" * 1000), "blank.jsonl holds no rows"),
    "empty.json": (plain(b"[ ]"), "empty.json holds no rows"),
    "empty.csv": (plain(), "empty.csv holds no rows"),
    "header.csv": (plain(b"instruction,output\n"), "header.csv holds no rows"),
    "no-rows.parquet": (parquet(pa.table({"instruction": pa.array([], pa.string())})), "no-rows.parquet holds no rows"),
    "repeated.parquet": (parquet(repeated_text()), "no example is left to train on (64 longer than cleaning.maxCharacters)"),
    "mark.jsonl": (plain(b"\xef\xbb\xbf" + GOOD), ""),
    "windows.jsonl": (plain(GOOD.replace(b"\n", b"\r\n")), ""),
    "no-end.jsonl": (plain(GOOD[:-1]), ""),
    "many-files": (many_files, ""),
}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What was said of each file, and the peak of memory in bytes."""
    folder = tmp_path_factory.mktemp("hostile")
    for name, (write, _) in FILES.items():
        write(folder / name)
    model = tiny_model("llama", chat_template=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__)), str(folder), str(model), str(tmp_path_factory.mktemp("out"))]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
    for name in FILES:
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_told_by_its_place(told: dict[str, Any], name: str) -> None:
    said = told["said"][name]
    expected = FILES[name][1]
    assert said["message"].removeprefix(told["folder"]).startswith(expected) if expected else not said["message"], said
    assert said["code"] in (["DataInvalid", "DataEmpty"] if expected else [""])
    assert len(said["message"]) < 1000


def test_memory_stays_bounded(told: dict[str, Any]) -> None:
    assert told["peak"] - told["libraries"] < ALLOWED, {name: said["peak"] // MIB for name, said in told["said"].items()}


def peak() -> int:
    """The most memory that this process ever held, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def read_all(folder: Path, model: Path, work: Path) -> dict[str, Any]:
    """Prepare each file of a folder by itself."""
    good = work / "good.jsonl"
    good.write_bytes(GOOD)
    prepare_here(a_data_job(good, base=model), work)
    libraries = peak()
    said = {}
    for path in sorted(folder.iterdir()):
        code = message = ""
        try:
            prepare_here(a_data_job(path, base=model), work / path.name)
        except Refusal as refusal:
            code, message = refusal.code.value, refusal.message
        said[path.name] = {"code": code, "message": message, "peak": peak()}
    return {"said": said, "peak": peak(), "libraries": libraries, "folder": f"{folder}/"}


if __name__ == "__main__":
    print(json.dumps(read_all(*map(Path, sys.argv[1:4]))))
