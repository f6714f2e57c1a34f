"""Types of tensors: llama.cpp's mixes, its fallbacks, and rows that are read back as what they were."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from phlora.errors import ConfigError, MissingExtraError, ModelError
from phlora.export.gguf_types import TYPES, encode, encoded_shape, require_type, tensor_type

# How far a row may be from what is read back, as a share of its largest value: half a step of the type.
ERRORS = {"F32": 0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 0.005, "Q6_K": 0.04, "Q5_K": 0.06, "Q4_K": 0.12}
ERRORS |= {"Q5_0": 0.07, "Q5_1": 0.07}


@pytest.mark.parametrize("kind", ERRORS)
def test_rows_are_read_back(kind: str) -> None:
    if "_K" in kind or kind.startswith("Q5"):
        pytest.importorskip("libgguf")
    rows = torch.randn(6, 512, generator=torch.Generator().manual_seed(0))
    packed = encode(rows, kind, name="x")
    shape, dtype, num_bytes = encoded_shape((6, 512), kind)
    assert packed.shape == shape and packed.dtype == dtype and packed.nbytes == num_bytes
    back = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind]).astype(np.float32)
    largest = rows.abs().amax(1, keepdim=True)
    assert ((torch.from_numpy(back) - rows).abs() / largest).max() <= ERRORS[kind]


def test_eight_bits_of_both_libraries_are_the_same_bytes() -> None:
    libgguf = pytest.importorskip("libgguf")
    rows = torch.randn(4, 256, generator=torch.Generator().manual_seed(1))
    assert np.array_equal(encode(rows, "Q8_0", name="x"), libgguf.quantize_rows(rows.numpy(), 8))


@pytest.mark.parametrize(
    ("name", "file_type", "layer", "kind"),
    [
        ("blk.0.attn_qkv.weight", "q4_k_m", 0, "Q5_K"),
        ("blk.0.attn_qkv.weight", "q5_k_m", 0, "Q6_K"),
        ("blk.3.attn_v.weight", "q4_k_m", 3, "Q6_K"),
        ("blk.4.attn_v.weight", "q4_k_m", 4, "Q4_K"),
        ("blk.31.ffn_down.weight", "q5_k_m", 31, "Q6_K"),
        ("blk.5.ffn_up.weight", "q4_k_m", 5, "Q4_K"),
        ("blk.6.ffn_down.weight", "q6_k", 6, "Q6_K"),
        ("blk.6.ffn_down.weight", "q8_0", 6, "Q8_0"),
        ("token_embd.weight", "q4_k_m", None, "Q4_K"),
    ],
)
def test_mixes_are_llama_cpps(name: str, file_type: str, layer: int | None, kind: str) -> None:
    """As `llama_tensor_get_type` of llama-quant.cpp has them for 32 layers."""
    found = tensor_type(name, (3072, 3072), file_type, layer=layer, num_layers=32, is_head=False)
    assert found == kind


def test_the_head_keeps_more_and_norms_keep_all() -> None:
    assert tensor_type("output.weight", (10, 256), "q4_k_m", layer=None, num_layers=2, is_head=True) == "Q6_K"
    assert (
        tensor_type("output_norm.weight", (256,), "q4_k_m", layer=None, num_layers=2, is_head=False) == "F32"
    )


@pytest.mark.parametrize(("columns", "kind"), [(256, "Q4_K"), (576, "Q5_0"), (112, "F16")])
def test_rows_that_blocks_do_not_divide_fall_back(columns: int, kind: str) -> None:
    name = "blk.1.ffn_up.weight"
    assert tensor_type(name, (4, columns), "q4_k_m", layer=1, num_layers=8, is_head=False) == kind


def test_values_beyond_float16_are_named() -> None:
    with pytest.raises(ModelError, match="(?s)blk.0.x holds values beyond.*bf16"):
        encode(torch.tensor([[1e6, 0.0]]), "F16", name="blk.0.x")


def test_types_are_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert require_type("Q8_0") == "q8_0" and set(TYPES) >= {"f32", "f16", "bf16", "q4_k_m", "q5_k_m", "q6_k"}
    with pytest.raises(ConfigError, match="did you mean `q4_k_m`"):
        require_type("q4_k_n")
    monkeypatch.setattr("phlora.extras.is_installed", lambda module: False)
    with pytest.raises(MissingExtraError, match=r"phlora\[gguf\].*q8_0"):
        require_type("q4_k_m")
