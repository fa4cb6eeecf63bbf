"""Tokens told word by word are those of the tokenizer, whatever the text and wherever it is cut."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AddedToken, PreTrainedTokenizerFast

from tunewright_crds.dataset import Overlong, TrainOn
from tunewright_trainer.prepare.boundaries import Boundaries
from tunewright_trainer.prepare.conversation import exchange
from tunewright_trainer.prepare.encode import Encoder, Teller
from tunewright_trainer.prepare.template import DEFAULT_CHAT_TEMPLATE, ID_BYTES, as_bytes, tokenize
from tunewright_trainer.prepare.words import WORDS, Words, words

GPT2, LLAMA3, QWEN = WORDS
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
SENTENCES = [
    "It's the dog's 1234 bones, isn't it?\n\n  def f(x):\n\treturn x + 10  \r\n",
    "Où est l’été — là-bas?",
    "WE'RE 'round  the   corner...",
]


def a_tokenizer(cutting: Any, *, normalizer: Any = None, added: tuple[AddedToken, ...] = ()) -> Any:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = cutting
    made.decoder = decoders.ByteLevel()
    if normalizer:
        made.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|im|>", "<|im|>_end"], initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(SENTENCES * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im|>")
    tokenizer.add_tokens(list(added))
    return tokenizer


def split_by(expression: str) -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(expression), "isolated"), BYTES])


KNOWN = {
    "GPT-2": a_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "GPT-2's as an expression": a_tokenizer(split_by(GPT2)),
    "Llama 3": a_tokenizer(split_by(LLAMA3)),
    "Qwen": a_tokenizer(split_by(QWEN), normalizer=normalizers.NFC(), added=(AddedToken("<tool>", special=False, normalized=False),)),
}
PIECES = [
    *"aZ'st \n\t\r\v\f\x1c\x7f09,.<|",
    "  ",
    " '",
    "'re",
    "'S",
    "don't",
    "bones",
    "<|im|>",
    "<|im|>_end",
    "<tool>",
    "<|im",
    "é",
    "e\u0301",
    "—",
    "²",
    "ſ",
    "\u2003",
    "\xa0",
    "\x85 ",
    "\u2028",
    " \u0301",
    "über",
    "犬",
]


def a_text(chance: random.Random) -> str:
    return "".join(chance.choices(PIECES if chance.random() < 0.3 else PIECES[:-14], k=chance.randint(0, 40)))


@pytest.mark.parametrize("make", [words, Boundaries])
@pytest.mark.parametrize("tokenizer", KNOWN.values(), ids=KNOWN)
def test_tellers_tell_what_the_tokenizer_does(tokenizer: Any, make: Callable[[Any], Teller | None]) -> None:
    teller = make(tokenizer)
    assert teller is not None
    chance = random.Random(1)
    texts = ["", *SENTENCES, *(a_text(chance) for _ in range(2000))]
    cuts = [sorted(chance.sample(range(len(text) + 1), min(3, len(text)))) for text in texts]
    placed = 0
    for text, some, (ids, places) in zip(texts, cuts, teller.told(texts, cuts), strict=True):
        whole, *beginnings = map(as_bytes, tokenize(tokenizer, [text, *(text[:cut] for cut in some)]))
        assert ids == whole, repr(text)
        if places is not None:
            assert [ids[: places[cut] * ID_BYTES] for cut in some] == beginnings, repr((text, some))
            placed += bool(some)
        elif make is words:
            assert not all(map(whole.startswith, beginnings)), repr((text, some))
    assert placed > 20


UNKNOWN = {
    "another expression": a_tokenizer(split_by(r"\s+|\S+")),
    "a space before the text": a_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "lower case": a_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizer=normalizers.Lowercase()),
    "an added token that takes spaces with it": a_tokenizer(
        pre_tokenizers.ByteLevel(add_prefix_space=False), added=(AddedToken("<mask>", lstrip=True, normalized=False),)
    ),
    "an added token in composed text": a_tokenizer(split_by(QWEN), normalizer=normalizers.NFC(), added=(AddedToken("é", normalized=True),)),
}


@pytest.mark.parametrize("tokenizer", UNKNOWN.values(), ids=UNKNOWN)
def test_nothing_is_told_of_tokenizers_that_cut_otherwise(tokenizer: Any) -> None:
    assert words(tokenizer) is None


@pytest.mark.parametrize(
    "lie",
    {
        "of the tokens": lambda ids, places: (ids[ID_BYTES:], places),
        "of the beginnings": lambda ids, places: (ids, places and {cut: place + 1 for cut, place in places.items()}),
    }.values(),
)
def test_a_teller_that_is_wrong_is_not_asked_again(monkeypatch: pytest.MonkeyPatch, lie: Callable[..., Any]) -> None:
    options: dict[str, Any] = {"train_on": TrainOn.RESPONSE, "longest": 99, "overlong": Overlong.DROP, "near": False}
    talks = [exchange(f"Who {number}?", "It's me.") for number in range(3)]
    true = Encoder(KNOWN["GPT-2"], DEFAULT_CHAT_TEMPLATE, **options).encode(talks)
    assert len(true.kept) == len(talks)
    tell = Words.told
    monkeypatch.setattr(Words, "told", lambda *given: [lie(*one) for one in tell(*given)])
    found = Encoder(KNOWN["GPT-2"], DEFAULT_CHAT_TEMPLATE, **options).encode(talks)
    assert found.ids.tolist() == true.ids.tolist()
    assert found.labels.tolist() == true.labels.tolist()


def test_no_table_grows_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunewright_trainer.prepare.words._MOST", 10)
    teller = words(KNOWN["Llama 3"])
    assert teller is not None
    texts = [f"word{number} word{number}" for number in range(100)] + ["a" * 1000]
    assert [ids for ids, _ in teller.told(texts, [()] * len(texts))] == [as_bytes(ids) for ids in tokenize(KNOWN["Llama 3"], texts)]
    assert all(len(table) <= 10 for table in vars(teller).values() if isinstance(table, dict) and table is not teller._added)
