"""The rows of the benchmarks: made from seeds, of stated lengths, the same on every machine."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

from common import SWEEP_TOKENS
from peer import Row
from phlora.config import TrainOn
from phlora.data.dataset import load_rows
from phlora.data.rows import Row as Chat
from phlora.data.tokenize import tokenize_rows

_WORDS = (
    "the river water stone garden window table letter morning winter music paper bridge market silver kitchen "
    "doctor number question answer simple story travel engine castle forest yellow summer island machine picture "
    "teacher village mountain history science language children evening company library measure weather captain "
    "people always around before between carry change country different early every family follow"
).split()


def make_rows(
    name: str, tokenizer: Any, *, vocab: int, long_row: int = 2048, scale: float = 1.0
) -> list[Row]:
    """The rows of a set, each with `input_ids` and `labels`.

    Args:
        tokenizer: with a chat template. Ids beyond `vocab` are folded into it, for models with random weights.
        long_row: tokens of the row of `long_row`.
        scale: factor of all lengths.
    """
    if name == "alpaca":
        return _alpaca_rows(8, vocab=vocab, scale=scale)
    if name.startswith("rows_of_"):
        length, count = _swept(int(name.removeprefix("rows_of_")), scale)
        return random_rows([length] * count, vocab=vocab)
    maker = _Maker(tokenizer, scale, random.Random(name))
    if name == "mixed":
        rows = maker.chats([400, 40, 140, 600, 64, 280, 96, 200])
    elif name == "shared":
        rows = maker.shared(32)
    elif name == "multi_turn":
        rows = maker.chats([480, 300, 550, 250], turns=4)
    elif name == "turns":
        rows = maker.turns(6, turns=4)
    elif name == "long_row":
        rows = maker.chats([long_row])
    elif name == "full_loss":
        rows = [_all_trained(row, maker.length(256)) for row in maker.chats([300] * 4)]
    else:
        rows = maker.chats(_pack_lengths(1024 * int(name.removeprefix("pack_")[:-1]), random.Random(name)))
    return [{key: [_folded(value, vocab) for value in values] for key, values in row.items()} for row in rows]


def token_rows(rows: Iterable[Chat], tokenizer: Any, *, train_on: TrainOn = "assistant") -> list[Row]:
    """Chats as the tokens of a model, whole."""
    tokenized = tokenize_rows(rows, tokenizer, train_on=train_on).rows
    return [{"input_ids": list(row.input_ids), "labels": list(row.labels)} for row in tokenized]


def random_rows(
    lengths: Sequence[int], *, vocab: int, shared: int = 0, trained: float = 0.25, seed: int = 0
) -> list[Row]:
    """Rows of random ids that begin with the same `shared` ids; the last part of each row is trained."""
    generator = random.Random(seed)
    start = [generator.randrange(vocab) for _ in range(shared)]
    rows = []
    for length in lengths:
        ids = start + [generator.randrange(vocab) for _ in range(length - shared)]
        first = length - max(1, round(trained * length))
        rows.append({"input_ids": ids, "labels": [-100] * first + ids[first:]})
    return rows


# Tokens of the 999 rows of LLaMA-Factory's alpaca_en_demo.json with the embedded model's tokenizer: shares of the rows,
# and the longest prompt (instruction and input) and the longest answer of each share. Prompts and answers are all but
# independent (correlation -0.17).
ALPACA_SHARES = (0.0, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99, 1.0)
ALPACA_PROMPTS = (4, 8, 11, 15, 22, 33, 43, 87, 169)
ALPACA_ANSWERS = (1, 11, 25, 106, 259, 362, 401, 509, 594)
# The markers of one question and its answer.
_TEMPLATE_TOKENS = 12


def _alpaca_rows(count: int, *, vocab: int, scale: float) -> list[Row]:
    """Rows of random ids, which share nothing; one of each of `count` equal shares of all lengths."""
    generator = random.Random("alpaca")
    shares = [(number + 0.5) / count for number in range(count)]
    answers = [max(1, round(scale * _quantile(ALPACA_ANSWERS, share))) for share in shares]
    prompts = [
        max(3, round(scale * (_quantile(ALPACA_PROMPTS, share) + _TEMPLATE_TOKENS))) for share in shares
    ]
    generator.shuffle(answers)
    generator.shuffle(prompts)
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = [generator.randrange(vocab) for _ in range(prompt + answer)]
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def _quantile(values: Sequence[int], share: float) -> float:
    """Between two known shares the lengths are spread evenly."""
    after = next(i for i, known in enumerate(ALPACA_SHARES) if known >= share and i)
    low, high = ALPACA_SHARES[after - 1], ALPACA_SHARES[after]
    return values[after - 1] + (values[after] - values[after - 1]) * (share - low) / (high - low)


def _swept(length: int, scale: float) -> tuple[int, int]:
    return max(8, round(length * scale)), SWEEP_TOKENS // length


class _Maker:
    """Chats of wanted lengths; the tokens of words that spaces part add up."""

    def __init__(self, tokenizer: Any, scale: float, generator: random.Random) -> None:
        self.tokenizer, self.scale, self.generator = tokenizer, scale, generator
        self.sizes = [len(tokenizer(" " + word, add_special_tokens=False)["input_ids"]) for word in _WORDS]

    def length(self, tokens: int) -> int:
        return max(4, round(tokens * self.scale))

    def text(self, tokens: int) -> str:
        words, count = [], 0
        while not words or count < tokens:
            number = self.generator.randrange(len(_WORDS))
            words.append(_WORDS[number])
            count += self.sizes[number]
        return " ".join(words)

    def chats(self, lengths: Sequence[int], *, turns: int = 1) -> list[Row]:
        """About three fifths of a chat are questions, the rest answers; the template's own tokens are within."""
        wrapping = len(self._rows([[*self._turn(1, 1)] * turns])[0]["input_ids"]) - 2 * turns
        chats = []
        for tokens in lengths:
            words = max(2 * turns, self.length(tokens) - wrapping)
            chats.append(
                [m for _ in range(turns) for m in self._turn(0.6 * words / turns, 0.4 * words / turns)]
            )
        return self._rows(chats)

    def shared(self, count: int) -> list[Row]:
        """One system prompt; the question and the answer behind it, with the template's 10 tokens, make the tail."""
        system = {"role": "system", "content": self.text(self.length(146))}
        tails = [self.length(28 + 32 * number // max(1, count - 1)) for number in range(count)]
        self.generator.shuffle(tails)
        return self._rows([[system, *self._turn(0.4 * (t - 10), 0.6 * (t - 10))] for t in tails])

    def turns(self, count: int, *, turns: int) -> list[Row]:
        """Conversations behind one system prompt, each once up to each of its answers; a turn has 60 tokens."""
        system = {"role": "system", "content": self.text(self.length(146))}
        words = self.length(60) - 10
        conversations = [
            [m for _ in range(turns) for m in self._turn(0.6 * words, 0.4 * words)] for _ in range(count)
        ]
        chats = [[system, *chat[: 2 * n]] for chat in conversations for n in range(1, turns + 1)]
        return self._rows(chats, train_on="last")

    def _turn(self, question: float, answer: float) -> list[dict[str, str]]:
        return [
            {"role": "user", "content": self.text(round(question))},
            {"role": "assistant", "content": self.text(round(answer))},
        ]

    def _rows(self, chats: list[list[dict[str, str]]], *, train_on: TrainOn = "assistant") -> list[Row]:
        rows = load_rows([{"messages": messages} for messages in chats]).rows
        return token_rows(rows, self.tokenizer, train_on=train_on)


def _all_trained(row: Row, length: int) -> Row:
    ids = (row["input_ids"] * 2)[:length]
    return {"input_ids": ids, "labels": list(ids)}


def _pack_lengths(tokens: int, generator: random.Random) -> list[int]:
    lengths: list[int] = []
    while (left := tokens - sum(lengths)) > 2148:
        lengths.append(min(2048, round(100 * 20.48 ** generator.random())))
    return [*lengths, left - 100, 100]


def _folded(value: int, vocab: int) -> int:
    return value if value < 0 else value % vocab
