"""A micro-batch that does not fit into memory, done in pieces that do: the same optimizer step, in more passes.

The loss of a step is a sum over its trained tokens with a divisor that is known before its first pass, so that its rows
may be computed in any company. What a pass had added to the gradients when the memory ran out cannot be told: the
passes of the step that were done before it are then done again, from no gradients.
"""

from __future__ import annotations

import gc
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate.utils.memory import clear_device_cache
from torch import nn

from phlora.data.collate import Batch, halves
from phlora.errors import NoRoomError
from phlora.measure import MEMORY_ERRORS, is_out_of_memory

_log = logging.getLogger(__name__)


class Counting(Protocol):
    """What pieces know of a trainer: it counts what passes do, and says how far the last one came."""

    model: nn.Module
    is_in_backward: bool

    def counts(self) -> Any: ...

    def put_back(self, counts: Any) -> None: ...


@dataclass(frozen=True)
class Passes:
    """The forward and backward passes of a trainer: `one_pass` takes a batch and returns its loss.

    Attributes:
        draw: whether they draw random numbers, as dropout does, which smaller ones draw anew.
    """

    trainer: Counting
    one_pass: Callable[[Batch], torch.Tensor]
    draw: bool = False

    def tried(self, piece: Batch) -> torch.Tensor | None:
        """The loss of a pass; None where the memory ran out."""
        self.trainer.is_in_backward = False
        try:
            return self.one_pass(piece)
        except MEMORY_ERRORS as error:
            if not is_out_of_memory(error):
                raise
        # Behind the `except`, whose error holds every tensor of the pass.
        gc.collect()
        clear_device_cache()
        return None


class Pieces:
    """The passes of one optimizer step after the other.

    Attributes:
        most_positions: of a piece, once a larger one did not fit; None: nothing is cut.
    """

    def __init__(self) -> None:
        self.most_positions: int | None = None
        self._done: list[Batch] = []

    def begin_step(self) -> None:
        self._done = []

    def run(self, batch: Batch, passes: Passes, *, when: str) -> torch.Tensor:
        """The loss of a micro-batch, whose gradients are added to those of its optimizer step.

        Args:
            when: for the line that tells of it, such as "at step 3".

        Raises:
            NoRoomError: one row alone does not fit.
        """
        losses, trainer, too_large = [], passes.trainer, 0
        # Those that are done again were counted before.
        todo = deque((piece, False) for piece in self._cut(batch))
        while todo:
            piece, is_again = todo.popleft()
            before = trainer.counts()
            loss = passes.tried(piece)
            if loss is not None:
                self._done.append(piece)
                if is_again:
                    trainer.put_back(before)
                else:
                    losses.append(loss)
                continue
            trainer.put_back(before)
            too_large = max(too_large, num_positions(piece))
            smaller = [(half, is_again) for half in self._smaller(piece)]
            if trainer.is_in_backward:
                trainer.model.zero_grad()
                todo.extendleft(reversed(smaller))
                todo.extendleft((done, True) for done in reversed(self._done))
                self._done = []
            else:
                todo.extendleft(reversed(smaller))
        if too_large:
            _log.warning(
                "Out of memory %s with %s positions in one pass: it is done in passes of %s at most, and so is "
                "all that follows; the result is the same%s.",
                when,
                f"{too_large:,}",
                f"{self.most_positions:,}",
                " but for dropout and noise, which are drawn anew" if passes.draw else "",
            )
        return torch.stack(losses).sum() if len(losses) > 1 else losses[0]

    def _smaller(self, piece: Batch) -> tuple[Batch, Batch]:
        found = halves(piece)
        if found is None:
            raise _one_row_too_large(piece)
        self.most_positions = max(map(num_positions, found))
        return found

    def _cut(self, batch: Batch) -> list[Batch]:
        if self.most_positions is None or num_positions(batch) <= self.most_positions:
            return [batch]
        parts = halves(batch)
        return [batch] if parts is None else [piece for part in parts for piece in self._cut(part)]


def num_positions(batch: Batch) -> int:
    """Positions that a pass computes, padding too."""
    return int(batch["input_ids"].numel())


def _one_row_too_large(batch: Batch) -> NoRoomError:
    rows, origins = batch.get("rows") or (), batch.get("origins") or ()
    named = [str(origin) for origin in (*origins, *(row.origin for row in rows)) if origin is not None]
    return NoRoomError(
        f"One row alone, of {num_positions(batch):,} tokens, does not fit into the memory",
        where=named[0] if named else "",
        fix="shorten the row or lower training_config.max_length, set training_config.activation_memory: recompute, "
        "or store the base in 4 bits (model.quantization: nf4)",
    )
