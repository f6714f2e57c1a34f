"""loralib's layers: the same names, signatures, parameter names, shapes, initialisation and numerics.

Drawn under the same seed, a layer here equals loralib 0.1.2's bit for bit, and the state dicts are
interchangeable. What is different is said at each class and, with the reasons, in docs/lora.md.

Legend: `T` tokens, `N` out, `K` in, `R` rank, `V` embeddings, `D` embedding width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phlora.errors import ConfigError
from phlora.lora import functional, fused
from phlora.lora.base import LoRALayer, is_untouched
from phlora.lora.blocks import RowBlock, row_blocks, split_rows


def _leave_pytorch_fast_path(module: nn.Module, args: object) -> None:
    """Does nothing: torch's fused encoder layer reads `linear1.weight` itself unless a hook is attached."""


class _BlockLinear(LoRALayer, nn.Linear):
    """A linear layer adapted on row blocks of its weight; `Linear` and `MergedLinear` only lay them out."""

    # The one place to choose between the fused functions and the reference; an instance may override it.
    lora_blocks = staticmethod(fused.lora_blocks)
    fan_in_fan_out = False
    blocks: tuple[RowBlock, ...] = ()

    def _adapt(self, blocks: tuple[RowBlock, ...], *, fan_in_fan_out: bool) -> None:
        """Adds the parameters of the blocks and initialises everything."""
        self.blocks = blocks
        self.register_forward_pre_hook(_leave_pytorch_fast_path)
        if self.r > 0:
            self.weight.requires_grad = False
        if blocks:
            rows = sum(block.size for block in blocks)
            self.lora_A = nn.Parameter(self.weight.new_zeros(self.r * len(blocks), self.in_features))
            self.lora_B = nn.Parameter(self.weight.new_zeros(rows, self.r))
        self.reset_parameters()
        self.fan_in_fan_out = fan_in_fan_out
        if fan_in_fan_out:
            # Contiguous, unlike loralib's, because safetensors stores nothing else.
            self.weight.data = self.weight.data.t().contiguous()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self._weight_nk(self.weight), a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features) if self.in_features > 0 else 0
            nn.init.uniform_(self.bias, -bound, bound)
        self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        """A as torch initialises a linear layer, B zero: the adapter starts as no change."""
        if self.is_adapted():
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)

    def merged_weight(self) -> Tensor:
        weight = self._weight_nk(self.weight)
        merged = fused.merged_weight(
            weight, self.lora_A, split_rows(self.lora_B, self.blocks), blocks=self.blocks
        )
        return self._weight_nk(merged).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        if not self.blocks:
            return F.linear(x, self._weight_nk(self.weight), self.bias)
        return self.lora_blocks(
            x,
            self._weight_nk(self.weight),
            self.lora_A,
            split_rows(self.lora_B, self.blocks),
            blocks=self.blocks,
            bias=self.bias,
            dropout=self._adapter_dropout(),
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.r}, lora_alpha={self.lora_alpha}"

    def _weight_nk(self, weight: Tensor) -> Tensor:
        """Between the stored layout and (N, K), either way."""
        return weight.t() if self.fan_in_fan_out else weight


