"""Make the quick start's base model: a Llama of 0.9 million parameters, pre-trained on one CPU in minutes.

The base learns *skills* (reversing, counting, opposites, ...) from plain statements such as
`the words backwards : cat dog cow = cow dog cat .` It never sees a request or the markers of a chat, and
answers follow `=` alone, so it cannot answer a chat; instruction tuning teaches it the form, and which
skill a request asks for. The held-out questions' words never occur together in a list or comparison of
the pre-training text; single facts (`the opposite of hot = cold .`) do occur, as they would for any base model.

    python examples/quickstart/make_model.py           # writes model/, see README.md for the time
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from make_data import NOUNS, NUMBERS, OPPOSITES, PLURALS, SUCCESSORS, TASKS, Splits, Subject, Task, make_splits, subject_key
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 11
CONTEXT = 256
"""The longest sequence, in tokens, that the finished model is declared to read."""
BLOCK = 128
"""Length in tokens of a pre-training row: documents end to end."""
SPECIAL_TOKENS = {"pad_token": "<|pad|>", "bos_token": "<|begin|>", "eos_token": "<|end|>", "unk_token": "<|unknown|>"}
ROLE_TOKENS = ["<|system|>", "<|user|>", "<|assistant|>"]
MOST_STATEMENTS = 6
"""The most statements in a document. `<|end|>` ends a document, so that its embedding is a trained one when tuning needs it."""
PROMPT_WEIGHT = 0.1
"""Loss weight of the words before `=`: they are random, and at full weight their noise hides the skills."""

CUES: dict[str, tuple[str, ...]] = {
    "reverse": ("reverse", "Reverse", "backwards"),
    "first": ("first", "begins"),
    "last": ("last", "ends"),
    "count": ("count", "Count", "many"),
    "sort": ("sort", "Sort", "alphabetical"),
    "repeat": ("repeat", "Repeat", "twice"),
    "larger": ("larger", "greater"),
    "opposite": ("opposite", "unlike"),
    "plural": ("plural", "several"),
    "next": ("next", "after"),
}
"""The words that name each skill in pre-training text."""
OPENINGS = ("{}", "{}", "the {}", "this {}", "{} of", "the {} of", "the words {}", "the {} word", "this list {}", "the {} number")
SEPARATORS = (":", ",", ".", "")
"""What may stand between a cue and its words: a skill must not hang on one wording."""
TASK_WEIGHTS = {"sort": 3.0, "count": 3.0, "reverse": 2.0, "repeat": 2.0, "larger": 2.0}
"""How often a task's statements occur, against 1 for the others: what is harder to learn occurs more."""


def documents(seed: int, splits: Splits) -> Iterator[list[tuple[str, str]]]:
    """Yield documents without end: statements, each as (up to and with `=`, the rest). A seed fixes them all."""
    rng = random.Random(seed)
    weights = [TASK_WEIGHTS.get(task.name, 1.0) for task in TASKS]
    while True:
        tasks = rng.choices(TASKS, weights, k=rng.randint(1, MOST_STATEMENTS))
        document = [_statement(task, rng, splits) for task in tasks]
        end = SPECIAL_TOKENS["eos_token"]
        yield [(given, f"{answer} {'.' if number < len(tasks) else end}") for number, (given, answer) in enumerate(document, start=1)]


def _statement(task: Task, rng: random.Random, splits: Splits) -> tuple[str, str]:
    subject = _subject(task, rng, splits)
    opening = rng.choice(OPENINGS).format(rng.choice(CUES[task.name]))
    # Splitting drops the empty separator's second space.
    return " ".join(f"{opening} {rng.choice(SEPARATORS)} {' '.join(subject)} =".split()), task.answer(subject)


def _subject(task: Task, rng: random.Random, splits: Splits) -> Subject:
    is_fact = task.family in ("opposite", "plural", "next")
    while True:
        subject = task.draw(rng)
        if is_fact or subject_key(task, subject) not in splits.held_out_subjects:
            return subject


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer whose tokens are whole words and marks; decoding joins them with single spaces."""
    split = Whitespace()
    texts = [*NOUNS, *PLURALS.values(), *OPPOSITES, *SUCCESSORS, *NUMBERS]
    texts += [phrasing.replace("|", " ") for task in TASKS for phrasing in task.phrasings]
    texts += [":", ",", "=", ".", *(cue for cues in CUES.values() for cue in cues)]
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text.replace("{}", ""))}
    vocabulary = [*SPECIAL_TOKENS.values(), *ROLE_TOKENS, *sorted(words)]
    model = WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token=SPECIAL_TOKENS["unk_token"])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = split
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=ROLE_TOKENS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        **SPECIAL_TOKENS,
    )


def blocks(
    tokenizer: PreTrainedTokenizerFast, splits: Splits, *, seed: int, batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches of token ids and loss weights, both [batch_size, BLOCK]."""
    vocabulary = tokenizer.get_vocab()
    ids: list[int] = []
    weights: list[float] = []
    size = batch_size * BLOCK
    for document in documents(seed, splits):
        # Statements have a space between any two tokens, so that splitting is tokenising, and quick.
        for given, rest in document:
            for text, weight in ((given, PROMPT_WEIGHT), (rest, 1.0)):
                words = text.split()
                ids += [vocabulary[word] for word in words]
                weights += [weight] * len(words)
        if len(ids) >= size:
            yield torch.tensor(ids[:size]).view(batch_size, BLOCK), torch.tensor(weights[:size]).view(batch_size, BLOCK)
            ids, weights = ids[size:], weights[size:]


def make_untrained(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Make the model with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def learning_rate_factor(step: int, steps: int, *, warm_up: int = 100) -> float:
    """Give the share of the peak learning rate at a step: a linear rise, then half a cosine down to 2 %."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def pretrain(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, steps: int, batch_size: int, peak: float) -> None:
    """Train the model in place by next-word prediction."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    data = blocks(tokenizer, make_splits(), seed=SEED, batch_size=batch_size)
    model.train()
    for step in range(steps):
        ids, weights = next(data)
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        losses = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
        target_weights = weights[:, 1:].flatten()
        loss = (losses * target_weights).sum() / target_weights.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            answer_loss = losses[target_weights == 1.0].mean().item()
            print(f"step {step}/{steps}  answer loss {answer_loss:.4f}  cpu {time.process_time():.0f} s", flush=True)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # The class that every release of transformers loads from tokenizer.json as it stands.
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Pre-train the quick start's base model.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--batch-size", type=int, default=16, help=f"rows of {BLOCK} tokens in a step")
    parser.add_argument("--learning-rate", type=float, default=2.5e-3)
    parser.add_argument("--threads", type=int, default=1, help="matrices this small gain little from more")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer()
    model = make_untrained(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens", flush=True)
    pretrain(model, tokenizer, steps=options.steps, batch_size=options.batch_size, peak=options.learning_rate)
    save(model, tokenizer, options.output)


if __name__ == "__main__":
    main()
