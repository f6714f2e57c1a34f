"""How the rows of a script's trainer are laid out and computed: as `finetune` would, wherever that is exact.

TRL prepares the rows, and its sampler, its batches and its steps stay. What changes is how a batch becomes tensors
(`data.collate.SharedPrefixCollator` in the place of TRL's collator) and which classes the layers have, both while the
trainer computes and no longer: the trainer's own `data_collator`, and the model, are what they were before and after.
"""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, get_args
from weakref import WeakKeyDictionary

import pyarrow.compute as pc
from datasets import Dataset
from torch import nn

from phlora.adapters.peft_layer import LoraLinear, fuse_lora, unfuse_lora
from phlora.adapters.speed import at_speed
from phlora.config import Speed
from phlora.data.collate import Batch, SharedPrefixCollator
from phlora.data.rows import Origin
from phlora.data.table import TokenizedRow
from phlora.dropin.memory import Activations, checkpointed, decide, is_said
from phlora.dropin.obstacles import (
    changed_model,
    has_own_loss,
    listening,
    own_batches,
    own_held_out_loss,
    random_masks,
    sharded,
    unknown_adapter,
    unreadable_rows,
)
from phlora.dropin.tell import tell
from phlora.errors import ConfigError, did_you_mean
from phlora.lora import matmul
from phlora.models.activation_memory import recomputing_mlps
from phlora.models.families import longrope_limit
from phlora.models.prefix_sharing import Sharing, decide_sharing
from phlora.train.trainer import SFTTrainer

# What a forecast of sharing looks at: rows enough for a share to within a few percent, tokens that take a moment.
_FORECAST_ROWS, _FORECAST_TOKENS = 1024, 1 << 19
_FORECAST_CHUNK = 64
_LENGTHS_CHUNK = 10_000


