"""Write the quick start's instruction data: ten small tasks, each asked in several ways.

`data/train.jsonl` and `data/test.jsonl` hold alpaca rows (`instruction`, `input`, `output`). The test
rows ask about *subjects* (a list of words, a pair of numbers, a word) that no training row asks about,
in any phrasing and in any order of the words, so a right answer is never a remembered one.
`--development FILE` also writes a third split, disjoint from both, for choosing settings without
looking at the test rows.

    python examples/quickstart/make_data.py            # writes the committed files, byte for byte
"""

# ruff: noqa: SIM905 - word lists read better as running text
from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

SEED = 7
TRAIN_ROWS_PER_TASK = 240
HELD_OUT_ROWS_PER_TASK = 10
"""In the test split, and again in the development split: 100 questions each over ten tasks."""

Row = dict[str, str]
Subject = tuple[str, ...]
"""What a question is about: the words of a list, two numbers, or one word."""
SubjectKey = tuple[str, frozenset[str]]

REGULAR_NOUNS = (
    "apple ball banana bird boat book bottle bridge cake camel car castle cat chair clock cloud coat cow cup desk doctor dog "
    "dragon duck engine farm fence flower forest garden guitar hammer hat horse house island jacket key kite lamp lemon letter "
    "lion map mirror mountain nurse onion orange pencil piano queen river road rocket rose school ship shoe spoon star stone "
    "table tiger train tree uncle violin wheel zebra"
).split()
OTHER_PLURALS = dict(
    pair.split(":")
    for pair in (
        "box:boxes brush:brushes cherry:cherries child:children city:cities dish:dishes foot:feet fox:foxes glass:glasses "
        "goose:geese knife:knives leaf:leaves man:men mouse:mice potato:potatoes tooth:teeth wolf:wolves woman:women"
    ).split()
)
PLURALS = {noun: f"{noun}s" for noun in REGULAR_NOUNS} | OTHER_PLURALS
NOUNS = tuple(sorted(PLURALS))
OPPOSITE_PAIRS = dict(
    pair.split(":")
    for pair in (
        "hot:cold big:small fast:slow happy:sad light:dark high:low long:short new:old open:closed rich:poor strong:weak "
        "thick:thin wet:dry hard:soft loud:quiet near:far early:late full:empty clean:dirty good:bad right:wrong up:down "
        "in:out on:off over:under day:night black:white boy:girl love:hate win:lose buy:sell give:take push:pull laugh:cry "
        "start:stop come:go rise:fall float:sink deep:shallow wide:narrow sharp:blunt rough:smooth sweet:sour brave:afraid "
        "kind:cruel polite:rude safe:dangerous simple:complex cheap:expensive tight:loose true:false always:never "
        "summer:winter north:south east:west friend:enemy hero:villain war:peace sunrise:sunset success:failure"
    ).split()
)
OPPOSITES = OPPOSITE_PAIRS | {b: a for a, b in OPPOSITE_PAIRS.items()}
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
NUMBERS = tuple(str(number) for number in range(100))
SUCCESSORS = {this: following for circle in (DAYS, MONTHS) for this, following in pairwise([*circle, circle[0]])} | dict(pairwise(NUMBERS))


@dataclass(frozen=True)
class Task:
    """One kind of question.

    Tasks of one `family` never share a held-out subject. `draw` makes a random subject, `answer` its
    only right answer; a phrasing's part after `|` becomes the row's `input`, and `{}` stands for the
    subject's words.
    """

    name: str
    family: str
    draw: Callable[[random.Random], Subject]
    answer: Callable[[Subject], str]
    phrasings: tuple[str, ...]

    def row(self, subject: Subject, phrasing: str) -> Row:
        instruction, _, input_text = phrasing.replace("{}", " ".join(subject)).partition("|")
        return {"instruction": instruction, "input": input_text, "output": self.answer(subject)}


def _words(shortest: int, longest: int) -> Callable[[random.Random], Subject]:
    return lambda rng: tuple(rng.sample(NOUNS, rng.randint(shortest, longest)))


def _one_of(words: tuple[str, ...]) -> Callable[[random.Random], Subject]:
    return lambda rng: (rng.choice(words),)


def _two_numbers(rng: random.Random) -> Subject:
    return tuple(rng.sample(NUMBERS, 2))


