"""Writes the data of the guide's samples: Python instructions, and a shop's chats in the ShareGPT layout.

    python examples/guide/make_data.py --seed 11 --out examples/guide/data

Every answer is a function of what is asked, so that exact match is a fair score. Python rows ask for one small
function; the answer follows a house style that no request mentions: verb_noun names, annotated arguments, one return.
The shop's desk answers with a case line and one sentence, by rules about how long ago a thing was bought. Training and
held-out rows share words, but no combination of them and no sentence. Names and words are Persian, Hindi, Serbian,
Turkish and Vietnamese too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Of each file, but for the rounding of the shares below.
NUM_TRAIN, NUM_HELD_OUT = 320, 80

Row = dict[str, Any]
Slots = dict[str, Any]

GREETINGS = {
    "Persian": ("سلام", ["شیرین", "آرش", "نرگس", "کاوه", "مینا", "بهرام", "پریسا", "سهراب"]),
    "Hindi": ("नमस्ते", ["मीरा", "अजय", "रवि", "सीता", "नेहा", "किरण", "मोहन", "लता"]),
    "Serbian": ("Здраво", ["Ђорђе", "Љиљана", "Жељко", "Миња", "Шћепан", "Наташа", "Вук", "Јована"]),
    "Turkish": ("Merhaba", ["Şebnem", "Çağla", "Uğur", "Gülşah", "İpek", "Özge", "Yiğit", "Ayşe"]),
    "Vietnamese": ("Xin chào", ["Hương", "Đức", "Thảo", "Nguyệt", "Quân", "Mỹ", "Tuấn", "Ngọc"]),
}
NAMES = [name for _, names in GREETINGS.values() for name in names]

NUMBERS = "age price score weight distance total height year length rating cost depth".split()
RECORDS = {
    "customer": ["name", "city", "phone", "street"],
    "book": ["title", "author", "year", "language"],
    "parcel": ["sender", "weight", "street", "price"],
    "song": ["title", "singer", "length", "year"],
    "room": ["floor", "size", "price", "key"],
    "recipe": ["title", "author", "minutes", "spice"],
}
UNKNOWN = ["unknown", "نامعلوم", "अज्ञात", "nepoznato", "непознато", "bilinmiyor", "không rõ", "none"]
COMPARISONS = {
    "above {n}": ">",
    "below {n}": "<",
    "of at least {n}": ">=",
    "of at most {n}": "<=",
    "other than {n}": "!=",
}
# Operator -> the ways to ask for it.
CHANGES = {
    "+": ["Add {n} to every {noun}", "Raise each {noun} by {n}"],
    "-": ["Take {n} off every {noun}", "Lower each {noun} by {n}"],
    "*": ["Multiply every {noun} by {n}", "Make every {noun} {n} times as large"],
    "/": ["Divide each {noun} by {n}", "Split every {noun} by {n}"],
}
AGGREGATES = {"largest": "max", "smallest": "min"}
WORDS = {"largest": ["largest", "highest"], "smallest": ["smallest", "lowest"]}
SEPARATORS = {
    "a comma": ",",
    "a semicolon": ";",
    "a slash": "/",
    "a dash": "-",
    "a colon": ":",
    "a space": " ",
}
TEXTS = "word line name tag city street colour letter".split()


@dataclass(frozen=True)
class Kind:
    """One kind of row.

    Attributes:
        share: rows of this kind among all rows, before rounding.
        combinations: every combination of slot values.
        row: a combination and a source of chance -> a row.
    """

    share: float
    combinations: list[Slots]
    row: Callable[[Slots, random.Random], Row]


def grid(**slots: Iterable[Any]) -> list[Slots]:
    return [dict(zip(slots, values, strict=True)) for values in itertools.product(*slots.values())]


# ------------------------------------------------------------------------------------------- Python instructions


def plural(noun: str) -> str:
    return noun[:-1] + "ies" if noun.endswith("y") and noun[-2] not in "aeiou" else noun + "s"


def function(name: str, arguments: str, result: str, value: str) -> str:
    return f"def {name}({arguments}) -> {result}:\n    return {value}"


def asked(instruction: str, answer: str, given: str = "") -> Row:
    return {"instruction": instruction, "input": given, "output": answer}


def keep(slots: Slots, random_: random.Random) -> Row:
    noun, nouns = slots["noun"], plural(slots["noun"])
    condition = slots["condition"].format(n=slots["n"])
    wordings = [
        f"Keep the {nouns} {condition}.",
        f"Filter a list of {nouns} for {nouns} {condition}.",
        f"From {nouns}, return those {condition}.",
        f"I need the {nouns} {condition}.",
    ]
    chosen = f"[{noun} for {noun} in {nouns} if {noun} {COMPARISONS[slots['condition']]} {slots['n']}]"
    arguments = f"{nouns}: list[int]"
    return asked(random_.choice(wordings), function(f"keep_{nouns}", arguments, "list[int]", chosen))


def count(slots: Slots, random_: random.Random) -> Row:
    noun, nouns = slots["noun"], plural(slots["noun"])
    condition = slots["condition"].format(n=slots["n"])
    wordings = [
        f"Count the {nouns} {condition}.",
        f"How many {nouns} {condition} are there?",
        f"Give the number of {nouns} {condition}.",
    ]
    value = f"sum({noun} {COMPARISONS[slots['condition']]} {slots['n']} for {noun} in {nouns})"
    return asked(random_.choice(wordings), function(f"count_{nouns}", f"{nouns}: list[int]", "int", value))


def change(slots: Slots, random_: random.Random) -> Row:
    noun, nouns, operator = slots["noun"], plural(slots["noun"]), slots["operator"]
    wording = random_.choice(CHANGES[operator]).format(noun=noun, n=slots["n"])
    value = f"[{noun} {operator} {slots['n']} for {noun} in {nouns}]"
    result = "list[float]" if operator == "/" else "list[int]"
    answer = function(f"change_{nouns}", f"{nouns}: list[int]", result, value)
    return asked(
        random_.choice([f"{wording}.", f"{wording}, please.", f"In a list: {wording.lower()}."]), answer
    )


def aggregate(slots: Slots, random_: random.Random) -> Row:
    noun, nouns, which, n = slots["noun"], plural(slots["noun"]), slots["which"], slots["n"]
    word = random_.choice(WORDS[which])
    wordings = [
        f"Find the {word} {noun}, {n} for an empty list.",
        f"Return the {word} of the {nouns}; without any, {n}.",
    ]
    value = f"{AGGREGATES[which]}({nouns}, default={n})"
    return asked(random_.choice(wordings), function(f"{which}_{noun}", f"{nouns}: list[int]", "int", value))


def look_up(slots: Slots, random_: random.Random) -> Row:
    record, field, default = slots["record"], slots["field"], slots["default"]
    wordings = [
        f'Look up the {field} of a {record}, "{default}" where it is missing.',
        f'Get the {field} from a {record}; if there is none, "{default}".',
        f'Give a {record}\'s {field}, or else "{default}".',
    ]
    answer = function(f"{field}_of", f"{record}: dict", "str", f'{record}.get("{field}", "{default}")')
    return asked(random_.choice(wordings), answer, f"{record}: {', '.join(RECORDS[record])}")


def sort(slots: Slots, random_: random.Random) -> Row:
    record, field, records = slots["record"], slots["field"], plural(slots["record"])
    wordings = [
        f"Sort {records} by {field}, {slots['order']}.",
        f"Order the {records} by their {field}, {slots['order']}.",
        f"I want the {records} in {slots['order']} order of {field}.",
    ]
    reverse = ", reverse=True" if slots["order"] == "descending" else ""
    value = f'sorted({records}, key=lambda {record}: {record}["{field}"]{reverse})'
    answer = function(f"sort_{records}", f"{records}: list[dict]", "list[dict]", value)
    return asked(random_.choice(wordings), answer, f"{record}: {', '.join(RECORDS[record])}")


def join(slots: Slots, random_: random.Random) -> Row:
    nouns = plural(slots["noun"])
    wordings = [
        f"Join {nouns} with {slots['separator']}.",
        f"Put {slots['separator']} between the {nouns}.",
        f"Make one text of the {nouns}, with {slots['separator']} in between.",
    ]
    value = f'"{SEPARATORS[slots["separator"]]}".join({nouns})'
    return asked(random_.choice(wordings), function(f"join_{nouns}", f"{nouns}: list[str]", "str", value))


def greet(slots: Slots, random_: random.Random) -> Row:
    language, name = slots["who"]
    wordings = [
        f"Greet {name} in {language}.",
        f"Say hello to {name} in {language}.",
        f"A {language} hello for {name}.",
    ]
    return asked(
        random_.choice(wordings), function("greet", "", "str", f'"{GREETINGS[language][0]} {name}!"')
    )


def python_kinds() -> list[Kind]:
    fields = [(record, field) for record, names in RECORDS.items() for field in names]
    records = [{"record": record, "field": field} for record, field in fields]
    who = [(language, name) for language, (_, names) in GREETINGS.items() for name in names]
    numbers = [2, 3, 4, 5, 7, 8, 10, 12, 15, 20, 25, 30, 40, 50, 60, 75, 90, 100]
    return [
        Kind(0.2, grid(noun=NUMBERS, condition=COMPARISONS, n=numbers), keep),
        Kind(0.16, grid(noun=NUMBERS, condition=COMPARISONS, n=numbers), count),
        Kind(0.16, grid(noun=NUMBERS, operator=CHANGES, n=numbers[:10]), change),
        Kind(0.12, grid(noun=NUMBERS, which=AGGREGATES, n=[0, 1, 5, 10, 20, 50, 100]), aggregate),
        Kind(0.12, [slots | {"default": default} for slots in records for default in UNKNOWN], look_up),
        Kind(
            0.12,
            [slots | {"order": order} for slots in records for order in ("ascending", "descending")],
            sort,
        ),
        Kind(0.06, grid(noun=TEXTS, separator=SEPARATORS), join),
        Kind(0.06, grid(who=who), greet),
    ]


# ----------------------------------------------------------------------------------------------- the shop's chats

DESK = "You are the desk of a shop. Answer with a case line and one sentence."
ITEMS = "kettle lamp chair radio clock coat bicycle camera carpet kite drum teapot mirror tent".split()
TROUBLES = {
    "unwanted": [
        "is fine, but I do not want it",
        "was a gift that I do not need",
        "does not suit me after all",
    ],
    "broken": ["is broken", "has stopped working", "fell apart"],
    "wrong": ["is not what I ordered", "is the wrong one", "has the wrong colour"],
    "missing": ["has not come", "is still not here", "never arrived"],
}
# Trouble -> (up to so many days, the case until then, the case afterwards).
RULES = {
    "unwanted": (14, "refund", "credit"),
    "broken": (30, "replace", "repair"),
    "wrong": (30, "exchange", "exchange"),
    "missing": (7, "wait", "trace"),
}
SENTENCES = {
    "refund": "We pay the {item} back within 5 days.",
    "credit": "We add the price of the {item} to your account.",
    "replace": "We send you a new {item} tomorrow.",
    "repair": "Send us the {item}, we repair it free of charge.",
    "exchange": "Send us the {item}, we send you the right one.",
    "wait": "The {item} is on its way, please wait until day 7.",
    "trace": "We look for the {item} and write to you tomorrow.",
}
THANKS = ["Thank you!", "متشکرم!", "धन्यवाद!", "Хвала!", "Hvala!", "Teşekkürler!", "Cảm ơn!"]


def case(slots: Slots, mark: str = "") -> str:
    days, until, after = RULES[slots["trouble"]]
    name = until if slots["days"] <= days else after
    line = f"CASE {name} | {slots['item']} | day {slots['days']} | {slots['name']}{mark}"
    return f"{line}\n{SENTENCES[name].format(item=slots['item'])}"


def conversation(slots: Slots, request: str, *more: str) -> Row:
    said = [DESK, request, case(slots), *more]
    speakers = ["system", *(["human", "gpt"] * len(said))]
    turns = [{"from": speaker, "value": text} for speaker, text in zip(speakers, said, strict=False)]
    return {"conversations": turns}


def request_of(slots: Slots, random_: random.Random) -> str:
    trouble = random_.choice(TROUBLES[slots["trouble"]])
    name, item, days = slots["name"], slots["item"], slots["days"]
    return random_.choice(
        [
            f"Hello, I am {name}. The {item} that I bought {days} days ago {trouble}.",
            f"I bought a {item} {days} days ago. It {trouble}. My name is {name}.",
            f"My {item} {trouble}. That was {days} days ago. {name}",
            f"This is {name}: the {item} {trouble}. I ordered it {days} days ago.",
        ]
    )


def first_answer(slots: Slots, random_: random.Random) -> Row:
    return conversation(slots, request_of(slots, random_))


def urgent(slots: Slots, random_: random.Random) -> Row:
    wish = random_.choice(["It is urgent.", "Please hurry.", "Can this be done today?"])
    return conversation(slots, request_of(slots, random_), wish, case(slots, mark=" | urgent"))


def other_day(slots: Slots, random_: random.Random) -> Row:
    meant = slots | {"days": random_.choice([day for day in DAYS if day != slots["days"]])}
    days = meant["days"]
    wish = random_.choice(
        [f"Sorry, it was {days} days ago.", f"No, {days} days ago.", f"I mean {days} days."]
    )
    return conversation(slots, request_of(slots, random_), wish, case(meant))


def other_item(slots: Slots, random_: random.Random) -> Row:
    meant = slots | {"item": random_.choice([item for item in ITEMS if item != slots["item"]])}
    item = meant["item"]
    wish = random_.choice([f"Sorry, I meant the {item}.", f"No, the {item}.", f"It is the {item}, not that."])
    return conversation(slots, request_of(slots, random_), wish, case(meant))


def thanks(slots: Slots, random_: random.Random) -> Row:
    closed = f"CLOSED | {slots['item']} | {slots['name']}\nYou are welcome."
    return conversation(slots, request_of(slots, random_), random_.choice(THANKS), closed)


DAYS = [2, 3, 5, 6, 8, 9, 10, 12, 16, 18, 20, 25, 28, 33, 35, 40, 45, 50, 60]


def desk_kinds() -> list[Kind]:
    chats = grid(name=NAMES, item=ITEMS, trouble=TROUBLES, days=DAYS)
    parts = {first_answer: 0.4, urgent: 0.15, other_day: 0.15, other_item: 0.15, thanks: 0.15}
    return [
        Kind(share, chats[number :: len(parts)], row) for number, (row, share) in enumerate(parts.items())
    ]


# --------------------------------------------------------------------------------------------------- both sides


def asked_of(row: Row) -> str:
    """What a row asks, by which rows are told apart."""
    return str(row["instruction"] if "instruction" in row else row["conversations"][1]["value"])


def rows_of(
    kind: Kind, combinations: list[Slots], number: int, seen: set[str], random_: random.Random
) -> list[Row]:
    """`number` rows, each combination as often as any other, nothing asked twice."""
    rows: list[Row] = []
    for attempt in range(200 * number):
        if len(rows) == number:
            break
        row = kind.row(combinations[attempt % len(combinations)], random_)
        if asked_of(row) not in seen:
            seen.add(asked_of(row))
            rows.append(row)
    return rows


def split(combinations: list[Slots], random_: random.Random) -> tuple[list[Slots], list[Slots]]:
    shuffled = random_.sample(combinations, len(combinations))
    num_held_out = max(1, round(0.2 * len(shuffled)))
    return shuffled[num_held_out:], shuffled[:num_held_out]


def build(kinds: list[Kind], seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on and held-out rows, each shuffled."""
    random_, seen = random.Random(seed), set[str]()
    train: list[Row] = []
    held_out: list[Row] = []
    for kind in kinds:
        for rows, combinations, total in zip(
            (train, held_out), split(kind.combinations, random_), (NUM_TRAIN, NUM_HELD_OUT), strict=True
        ):
            rows += rows_of(kind, combinations, round(kind.share * total), seen, random_)
    random_.shuffle(train)
    random_.shuffle(held_out)
    return train, held_out


def files(seed: int) -> dict[str, list[Row]]:
    """The name of each file and its rows."""
    python, desk = build(python_kinds(), seed), build(desk_kinds(), seed)
    return {
        "python_train.jsonl": python[0],
        "python_heldout.jsonl": python[1],
        "sharegpt_train.jsonl": desk[0],
        "sharegpt_heldout.jsonl": desk[1],
    }


def write(rows: list[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    options = parser.parse_args()
    for name, rows in files(options.seed).items():
        write(rows, options.out / name)
        print(f"{options.out / name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
