"""PEFT's LoRA layer for linear weights, computed by the fused functions, on the whole weight or on row blocks of it.

`LoraLinear` is PEFT's own `lora.Linear` with another `forward`: one autograd node instead of five, and no scaled copies
of the output. Parameters, names, state dict and every method of `PeftModel` stay PEFT's. So a layer becomes ours, and
PEFT's again, by changing its class: nothing is copied, and optimizers and hooks do not notice.

What the fused functions do not cover goes to PEFT's forward: several active adapters, mixed batches, merged or
disabled adapters, DoRA and the other variants, `lora_bias`, hooks on the inner layers, unusual weights.

Legend: `N` out, `K` in, `R` rank; the sums run over the adapted blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import layer as peft_lora
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from phlora.adapters.block_modules import BlockUp, StartedDown, StartedUp
from phlora.errors import ModelError
from phlora.lora import fused
from phlora.lora.base import is_untouched
from phlora.lora.blocks import RowBlock
from phlora.lora.frozen import is_plain_linear, is_plain_tensor
from phlora.lora.operands import FrozenWeight
from phlora.models.operands import frozen_weight, is_operand, is_quantized


class LoraLinear(peft_lora.Linear):
    """`y = x Wᵀ + b + scaling · dropout(x) Aᵀ Bᵀ`, see the module; made by `fuse_lora`, never constructed.

    Merging rounds once, from fp32, and keeps the weight as it was, so that unmerging restores every bit, with DoRA and
    other variants too; until then the layer holds both. A weight that was written to while merged is left to PEFT,
    which subtracts.
    """

    _before_merge: dict[str, Tensor]
    _after_merge: tuple[torch.dtype, Tensor] | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        special = args or any(value is not None for value in kwargs.values())
        adapters = [name for name in self.active_adapters if name in self.lora_A]
        if special or self.disable_adapters or self.merged or len(adapters) != 1:
            return super().forward(x, *args, **kwargs)
        (name,) = adapters
        weight = self._weight_for(x) if self._is_plain(name) else None
        if weight is None:
            return super().forward(x, *args, **kwargs)
        dropout, base = self.lora_dropout[name], self._base
        lora_A, lora_B, blocks = self._pair(name)
        return fused.lora_blocks(
            x,
            weight,
            lora_A,
            lora_B,
            blocks=blocks,
            bias=base.bias,
            dropout=dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0,
        )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the base weight; see PEFT's `merge` for the arguments.

        Raises:
            ModelError: the base weight is quantised.
            ValueError: `safe_merge` was asked for and a merged weight is not finite.
        """
        if is_quantized(self.base_layer):
            raise ModelError(
                "An adapter cannot be added to a quantised weight without losing most of it",
                fix="merge it into the base model in 16 or 32 bits",
            )
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        for name in names:
            weight = self._base_weight()
            if self._is_plain(name):
                before = weight.data
                self._merge_plain(name, safe_merge)
            else:
                before = weight.data.clone()
                super().merge(safe_merge, [name])
            self._before_merge[name] = before
        if names:
            weight = self._base_weight()
            self._after_merge = weight.dtype, _marks(weight)

    def _merge_plain(self, name: str, safe_merge: bool) -> None:
        lora_A, lora_B, blocks = self._pair(name)
        weight = self._base_weight()
        merged = fused.merged_weight(weight, lora_A, lora_B, blocks=blocks)
        if safe_merge and not merged.isfinite().all():
            raise ValueError(f"The weight merged with the adapter {name} is not finite")
        weight.data = merged
        self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight again."""
        if not self.merged:
            return super().unmerge()
        weight, names = self._base_weight(), list(self.merged_adapters)
        exact = all(name in self._before_merge for name in names) and self._is_as_merged(weight)
        # What else a variant or a bias of its own has put somewhere, PEFT takes back.
        if not exact or any(name in self.lora_variant or self.lora_bias[name] for name in names):
            super().unmerge()
        if exact:
            weight.data = self._before_merge[names[0]].to(weight.device, weight.dtype)
        self.merged_adapters.clear()
        self._before_merge.clear()
        self._after_merge = None

    def _base_weight(self) -> Tensor:
        weight: Tensor = self._base.weight
        return weight

    def _is_as_merged(self, weight: Tensor) -> bool:
        """Whether the weight is what merging made it; where its dtype was changed since, that cannot be told."""
        dtype, marks = self._after_merge or (None, None)
        if marks is None or dtype != weight.dtype or weight.is_meta:
            return True
        return torch.equal(_marks(weight), marks.to(weight.device))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """As torch's.

        Raises:
            ModelError: other values for a merged weight, or for an adapter that is merged into it.
        """
        merged = set(self.merged_adapters)
        for name, value in self.state_dict().items() if merged else ():
            place, _, rest = name.partition(".")
            concerned = place == "base_layer" or rest.partition(".")[0] in merged
            new = state_dict.get(f"{prefix}{name}")
            if concerned and new is not None and not torch.equal(new.to(value.device), value):
                raise ModelError(
                    f"The adapter {', '.join(self.merged_adapters)} is merged into the weight, so that loaded values "
                    "would be added to it or taken out of it again",
                    where=f"{prefix}{name}",
                    fix="call unmerge_adapter() before loading",
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _get_name(self) -> str:
        # `print(model)` shows what PEFT shows.
        return "Linear"

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._before_merge.pop(adapter_name, None)

    @property
    def _base(self) -> Any:
        """The base layer, without types: PEFT's own say `Tensor | Module` of everything."""
        return self.base_layer

    def _pair(self, name: str) -> tuple[Tensor, Sequence[Tensor], list[RowBlock]]:
        """lora_A (ΣR_i, K), the B_i and their blocks; a plain adapter is one block of all rows."""
        modules: Any = (self.lora_A[name], self.lora_B[name])
        (down, up), scaling = modules, self.scaling[name]
        # Asked of torch's class, at every pass of every layer: an abstract one takes ten times as long to answer.
        lora_A = down.weight if isinstance(down, nn.Linear) else down.joined()
        if not isinstance(up, nn.Linear):
            return lora_A, up.values, up.scaled(scaling)
        # Hot swapping changes the rank of the weight, and not what the module says of itself.
        rows, rank = up.weight.shape
        whole = RowBlock(name="", start=0, stop=rows, r=rank, scaling=scaling)
        return lora_A, [up.weight], [whole]

    def _is_plain(self, name: str) -> bool:
        """Whether the formula of the fused functions is all that this adapter does."""
        down, up, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
        return (
            name not in self.lora_variant
            and not self.lora_bias[name]
            and isinstance(self.scaling[name], int | float)
            and type(down) in (nn.Linear, StartedDown)
            and type(up) in (nn.Linear, BlockUp, StartedUp)
            and type(dropout) in (nn.Dropout, nn.Identity)
            and all(is_untouched(module) for module in (down, up, dropout))
        )

    def _weight_for(self, x: Tensor) -> Tensor | FrozenWeight | None:
        """The base weight, if all that the base layer does is to multiply x by it."""
        base = self._base
        if not is_untouched(base):
            return None
        if is_operand(base):
            return frozen_weight(base)
        dense = is_plain_linear(base) and is_plain_tensor(base.weight)
        if dense and (x.dtype == base.weight.dtype or torch.is_autocast_enabled(x.device.type)):
            weight: Tensor = base.weight
            return weight
        return None


