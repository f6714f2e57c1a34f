"""What every LoRA layer has: its settings, their checks, and what merging means.

No weight is ever written to, and none is kept merged: a layer computes `x Wᵀ + s · x Aᵀ Bᵀ` from the parameters that it
has when it is called, in training and evaluation, merged or not. A kept sum `W + ΔW` would have to notice every
change of W, A and B, and nothing in torch tells of all of them: optimizers with `fused=True`, writes through `.data` or
numpy and exchanged parameters leave no trace. So the output is that of the present parameters; the state dict is the
same merged or not; checkpoints load in either state; a weight that is shared (tied embeddings) stays what it was
for its other users; nothing is rounded in 16 bits. The price is two products of the width of a rank. A plain
checkpoint without it is `merged_state_dict`.
"""

from __future__ import annotations

import math
import operator
from typing import ClassVar, Self

from torch import Tensor, nn

from phlora.errors import ConfigError


class LoRALayer(nn.Module):
    """Base of all LoRA layers: rank, scaling, dropout, and merging that never touches the stored weight.

    Initialised after the torch layer that it extends. A layer with `r == 0` is that torch layer.

    Attributes:
        scaling: `lora_alpha / r`, the factor of `B A`; 0 when `r == 0`.
        merged: what loralib's programs read to know the state; the layer computes the same either way.
        merge_weights: whether `eval()` sets `merged` and `train()` takes it back.
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
        raise self._undefined("merged_weight")

    def reset_lora_parameters(self) -> None:
        """Draws A and B anew, so that the adapter is no change."""
        raise self._undefined("reset_lora_parameters")

    def merge(self) -> None:
        """Marks the layer as merged, until `unmerge()` (or, with `merge_weights`, `train()`)."""
        self.merged = self.is_adapted()

    def unmerge(self) -> None:
        """Marks the layer as not merged."""
        self.merged = False

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.merge_weights:
            self.merged = not mode and self.is_adapted()
        return self

    def _undefined(self, method: str) -> NotImplementedError:
        # Not abstract methods: a layer of somebody's own that needs neither, as loralib's do not, can be made.
        return NotImplementedError(f"{type(self).__name__} does not define {method}()")

    def _adapter_dropout(self) -> float:
        # Asked of the module each time, so that turning dropout modules off from outside works here too.
        return self.lora_dropout.p if self.lora_dropout.training else 0.0


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


def is_untouched(module: nn.Module) -> bool:
    """No hooks and no replaced forward, which computing without calling the module would pass over."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return not any(hooks) and "forward" not in module.__dict__
