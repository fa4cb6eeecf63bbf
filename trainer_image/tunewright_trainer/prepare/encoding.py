"""Encoding many conversations on all processors, in order."""

import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from tunewright_crds.dataset import Overlong, TrainOn
from tunewright_trainer.prepare.conversation import Conversation
from tunewright_trainer.prepare.encode import Encoded, Encoder
from tunewright_trainer.prepare.sequences import InstructedEncoder, SequenceEncoder
from tunewright_trainer.prepare.template import load_tokenizer
from tunewright_trainer.process import do_without

ALONE: Final = 20  # batches that one process encodes before others are started, which takes a second or two
AHEAD: Final = 3  # batches for each process that wait or are done: bounds memory

T = TypeVar("T")


class Recipe(NamedTuple):
    """What an encoder is made of."""

    tokenizer: Path
    template: str
    train_on: TrainOn
    longest: int
    overlong: Overlong
    near: bool
    seq2seq: bool
    instructed: bool

    def encoder(self) -> Encoder:
        tokenizer = load_tokenizer(self.tokenizer)
        if self.seq2seq:
            encoder = InstructedEncoder if self.instructed else SequenceEncoder
            return encoder(tokenizer, self.template, longest=self.longest, overlong=self.overlong, near=self.near)
        return Encoder(tokenizer, self.template, train_on=self.train_on, longest=self.longest, overlong=self.overlong, near=self.near)


def encoded(
    batches: Iterable[tuple[T, Sequence[Conversation]]], recipe: Recipe, own: Encoder, *, processes: int
) -> Iterator[tuple[T, Encoded]]:
    """Each batch's examples, in order, with what came with the batch. `own` is this process's encoder; others are started once there is enough to do."""
    rest = iter(batches)
    for mark, batch in itertools.islice(rest, ALONE if processes > 1 else None):
        yield mark, own.encode(batch)
    first = next(rest, None)
    if first is None:
        return
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_start, initargs=(recipe,))
    waiting: deque[tuple[T, Future[Encoded]]] = deque()
    try:
        for mark, batch in itertools.chain([first], rest):
            waiting.append((mark, pool.submit(_encode, batch)))
            if len(waiting) >= AHEAD * processes:
                done, result = waiting.popleft()
                yield done, result.result()
        while waiting:
            done, result = waiting.popleft()
            yield done, result.result()
    except BrokenProcessPool as error:
        raise MemoryError("one of the processes that prepare was killed, most likely for its memory") from error
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: Encoder


def _start(recipe: Recipe) -> None:
    global _encoder
    do_without("torch")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each processor
    _encoder = recipe.encoder()


def _encode(batch: Sequence[Conversation]) -> Encoded:
    return _encoder.encode(batch)
