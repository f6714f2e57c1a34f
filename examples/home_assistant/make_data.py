"""Writes the demo's chats: requests to a home assistant and the JSON tool call that each of them means.

    python examples/home_assistant/make_data.py --seed 7 --out examples/home_assistant

Every answer is a function of the request, so exact match is a fair score. A request is a combination of slots
(tool, room, value) put into words. Training and held-out rows share the words but no combination and no sentence:
what is measured is whether the rule was learned, not whether rows were memorised.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

NUM_TRAIN, NUM_HELD_OUT = 600, 100

SYSTEM = """\
You run a smart home. Turn each request into one line of JSON:
{"tool":"light","room":R,"state":"on" or "off"}
{"tool":"dim","room":R,"percent":N}
{"tool":"heat","room":R,"celsius":N}
{"tool":"blinds","room":R,"state":"open" or "closed"}
{"tool":"play","room":R,"what":W}
{"tool":"timer","minutes":N,"label":L}
{"tool":"shop","item":I,"count":N}
{"tool":"lock","door":D}
Ask "Which room?" if the room is missing. Never unlock a door. Say so when a request is not about the home."""

ROOMS = [
    "kitchen",
    "living room",
    "bedroom",
    "bathroom",
    "hallway",
    "office",
    "garage",
    "nursery",
    "dining room",
]
ROOMS += ["attic", "basement", "guest room"]
DOORS = [
    "front door",
    "back door",
    "garage door",
    "garden gate",
    "cellar door",
    "balcony door",
    "side door",
    "shed door",
]
DOORS += ["main gate", "cabin door"]
MUSIC = [
    "jazz",
    "the news",
    "classical music",
    "rock",
    "rain sounds",
    "lullabies",
    "reggae",
    "a podcast",
    "pop hits",
]
MUSIC += ["an audiobook", "blues", "folk songs"]
LABELS = ["pasta", "eggs", "tea", "laundry", "pizza", "bread", "rice", "homework", "nap", "cake"]
ITEMS = [
    "apples",
    "eggs",
    "onions",
    "lemons",
    "batteries",
    "light bulbs",
    "carrots",
    "yoghurts",
    "bananas",
    "tomatoes",
]
ITEMS += ["candles", "oranges", "potatoes", "bagels", "pears", "sponges"]
WORDS = {
    2: "two",
    3: "three",
    4: "four",
    5: "five",
    6: "six",
    7: "seven",
    8: "eight",
    9: "nine",
    10: "ten",
    12: "twelve",
}

NOT_HOME = "I can only help with things in the home."
WHICH_ROOM = "Which room?"


@dataclass(frozen=True)
class Intent:
    """One kind of request.

    Attributes:
        share: rows of this kind among all rows, before rounding.
        combinations: every combination of slot values.
        wordings: format strings over the slots.
        answer: what the assistant says for a combination.
    """

    share: float
    combinations: list[dict[str, object]]
    wordings: list[str]
    answer: Callable[[dict[str, object]], str]


def call(tool: str, *slots: str) -> Callable[[dict[str, object]], str]:
    """An answer that is a compact JSON call with the given slots, in that order."""

    def answer(values: dict[str, object]) -> str:
        return json.dumps({"tool": tool, **{slot: values[slot] for slot in slots}}, separators=(",", ":"))

    return answer


def grid(**slots: Iterable[object]) -> list[dict[str, object]]:
    return [dict(zip(slots, values, strict=True)) for values in itertools.product(*slots.values())]


def intents() -> list[Intent]:
    return [
        Intent(
            0.14,
            grid(room=ROOMS, state=["on", "off"]),
            [
                "Turn {state} the light in the {room}.",
                "Turn the {room} light {state}.",
                "Switch the light in the {room} {state}.",
                "Lights {state} in the {room}, please.",
                "Could you switch {state} the {room} lights?",
                "I want the {room} light {state}.",
            ],
            call("light", "room", "state"),
        ),
        Intent(
            0.13,
            grid(room=ROOMS, percent=range(10, 100, 10)),
            [
                "Dim the {room} to {percent} percent.",
                "Set the {room} light to {percent}%.",
                "Bring the lights in the {room} down to {percent} percent.",
                "Please dim the light in the {room} to {percent}%.",
                "{percent} percent light in the {room}, please.",
            ],
            call("dim", "room", "percent"),
        ),
        Intent(
            0.14,
            grid(room=ROOMS, celsius=range(15, 26)),
            [
                "Heat the {room} to {celsius} degrees.",
                "Set the {room} to {celsius} degrees.",
                "I'd like it {celsius} degrees in the {room}.",
                "Make the {room} {celsius} degrees warm, please.",
                "Could you bring the {room} to {celsius} degrees?",
            ],
            call("heat", "room", "celsius"),
        ),
        Intent(
            0.11,
            grid(room=ROOMS, state=["open", "closed"]),
            [
                "I want the blinds in the {room} {state}.",
                "Blinds {state} in the {room}, please.",
                "The {room} blinds should be {state}.",
                "Can you make sure the {room} blinds are {state}?",
                "Set the blinds in the {room} to {state}.",
            ],
            call("blinds", "room", "state"),
        ),
        Intent(
            0.14,
            grid(room=ROOMS, what=MUSIC),
            [
                "Play {what} in the {room}.",
                "Put on {what} in the {room}, please.",
                "I'd like to hear {what} in the {room}.",
                "Could you play {what} in the {room}?",
                "In the {room}, play {what}.",
            ],
            call("play", "room", "what"),
        ),
        Intent(
            0.12,
            grid(minutes=[1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 45, 50, 90], label=LABELS),
            [
                "Set a timer of {minutes} minutes for the {label}.",
                "Timer for the {label}, {minutes} minutes.",
                "Remind me about the {label} in {minutes} minutes.",
                "Start a {minutes} minute timer for the {label}.",
                "Please tell me in {minutes} minutes that the {label} is done.",
            ],
            call("timer", "minutes", "label"),
        ),
        Intent(
            0.11,
            [dict(slots, number=WORDS[slots["count"]]) for slots in grid(item=ITEMS, count=WORDS)],
            [
                "Add {number} {item} to the shopping list.",
                "Put {number} {item} on the list.",
                "We need {number} {item}.",
                "Please note {number} {item} for the next shopping trip.",
            ],
            call("shop", "item", "count"),
        ),
        Intent(
            0.075,
            grid(
                door=DOORS,
                how=[
                    "Lock the {}.",
                    "Please lock the {}.",
                    "Can you lock the {}?",
                    "The {} should be locked.",
                    "Make sure the {} is locked.",
                ],
            ),
            ["{request}"],
            call("lock", "door"),
        ),
        Intent(
            0.075,
            grid(
                door=DOORS,
                how=[
                    "Unlock the {}.",
                    "Please unlock the {}.",
                    "Can you unlock the {}?",
                    "Open the {} for me.",
                    "Could you unlock the {}?",
                    "I want the {} unlocked.",
                    "Unlock the {}, please.",
                ],
            ),
            ["{request}"],
            lambda slots: f"I never unlock a door. Please open the {slots['door']} yourself.",
        ),
        Intent(
            0.1,
            grid(
                wish=[
                    "Turn on the light",
                    "Switch off the light",
                    "Lights on",
                    "Dim the light to 30 percent",
                    "Make it 21 degrees",
                    "Blinds closed",
                    "Open the blinds",
                    "Play jazz",
                    "Play the news",
                    "Close the blinds",
                    "Set it to 18 degrees",
                    "Put on some blues",
                    "The light should be off",
                    "Dim the lights to 70 percent",
                    "I want the blinds open",
                    "Heat to 23 degrees",
                ],
                how=["{}.", "{}, please.", "Hello! {}.", "Hi, {}.", "{}, thanks."],
            ),
            ["{request}"],
            lambda slots: WHICH_ROOM,
        ),
        Intent(
            0.05,
            grid(
                wish=[
                    "What is the capital of Norway",
                    "Who wrote Hamlet",
                    "How do I fix my car",
                    "What is 12 times 9",
                    "Can you book a flight to Rome",
                    "What should I wear today",
                    "How tall is Mount Everest",
                    "Who won the football match",
                    "What is the weather in Paris",
                    "How do I cook lentils",
                    "Which language is spoken in Peru",
                    "When was the telephone invented",
                    "Can you tell me a joke",
                    "What does a llama eat",
                ],
                how=["{}?", "Hey, {}?", "Tell me: {}?"],
            ),
            ["{request}"],
            lambda slots: NOT_HOME,
        ),
    ]


def phrase(intent: Intent, slots: dict[str, object], random_: random.Random) -> str:
    if "how" in slots:
        subject = str(slots.get("door", slots.get("wish")))
        return str(slots["how"]).format(subject)
    return random_.choice(intent.wordings).format(**slots)


def split(intent: Intent, random_: random.Random) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Combinations for training and for the held-out rows, disjoint."""
    shuffled = random_.sample(intent.combinations, len(intent.combinations))
    num_held_out = max(1, round(0.2 * len(shuffled)))
    return shuffled[num_held_out:], shuffled[:num_held_out]


