"""Filling in a template's skeleton, and rendering it, give what transformers' own `apply_chat_template` does; templates that look at contents have none."""

from itertools import pairwise
from typing import Any

import pytest

from tests.support.models import CHAT_TEMPLATE, byte_tokenizer
from tunewright_trainer.prepare.skeleton import Skeletons
from tunewright_trainer.prepare.template import DEFAULT_CHAT_TEMPLATE, Unrenderable, render

TOKENIZER = byte_tokenizer()
LOOP = "{%% for m in messages %%}[{{ m['role'] }}]{{ %s }}\n{%% endfor %%}{%% if add_generation_prompt %%}[assistant]{%% endif %%}"

TEMPLATES = {
    "ChatML": CHAT_TEMPLATE,
    "ours": DEFAULT_CHAT_TEMPLATE,
    "Llama 3": (
        "{{- bos_token }}{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}"
        "{%- else %}{%- set system = '' %}{%- endif %}{{- '<|system|>' + system + '<|eot|>' }}"
        "{%- for message in messages %}{%- if not (message.role == 'ipython' or 'tool_calls' in message) %}"
        "{{- '<|' + message['role'] + '|>\n\n' + message['content'] | trim + '<|eot|>' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|assistant|>\n\n' }}{%- endif %}"
    ),
    "Gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
        "{% if m['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = m['role'] %}{% endif %}"
        "{{ '<start>' + role + '\n' + m['content'] | trim + '<end>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start>model\n' }}{% endif %}"
    ),
    "Qwen 2.5": (
        "{%- if tools %}{{- tools | tojson }}{%- else %}{%- if messages[0]['role'] == 'system' %}{{- '<s>' + messages[0]['content'] + '<e>' }}"
        "{%- else %}{{- '<s>You are Qwen.<e>' }}{%- endif %}{%- endif %}"
        "{%- for message in messages %}{%- if (message.role == 'user') or (message.role == 'system' and not loop.first)"
        " or (message.role == 'assistant' and not message.tool_calls) %}{{- '<' + message.role + '>' + message.content + '<e>' + '\n' }}"
        "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<assistant>' }}{%- endif %}"
    ),
    "Llama 2's way with system messages, in namespaces": (
        "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}{% set ns.system = '<<' + m.content + '>>' %}"
        "{% elif m.role == 'user' %}{{ bos_token + '[INST] ' + ns.system + m.content + ' [/INST]' }}{% set ns.system = '' %}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    ),
    "contents that are texts and not empty": LOOP % "m.content if m.content is string and m.content is not none and m.content else ''",
    "what is got": LOOP % "m.get('content', 'none') | default('none')",
}
TALKS = [
    ["user", "assistant"],
    ["system", "user", "assistant"],
    ["user", "assistant", "user", "assistant"],
    ["system", "user", "assistant", "user", "assistant"],
]
CONTENTS = ["Who?", "a  b\n\nc", "<|im_end|>", "{{ x }}", "é\u2028犬", "[user]", "\\0", "0"]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_skeleton_is_filled_as_the_template_would_write(template: str) -> None:
    skeletons = Skeletons(TOKENIZER, template)
    filled = 0
    for roles in TALKS:
        for first in range(len(CONTENTS)):
            contents = [CONTENTS[(first + number) % len(CONTENTS)] for number in range(len(roles))]
            assert skeletons.fits(contents)
            talk = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
            found = []
            for count in range(1, len(roles) + 1):
                skeleton = skeletons.of(tuple(roles[:count]), generation_prompt=count < len(roles))
                if skeleton is None:
                    with pytest.raises(Unrenderable):
                        render(TOKENIZER, talk[:count], template, generation_prompt=count < len(roles))
                    continue
                text = TOKENIZER.apply_chat_template(
                    talk[:count], chat_template=template, tokenize=False, add_generation_prompt=count < len(roles)
                )
                assert skeleton.filled(contents) == render(TOKENIZER, talk[:count], template, generation_prompt=count < len(roles)) == text
                assert skeleton.length(contents) == len(text)
                found.append((skeleton, text))
                filled += 1
            for (one, begins), (other, text) in pairwise(found):
                assert not one.begins(other) or text.startswith(begins)
    assert filled > 40


