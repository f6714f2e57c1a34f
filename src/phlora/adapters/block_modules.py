"""Adapters on row blocks of one weight, in the places that PEFT's LoRA layer has for those on all of it.

An adapter on row blocks has a `BlockUp` in the place of `lora_B`, and with DoRA a `BlockMagnitude` in that of
`lora_magnitude_vector`. Their state dicts hold the plain, block-diagonal `lora_B.weight` and the lengths of all rows,
and so do their attributes `weight`: what PEFT reads, saves, loads and swaps is a plain adapter. One that starts from
PiSSA or OLoRA has a `StartedDown` and a `StartedUp`, which hold beside what is trained what it started from.

Legend: `N` out, `K` in, `R` rank; the sums run over the adapted blocks.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn

from phlora.adapters.blockform import (
    block_factors,
    fitting_blocks,
    from_block_diagonal,
    plain_rank,
    to_block_diagonal,
)
from phlora.adapters.plain_weight import PartsOf, PlainWeight
from phlora.errors import ModelError
from phlora.lora.blocks import RowBlock, rank_slices
from phlora.lora.functional import in_rows


class _ByRows(nn.Module, abc.ABC):
    """One parameter for each adapted row block, in the place where PEFT has one `weight` for all rows, and in the
    state dict that one."""

    blocks: tuple[RowBlock, ...]

    @property
    def parts(self) -> list[Tensor]:
        """What is trained, in the order of `blocks`: parameters, or what stands in their place for a while."""
        return [getattr(self, _name(block)) for block in self.blocks]

    @property
    def part_names(self) -> list[str]:
        """Their names as parameters of this module."""
        return [_name(block) for block in self.blocks]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise ModelError(
                f"The weight of a {type(self).__name__} is put together from its row blocks, and cannot be exchanged",
                where=", ".join(self.part_names),
                fix="exchange these parameters, or write into `weight.data`",
            )
        if name == "_hf_hook":
            for hook in getattr(value, "hooks", [value]):
                if getattr(hook, "weights_map", None) is not None:
                    hook.weights_map = PartsOf(hook.weights_map, self)
        super().__setattr__(name, value)

    @abc.abstractmethod
    def joined(self) -> Tensor:
        """The one `weight` for all rows, in a dtype that loses nothing."""

    @abc.abstractmethod
    def receive(self, plain: Tensor) -> Sequence[Tensor]:
        """Keep what is not trained of a `weight` for all rows, and return the values for `parts`."""

    def _put(self, values: Iterable[Tensor]) -> None:
        with torch.no_grad():
            for part, value in zip(self.parts, values, strict=True):
                part.copy_(value)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        weight = self.joined()
        destination[f"{prefix}weight"] = weight if keep_vars else weight.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take the blocks out of a plain `weight`, or out of a tensor for each, as `named_parameters` gives them.

        Raises:
            ModelError: the plain weight is none of these blocks.
        """
        key, names = f"{prefix}weight", [f"{prefix}{_name(block)}" for block in self.blocks]
        known = [key]
        if key in state_dict:
            values = self.receive(state_dict[key])
        elif any(name in state_dict for name in names):
            known = names
            values = self._receive_parts(state_dict, names, missing_keys, error_msgs)
        else:
            missing_keys.append(key)
            return
        if strict:
            unexpected_keys += [k for k in state_dict if k.startswith(prefix) and k not in known]
        if not local_metadata.get("assign_to_params_buffers", False):
            return self._put(values)
        for block, part, value in zip(self.blocks, self.parts, values, strict=True):
            setattr(self, _name(block), nn.Parameter(value.clone(), requires_grad=part.requires_grad))

    def _receive_parts(
        self,
        state_dict: Mapping[str, Tensor],
        names: Sequence[str],
        missing_keys: list[str],
        error_msgs: list[str],
    ) -> list[Tensor]:
        values = []
        for name, part in zip(names, self.parts, strict=True):
            value = state_dict.get(name)
            if value is None:
                missing_keys.append(name)
            elif value.shape != part.shape:
                error_msgs.append(
                    f"size mismatch for {name}: copying a param with shape {tuple(value.shape)} from checkpoint, "
                    f"the shape in current model is {tuple(part.shape)}."
                )
                value = None
            values.append(part.detach() if value is None else value)
        return values

    def extra_repr(self) -> str:
        return ", ".join(
            f"{block.name}: {tuple(part.shape)}" for block, part in zip(self.blocks, self.parts, strict=True)
        )


