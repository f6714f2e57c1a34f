"""What is asked of a generator of ONNX Runtime: logits where tokens are trained, and an answer up to its end."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from phlora.data.rows import Origin
from phlora.data.table import IGNORED
from phlora.data.tokenize import TokenizedRow
from phlora.export.onnx import onnx_answer, onnx_logits

VOCABULARY = 10


class Counting:
    """A generator whose next token is the number of tokens before it, for sure."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = list(ids)

    def append_tokens(self, ids: Sequence[int]) -> None:
        self.ids += ids

    def get_logits(self) -> list[list[list[float]]]:
        return [[torch.nn.functional.one_hot(torch.tensor(len(self.ids)), VOCABULARY).tolist()]]

    def is_done(self) -> bool:
        return len(self.ids) >= VOCABULARY

    def generate_next_token(self) -> None:
        self.ids.append(len(self.ids))

    def get_next_tokens(self) -> list[int]:
        return self.ids[-1:]


@pytest.mark.parametrize("trained", [[3], [2, 3, 6], [0, 1], [0], [], [7]], ids=str)
def test_logits_are_those_behind_all_tokens_before_a_trained_one(trained: list[int]) -> None:
    ids = [0] * 8
    row = TokenizedRow(ids, [ids[n] if n in trained else IGNORED for n in range(8)], None, Origin("a", 1))
    found = onnx_logits(Counting, row)
    # Nothing predicts the first token.
    assert found.argmax(-1).tolist() == [place for place in trained if place]


@pytest.mark.parametrize(("most", "stops", "answer"), [(3, (), [2, 3, 4]), (9, (5,), [2, 3, 4]), (0, (), [])])
def test_an_answer_ends_at_a_stop_token_or_its_limit(
    most: int, stops: tuple[int, ...], answer: list[int]
) -> None:
    assert onnx_answer(Counting, [7, 7], most=most, stop_token_ids=stops) == answer
    assert onnx_answer(Counting, [7, 7], most=99, stop_token_ids=()) == list(range(2, VOCABULARY))