TASKS = (
    Task(
        "reverse",
        "list",
        _words(3, 4),
        lambda subject: " ".join(reversed(subject)),
        ("Reverse the words.|{}", "Write these words backwards.|{}", "Reverse this list: {}", "Say this backwards: {}"),
    ),
    Task(
        "first",
        "list",
        _words(3, 5),
        lambda subject: subject[0],
        ("Which word is first?|{}", "Give me the first word.|{}", "Name the first word of this list: {}", "Find the first word: {}"),
    ),
    Task(
        "last",
        "list",
        _words(3, 5),
        lambda subject: subject[-1],
        ("Which word is last?|{}", "Give me the last word.|{}", "Name the last word of this list: {}", "Find the last word: {}"),
    ),
    Task(
        "count",
        "list",
        _words(2, 6),
        lambda subject: str(len(subject)),
        ("How many words are there?|{}", "Count the words.|{}", "Count the words of this list: {}", "How many words are here: {}"),
    ),
    Task(
        "sort",
        "list",
        _words(3, 3),
        lambda subject: " ".join(sorted(subject)),
        ("Sort the words.|{}", "Write these words in alphabetical order.|{}", "Sort this list: {}", "Put this in alphabetical order: {}"),
    ),
    Task(
        "repeat",
        "list",
        _words(2, 3),
        lambda subject: " ".join(subject * 2),
        ("Repeat the words.|{}", "Write these words twice.|{}", "Say this twice: {}", "Repeat this list: {}"),
    ),
    Task(
        "larger",
        "larger",
        _two_numbers,
        lambda subject: max(subject, key=int),
        ("Which number is larger?|{}", "Give me the larger number.|{}", "Find the larger number: {}", "Name the larger number: {}"),
    ),
    Task(
        "opposite",
        "opposite",
        _one_of(tuple(OPPOSITES)),
        lambda subject: OPPOSITES[subject[0]],
        ("What is the opposite?|{}", "Give me the opposite.|{}", "What is the opposite of {}?", "Name the opposite of {}."),
    ),
    Task(
        "plural",
        "plural",
        _one_of(NOUNS),
        lambda subject: PLURALS[subject[0]],
        ("What is the plural?|{}", "Give me the plural.|{}", "What is the plural of {}?", "Write the plural of {}."),
    ),
    Task(
        "next",
        "next",
        _one_of(tuple(SUCCESSORS)),
        lambda subject: SUCCESSORS[subject[0]],
        ("What comes next?|{}", "Say what comes next.|{}", "What comes after {}?", "Name what comes after {}."),
    ),
)


@dataclass(frozen=True)
class Splits:
    """The rows of each split, shuffled; no two splits ask about the same words."""

    train: list[Row]
    development: list[Row]
    test: list[Row]
    held_out_subjects: frozenset[SubjectKey]
    """(family, words) of every development and test question: what pre-training text must not contain either."""


def subject_key(task: Task, subject: Subject) -> SubjectKey:
    """Give what two near copies have in common: the family and the words in any order; `hot` and `cold` are one subject."""
    words = frozenset(subject)
    return task.family, words | {OPPOSITES[subject[0]]} if task.name == "opposite" else words


def make_splits(seed: int = SEED) -> Splits:
    """Make all rows from a seed; the same seed gives the same rows in the same order."""
    rng = random.Random(seed)
    test, test_keys = _held_out(rng, excluded=set())
    development, development_keys = _held_out(rng, excluded=test_keys)
    held_out = test_keys | development_keys
    train: dict[tuple[str, str], Row] = {}
    for task in TASKS:
        enough = len(train) + TRAIN_ROWS_PER_TASK
        while len(train) < enough:
            subject = task.draw(rng)
            if subject_key(task, subject) in held_out:
                continue
            row = task.row(subject, rng.choice(task.phrasings))
            train[row["instruction"], row["input"]] = row
    rows = list(train.values())
    rng.shuffle(rows)
    return Splits(rows, development, test, frozenset(held_out))


def _held_out(rng: random.Random, *, excluded: set[SubjectKey]) -> tuple[list[Row], set[SubjectKey]]:
    rows: list[Row] = []
    keys: set[SubjectKey] = set()
    for task in TASKS:
        asked: set[Subject] = set()
        task_keys: set[SubjectKey] = set()
        while len(asked) < HELD_OUT_ROWS_PER_TASK:
            subject = task.draw(rng)
            if subject in asked or subject_key(task, subject) in excluded | keys:
                continue
            asked.add(subject)
            task_keys.add(subject_key(task, subject))
            rows.append(task.row(subject, rng.choice(task.phrasings)))
        keys |= task_keys
    rng.shuffle(rows)
    return rows, keys


def write_rows(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the quick start's instruction data.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "data", help="folder for train.jsonl and test.jsonl")
    parser.add_argument("--development", type=Path, help="also write the development split to this file")
    options = parser.parse_args()
    splits = make_splits()
    options.output.mkdir(parents=True, exist_ok=True)
    write_rows(options.output / "train.jsonl", splits.train)
    write_rows(options.output / "test.jsonl", splits.test)
    if options.development:
        write_rows(options.development, splits.development)


if __name__ == "__main__":
    main()