def rows_of(
    intent: Intent, combinations: list[dict[str, object]], count: int, seen: set[str], random_: random.Random
) -> list[dict[str, object]]:
    """`count` rows, each combination as often as any other, no sentence twice."""
    rows: list[dict[str, object]] = []
    for attempt in range(200 * count):
        if len(rows) == count:
            break
        slots = combinations[attempt % len(combinations)]
        request = phrase(intent, slots, random_)
        if request not in seen:
            seen.add(request)
            rows.append(chat(request, intent.answer(slots)))
    return rows


def chat(request: str, answer: str) -> dict[str, object]:
    turns = [("system", SYSTEM), ("user", request), ("assistant", answer)]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def counts(shares: list[float], total: int) -> list[int]:
    """Whole numbers in proportion to the shares that add up to the total; every kind gets at least one."""
    wanted = [max(1, int(share / sum(shares) * total)) for share in shares]
    wanted[0] += total - sum(wanted)
    return wanted


def build(seed: int) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Training and held-out rows, shuffled; the same seed gives the same rows."""
    random_ = random.Random(seed)
    kinds = intents()
    shares = [intent.share for intent in kinds]
    train: list[dict[str, object]] = []
    held_out: list[dict[str, object]] = []
    seen: set[str] = set()
    for intent, num_train, num_held_out in zip(
        kinds, counts(shares, NUM_TRAIN), counts(shares, NUM_HELD_OUT), strict=True
    ):
        for_train, for_held_out = split(intent, random_)
        held_out += rows_of(intent, for_held_out, num_held_out, seen, random_)
        train += rows_of(intent, for_train, num_train, seen, random_)
    random_.shuffle(train)
    random_.shuffle(held_out)
    return train, held_out


def write(rows: list[dict[str, object]], path: Path) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    train, held_out = build(options.seed)
    write(train, options.out / "train.jsonl")
    write(held_out, options.out / "heldout.jsonl")
    print(f"{len(train)} training and {len(held_out)} held-out rows in {options.out}")


if __name__ == "__main__":
    main()
