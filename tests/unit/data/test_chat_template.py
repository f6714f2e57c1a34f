"""Joined literals and contents are what the template renders; templates that look into contents are rendered."""

from __future__ import annotations

import random

import pytest
from template_texts import ASKS_FOR_TOOLS, DEFAULT_SYSTEM, OPEN_END, SKIPS_EMPTY

from phlora.data.chat_template import ChatTemplate
from phlora.data.rendering import TemplateRefusal
from phlora.testing import LANGUAGES, chatml_tokenizer, llama2_tokenizer, phi3_tokenizer
from phlora.testing.tokenizers import CHATML, LLAMA2, PHI3, PHI3_WITHOUT_SYSTEM, REASONING, TRIMMED

TEMPLATES = {
    "phi3": (phi3_tokenizer, PHI3),
    "phi3_without_system": (phi3_tokenizer, PHI3_WITHOUT_SYSTEM),
    "chatml": (chatml_tokenizer, CHATML),
    "default_system": (chatml_tokenizer, DEFAULT_SYSTEM),
    "skips_empty": (chatml_tokenizer, SKIPS_EMPTY),
    "asks_for_tools": (chatml_tokenizer, ASKS_FOR_TOOLS),
    "open_end": (chatml_tokenizer, OPEN_END),
    "no_end": (chatml_tokenizer, CHATML.replace("<|im_end|>", "")),
    "twice": (chatml_tokenizer, CHATML.replace("message['content']", "message.content + message.content")),
    "trimmed": (chatml_tokenizer, TRIMMED),
    "reasoning": (chatml_tokenizer, REASONING),
    "llama2": (llama2_tokenizer, LLAMA2),
}
PARTS = [
    *LANGUAGES.values(),
    "user",
    "\n",
    "  ",
    "<|end|>",
    "</think>",
    "<|im_end|>",
    "\ue0f00\ue0f1",
    "👩‍👩‍👧",
    "",
]


def _chats(num_chats):
    generator = random.Random(0)
    for _ in range(num_chats):
        roles = ["system"] * (generator.random() < 0.3) + ["user", "assistant"] * generator.randint(1, 4)
        yield [
            {"role": role, "content": "".join(generator.choices(PARTS, k=generator.choice((1, 1, 2, 3))))}
            for role in roles
        ]


def _outcome(render, messages, generation):
    try:
        return render(messages, None, generation)
    except TemplateRefusal as refusal:
        return str(refusal)


@pytest.mark.parametrize("name", TEMPLATES)
def test_chats_are_rendered_as_the_template_renders_them(name):
    make, text = TEMPLATES[name]
    tokenizer = make(text)
    fast, oracle = ChatTemplate(tokenizer), ChatTemplate(tokenizer)
    for generation in (False, True):
        for messages in _chats(150):
            expected = _outcome(oracle._render_really, messages, generation)
            assert _outcome(fast._render, messages, generation) == expected


def test_known_shapes_are_not_rendered_again(monkeypatch):
    template = ChatTemplate(phi3_tokenizer())
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    template.render(chat)
    monkeypatch.setattr(template, "_apply", None)
    rendering = template.render([{**message, "content": LANGUAGES["hi"]} for message in chat])
    assert rendering.text.count(LANGUAGES["hi"]) == 2


@pytest.mark.parametrize("name", ["phi3", "skips_empty"])
def test_an_empty_system_prompt_costs_no_rendering_either(name, monkeypatch):
    make, text = TEMPLATES[name]
    template = ChatTemplate(make(text))
    chat = [{"role": role, "content": role[1:]} for role in ("system", "user", "assistant")]
    chat[0]["content"] = ""
    expected = template.render(chat)
    assert expected.spans[0] is None
    monkeypatch.setattr(template, "_apply", None)
    assert template.render(chat) == expected


def test_an_empty_turn_that_is_left_out_does_not_slow_down_the_others(monkeypatch):
    template = ChatTemplate(chatml_tokenizer(SKIPS_EMPTY))
    roles = ("user", "assistant") * 2
    full = [{"role": role, "content": "a"} for role in roles]
    expected = template.render(full)
    assert template.render([full[0], {**full[1], "content": ""}, *full[2:]]).text.count("assistant") == 1
    monkeypatch.setattr(template, "_apply", None)
    assert template.render(full) == expected


def test_a_template_that_is_not_what_its_syntax_shows_is_rendered_from_then_on(monkeypatch):
    template = ChatTemplate(phi3_tokenizer())
    render = ChatTemplate._apply
    monkeypatch.setattr(
        ChatTemplate, "_apply", lambda self, chat, *rest: render(self, chat, *rest).replace("secret", "")
    )
    chat = [{"role": "user", "content": "secret x"}, {"role": "assistant", "content": "b"}]
    assert "secret" not in template.render(chat).text
    assert "secret" not in template.render(chat).text