class LaidOutTrainer(SFTTrainer):
    """The trainer of `phlora.train`, which lays out what TRL has prepared by itself.

    Args:
        speed: `auto`, or `reference` for the batches of TRL and the layers of PEFT and transformers. All else is for
            `phlora.train.trainer.SFTTrainer`.
    """

    def __init__(self, *args: Any, speed: Speed = "auto", **kwargs: Any) -> None:
        if speed not in get_args(Speed):
            raise ConfigError(
                f"speed is {speed!r}",
                where="SFTTrainer",
                expected=" or ".join(get_args(Speed)),
                fix=did_you_mean(str(speed), get_args(Speed)),
            )
        self.speed = speed
        self._now: Layout | None = None
        # Held-out rows are met again and again, and shared alike.
        self._held_out: WeakKeyDictionary[Any, Sharing] = WeakKeyDictionary()
        self._told = ""
        self._activations: Activations | None = None
        super().__init__(*args, **kwargs)

    def get_train_dataloader(self) -> Any:
        on = self._now is not None and self._now.sharing.on
        with _collating(self, on=on):
            return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        rows = self.eval_dataset[given] if isinstance(given, str) else given
        with _collating(self, on=self._now is not None and decide_held_out(self, rows).on):
            return super().get_eval_dataloader(eval_dataset)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with self._laid_out(training=True):
            return super().train(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        with self._laid_out(training=False):
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        with self._laid_out(training=False):
            return super().predict(*args, **kwargs)

    @property
    def _max_positions(self) -> int | None:
        longest = self._now.longest if self._now is not None else None
        if longest is None:
            return super()._max_positions
        return int(self._train_batch_size * longest)

    @functools.cached_property
    def _may_be_cut(self) -> bool:
        return bool(super()._may_be_cut) and not has_own_loss(self)

    @property
    def _is_held_out_by_token(self) -> bool:
        return own_held_out_loss(self) is None

    @contextmanager
    def _laid_out(self, *, training: bool) -> Iterator[None]:
        if self._now is not None:
            # An evaluation while training.
            yield
            return
        layout = choose(self, training=training)
        with layout.at_work(self.model, self.args) as layers:
            self._now = layout
            try:
                if training:
                    self._tell(
                        f"shared prefixes {layout.sharing.describe()}; {layers}{layout.kept()}{_leaks(self.args)}"
                    )
                yield
            finally:
                self._now = None

    def _tell(self, words: str) -> None:
        if words != self._told:
            self._told = words
            tell(f"speed={self.speed}: {words}")


@dataclass(frozen=True)
class Layout:
    """How a trainer computes.

    Attributes:
        sharing: whether rows of an optimizer step share the computation of their common starts, and why (not).
        speed: of the layers.
        why_plain: why the layers stay as they are; None: they are computed as `speed` says.
        longest: tokens of the longest sequence; None where that is not known.
        activations: what layers keep for backward; None: what the script says, or TRL where it says nothing.
    """

    sharing: Sharing
    speed: Speed
    why_plain: str | None = None
    longest: int | None = None
    activations: Activations | None = None

    def kept(self) -> str:
        """A line's rest about what layers keep."""
        return "" if self.activations is None else f"; {self.activations}"

    @contextmanager
    def at_work(self, model: nn.Module, args: Any) -> Iterator[str]:
        """Compute so, and leave the model and the process as they were; yields a line about the layers."""
        with ExitStack() as stack:
            stack.enter_context(_as_it_was(model))
            if self.why_plain is not None:
                yield f"layers as they are: {self.why_plain}"
                return
            layers = stack.enter_context(at_speed(model, self.speed))
            if self.activations is not None:
                stack.enter_context(checkpointed(args, self.activations.level))
                if self.activations.level == "recompute_mlp":
                    stack.enter_context(recomputing_mlps(model))
            yield layers


def choose(trainer: LaidOutTrainer, *, training: bool = True) -> Layout:
    """The fastest layout that is exact for a trainer as it is now, with the collator and the rows that it has now.

    Args:
        training: whether it will train; else nothing is asked of the training rows.
    """
    if trainer.speed == "reference":
        return Layout(Sharing(False, "speed is reference"), "reference")
    why_plain = changed_model(trainer.model) or sharded(trainer)
    if not training:
        return Layout(Sharing(False, "nothing is trained"), "auto", why_plain)
    sharing = decide_training(trainer)
    if why_plain is None and trainer._activations is None and not is_said(trainer.args, trainer.model):
        trainer._activations = decide(
            trainer, lambda: with_longest(trainer.train_dataset, seed=trainer.args.seed), shared=sharing.on
        )
    longest = longest_of(trainer.train_dataset) if sharing.on else None
    return Layout(sharing, "auto", why_plain, longest, trainer._activations)


def decide_training(trainer: LaidOutTrainer) -> Sharing:
    """Whether rows of an optimizer step share the computation of their common starts, and why (not)."""
    rows = trainer.train_dataset
    obstacle = why_not_shared(trainer, rows, training=True)
    if obstacle is not None:
        return Sharing(False, obstacle)
    args = copy.copy(trainer.args)
    # Without padding TRL's own layout is a stream as well.
    args.packing = args.packing or trainer.padding_free
    return decide_sharing(
        trainer.model,
        some_sequences(rows, seed=args.seed),
        speed=trainer.speed,
        batch_size=args.train_batch_size,
        args=args,
        device=args.device,
    )


def decide_held_out(trainer: LaidOutTrainer, rows: Any) -> Sharing:
    """Whether held-out rows share the computation of their common starts, and why (not)."""
    if trainer.speed == "reference":
        return Sharing(False, "speed is reference")
    obstacle = why_not_shared(trainer, rows, training=False)
    if obstacle is not None:
        return Sharing(False, obstacle)
    if rows not in trainer._held_out:
        trainer._held_out[rows] = decide_sharing(
            trainer.model,
            some_sequences(rows, seed=trainer.args.seed),
            speed=trainer.speed,
            batch_size=trainer.args.eval_batch_size,
            device=trainer.args.device,
        )
    return trainer._held_out[rows]


def why_not_shared(trainer: LaidOutTrainer, rows: Any, *, training: bool) -> str | None:
    """What of a script needs whole rows, as a sentence; None: nothing does."""
    model = trainer.model
    return (
        own_batches(trainer, training=training)
        or unreadable_rows(rows)
        or changed_model(model)
        or listening(model)
        or unknown_adapter(model)
        or (random_masks(model) if training else None)
    )


@dataclass(frozen=True)
class RowsCollator:
    """What TRL has prepared, as one stream in which common starts stand once.

    Takes what TRL's collator takes, and trains the same tokens: `labels` are `input_ids` where there are none, packs
    fall into the rows that `seq_lengths` tells, and the first token of a row is predicted by nothing.
    """

    share: SharedPrefixCollator

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> Batch:
        return self.share([row for feature in features for row in rows_of(feature)])


def rows_of(feature: Mapping[str, Any]) -> list[TokenizedRow]:
    """The rows of an example that TRL has prepared: one, or those of a pack."""
    ids = _listed(feature["input_ids"])
    labels = _listed(feature["labels"]) if feature.get("labels") is not None else ids
    lengths = _listed(feature["seq_lengths"]) if feature.get("seq_lengths") is not None else [len(ids)]
    rows, start = [], 0
    for length in lengths:
        span = slice(start, start + length)
        rows.append(TokenizedRow(ids[span], labels[span], None, Origin("", 0)))
        start += length
    return rows


def some_sequences(rows: Dataset, *, seed: int) -> list[list[TokenizedRow]]:
    """Sequences of a data set, drawn at random: as many as a forecast needs. No random state is touched."""
    plain = rows.with_format(None)
    order = list(range(len(plain)))
    random.Random(seed).shuffle(order)
    found: list[list[TokenizedRow]] = []
    seen = tokens = 0
    for start in range(0, len(order), _FORECAST_CHUNK):
        batch = plain[order[start : start + _FORECAST_CHUNK]]
        names = [name for name in ("input_ids", "labels", "seq_lengths") if name in batch]
        features = zip(*(batch[name] for name in names), strict=True)
        found += [rows_of(dict(zip(names, feature, strict=True))) for feature in features]
        seen += sum(len(sequence) for sequence in found[start:])
        tokens += sum(len(row.input_ids) for sequence in found[start:] for row in sequence)
        if seen >= _FORECAST_ROWS or tokens >= _FORECAST_TOKENS:
            break
    return found


def longest_of(rows: Dataset) -> int:
    """Tokens of the longest sequence of a data set, without a row being read."""
    return max(_lengths_of(rows), default=0)


def with_longest(rows: Dataset, *, seed: int) -> list[list[TokenizedRow]]:
    """Sequences as a forecast of memory needs them: some, and the longest of all."""
    lengths = _lengths_of(rows)
    longest = rows.with_format(None)[lengths.index(max(lengths))]
    return [rows_of(longest), *some_sequences(rows, seed=seed)]


def _lengths_of(rows: Dataset) -> list[int]:
    chunks = rows.select_columns("input_ids").with_format("arrow").iter(_LENGTHS_CHUNK)
    return [
        length or 0 for chunk in chunks for length in pc.list_value_length(chunk["input_ids"]).to_pylist()
    ]


@contextmanager
def _collating(trainer: LaidOutTrainer, *, on: bool) -> Iterator[None]:
    """Data loaders that are made here lay rows out as a stream; the trainer keeps the collator that it has."""
    if not on:
        yield
        return
    collator = trainer.data_collator
    trainer.data_collator = RowsCollator(SharedPrefixCollator(longrope_limit(trainer.model.config)))
    try:
        yield
    finally:
        trainer.data_collator = collator


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Afterwards every layer has the class that it has now, and products, and attention, go as they do now."""
    classes = [(module, type(module)) for module in model.modules()]
    libraries = matmul.libraries()
    configs: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
    attention = [
        (config, config._attn_implementation_internal)
        for config in configs
        if hasattr(config, "_attn_implementation_internal")
    ]
    try:
        yield
    finally:
        for config, name in attention:
            # Not through the setter, which sets that of the parts too.
            config._attn_implementation_internal = name
        matmul.use_libraries(libraries)
        for module, kind in classes:
            if type(module) is kind:
                continue
            if type(module) is LoraLinear:
                unfuse_lora(module)
            elif kind is LoraLinear:
                fuse_lora(module)
            else:
                module.__class__ = kind


def _leaks(args: Any) -> str:
    """What to know of packs whose rows see each other with TRL, and so here: there the rows can no longer be told."""
    if not args.packing or args.packing_strategy != "wrapped":
        return ""
    return "; packing_strategy=wrapped lets each row see the one before it, as in TRL (bfd keeps them apart)"


def _listed(values: Any) -> list[int]:
    return values.tolist() if hasattr(values, "tolist") else list(values)