def fuse_lora(model: nn.Module) -> nn.Module:
    """Let the plain LoRA layers that PEFT put on linear weights compute with the fused functions, in place.

    Parameters, their names and what is saved stay as they are, also for an optimizer that holds them. Adapters with
    DoRA or another variant, and layers on other kinds of weights, are computed by PEFT.

    Returns:
        The same model.
    """
    found: Any = [module for module in model.modules() if type(module) is peft_lora.Linear and _fits(module)]
    for layer in found:
        layer.__class__ = LoraLinear
        layer._before_merge = {}
    return model


def unfuse_lora(model: nn.Module) -> nn.Module:
    """Undo `fuse_lora`: every layer is computed by PEFT again, adapters on row blocks included.

    Returns:
        The same model.
    """
    found: Any = [module for module in model.modules() if type(module) is LoraLinear]
    for layer in found:
        if layer.merged:
            layer.unmerge()
        layer.__class__ = peft_lora.Linear
        del layer._before_merge
        layer.__dict__.pop("_after_merge", None)
    return model


def _fits(layer: peft_lora.Linear) -> bool:
    plain = not layer.fan_in_fan_out and not layer.merged
    return plain and (is_plain_linear(layer.base_layer) or is_operand(layer.base_layer))


def _marks(weight: Tensor) -> Tensor:
    """Sums of the bits of every column and every row: what tells one weight from another, on its own device."""
    codes = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    bits = weight.detach().contiguous().view(codes)
    return torch.cat([bits.sum(0, dtype=torch.int64), bits.sum(1, dtype=torch.int64)])
