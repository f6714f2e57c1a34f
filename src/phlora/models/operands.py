"""The frozen weight of a layer as the operand that `phlora.lora` multiplies by, whatever it is stored as."""

from __future__ import annotations

from torch import Tensor, nn

from phlora.errors import ModelError
from phlora.lora.operands import DenseWeight, FrozenWeight, WidenedWeight
from phlora.models.stored_layers import StoredLinear


def frozen_weight(module: nn.Module) -> FrozenWeight:
    """The operand `W (N, K)` of a linear layer: `nn.Linear`, a stored one, transformers' `Conv1D`, or bitsandbytes'.

    Nothing is copied or dequantised here, so it may be asked for at every forward pass.

    Raises:
        ModelError: the layer stores its weight in a way that is not known.
    """
    if is_quantized(module):
        # Only a model that is quantised already needs the package, and then it is installed.
        from phlora.models import bnb

        return bnb.operand(module)
    if isinstance(module, StoredLinear):
        return WidenedWeight(module.weight)
    if type(module).__name__ == "Conv1D":
        weight = module.weight
        assert isinstance(weight, Tensor)
        return DenseWeight(weight.t())
    if isinstance(module, nn.Linear) and module.weight.is_floating_point():
        return DenseWeight(module.weight)
    raise ModelError(
        f"The weight of a `{type(module).__name__}` cannot be multiplied by",
        expected="a linear layer in 16 or 32 bits, or one that bitsandbytes quantised",
    )


def is_operand(module: nn.Module) -> bool:
    """Whether a layer's weight is stored otherwise than it is computed with, so that only `frozen_weight` reads it."""
    return isinstance(module, StoredLinear) or is_quantized(module)


def is_quantized(module: nn.Module) -> bool:
    """Whether bitsandbytes stores the weight of this layer; told by names, without importing it."""
    return any(
        kind.__name__ in ("Linear4bit", "Linear8bitLt") and kind.__module__.startswith("bitsandbytes.")
        for kind in type(module).__mro__
    )
