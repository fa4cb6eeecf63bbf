"""Message trees of OpenAssistant, whole or as flat messages: every way from the first prompt to a last answer is a conversation, and every two ranked
answers to the same thread are a pair of preferences."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from tunewright_trainer.prepare.chat import ROLES
from tunewright_trainer.prepare.conversation import Conversation, Drop, Message, RowError, pair
from tunewright_trainer.prepare.fields import Fields, within
from tunewright_trainer.prepare.rows import Row

MOST_MESSAGES: Final = 10_000  # of one tree; theirs have a few dozen
MOST_RANKED: Final = 64  # answers to one thread, of which every two are a pair: 2,016 of them


@dataclass
class Node:
    """A message with its replies."""

    message: Message
    rank: float | None
    replies: list["Node"] = field(default_factory=list)


Told = Callable[[Node, str], Iterator[Conversation | Drop]]
"""What a tree, by its first message and its name, comes to: `threads` or `pairs`."""


def whole_tree(fields: Fields, told: Told) -> Iterator[Conversation | Drop]:
    """A row that holds a tree: {message_tree_id, prompt: {role, text, replies: [...]}}."""
    root = within(fields.get("prompt"), fields.name("prompt"))
    yield from told(_node(root, left=[MOST_MESSAGES]), fields.optional("message_tree_id", "message_id"))


def _node(entry: Fields, *, left: list[int]) -> Node:
    left[0] -= 1
    if left[0] < 0:
        raise RowError(entry.name("replies"), f"belongs to a tree of more than {MOST_MESSAGES} messages")
    node = _bare(entry)
    if entry.find("replies"):
        node.replies = [_node(reply, left=left) for reply in entry.objects("replies") if reply.find("deleted") is not True]
    return node


def _bare(entry: Fields) -> Node:
    role = ROLES.get(entry.text("role"))
    if role not in ("user", "assistant"):
        raise RowError(entry.name("role"), "must be prompter or assistant")
    rank = entry.find("rank")
    return Node({"role": role, "content": entry.text("text")}, rank if isinstance(rank, int | float) and math.isfinite(rank) else None)


def flat_tree(messages: Iterable[Row], told: Told) -> Iterator[Conversation | Drop]:
    """Messages of one tree: {message_id, parent_id, message_tree_id, role, text}, in any order."""
    rows = [Fields(row, {}) for row in messages]
    known = {row.text("message_id") for row in rows}
    nodes = {row.text("message_id"): _bare(row) for row in rows if row.find("deleted") is not True}
    roots = []
    for row in rows:
        node = nodes.get(row.text("message_id"))
        if node is None:
            continue
        if not row.has("parent_id"):
            roots.append(node)
        elif row.text("parent_id") in nodes:
            nodes[row.text("parent_id")].replies.append(node)
        elif row.text("parent_id") not in known:
            raise RowError("parent_id", "is of no message in the rows around it; sort the file by message_tree_id")
    if not roots and nodes:
        raise RowError("parent_id", "is set in every message of the tree, so that none is the first")
    for root in roots:
        yield from told(root, rows[0].optional("message_tree_id"))


def threads(root: Node, tree: str) -> Iterator[Conversation | Drop]:
    """Every way to an answer that nobody asked on from, the best ranked first. An answer on several ways is learned on the first of them."""
    learned: set[int] = set()
    for path in _paths(root, []):
        answers = [at for at, node in enumerate(path) if node.message["role"] == "assistant"]
        if not answers:
            continue
        path = path[: answers[-1] + 1]
        known = frozenset(at for at in answers if id(path[at]) in learned)
        if len(known) < len(answers):
            learned.update(id(path[at]) for at in answers)
            yield Conversation(tuple(node.message for node in path), read_only=known, group=tree)
    if not learned:
        yield Drop("a tree without answers")


def _paths(node: Node, before: list[Node]) -> Iterator[list[Node]]:
    path = [*before, node]
    if not node.replies:
        yield path
    for reply in sorted(node.replies, key=lambda reply: reply.rank or 0):
        yield from _paths(reply, path)


def pairs(root: Node, tree: str) -> Iterator[Conversation | Drop]:
    """Of the ranked answers to each thread, every better one with every worse one; rank 0 is the best."""
    found = False
    for prompt, ranked in _ranked(root, ()):
        for at, better in enumerate(ranked):
            for worse in ranked[at + 1 :]:
                if better.rank != worse.rank:
                    found = True
                    yield pair((*prompt, better.message), (*prompt, worse.message), shared=len(prompt), group=tree)
    if not found:
        yield Drop("a tree without answers that are ranked")


def _ranked(node: Node, before: tuple[Message, ...]) -> Iterator[tuple[tuple[Message, ...], list[Node]]]:
    """Each thread that ends with a question, and the answers to it that have a rank, best first."""
    thread = (*before, node.message)
    if node.message["role"] == "user":
        ranked = [reply for reply in node.replies if reply.message["role"] == "assistant" and reply.rank is not None]
        if len(ranked) > MOST_RANKED:
            raise RowError("replies", f"holds more than {MOST_RANKED} ranked answers to one message")
        yield thread, sorted(ranked, key=lambda reply: reply.rank or 0)
    for reply in node.replies:
        yield from _ranked(reply, thread)
