"""Message trees of OpenAssistant, whole or as flat messages: every way from the first prompt to a last answer is a conversation."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from tunewright_trainer.prepare.chat import ROLES
from tunewright_trainer.prepare.conversation import Conversation, Drop, Message, RowError
from tunewright_trainer.prepare.fields import Fields, within
from tunewright_trainer.prepare.rows import Row

MOST_MESSAGES: Final = 10_000  # of one tree; theirs have a few dozen


@dataclass
class Node:
    """A message with its replies."""

    message: Message
    rank: float
    replies: list["Node"] = field(default_factory=list)


def whole_tree(fields: Fields) -> Iterator[Conversation | Drop]:
    """A row that holds a tree: {message_tree_id, prompt: {role, text, replies: [...]}}."""
    root = within(fields.get("prompt"), fields.name("prompt"))
    yield from threads(_node(root, left=[MOST_MESSAGES]), fields.optional("message_tree_id", "message_id"))


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
    return Node({"role": role, "content": entry.text("text")}, float(rank) if isinstance(rank, int | float) else 0.0)


def flat_tree(messages: Iterable[Row]) -> Iterator[Conversation | Drop]:
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
        yield from threads(root, rows[0].optional("message_tree_id"))


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
    for reply in sorted(node.replies, key=lambda reply: reply.rank):
        yield from _paths(reply, path)
