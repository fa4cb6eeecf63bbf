"""Chat templates: which one a job uses, and the one way in which preparing and serving turn a conversation into tokens."""

import json
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import jinja2

from tunewright_crds.errors import FailureCode, Refusal
from tunewright_trainer.architecture import is_seq2seq
from tunewright_trainer.prepare.conversation import Message

DEFAULT_CHAT_TEMPLATE: Final = (
    "{% if tools %}{{ '<|tools|>\\n' }}{% for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor %}{{ '<|end|>\\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}{{ '<|call|>' + call['function'] | tojson }}{% endfor %}{{ '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)

SEQ2SEQ_CHAT_TEMPLATE: Final = (
    "{% set asked = messages[:-1] if messages[-1]['role'] == 'assistant' else messages %}{{ bos_token }}"
    "{% if tools %}Tools:\n{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}\n{% endif %}"
    "{% for message in asked %}{% if not loop.first %}{{ '\n\n' }}{% endif %}"
    "{% if asked | length > 2 %}{{ message['role'] + ': ' }}{% endif %}{{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}{{ call['function'] | tojson }}{% endfor %}{% endfor %}{{ eos_token }}"
    "{% if messages[-1]['role'] == 'assistant' %}{{ messages[-1]['content'] }}"
    "{% for call in messages[-1]['tool_calls'] or [] %}{{ call['function'] | tojson }}{% endfor %}{{ eos_token }}{% endif %}"
)
"""For encoder-decoders: the bare prompt, as they were trained on, and who says what only where several messages come before the answer. Behind the prompt,
which ends as an encoder's text does, stands the answer."""

RENDER_ERRORS: Final = (jinja2.TemplateError, TypeError, KeyError, ValueError, IndexError)
"""What a template raises at messages that it was not written for."""
ID_BYTES: Final = array("i").itemsize


class Unrenderable(Exception):
    """The template refuses this conversation, as templates do with roles that they have no place for, or leaves a part of it out."""

    def __init__(self, reason: str = "refused by the chat template") -> None:
        super().__init__(reason)
        self.reason = reason


def chat_template(folder: Path, job_template: str = "") -> str:
    """The template of a model in `folder`: the job's, else the model's own, else the plain one for its architecture. Loads no library."""
    if job_template:
        return job_template
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    settings = folder / "tokenizer_config.json"
    own = json.loads(settings.read_text(encoding="utf-8")).get("chat_template") if settings.is_file() else None
    if isinstance(own, list):  # several by name, of which one is for plain conversations
        own = {entry.get("name"): entry.get("template") for entry in own if isinstance(entry, dict)}.get("default")
    if isinstance(own, str) and own:
        return own
    return SEQ2SEQ_CHAT_TEMPLATE if is_seq2seq(folder) else DEFAULT_CHAT_TEMPLATE


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model's folder; no code of the model's own is run."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError, ImportError, TypeError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise Refusal(FailureCode.MODEL_UNSUPPORTED, f"the tokenizer cannot be loaded: {reason}", param="spec.model.uri") from error
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        # Some are published with both.
        backend.no_truncation()
        backend.no_padding()
    return tokenizer


def compiled(template: str) -> Any:
    """The template as transformers compiles it, with its sandbox and functions; once."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template(template)


def render(
    tokenizer: Any, messages: Sequence[Message], template: str, *, generation_prompt: bool, tools: Sequence[Mapping[str, Any]] = ()
) -> str:
    """The text of a conversation; with `generation_prompt` up to where the model goes on as the assistant.

    What `tokenizer.apply_chat_template` gives for messages of plain values, in half the time.
    """
    if not messages:
        raise Unrenderable
    try:
        text: str = compiled(template).render(
            messages=list(messages),
            tools=list(tools) or None,
            documents=None,
            add_generation_prompt=generation_prompt,
            **tokenizer.special_tokens_map,
        )
    except RENDER_ERRORS as error:
        raise Unrenderable from error
    return text


def render_prompt_ids(tokenizer: Any, messages: Sequence[Message], template: str) -> list[int]:
    """Token ids of the prompt that asks the model for the next assistant message. Training rows begin with exactly these."""
    return tokenize(tokenizer, [render(tokenizer, messages, template, generation_prompt=True)])[0]


def tokenize(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of rendered texts. Nothing is added: the template has written every special token."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # without what transformers puts around it, which takes a tenth of the time
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return ids


def as_bytes(ids: Sequence[int]) -> bytes:
    """Ids end to end, `ID_BYTES` each: slices, comparisons and joins of these cost next to nothing."""
    return array("i", ids).tobytes()


def end_of_turn(tokenizer: Any, template: str) -> str:
    """The text with which the template ends an assistant's message, without white space; empty where it writes none."""
    question: Message = {"role": "user", "content": "question"}
    answer: Message = {"role": "assistant", "content": "answer"}
    whole = render(tokenizer, [question, answer], template, generation_prompt=False)
    return whole.rpartition("answer")[2].strip()


def end_of_turn_ids(tokenizer: Any, template: str) -> list[int]:
    """Token ids after which an answer is complete: the end-of-turn marker, which may be several tokens, else the end-of-text token."""
    marker = end_of_turn(tokenizer, template)
    if marker:
        return tokenize(tokenizer, [marker])[0]
    return [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]


def needs_end_of_text(tokenizer: Any, template: str) -> bool:
    """Whether an answer's end is no single special token, so that engines which stop at the end-of-text token only would not stop."""
    marker = end_of_turn_ids(tokenizer, template) if end_of_turn(tokenizer, template) else []
    return tokenizer.eos_token_id is not None and not (len(marker) == 1 and marker[0] in tokenizer.all_special_ids)


def check_template(tokenizer: Any, template: str, *, own: bool) -> None:
    """Refuse a template that cannot render the plainest conversation, or after which no model could learn to stop. `own`: it is the job's."""
    code, param = (FailureCode.CONFIG_INVALID, "spec.model.chatTemplate") if own else (FailureCode.MODEL_UNSUPPORTED, "spec.model.uri")
    try:
        end = end_of_turn_ids(tokenizer, template)
    except Unrenderable as error:
        reason = (str(error.__cause__).splitlines() or [""])[0][:300]
        raise Refusal(code, f"the chat template cannot render a question and its answer: {reason}", param=param) from error
    if not end:
        what = (
            "the chat template writes nothing after an answer and the tokenizer has no end-of-text token, so that no end could be learned"
        )
        raise Refusal(code, what, param=param)
