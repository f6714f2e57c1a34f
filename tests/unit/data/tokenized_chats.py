"""Tokenizers of every family, chats for them, and what is asked of the rows that they become."""

from __future__ import annotations

import random

from tokenizers import AddedToken
from trl.chat_template_utils import phi3_5_training_chat_template, phi3_training_chat_template

from phlora.data.dataset import load_rows
from phlora.data.tokenize import (
    IGNORED,
    tokenize_rows,
)
from phlora.testing import LANGUAGES, chatml_tokenizer, llama2_tokenizer, phi3_tokenizer
from phlora.testing.tokenizers import (
    CHATML,
    LLAMA2,
    PHI3,
    PHI3_SPECIALS,
    REASONING,
    TRIMMED,
)

FAMILIES = {
    "phi3": (phi3_tokenizer, PHI3, "<|end|>", "<|endoftext|>"),
    "phi3_plain": (
        lambda template: phi3_tokenizer(template, rstrip=False),
        PHI3,
        "<|end|>",
        "\n<|endoftext|>",
    ),
    "chatml": (chatml_tokenizer, CHATML, "<|im_end|>", ""),
    "trimmed": (chatml_tokenizer, TRIMMED, "<|im_end|>", ""),
    "reasoning": (chatml_tokenizer, REASONING, "<|im_end|>", ""),
    "llama2": (llama2_tokenizer, LLAMA2, " </s>", ""),
}


PARTS = [
    *LANGUAGES.values(),
    "user",
    "assistant",
    "\n",
    "  ",
    "Paris",
    "[INST]",
    "</think>",
    "{}",
    "x",
    "<|",
    "end",
    "\ue0f00",
    "👩‍👩‍👧",
]


def tokenizer_of(family):
    make, template, *_ = FAMILIES[family]
    return make(template)


def user(content, **keys):
    return {"role": "user", "content": content, **keys}


def assistant(content, **keys):
    return {"role": "assistant", "content": content, **keys}


def system(content):
    return {"role": "system", "content": content}


def row_of(*messages, **columns):
    return load_rows([{"messages": list(messages), **columns}]).rows[0]


def tokenized(tokenizer, *messages, tools=None, **options):
    columns = {"tools": tools} if tools else {}
    return tokenize_rows([row_of(*messages, **columns)], tokenizer, on_bad="collect", **options)


def trained_text(tokenizer, row):
    return tokenizer.decode([label for label in row.labels if label != IGNORED])


def full_text(tokenizer, row):
    return tokenizer.decode(row.input_ids)


def kinds(result):
    return {note.kind for note in result.notes}


def random_chat(seed):
    generator = random.Random(seed)
    messages = [system("Be brief.")] if generator.random() < 0.3 else []
    for _ in range(generator.randint(1, 6)):
        question, answer = ("".join(generator.choices(PARTS, k=generator.randint(1, 4))) for _ in range(2))
        # Equal contents in several turns and roles.
        messages += [user(question), assistant(question if generator.random() < 0.3 else answer)]
    return messages


RECORDS = {
    "messages": lambda text: {"messages": [user(text), assistant(text), user(f"{text}?"), assistant(text)]},
    "system": lambda text: {"messages": [system(text), user(text), assistant(f"{text} <|end|> {text}")]},
    "conversations": lambda text: {
        "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": text}]
    },
    "prompt_completion": lambda text: {"prompt": text, "completion": text},
    "chat_prompt_completion": lambda text: {"prompt": [user(text)], "completion": [assistant(text)]},
    "alpaca": lambda text: {"instruction": text, "input": text, "output": text},
    "qa": lambda text: {"question": text, "answer": text},
    "text": lambda text: {"text": text},
}


def marked_chatml(before, inside, after):
    """ChatML with generation markers around a part of each assistant turn."""
    turn = f"{{{{ {before!r} }}}}{{% generation %}}{{{{ {inside} }}}}{{% endgeneration %}}{{{{ {after!r} }}}}"
    return CHATML.replace(
        "{{ '<|im_start|>'",
        f"{{% if message['role'] == 'assistant' %}}{turn}{{% else %}}{{{{ '<|im_start|>'",
        1,
    ).replace("{% endfor %}", "{% endif %}{% endfor %}")


def phi3_sentencepiece(template):
    """Phi-3's control tokens in a vocabulary like Llama's, as Phi-3-mini has them."""
    tokenizer = llama2_tokenizer(template)
    tokens = [AddedToken(token, rstrip=True, normalized=False) for token in PHI3_SPECIALS]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.eos_token = "<|endoftext|>"
    return tokenizer


HEADER, CONTENT, END = "<|im_start|>assistant\n", "message['content']", "<|im_end|>\n"


TRAINING = {
    "phi3": (phi3_tokenizer, phi3_training_chat_template),
    "phi3_plain": (FAMILIES["phi3_plain"][0], phi3_training_chat_template),
    "phi3_sentencepiece": (phi3_sentencepiece, phi3_training_chat_template),
    "phi3_5": (phi3_tokenizer, phi3_5_training_chat_template),
    "answer_and_end": (chatml_tokenizer, marked_chatml(HEADER, f"{CONTENT} + {END!r}", "")),
    "whole_turn": (chatml_tokenizer, marked_chatml("", f"{HEADER!r} + {CONTENT} + {END!r}", "")),
    "answer_alone": (chatml_tokenizer, marked_chatml(HEADER, CONTENT, END)),
    "end_alone": (
        chatml_tokenizer,
        CHATML.replace("+ '<|im_end|>", "}}{% generation %}{{ '<|im_end|>").replace(
            "{% endfor %}", "{% endgeneration %}{% endfor %}"
        ),
    ),
    "all_turns": (
        phi3_tokenizer,
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}{% generation %}"
        "{{ message['content'] + '<|end|>\n' }}{% endgeneration %}{% endfor %}",
    ),
    "no_turn": (
        chatml_tokenizer,
        CHATML.replace("{% endfor %}", "{% endfor %}{% generation %}{% endgeneration %}"),
    ),
}


def any_chat(generator):
    """Turns of all kinds: empty, with control tokens, with white space around them, with keys of their own."""
    pieces = [*PARTS, *PARTS, "<|end|>", "<|im_end|>", "<|assistant|>", " ", "\n"]
    keys = [{}, {}, {}, {}, {"train": True}, {"train": False}, {"weight": 0.5}, {"weight": 0}]

    def turn(role):
        content = "".join(generator.choices(pieces, k=generator.randint(1, 4)))
        content = generator.choice([content.strip(), content.strip(), content, ""])
        return {"role": role, "content": content, **generator.choice(keys)}

    chat = [system(generator.choice(["", "Be brief."]))] if generator.random() < 0.4 else []
    return chat + [turn(role) for role in ("user", "assistant") * generator.randint(1, 4)]


TOOLS = [{"type": "function", "function": {"name": "lamp", "parameters": {}}}]


TOOL_TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{% for call in message.tool_calls or [] %}{{ '<call>' + call.function | tojson + '</call>' }}"
    "{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def length_of(tokenizer, *messages):
    return len(tokenizer.apply_chat_template(list(messages))["input_ids"])


def plain_row(tokenizer, **record):
    return tokenize_rows(load_rows([record]).rows, tokenizer)
