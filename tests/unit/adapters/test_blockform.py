"""Row blocks and the block-diagonal form: the same ΔW, and back bit for bit."""

from __future__ import annotations

import pytest
import torch

from phlora.adapters.blockform import (
    fitting_blocks,
    from_block_diagonal,
    plain_alpha,
    plain_rank,
    plain_scaling,
    to_block_diagonal,
)
from phlora.errors import ModelError
from phlora.lora.blocks import RowBlock, rank_slices, row_blocks
from phlora.lora.functional import delta_weight

SIZES = {"q_proj": 64, "k_proj": 32, "v_proj": 32}


def blocks_of(scaling: dict[str, float] | float, r: dict[str, int] | int = 4) -> tuple[RowBlock, ...]:
    return row_blocks(SIZES, ["q_proj", "v_proj"], r=r, scaling=scaling)


def up_matrices(blocks: tuple[RowBlock, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(block.size, block.r).to(dtype) for block in blocks]


@pytest.mark.parametrize("r", [4, {"q_proj": 6, "v_proj": 3}])
@pytest.mark.parametrize("scaling", [2.0, {"q_proj": 2.0, "v_proj": 0.5}, {"q_proj": 0.7, "v_proj": 2.1}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_is_bit_for_bit(r, scaling, dtype) -> None:
    blocks = blocks_of(scaling, r)
    lora_B = up_matrices(blocks, dtype)
    back = from_block_diagonal(to_block_diagonal(lora_B, blocks, out_features=128), blocks, dtype=dtype)
    assert all(torch.equal(a, b) and a.dtype == dtype for a, b in zip(lora_B, back, strict=True))


@pytest.mark.parametrize("scaling", [2.0, {"q_proj": 0.7, "v_proj": 2.1}])
def test_the_plain_form_has_the_same_delta(scaling) -> None:
    blocks = blocks_of(scaling, {"q_proj": 6, "v_proj": 3})
    lora_A, lora_B = torch.randn(9, 16).double(), [B.double() for B in up_matrices(blocks)]
    plain = to_block_diagonal(lora_B, blocks, out_features=128) @ lora_A * plain_scaling(blocks)
    torch.testing.assert_close(plain, delta_weight(lora_A, lora_B, blocks=blocks, out_features=128))
    assert not plain[64:96].any()


def test_a_plain_scaling_is_alpha_over_rank() -> None:
    blocks = blocks_of(2.0, {"q_proj": 6, "v_proj": 3})
    assert (plain_rank(blocks), plain_alpha(blocks)) == (9, 18)
    assert plain_alpha(blocks, use_rslora=True) == 6


def test_what_lies_outside_the_blocks_is_refused() -> None:
    blocks = blocks_of(2.0)
    plain = to_block_diagonal(up_matrices(blocks), blocks, out_features=128)
    plain[70, 0] = 1e-9
    with pytest.raises(ModelError, match="1 values of lora_B lie outside the blocks q_proj, v_proj"):
        from_block_diagonal(plain, blocks)
    with pytest.raises(ModelError, match=r"the shape \(128, 7\)"):
        from_block_diagonal(plain[:, :7], blocks)


@pytest.mark.parametrize("r", [4, {"q_proj": 6, "v_proj": 3}])
@pytest.mark.parametrize("other", [4, 2, 7, {"q_proj": 1, "v_proj": 8}])
def test_the_ranks_of_a_plain_form_are_told_from_its_zeros(r, other) -> None:
    blocks = blocks_of(2.0, other)
    plain = to_block_diagonal(up_matrices(blocks), blocks, out_features=128)
    assert fitting_blocks(plain, blocks_of(2.0, r)) == blocks


def test_a_plain_form_of_other_blocks_is_one_block() -> None:
    blocks = blocks_of(2.0)
    for plain in (
        torch.randn(128, 8),
        to_block_diagonal(up_matrices(blocks), blocks, out_features=128)[:, :4],
    ):
        (whole,) = fitting_blocks(plain, blocks)
        assert (whole.rows, whole.r, whole.scaling) == (slice(0, 128), plain.shape[1], 2.0)
    assert fitting_blocks(torch.zeros(128, 8), blocks) == blocks


def test_gradients_reach_the_blocks() -> None:
    blocks = blocks_of({"q_proj": 1.0, "v_proj": 2.0})
    lora_B = [B.requires_grad_() for B in up_matrices(blocks)]
    weight = torch.randn(128, 8)
    (to_block_diagonal(lora_B, blocks, out_features=128) * weight).sum().backward()
    for block, columns, B, factor in zip(blocks, rank_slices(blocks), lora_B, [1, 2], strict=True):
        torch.testing.assert_close(B.grad, weight[block.rows, columns] * factor)
