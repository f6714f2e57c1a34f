"""Linear layers whose weight does not train."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from phlora.lora.autograd import sees_through
from phlora.lora.fused import frozen_linear
from phlora.lora.operands import DenseWeight


class FrozenLinear(nn.Linear):
    """`y = x Wᵀ + b` with a frozen weight: keeps nothing for backward but that weight.

    Made from an `nn.Linear` by exchanging the class, and back the same way. With a weight that trains, under autocast
    and for whoever follows each operation (torch.compile, torch.func) it computes as `nn.Linear` does.
    """

    label: ClassVar[str] = "frozen linears"

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether this layer has a plain weight that is frozen."""
        weight: Any = module.weight
        return is_plain_tensor(weight) and weight.is_floating_point() and not weight.requires_grad

    def forward(self, x: Tensor) -> Tensor:
        plain = x.dtype == self.weight.dtype and not self.weight.requires_grad
        if not plain or torch.is_autocast_enabled(x.device.type) or sees_through():
            return super().forward(x)
        return frozen_linear(x, DenseWeight(self.weight), self.bias)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a layer is `nn.Linear` or its frozen form, and no other kind of it."""
    return type(module) in (nn.Linear, FrozenLinear)


def is_plain_tensor(tensor: object) -> bool:
    """Whether a tensor is its numbers and nothing else, as subclasses may be. One without storage, of the kind in which
    a step is forecast (torch's FakeTensor), stands for a plain one."""
    return type(tensor) in (nn.Parameter, Tensor) or type(tensor).__name__ == "FakeTensor"
