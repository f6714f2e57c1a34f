from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from phlora.data.collate import Collator, PackedCollator, SharedPrefixCollator, halves
from phlora.data.rows import Origin
from phlora.data.tokenize import TokenizedRow
from phlora.errors import DataError

ORIGIN = Origin("chats.jsonl", 1)
SHORT = TokenizedRow([5, 6, 2], [-100, 6, 2], None, ORIGIN)
LONG = TokenizedRow([5, 7, 8, 2, 2], [-100, -100, 8, 2, 2], None, ORIGIN)
WEIGHTED = TokenizedRow([5, 9, 2], [-100, 9, 2], [0.0, 0.5, 0.5], ORIGIN)


def test_padding_follows_length_even_where_the_pad_token_is_trained():
    batch = Collator(pad_token_id=2)([SHORT, LONG])
    assert batch["input_ids"].tolist() == [[5, 6, 2, 2, 2], [5, 7, 8, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 6, 2, -100, -100], [-100, -100, 8, 2, 2]]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


@pytest.mark.parametrize(
    "feature", [{"messages": []}, {"input_ids": [1, 2]}, "a text", None, ([1], [1]), ORIGIN], ids=repr
)
@pytest.mark.parametrize("collator", [Collator(0), PackedCollator(), SharedPrefixCollator()], ids=repr)
def test_what_is_no_row_of_tokens_is_named_with_the_way_to_some(feature, collator):
    with pytest.raises(DataError, match="without `input_ids` and `labels`") as error:
        collator([SHORT, feature])
    assert "tokenize_rows" in error.value.fix


def test_lengths_are_rounded_up():
    batch = Collator(pad_token_id=0, pad_to_multiple_of=8)([SHORT, LONG])
    assert {tuple(tensor.shape) for tensor in batch.values()} == {(2, 8)}


def test_weights_appear_when_one_row_has_them():
    weights = Collator(pad_token_id=0)([LONG, WEIGHTED])["loss_weights"]
    assert weights.dtype == torch.float32
    assert weights.tolist() == [[0, 0, 1, 1, 1], [0, 0.5, 0.5, 0, 0]]


def test_packed_rows_restart_positions_and_learn_nothing_from_each_other():
    batch = PackedCollator()([SHORT, WEIGHTED, TokenizedRow([5, 6], [5, 6], None, ORIGIN)])
    assert batch["input_ids"].tolist() == [[5, 6, 2, 5, 9, 2, 5, 6]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 6, 2, -100, 9, 2, -100, 6]]
    assert batch["loss_weights"].tolist() == [[0, 1, 1, 0, 0.5, 0.5, 0, 1]]
    assert "attention_mask" not in batch


def test_rows_of_a_datasets_object_collate_alike():
    table = Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in (SHORT, LONG)])
    for collate in (Collator(pad_token_id=0), PackedCollator()):
        ours, theirs = collate([SHORT, LONG]), collate([table[0], table[1]])
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_shared_start_stands_once_with_its_targets_and_weights():
    start = list(range(30, 60))
    rows = [
        TokenizedRow([*start, 5, 6], [-100] * 20 + [*start[20:], 5, 6], None, ORIGIN),
        TokenizedRow([*start, 7], [-100] * 25 + [*start[25:], 7], [0.0] * 25 + [0.5] * 6, ORIGIN),
    ]
    batch = SharedPrefixCollator()(rows)
    # The last common token stands in each tail, since each row goes on differently after it. The last token of a row
    # predicts nothing.
    assert batch["input_ids"].tolist() == [[*start[:29], 59, 5, 59]]
    assert batch["position_ids"].tolist() == [[*range(29), 29, 30, 29]]
    assert batch["shift_labels"].tolist() == [[-100] * 19 + [*range(50, 60)] + [5, 6, 7]]
    assert batch["loss_weights"].tolist() == [[0] * 19 + [1] * 5 + [1.5] * 5 + [1, 1, 0.5]]
    assert batch["num_tokens"] == 63 and batch["segments"].num_positions == 32


