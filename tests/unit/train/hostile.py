"""Configurations and command lines with one or two hostile values in them, from a seed."""

from __future__ import annotations

import copy
import dataclasses
import random
from typing import Any

import trl
from peft import LoraConfig

HOSTILE: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 10**18, -(10**18), 10**400, 0.5, 1.5, -0.5, 1e308, 1e-308, 5e-324),
    *(
        float("nan"),
        float("inf"),
        -float("inf"),
        "",
        " ",
        "x",
        "no",
        "none",
        "auto",
        "1e18",
        "nan",
        "inf",
        "-1",
    ),
    *(
        "2e-4",
        "0x10",
        "1_000",
        "١٢",
        "ａ",
        "\u202eabc",
        "\ud800",
        "é\x00",
        "a" * 5000,
        "{}",
        '{"a": 1}',
        "[1]",
        "../x",
    ),
    *([], [1], ["a"], [None], [[]], {}, {"a": 1}, {"": None}, {1: 2}, {"type": "nf4"}, {"name": None}),
    *((1, 2), b"bytes", 1 + 2j, object, {1, 2}, range(3)),
]
WORDS = [
    *("train", "--", "-", "--set", "--set=", "=", "a=b", "model=", "model.name=", "peft_config=5"),
    *("data.files=[[", "x.y.z=1", "training_config.max_steps=1e18", "training_config.eval_strategy=no"),
    *("training_config={a: b}", "output=", "--data", "training_config.learning_rate=.nan"),
    *("peft_config.r=!!python/object:os.system x", "speed=*a", "data.eval_size=.inf", "--model"),
    *("--eval-data", "--output", "--quantization", "nf4", "int8", "--resume", "--overwrite", "--json"),
    *("--quiet", "evaluation.metrics=[regex:(]", "evaluation.metrics=[5]", "data.train_on=last"),
    *("model.device=cuda:99", "\xe9\x00", "\ud800", "\u202e", "", " ", "../..", "/dev/null", "*", "{}"),
    *("-1", "1e999", "no", "--dry-run=5", "--nonsense"),
    "a" * 5000,
]


def names(cls: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(cls) if field.init]


KEYS = {
    "training_config": [*names(trl.SFTConfig), "z_loss", "max_seq_length", "warmup_ratio", "group_by_length"],
    "peft_config": [*names(LoraConfig), "loraplus_lr_ratio"],
    "model": "name revision dtype attn_implementation use_cache device quantization offline".split(),
    "data": "files eval eval_size format train_on too_long cache group_by stratify_by".split(),
    "evaluation": "metrics max_new_tokens max_answers enabled".split(),
    "": "model data training_config peft_config evaluation output speed origins nonsense".split(),
}


def mutated(base: dict[str, Any], seed: int) -> tuple[dict[str, Any], str]:
    """A configuration with one to three values exchanged, and in words which."""
    draw, values, said = random.Random(seed), copy.deepcopy(base), []
    for _ in range(draw.choice((1, 1, 2, 3))):
        section = draw.choices(list(KEYS), weights=[6, 3, 2, 2, 1, 1])[0]
        key, value = draw.choice(KEYS[section]), draw.choice(HOSTILE)
        if section == "":
            values[key] = value
        elif isinstance(values.get(section), dict):
            values[section][key] = value
        said.append(f"{section}.{key}={value!r:.60}")
    return values, ", ".join(said)


def mutated_line(base: list[str], seed: int) -> list[str]:
    """A command line with one to three words left out, doubled, exchanged or added."""
    draw, words = random.Random(seed), list(base)
    for _ in range(draw.choice((1, 1, 2, 3))):
        at, word = draw.randrange(1, len(words) + 1), draw.choice(WORDS)
        kind = draw.choice(("drop", "double", "exchange", "add", "set", "set"))
        if kind == "set":
            words += ["--set", word]
        elif kind == "add" or at == len(words):
            words.insert(at, word)
        elif kind == "double":
            words.insert(at, words[at])
        elif kind == "exchange":
            words[at] = word
        else:
            del words[at]
    return words


def mutated_text(base: str, seed: int) -> str:
    """A configuration file with a few characters or lines of it changed."""
    draw, text = random.Random(seed), base
    for _ in range(draw.choice((1, 2, 4))):
        at = draw.randrange(len(text) + 1)
        text = (
            text[:at]
            + draw.choice([*"{}[]:,#&*!|>'\"%@\n\t -0", "\u202e", "٣", "~", "null", "1e400", "<<: "])
            + text[at + draw.choice((0, 1, 5)) :]
        )
    return text
