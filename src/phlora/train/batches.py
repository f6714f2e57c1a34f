"""Batches for the trainer, by the numbers of their sequences, and their order and packs in every epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from phlora.data.collate import Batch, collator_of
from phlora.data.packing import TokenSequences
from phlora.data.table import TokenizedRow
from phlora.train.trainer import SFTTrainer


@dataclass(frozen=True)
class SequenceCollator:
    """Batches of sequences by their number: rows padded side by side, packs end to end, or common starts shared.

    The trainer's data set holds numbers and lengths only, so the rows exist once. The numbers of held-out rows follow
    those of the training sequences.
    """

    train: TokenSequences
    held_out: TokenSequences
    pad_token_id: int
    packed: bool
    shared: bool = False
    rope_limit: int | None = None

    def __call__(self, features: Sequence[dict[str, int]]) -> Batch:
        rows = [row for feature in features for row in self._rows(feature["sequence"])]
        collate = collator_of(
            shared=self.shared,
            packed=self.packed,
            pad_token_id=self.pad_token_id,
            rope_limit=self.rope_limit,
        )
        batch = collate(rows)
        return batch if self.shared else {**batch, "origins": tuple(row.origin for row in rows)}

    def _rows(self, number: int) -> list[TokenizedRow]:
        is_trained = number < len(self.train)
        return self.train[number] if is_trained else self.held_out[number - len(self.train)]


class NewPacks(TrainerCallback):
    """Packs the rows anew for each epoch, also for the one that a resumed run continues."""

    def __init__(self, sequences: TokenSequences) -> None:
        self.sequences = sequences

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.sequences.set_epoch(int(state.epoch or 0))


class GroupedEpochs(LengthGroupedSampler):
    """Sequences of like length side by side, in an order that the seed and the number of the epoch decide.

    transformers' own draws from the generator of the whole process, which stands elsewhere when a run is continued in
    the middle of an epoch: the rest of it would be made of other sequences.
    """

    seed: int

    @classmethod
    def of(cls, sampler: LengthGroupedSampler, *, seed: int) -> GroupedEpochs:
        """Over the lengths and the batch size of another sampler."""
        made = cls(sampler.batch_size, lengths=sampler.lengths)
        made.seed = seed
        made.set_epoch(0)
        return made

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate as each epoch begins, also the one that a resumed run continues."""
        self.generator = torch.Generator().manual_seed(self.seed + epoch)


class RunTrainer(SFTTrainer):
    """The trainer of a run, which sees the same order of sequences however often it is interrupted."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        sampler: Sampler[int] | None = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            return GroupedEpochs.of(sampler, seed=seed)
        return sampler


def number_sequences(lengths: Sequence[int]) -> Dataset:
    """The data set that the trainer is given: the number and the length of every sequence."""
    return Dataset.from_dict({"sequence": list(range(len(lengths))), "length": lengths})