def test_what_follows_the_last_prediction_is_left_out():
    rows = [TokenizedRow([1, 2, 3, 4, 5, 6], [-100, -100, 3, 4, -100, -100], None, ORIGIN), SHORT]
    untrained = TokenizedRow([7, 8, 9], [-100] * 3, None, ORIGIN)
    batch = SharedPrefixCollator()([*rows, untrained])
    paths = [[batch["input_ids"][0, p].item() for p in batch["segments"].paths[n]] for n in range(3)]
    assert paths == [[1, 2, 3], SHORT.input_ids[:-1], [7]]
    assert batch["num_tokens"] == 9 + len(SHORT.input_ids)
    # A row that a longrope model rotates as a long one stays long.
    kept = SharedPrefixCollator(rope_limit=4)(rows[:1])
    assert kept["input_ids"].tolist() == [[1, 2, 3, 4, 5]]
    assert kept["shift_labels"].tolist() == [[-100, 3, 4, -100, -100]]


def test_a_label_that_is_not_its_token_is_shared_only_with_the_same_label():
    ids = list(range(30, 70))
    plain = {"input_ids": ids, "labels": ids}
    other = {"input_ids": ids, "labels": [*ids[:35], 9, *ids[36:]]}
    _, group = SharedPrefixCollator()([plain, other])["segments"].groups
    assert group.num_shared == 34
    _, group = SharedPrefixCollator()([other, other])["segments"].groups
    # Every computed position but the last, which each row keeps.
    assert group.num_shared == 38


def _trained(batch):
    """(token, what it is trained to predict, weight) of each position that is trained, and how many are computed."""
    labels = (
        batch["shift_labels"]
        if "shift_labels" in batch
        else F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    )
    weights = batch.get("loss_weights")
    if "shift_labels" not in batch and weights is not None:
        weights = F.pad(weights[:, 1:], (0, 1))
    weights = (labels != -100).float() if weights is None else weights
    found = [batch["input_ids"][labels != -100], labels[labels != -100], weights[labels != -100]]
    return sorted(zip(*(part.tolist() for part in found), strict=True))


def _of_length(number, length):
    return {
        "input_ids": [100 * number + place for place in range(length)],
        "labels": [-100] * (length // 2) + [100 * number + place for place in range(length // 2, length)],
        **({"weights": [0.0] * (length // 2) + [0.5] * (length - length // 2)} if number % 2 else {}),
    }


@pytest.mark.parametrize("collate", [Collator(0), PackedCollator(), SharedPrefixCollator()])
def test_halves_hold_the_same_rows(collate):
    features = [_of_length(number, length) for number, length in enumerate((4, 9, 3, 12, 5))]
    parts = [{**collate(features), "origins": tuple("abcde")}]
    whole = parts[0]
    while any(halves(part) for part in parts):
        parts = [piece for part in parts for piece in (halves(part) or (part,))]
        assert sorted(sum(map(_trained, parts), [])) == _trained(whole)
    assert len(parts) == 5
    assert all(len(part["input_ids"]) == 1 for part in parts)
    if "segments" not in whole:
        assert [part["origins"] for part in parts] == [("a",), ("b",), ("c",), ("d",), ("e",)]
        # Without padding.
        assert [part["input_ids"].shape[1] for part in parts] == [4, 9, 3, 12, 5]


def test_what_cannot_be_told_apart_is_not_halved():
    ids = torch.arange(6).view(1, 6)
    assert halves({"input_ids": ids, "labels": ids}) is None
    # Whoever counts rows in another way must be asked.
    packed = {"input_ids": ids, "labels": ids, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
    assert halves(packed) is not None
    assert halves({**packed, "cu_seq_lens_q": torch.tensor([0, 3, 6])}) is None
