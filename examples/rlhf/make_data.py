"""Write the data of the RLHF example: what people showed, what people preferred, and what is only asked.

All of it is about three of the quick start's tasks: opposites, plurals, and what comes next. Every question has two right answers, a single word and
a whole sentence. The demonstrations give one or the other, by a coin; the comparisons always prefer the sentence. No two files ask about the same word.

    python -m examples.rlhf.make_data            # writes the committed files, byte for byte
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from examples.quickstart.make_data import OPPOSITES, PLURALS, SUCCESSORS, TASKS

SEED = 11
SENTENCES = {"opposite": "the opposite of {} is {}", "plural": "the plural of {} is {}", "next": "after {} comes {}"}
WORDS = {"opposite": OPPOSITES, "plural": PLURALS, "next": SUCCESSORS}
SHARES = {"demonstrations": 0.5, "comparisons": 0.3, "prompts": 0.2}  # of the words

Row = dict[str, str]


def make_files(seed: int = SEED) -> dict[str, list[Row]]:
    """Make the rows of each file, shuffled; the same seed gives the same rows in the same order."""
    rng = random.Random(seed)
    facts = [(task, word, answer) for task, answers in WORDS.items() for word, answer in sorted(answers.items())]
    rng.shuffle(facts)
    files: dict[str, list[Row]] = {}
    for name, share in SHARES.items():
        count = round(share * sum(map(len, WORDS.values())))
        files[name] = [_row(name, question, word, answer, rng) for word, answer, question in _asked(facts[:count])]
        rng.shuffle(files[name])
        facts = facts[count:]
    return files


def _asked(facts: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Word, sentence and question of each fact, which is asked in every way that takes one line."""
    phrasings = {task.name: [phrasing for phrasing in task.phrasings if "|" not in phrasing] for task in TASKS}
    return [
        (answer, SENTENCES[task].format(word, answer), phrasing.format(word))
        for task, word, answer in facts
        for phrasing in phrasings[task]
    ]


def _row(name: str, question: str, word: str, sentence: str, rng: random.Random) -> Row:
    if name == "comparisons":
        return {"prompt": question, "chosen": sentence, "rejected": word}
    if name == "demonstrations":
        return {"prompt": question, "completion": rng.choice((word, sentence))}
    return {"prompt": question, "completion": sentence}  # what is answered there nobody learns


def write_files(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in make_files().items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    write_files(Path(__file__).parent / "data")
