"""Batches by the numbers of their sequences, and an order that an interruption does not change."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import RandomSampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from phlora.data.collate import Collator, PackedCollator, SharedPrefixCollator
from phlora.data.packing import TokenSequences
from phlora.data.rows import Origin
from phlora.data.table import TableBuilder, TokenTable
from phlora.train.batches import GroupedEpochs, NewPacks, RunTrainer, SequenceCollator, number_sequences
from phlora.train.trainer import SFTTrainer

LENGTHS = [3, 9, 4, 7, 5, 2, 8, 6]


def table(lengths: list[int], first: int = 10) -> TokenTable:
    builder = TableBuilder()
    for number, length in enumerate(lengths):
        ids = list(range(first + number, first + number + length))
        builder.add(ids, bytes([0] + [1] * (length - 1)), None, Origin("rows.jsonl", number + 1))
    return builder.table()


def collator(*, max_length: int | None = None, **settings: Any) -> SequenceCollator:
    return SequenceCollator(
        TokenSequences(table(LENGTHS), max_length=max_length, seed=3),
        TokenSequences(table([4, 6], first=100)),
        pad_token_id=0,
        packed=max_length is not None,
        **settings,
    )


def assert_same_batch(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value


def test_numbers_stand_for_training_sequences_and_after_them_for_held_out_rows() -> None:
    collate = collator()
    train, held_out = table(LENGTHS), table([4, 6], first=100)
    for numbers, rows in (((6, 0), (train[6], train[0])), ((8, 9), (held_out[0], held_out[1]))):
        found = collate([{"sequence": number} for number in numbers])
        assert found.pop("origins") == tuple(row.origin for row in rows)
        assert_same_batch(found, Collator(0)(rows))


def test_packs_lie_end_to_end_and_common_starts_are_shared() -> None:
    packed = collator(max_length=12)
    rows = packed.train[1]
    assert len(rows) > 1
    found = packed([{"sequence": 1}])
    assert found.pop("origins") == tuple(row.origin for row in rows)
    assert_same_batch(found, PackedCollator()(rows))
    shared = collator(shared=True, rope_limit=64)
    found = shared([{"sequence": 2}, {"sequence": 3}])
    expected = SharedPrefixCollator(64)([table(LENGTHS)[2], table(LENGTHS)[3]])
    assert (
        torch.equal(found["input_ids"], expected["input_ids"])
        and found["segments"].paths == expected["segments"].paths
    )


def test_the_trainer_is_given_numbers_and_lengths_alone() -> None:
    assert number_sequences(LENGTHS).to_dict() == {"sequence": list(range(8)), "length": LENGTHS}


@pytest.mark.parametrize("epoch", [None, 0.0, 1.0, 1.75])
def test_an_epoch_that_goes_on_has_the_packs_that_it_began_with(epoch: float | None) -> None:
    expected, found = (TokenSequences(table(LENGTHS), max_length=12, seed=3) for _ in range(2))
    expected.set_epoch(int(epoch or 0))
    found.set_epoch(5)
    state: Any = SimpleNamespace(epoch=epoch)
    NewPacks(found).on_epoch_begin(None, state, None)  # type: ignore[arg-type]
    assert found[:] == expected[:]


def order(sampler: GroupedEpochs, epoch: int) -> list[int]:
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.fixture
def lengths() -> list[int]:
    return torch.randint(1, 50, (400,), generator=torch.Generator().manual_seed(0)).tolist()


def test_the_order_of_an_epoch_is_that_of_its_number_and_the_seed(lengths: list[int]) -> None:
    def sampler(seed: int) -> GroupedEpochs:
        return GroupedEpochs.of(LengthGroupedSampler(4, lengths=lengths), seed=seed)

    in_turn, resumed = sampler(7), sampler(7)
    first, second = order(in_turn, 0), order(in_turn, 1)
    torch.manual_seed(123)  # where the generator of the process stands has no say
    assert order(resumed, 1) == second and order(resumed, 0) == first
    assert first != second and order(sampler(8), 0) != first
    assert sorted(first) == sorted(second) == list(range(400))


def test_sequences_of_like_length_meet_as_in_transformers_own(lengths: list[int]) -> None:
    theirs = LengthGroupedSampler(4, lengths=lengths, generator=torch.Generator().manual_seed(9))
    ours = GroupedEpochs.of(theirs, seed=7)
    assert order(ours, 2) == list(theirs)


@pytest.mark.parametrize(("data_seed", "seed"), [(None, 42), (5, 5), (0, 0)])
def test_the_trainer_of_a_run_takes_this_order_where_it_groups_and_no_other(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], data_seed: int | None, seed: int
) -> None:
    given: Iterator[Any] = iter([LengthGroupedSampler(4, lengths=lengths), RandomSampler(lengths), None])
    monkeypatch.setattr(SFTTrainer, "_get_train_sampler", lambda *_: next(given))
    trainer = object.__new__(RunTrainer)
    trainer.args = SimpleNamespace(seed=42, data_seed=data_seed)  # type: ignore[assignment]
    grouped = trainer._get_train_sampler()
    assert isinstance(grouped, GroupedEpochs) and grouped.seed == seed
    assert isinstance(trainer._get_train_sampler(), RandomSampler)
    assert trainer._get_train_sampler() is None