LOOKS = {
    "compared": "'x' if m.content == 'x' else m.content",
    "in a list": "'x' if m.content in ['x'] else m.content",
    "in a text": "'x' if m.content in 'Who? What?' else m.content",
    "searched": "'x' if '0' in m.content else m.content",
    "measured": "m.content | length",
    "a list of characters": "m.content[0]",
    "shortened": "m.content[1:]",
    "upper case": "m.content | upper",
    "upper case once it is joined": "('a' + m.content) | upper",
    "upper case once it is trimmed": "m.content | trim | upper",
    "compared once it is trimmed": "'x' if m.content | trim == 'x' else m.content",
    "trimmed of characters": "m.content | trim('W')",
    "split": "m.content.split('?')[0]",
    "asked for a method": "'x' if m.content.split is defined else m.content",
    "iterable": "'x' if m.content is iterable else m.content",
    "a sequence": "'x' if m.content is sequence else m.content",
    "as JSON": "m.content | tojson",
    "the message as JSON": "m | tojson",
    "joined by ~": "(m.content ~ 'x').upper()",
    "formatted": "('%s' % m.content).upper()",
    "formatted by a method": "'{}'.format(m.content).upper()",
    "a key": "{m.content: 1}['Who?'] | default('none')",
    "repeated": "m.content * 2",
    "a clock": "m.content + strftime_now('%H')",
    "a block": "'' }}{% set all %}{{ m.content }}{% endset %}{{ all | upper",
    "a macro": "'' }}{% macro say(x) %}{{ x }}{% endmacro %}{{ say(m.content) | upper",
    "a loop": "'' }}{% for c in m.content %}{{ c + '.' }}{% endfor %}{{ ''",
    "first characters": "m.content | first",
    "last characters": "m.content | last",
    "sorted": "'' }}{% for one in messages | sort(attribute='content') %}{{ one.content }}{% endfor %}{{ ''",
    "compared with other messages": "'x' if m == {'role': m.role, 'content': 'Who?'} else 'y'",
}


@pytest.mark.parametrize("expression", LOOKS.values(), ids=LOOKS)
def test_a_template_that_looks_at_contents_has_no_skeleton(expression: str) -> None:
    template = LOOP.replace("%s", expression).replace("%%", "%")
    assert render(TOKENIZER, [{"role": "user", "content": "Who?"}], template, generation_prompt=False)
    assert Skeletons(TOKENIZER, template).of(("user", "assistant"), generation_prompt=False) is None


@pytest.mark.parametrize(("contents", "fit"), {("a", "b"): True, ("a", ""): False, ("a ", "b"): False, ("a", "\nb"): False}.items())
def test_contents_that_trimming_would_change_are_not_filled_in(contents: tuple[str, ...], *, fit: bool) -> None:
    assert Skeletons(TOKENIZER, LOOP % "m.content | trim").fits(contents) is fit
    assert Skeletons(TOKENIZER, LOOP % "m.content").fits(contents) is all(contents)


def test_tools_are_rendered_as_transformers_does() -> None:
    tools: list[dict[str, Any]] = [{"type": "function", "function": {"name": "wetter", "description": "für <b>alle</b>", "parameters": {}}}]
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "wetter", "arguments": {"a": [1, None]}}}],
    }
    talk: list[dict[str, Any]] = [{"role": "user", "content": "?"}, call, {"role": "tool", "content": "12", "name": "wetter"}]
    expected = TOKENIZER.apply_chat_template(
        talk, chat_template=DEFAULT_CHAT_TEMPLATE, tokenize=False, tools=tools, add_generation_prompt=True
    )
    assert render(TOKENIZER, talk, DEFAULT_CHAT_TEMPLATE, generation_prompt=True, tools=tools) == expected
