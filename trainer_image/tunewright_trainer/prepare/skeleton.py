"""What a chat template writes around the contents of messages, so that it need not be run for every conversation.

The template is run once for each sequence of roles, with marks in place of the contents. A mark can be written out, joined to other text and trimmed;
whatever else a template does with it is noticed. Where it does nothing else, it writes the same around any contents.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from jinja2 import nodes

from tunewright_trainer.prepare.template import RENDER_ERRORS, compiled

_MOST: Final = 1024  # sequences of roles that are remembered; conversations of a hundred messages have no two alike
_SIGN: Final = "\0"
_MARK: Final = re.compile(f"{_SIGN}([0-9]+){_SIGN}")

# Parts of templates that hand a mark on as it is, or notice that they cannot.
_NODES: Final = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.Const, nodes.Name, nodes.NSRef, nodes.Getattr, nodes.Getitem, nodes.Slice),
    *(
        nodes.For,
        nodes.If,
        nodes.CondExpr,
        nodes.Compare,
        nodes.Operand,
        nodes.And,
        nodes.Or,
        nodes.Not,
        nodes.Add,
        nodes.Sub,
        nodes.Assign,
    ),
    *(
        nodes.List,
        nodes.Tuple,
        nodes.Dict,
        nodes.Pair,
        nodes.Keyword,
        nodes.Break,
        nodes.Continue,
        nodes.Mod,
        nodes.Call,
        nodes.Filter,
        nodes.Test,
    ),
)
_FILTERS: Final = frozenset({"trim", "tojson", "length", "count", "first", "last", "default"})
_TESTS: Final = frozenset(
    {"defined", "undefined", "none", "string", "mapping", "iterable", "sequence", "number", "boolean", "true", "false"}
)
_FUNCTIONS: Final = frozenset({"raise_exception", "namespace", "range"})


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A rendered conversation without its contents: what stands before, between and behind them."""

    around: Sequence[str]
    """[contents + 1]"""
    order: Sequence[int]
    """[contents]: the numbers of the messages whose contents they are."""

    def filled(self, contents: Sequence[str]) -> str:
        """The text with the contents of each message."""
        pieces = [self.around[0]]
        for number, behind in zip(self.order, self.around[1:], strict=True):
            pieces += (contents[number], behind)
        return "".join(pieces)

    def length(self, contents: Sequence[str]) -> int:
        """How long the text is."""
        return sum(map(len, self.around)) + sum(len(contents[number]) for number in self.order)

    def begins(self, other: "Skeleton") -> bool:
        """Whether other texts begin with those of this, if they have the same contents."""
        count = len(self.order)
        return (
            other.order[:count] == self.order
            and other.around[:count] == self.around[:count]
            and other.around[count].startswith(self.around[count])
        )


class Skeletons:
    """Of one template. They hold for contents that `fits` accepts."""

    def __init__(self, tokenizer: Any, template: str) -> None:
        self._special = dict(tokenizer.special_tokens_map)
        self._template = None
        environment = compiled(template).environment.overlay()
        tree = environment.parse(template)
        self._trims = any(one.name == "trim" for one in tree.find_all(nodes.Filter))
        if _SIGN not in template and all(map(_is_plain, tree.find_all(nodes.Node))):
            trim, is_string = environment.filters["trim"], environment.tests["string"]
            environment.filters = {
                **environment.filters,
                "trim": lambda value: value.trimmed() if isinstance(value, _Mark) else trim(value),
            }
            environment.tests = {**environment.tests, "string": lambda value: isinstance(value, _Mark) or is_string(value)}
            self._template = environment.from_string(template)
        self._known: dict[tuple[Sequence[str], bool], Skeleton | None] = {}

    def fits(self, contents: Sequence[str]) -> bool:
        """Whether each says something, and would be left as it is by trimming, if the template trims."""
        return all(contents) and not (self._trims and any(text[0].isspace() or text[-1].isspace() for text in contents))

    def of(self, roles: Sequence[str], *, generation_prompt: bool) -> Skeleton | None:
        """The skeleton of messages with these roles; None where what is around the contents may depend on them."""
        key = (roles, generation_prompt)
        if key not in self._known:
            if len(self._known) >= _MOST:
                return None
            self._known[key] = self._made(roles, generation_prompt)
        return self._known[key]

    def _made(self, roles: Sequence[str], generation_prompt: bool) -> Skeleton | None:
        if self._template is None:
            return None
        looked: list[bool] = []
        messages = [{"role": role, "content": _Mark(f"{_SIGN}{number}{_SIGN}", looked)} for number, role in enumerate(roles)]
        try:
            text = self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=generation_prompt, **self._special
            )
        except (*RENDER_ERRORS, AttributeError):
            return None
        if looked:
            return None
        parts = _MARK.split(text)
        return Skeleton(tuple(parts[::2]), tuple(map(int, parts[1::2])))


class _Mark:
    """Stands for a text of which nothing is known but that it is not empty."""

    def __init__(self, text: str, looked: list[bool]) -> None:
        self._text = text
        self._looked = looked

    def __str__(self) -> str:
        return self._text

    def __add__(self, other: Any) -> "_Mark":
        return _Mark(self._text + str(other), self._looked) if isinstance(other, str | _Mark) else NotImplemented

    def __radd__(self, other: Any) -> "_Mark":
        return _Mark(other + self._text, self._looked) if isinstance(other, str) else NotImplemented

    def __bool__(self) -> bool:
        return True

    def trimmed(self) -> "_Mark":
        """As trimming leaves a text whose marks stand for trimmed ones."""
        return _Mark(self._text.strip(), self._looked)

    def _is_looked_at(self, *_: object) -> Any:
        self._looked.append(True)
        raise TypeError

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):
            self._looked.append(True)
        raise AttributeError(name)

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = _is_looked_at
    __len__ = __iter__ = __getitem__ = __contains__ = __call__ = __mod__ = __rmod__ = __mul__ = __rmul__ = __format__ = _is_looked_at


def _is_plain(node: nodes.Node) -> bool:
    """Whether a part of a template can do nothing with a mark without its being noticed."""
    match node:
        case nodes.Filter():
            return node.name in _FILTERS and not (node.name == "trim" and (node.args or node.kwargs))
        case nodes.Test():
            return node.name in _TESTS
        case nodes.Call():
            called = node.node
            return (
                called.attr == "get" if isinstance(called, nodes.Getattr) else isinstance(called, nodes.Name) and called.name in _FUNCTIONS
            )
        case nodes.Mod():
            return isinstance(node.right, nodes.Const) and isinstance(node.right.value, int)
    return isinstance(node, _NODES)
