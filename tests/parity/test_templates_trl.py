"""What is trained, found from the rendered text alone, equals TRL's templates with generation markers."""

from __future__ import annotations

import pytest
from trl import chat_template_utils as trl_templates

from phlora.data.dataset import load_rows
from phlora.data.tokenize import IGNORED, tokenize_row
from phlora.testing import LANGUAGES, chatml_tokenizer, phi3_tokenizer

FAMILIES = {
    "phi3": (
        phi3_tokenizer,
        trl_templates.phi3_chat_template,
        trl_templates.phi3_training_chat_template,
    ),
    "phi3_5": (
        phi3_tokenizer,
        trl_templates.phi3_5_chat_template,
        trl_templates.phi3_5_training_chat_template,
    ),
    "qwen2_5": (
        chatml_tokenizer,
        trl_templates.qwen2_5_chat_template,
        trl_templates.qwen2_5_training_chat_template,
    ),
}


def _chat(num_turns, *, with_system):
    texts = [*LANGUAGES.values(), "def f():\n    return 1"]
    chat = [{"role": "system", "content": "Be brief."}] if with_system else []
    for turn in range(num_turns):
        chat.append({"role": "user", "content": texts[turn % 6]})
        chat.append({"role": "assistant", "content": texts[(turn + turn // 2) % 6]})
    return chat


@pytest.mark.parametrize("with_system", [False, True])
@pytest.mark.parametrize("num_turns", range(1, 7))
@pytest.mark.parametrize("family", FAMILIES)
def test_mask_equals_trl(family, num_turns, with_system):
    make, template, training_template = FAMILIES[family]
    tokenizer = make(template)
    chat = _chat(num_turns, with_system=with_system)
    theirs = tokenizer.apply_chat_template(
        chat, chat_template=training_template, return_dict=True, return_assistant_tokens_mask=True
    )
    row = load_rows([{"messages": chat}]).rows[0]
    ours = tokenize_row(row, tokenizer)
    assert ours.input_ids == theirs["input_ids"]
    mask = theirs["assistant_masks"]
    if family == "qwen2_5":
        # TRL's markers also enclose the line break before the answer (part of the generation prompt) and the
        # one after its end token (never generated, since generation stops there). Ours train neither.
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        ids = [None, *ours.input_ids]
        started = [0, *mask]
        mask = [int(keep and started[place] and ids[place] != end) for place, keep in enumerate(mask)]
    assert [int(label != IGNORED) for label in ours.labels] == mask


@pytest.mark.parametrize("family", FAMILIES)
def test_the_training_template_decides_where_it_is_given(family):
    make, template, training_template = FAMILIES[family]
    tokenizer = make(template)
    chat = _chat(4, with_system=True)
    mask = tokenizer.apply_chat_template(
        chat, chat_template=training_template, return_dict=True, return_assistant_tokens_mask=True
    )["assistant_masks"]
    row = load_rows([{"messages": chat}]).rows[0]
    ours = tokenize_row(row, tokenizer, training_template=training_template)
    assert [int(label != IGNORED) for label in ours.labels] == mask
    last = tokenize_row(row, tokenizer, training_template=training_template, train_on="last")
    assert 0 < last.num_trained_tokens < ours.num_trained_tokens
