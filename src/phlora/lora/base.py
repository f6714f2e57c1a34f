"""What every LoRA layer has: its settings, their checks, and the merged weight.

The stored weight is never written to. A merged layer computes with a second tensor, `W + ΔW`, that is folded
when it is first needed, folded again when one of the parameters has changed since, and dropped when the layer
is unmerged. So merging is exactly reversible in every dtype; the state dict is the same merged or not;
checkpoints load in either state; a weight that is shared (tied embeddings) stays what it was for its other
users. The price is one more copy of the weight while merged; `merge_weights=False` does without.

In 16 bits `W + ΔW` rounds small deltas away (measured in bf16: an error of 32 % of a delta that is 200 times
smaller than the weight). `eval()` therefore merges only weights of 32 bits and more; `merge()` merges any.
"""

from __future__ import annotations

import math
import operator
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from phlora.errors import ConfigError


class LoRALayer(nn.Module):
    """Base of all LoRA layers: rank, scaling, dropout, and merging that never touches the stored weight.

    Initialised after the torch layer that it extends. A layer with `r == 0` is that torch layer.

    Attributes:
        scaling: `lora_alpha / r`, the factor of `B A`; 0 when `r == 0`.
        merged: whether inference uses the merged weight. Whenever a gradient of lora_A or lora_B is wanted,
            and while torch.compile traces, the layer computes unmerged regardless.
        merge_weights: whether `eval()` merges (weights of 32 bits and more) and `train()` unmerges.
    """

    base_name: ClassVar[str] = "weight"
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self, r: int, lora_alpha: float, lora_dropout: float, merge_weights: bool) -> None:
        kind = type(self).__name__
        self.r = _checked_rank(r, where=f"{kind}.r")
        self.lora_alpha = _checked_alpha(lora_alpha, where=f"{kind}.lora_alpha")
        self.lora_dropout = nn.Dropout(_checked_dropout(lora_dropout, where=f"{kind}.lora_dropout"))
        self.scaling = self.lora_alpha / self.r if self.r else 0.0
        self.merge_weights = merge_weights
        self.merged = False
        self._folded: Tensor | None = None
        self._folded_from: tuple[tuple[int, int, int], ...] = ()

    @property
    def base(self) -> nn.Parameter:
        """The pretrained weight, as stored."""
        weight: nn.Parameter = operator.attrgetter(self.base_name)(self)
        return weight

    def is_adapted(self) -> bool:
        """Whether the layer has LoRA parameters at all."""
        return hasattr(self, "lora_A")

    def merged_weight(self) -> Tensor:
        """`W + ΔW` in the shape and dtype of the stored weight, added in fp32 at least and rounded once."""
        raise NotImplementedError

    def reset_lora_parameters(self) -> None:
        """Draws A and B anew, so that the adapter is no change."""
        raise NotImplementedError

    def merge(self) -> None:
        """Uses the merged weight for inference until `unmerge()` (or, with `merge_weights`, `train()`)."""
        self.merged = self.is_adapted()

    def unmerge(self) -> None:
        """Drops the merged weight; the stored one was never changed."""
        self.merged = False
        self._folded = None

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.merge_weights and mode:
            self.unmerge()
        elif self.merge_weights and self.is_adapted() and self.base.dtype.itemsize >= 4:
            self.merge()
        return self

    def _computes_merged(self) -> bool:
        if not self.merged or torch.compiler.is_compiling():
            return False
        return not (torch.is_grad_enabled() and (self.lora_A.requires_grad or self.lora_B.requires_grad))

    def _folded_weight(self) -> Tensor:
        """The merged weight, folded anew if a parameter was replaced or written to since the last time."""
        state = tuple(_state_of(p) for p in (self.base, self.lora_A, self.lora_B))
        if self._folded is None or state != self._folded_from:
            # An inference tensor could not be used later where autograd records.
            with torch.inference_mode(False), torch.no_grad():
                self._folded, self._folded_from = self.merged_weight(), state
        return self._folded

    def _adapter_dropout(self) -> float:
        # Asked of the module each time, so that turning dropout modules off from outside works here too.
        return self.lora_dropout.p if self.lora_dropout.training else 0.0

    def _check_rank_fits(self, rows: int, columns: int) -> None:
        if self.r > min(rows, columns):
            raise ConfigError(
                f"The rank {self.r} is larger than the smaller side of a {rows} x {columns} weight",
                where=f"{type(self).__name__}.r",
                expected=f"a whole number from 0 to {min(rows, columns)}",
            )

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._folded = None
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_folded": None}


def _state_of(parameter: Tensor) -> tuple[int, int, int]:
    """Identity, storage, write count: one changes whenever values are given, except through `.data.copy_`."""
    version = -1 if parameter.is_inference() else parameter._version
    return id(parameter), parameter.data_ptr(), version


def _checked_rank(r: int, *, where: str) -> int:
    expected = "a whole number, 0 (no LoRA) or more"
    try:
        rank = operator.index(r)
    except TypeError:
        raise ConfigError(f"The rank is {r!r}", where=where, expected=expected) from None
    if rank < 0 or isinstance(r, bool):
        raise ConfigError(f"The rank is {r!r}", where=where, expected=expected)
    return rank


def _checked_alpha(lora_alpha: float, *, where: str) -> float:
    if isinstance(lora_alpha, (int, float)) and math.isfinite(lora_alpha) and lora_alpha > 0:
        return lora_alpha
    raise ConfigError(f"lora_alpha is {lora_alpha!r}", where=where, expected="a number above 0")


def _checked_dropout(lora_dropout: float, *, where: str) -> float:
    if isinstance(lora_dropout, (int, float)) and 0 <= lora_dropout < 1:
        return float(lora_dropout)
    raise ConfigError(
        f"lora_dropout is {lora_dropout!r}", where=where, expected="a number from 0 up to, but not, 1"
    )