class Linear(_BlockLinear):
    """`y = x Wᵀ + bias + (lora_alpha / r) · dropout(x) Aᵀ Bᵀ`.

    Parameters: weight (N, K), or (K, N) with `fan_in_fan_out`; bias (N,); lora_A (R, K); lora_B (N, R).

    Raises:
        ConfigError: `r` is negative or no whole number; `lora_alpha` or `lora_dropout` is out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        enabled = ["weight"] if self.r > 0 else []
        blocks = row_blocks({"weight": out_features}, enabled, r=self.r, scaling=self.scaling)
        self._adapt(blocks, fan_in_fan_out=fan_in_fan_out)


class MergedLinear(_BlockLinear):
    """One linear layer that stands for several, stacked by rows: each enabled one has its own A and B.

    Parameters: weight (N, K), or (K, N) with `fan_in_fan_out`; bias (N,); lora_A (n·R, K) and lora_B (ΣN_i,
    R), stacked over the n enabled blocks. Unlike loralib's, the blocks may have unequal sizes, no (N, K)
    delta is ever built in a forward pass, and a layer with nothing enabled is a plain linear layer (frozen
    when `r > 0`).

    Args:
        enable_lora: which of the blocks are adapted, in the order of the rows.
        out_features_per_block: rows of each block when they are not all equal, such as (3072, 1024, 1024) for
            grouped-query q | k | v.

    Raises:
        ConfigError: the blocks do not add up to `out_features`; or as for `Linear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: Sequence[bool] = (False,),
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        *,
        out_features_per_block: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        sizes = _block_sizes(out_features, enable_lora, out_features_per_block)
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        self.enable_lora = list(enable_lora)
        self.out_features_per_block = sizes
        enabled = [str(i) for i, on in enumerate(enable_lora) if on and self.r > 0]
        named = {str(i): size for i, size in enumerate(sizes)}
        blocks = row_blocks(named, enabled, r=self.r, scaling=self.scaling)
        self._adapt(blocks, fan_in_fan_out=fan_in_fan_out)

    @property
    def lora_ind(self) -> Tensor:
        """Which rows of the weight are adapted: (N,) bool."""
        rows = [
            torch.full((size,), bool(on), device=self.weight.device)
            for on, size in zip(self.enable_lora, self.out_features_per_block, strict=True)
        ]
        return torch.cat(rows)

    def zero_pad(self, x: Tensor) -> Tensor:
        """The adapted rows, (ΣN_i, ...), among zeros where nothing is adapted: (N, ...)."""
        adapted = self.lora_ind
        return x.new_zeros(len(adapted), *x.shape[1:]).index_put((adapted,), x)

    def merge_AB(self) -> Tensor:
        """`B A`, without the scaling, in the layout of the weight; with gradient."""
        unscaled = [dataclasses.replace(block, scaling=1.0) for block in self.blocks]
        delta = functional.delta_weight(
            self.lora_A,
            split_rows(self.lora_B, self.blocks),
            blocks=unscaled,
            out_features=self.out_features,
        )
        return self._weight_nk(delta)


def _block_sizes(
    out_features: int, enable_lora: Sequence[bool], out_features_per_block: Sequence[int] | None
) -> tuple[int, ...]:
    count = len(enable_lora)
    if out_features_per_block is None:
        if count and out_features % count == 0:
            return (out_features // count,) * count
        raise ConfigError(
            f"out_features={out_features} cannot be cut into {count} equal blocks",
            where="MergedLinear.enable_lora",
            expected="one entry per block, and blocks of equal size unless their sizes are given",
            fix="give the sizes, for example out_features_per_block=(3072, 1024, 1024)",
        )
    sizes = tuple(out_features_per_block)
    if len(sizes) != count or sum(sizes) != out_features or min(sizes, default=0) < 1:
        raise ConfigError(
            f"{len(sizes)} sizes, in sum {sum(sizes)}, for {count} blocks and out_features={out_features}",
            where="MergedLinear.out_features_per_block",
            expected="one positive size per entry of enable_lora, adding up to out_features",
        )
    return sizes


class Embedding(LoRALayer, nn.Embedding):
    """`y = W[i] + (lora_alpha / r) · Aᵀ[i] Bᵀ` for each index `i`.

    Parameters: weight (V, D); lora_A (R, V), zero at first; lora_B (D, R), normal. `max_norm` bounds the
    pretrained rows only.

    Raises:
        ConfigError: as for `Linear`.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 0,
        lora_alpha: float = 1,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, 0.0, merge_weights)
        if self.r > 0:
            self.lora_A = nn.Parameter(self.weight.new_zeros(self.r, num_embeddings))
            self.lora_B = nn.Parameter(self.weight.new_zeros(embedding_dim, self.r))
            self.weight.requires_grad = False
        if kwargs.get("_weight") is None:
            self.reset_parameters()
        else:
            self.reset_lora_parameters()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, embeddings: Tensor, freeze: bool = True, **kwargs: Any
    ) -> Self:
        """Like `nn.Embedding.from_pretrained`, with `r`, `lora_alpha` and `merge_weights` besides.

        The values are kept, and the storage is shared with `embeddings`, as torch does.
        """
        return cls(*embeddings.shape, _weight=embeddings, _freeze=freeze, **kwargs)

    def reset_parameters(self) -> None:
        nn.Embedding.reset_parameters(self)
        self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        """A zero, B normal: the adapter starts as no change."""
        if self.is_adapted():
            nn.init.zeros_(self.lora_A)
            nn.init.normal_(self.lora_B)

    def merged_weight(self) -> Tensor:
        block = RowBlock(name="weight", start=0, stop=self.num_embeddings, r=self.r, scaling=self.scaling)
        return fused.merged_weight(self.weight, self.lora_B.t(), [self.lora_A.t()], blocks=[block])

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_adapted():
            return nn.Embedding.forward(self, x)
        y = nn.Embedding.forward(self, x)
        wide = torch.promote_types(y.dtype, self.lora_A.dtype)
        after_A = F.embedding(
            x, self.lora_A.t(), self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq
        ).to(wide)
        return torch.add(y, after_A @ self.lora_B.t().to(wide), alpha=self.scaling).to(y.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.r}, lora_alpha={self.lora_alpha}"


class ConvLoRA(LoRALayer):
    """A convolution with weight `W + (lora_alpha / r) · (B A)` reshaped to the shape of W.

    Parameters, for a kernel (k_1, ..., k_d) and g groups: conv.weight, conv.bias; lora_A (R·k_d, in·k_d);
    lora_B (out/g·k_1···k_(d-1), R·k_d). For the square kernels of `Conv2d`, and for kernels of 1, these are
    loralib's shapes; its lora_B has the wrong number of rows for any other kernel, and the layer cannot run.

    `lora_dropout` acts on the input of the low-rank part, as in `Linear` (loralib ignores it here).
    Checkpoints of a plain convolution (`weight`, `bias`) load too.

    Raises:
        ConfigError: as for `Linear`.
    """

    base_name = "conv.weight"
    conv: nn.Conv1d | nn.Conv2d | nn.Conv3d

    def __init__(
        self,
        conv_module: type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d],
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        self.conv = conv_module(in_channels, out_channels, kernel_size, **kwargs)  # type: ignore[arg-type]
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        if self.r > 0:
            *outer, last = self.conv.kernel_size
            rows, columns = out_channels // self.conv.groups * math.prod(outer), in_channels * last
            weight = self.conv.weight
            self.lora_A = nn.Parameter(weight.new_zeros(self.r * last, columns))
            self.lora_B = nn.Parameter(weight.new_zeros(rows, self.r * last))
            weight.requires_grad = False
        self.reset_parameters()

    @property
    def weight(self) -> Tensor:
        """The pretrained weight; for code that asks a convolution for its dtype or device."""
        return self.conv.weight

    @property
    def bias(self) -> Tensor | None:
        return self.conv.bias

    def reset_parameters(self) -> None:
        self.conv.reset_parameters()
        self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        """A as torch initialises a linear layer, B zero: the adapter starts as no change."""
        if self.is_adapted():
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)

    def delta_weight(self) -> Tensor:
        """`(lora_alpha / r) · B A` in the shape of the weight, with gradient."""
        return (self.lora_B @ self.lora_A).view(self.conv.weight.shape) * self.scaling

    def merged_weight(self) -> Tensor:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        delta = (self.lora_B.to(dtype) @ self.lora_A.to(dtype)).view(self.weight.shape)
        return torch.add(self.weight.to(dtype), delta, alpha=self.scaling).detach().to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        conv: Callable[[Tensor, Tensor, Tensor | None], Tensor] = self.conv._conv_forward
        base: Callable[[Tensor], Tensor] = self.conv
        if not self.is_adapted():
            return base(x)
        delta = self.delta_weight().to(self.conv.weight.dtype)
        # In 16 bits the sum of the weights would round small deltas away.
        narrow = delta.dtype.itemsize < 4 or torch.is_autocast_enabled(x.device.type)
        if narrow or self._adapter_dropout() or not is_untouched(self.conv):
            return base(x) + conv(self.lora_dropout(x), delta, None)
        return conv(x, self.conv.weight + delta, self.conv.bias)

    def extra_repr(self) -> str:
        return f"r={self.r}, lora_alpha={self.lora_alpha}"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name in ("weight", "bias"):
            if f"{prefix}{name}" in state_dict and f"{prefix}conv.{name}" not in state_dict:
                state_dict[f"{prefix}conv.{name}"] = state_dict.pop(f"{prefix}{name}")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class Conv1d(ConvLoRA):
    """`ConvLoRA` over `nn.Conv1d`: Conv1d(in_channels, out_channels, kernel_size, r, lora_alpha, ...)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv1d, *args, **kwargs)


class Conv2d(ConvLoRA):
    """`ConvLoRA` over `nn.Conv2d`: Conv2d(in_channels, out_channels, kernel_size, r, lora_alpha, ...)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv2d, *args, **kwargs)


class Conv3d(ConvLoRA):
    """`ConvLoRA` over `nn.Conv3d`: Conv3d(in_channels, out_channels, kernel_size, r, lora_alpha, ...)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv3d, *args, **kwargs)