class BlockUp(_ByRows):
    """The B_i (N_i, R_i) of the adapted row blocks, in the place where PEFT has one `lora_B (N, R)`.

    Args:
        lora_B: initial values, in the order of `blocks`.
        blocks: rows, ranks and scalings.
        out_features: N of the fused weight.
    """

    bias = None

    def __init__(self, lora_B: Iterable[Tensor], blocks: Sequence[RowBlock], *, out_features: int) -> None:
        super().__init__()
        self.blocks = tuple(blocks)
        self.in_features, self.out_features = plain_rank(blocks), out_features
        for block, B in zip(self.blocks, lora_B, strict=True):
            # A copy: a view would keep all of the plain matrix alive.
            self.register_parameter(_name(block), nn.Parameter(B.detach().clone()))

    @property
    def values(self) -> Sequence[Tensor]:
        """The B_i (N_i, R_i), trained or not."""
        return self.parts

    @property
    def weight(self) -> Tensor:
        """The block-diagonal `lora_B (N, ΣR_i)`, made anew; writing into it writes into the blocks."""
        plain = self.joined().to(self.parts[0].dtype)
        return PlainWeight.of(self, plain, plain)

    def scaled(self, scaling: float) -> list[RowBlock]:
        """The blocks when the plain form's scaling is `scaling`, as PEFT's methods may have set it."""
        factors = block_factors(self.blocks)
        return [
            dataclasses.replace(block, scaling=scaling * factor)
            for block, factor in zip(self.blocks, factors, strict=True)
        ]

    def forward(self, u: Tensor) -> Tensor:
        """(..., ΣR_i) -> (..., N), zero where no block is."""
        factors = block_factors(self.blocks)
        parts = [
            nn.functional.linear(u[..., columns], B.to(u.dtype)) * factor
            for columns, factor, B in zip(rank_slices(self.blocks), factors, self.values, strict=True)
        ]
        return in_rows(parts, self.blocks, dim=-1, size=self.out_features)

    def take(self, plain: Tensor, *, swaps: bool = True) -> None:
        """Become another plain `lora_B (N, R)`, of any rank, as hot swapping asks.

        The blocks stay, with other ranks where need be; one that is no adapter on these blocks makes all rows one.

        Args:
            plain: the values.
            swaps: whether they may be those of another adapter; else the blocks have to stay as they are.

        Raises:
            ModelError: the blocks have to stay, and there are values between them.
        """
        plain, like = plain.detach(), self.parts[0]
        if not swaps:
            return self._put(self.receive(plain))
        blocks = fitting_blocks(plain, self.blocks)
        values = from_block_diagonal(plain.to(like.device), blocks, dtype=like.dtype)
        if blocks == self.blocks:
            return self._put(values)
        self._parameters.clear()
        self.blocks, self.in_features = blocks, plain_rank(blocks)
        for block, value in zip(blocks, values, strict=True):
            B = nn.Parameter(value.clone(), requires_grad=like.requires_grad)
            self.register_parameter(_name(block), B)

    def joined(self) -> Tensor:
        return to_block_diagonal(self.values, self.blocks, out_features=self.out_features)

    def receive(self, plain: Tensor) -> Sequence[Tensor]:
        return from_block_diagonal(plain, self.blocks, dtype=self.parts[0].dtype)


class _Started(_ByRows):
    """With a buffer beside each part: what the part started from."""

    def _register(self, halves: Iterable[tuple[Tensor, Tensor]]) -> None:
        for block, (value, start) in zip(self.blocks, halves, strict=True):
            # Copies, as views would keep all of the plain matrix alive.
            self.register_parameter(_name(block), nn.Parameter(value.detach().clone()))
            self.register_buffer(f"start_{block.name}", start.detach().clone(), persistent=False)

    @property
    def starts(self) -> list[Tensor]:
        """What is not trained, in the order of `blocks`."""
        return [getattr(self, f"start_{block.name}") for block in self.blocks]

    def _keep(self, halves: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor]:
        values = []
        for buffer, (value, start) in zip(self.starts, halves, strict=True):
            buffer.copy_(start.detach())
            values.append(value)
        return values


def _halved(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    first, second = x.chunk(2, dim)
    return first, second


class StartedDown(_Started):
    """The A_i (R_i/2, K) of the row blocks, each above the A⁰_i that it started from, as `lora_A (ΣR_i, K)`.

    Args:
        lora_A: initial values (ΣR_i, K).
        blocks: rows, ranks and scalings.
    """

    bias = None

    def __init__(self, lora_A: Tensor, blocks: Sequence[RowBlock]) -> None:
        super().__init__()
        self.blocks = tuple(blocks)
        self.in_features, self.out_features = lora_A.shape[1], plain_rank(blocks)
        self._register(self._halves(lora_A))

    @property
    def weight(self) -> Tensor:
        """`lora_A (ΣR_i, K)`, made anew; writing into it writes into the blocks."""
        plain = self.joined()
        return PlainWeight.of(self, plain, plain)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., ΣR_i)."""
        return nn.functional.linear(x, self.joined())

    def take(self, plain: Tensor, *, swaps: bool = True) -> None:
        """Become another `lora_A` of the same rank.

        Raises:
            ModelError: its rank is another.
        """
        self._put(self.receive(plain.detach()))

    def joined(self) -> Tensor:
        return torch.cat([half for pair in zip(self.parts, self.starts, strict=True) for half in pair])

    def receive(self, plain: Tensor) -> Sequence[Tensor]:
        if plain.shape != (self.out_features, self.in_features):
            raise ModelError(
                f"lora_A has the shape {tuple(plain.shape)}",
                expected=f"({self.out_features}, {self.in_features}), the values that are trained and those before",
                fix="load the adapter instead of swapping it in",
            )
        return self._keep(self._halves(plain))

    def _halves(self, plain: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [_halved(plain[rows], 0) for rows in rank_slices(self.blocks)]


class StartedUp(_Started, BlockUp):
    """A `BlockUp` whose B_i (N_i, R_i/2) stand beside the -B⁰_i that they started from.

    Args:
        lora_B: initial values (N_i, R_i), in the order of `blocks`.
        blocks: rows, ranks and scalings.
        out_features: N of the fused weight.
    """

    def __init__(self, lora_B: Iterable[Tensor], blocks: Sequence[RowBlock], *, out_features: int) -> None:
        nn.Module.__init__(self)
        self.blocks = tuple(blocks)
        self.in_features, self.out_features = plain_rank(blocks), out_features
        self._register([_halved(B, 1) for B in lora_B])

    @property
    def values(self) -> list[Tensor]:
        return [torch.cat(pair, 1) for pair in zip(self.parts, self.starts, strict=True)]

    def take(self, plain: Tensor, *, swaps: bool = True) -> None:
        """Become another plain `lora_B (N, R)` on the same blocks.

        Raises:
            ModelError: it is none of these blocks and ranks.
        """
        self._put(self.receive(plain.detach()))

    def receive(self, plain: Tensor) -> Sequence[Tensor]:
        return self._keep([_halved(B, 1) for B in super().receive(plain)])


class BlockMagnitude(_ByRows, DoraLinearLayer):
    """DoRA's lengths `m (N,)` of the rows, trained for the adapted blocks and for no other row.

    `W' = m · (W + s·BA) / ‖W + s·BA‖` by rows, as PEFT computes it. The rows in no block keep the length that they
    have in `W`, and stay what they are to the bit.

    Args:
        lengths: initial values `(N,)`.
        blocks: the rows that are adapted.
    """

    lengths: Tensor

    def __init__(self, lengths: Tensor, blocks: Sequence[RowBlock]) -> None:
        super().__init__(fan_in_fan_out=False)  # type: ignore[no-untyped-call]
        self.blocks = tuple(blocks)
        self.register_buffer("lengths", lengths.detach().clone(), persistent=False)
        for block in self.blocks:
            self.register_parameter(_name(block), nn.Parameter(self.lengths[block.rows].clone()))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The lengths `(N,)` of all rows, made anew."""
        return self.joined()

    def get_weight_norm(self, *args: Any, **kwargs: Any) -> Tensor:
        """The lengths `(N,)` that PEFT divides `weight` by.

        For a row in no block it is its own: another device or dtype than that of `lengths` would round its norm in
        another way, and the row would move.
        """
        norm = super().get_weight_norm(*args, **kwargs)
        divisor = self.lengths.to(torch.promote_types(norm.dtype, self.lengths.dtype), copy=True)
        for block in self.blocks:
            divisor[block.rows] = norm[block.rows]
        return divisor

    def start(self, lengths: Tensor) -> None:
        """Take the lengths `(N,)` of all rows."""
        self._put(self.receive(lengths))

    def joined(self) -> Tensor:
        lengths = self.lengths.clone()
        for block, part in zip(self.blocks, self.parts, strict=True):
            lengths[block.rows] = part
        return lengths

    def receive(self, plain: Tensor) -> Sequence[Tensor]:
        if plain.shape != self.lengths.shape:
            raise ModelError(
                f"lora_magnitude_vector has the shape {tuple(plain.shape)}",
                expected=f"one length for each of {len(self.lengths)} rows",
            )
        # Those in no block too, so that what is saved again is what was loaded.
        self.lengths.copy_(plain.detach())
        return [plain[block.rows].to(self.lengths) for block in self.blocks]


def _name(block: RowBlock) -> str:
    """`weight_q_proj`: what optimizers and reports read as `lora_B.default.weight…`."""
    return f"weight_{block.name}"
