"""A base model is known again by its weights, whatever they are loaded as and whatever stands on them."""

import copy
import hashlib

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from phlora.models.fingerprint import fingerprint, keep_fingerprint, split_fingerprint
from phlora.models.load import load_model
from phlora.testing import tiny_phi3

FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def test_fingerprint_is_the_same_in_float32_and_bfloat16_and_under_an_adapter(tiny_folder):
    full, half = (
        load_model(tiny_folder, device="cpu", dtype=dtype).fingerprint for dtype in ("float32", "bfloat16")
    )
    assert full == half
    adapted = get_peft_model(tiny_phi3()[0], LoraConfig(target_modules=FUSED))
    assert fingerprint(adapted) == full


def test_fingerprint_tells_weights_of_the_same_shape_apart(tiny_folder):
    base = fingerprint(tiny_phi3()[0])
    assert base == fingerprint(tiny_phi3()[0])
    assert base != fingerprint(tiny_phi3(seed=1)[0])
    assert load_model(tiny_folder, device="cpu", dtype="float16").fingerprint != base


def test_it_is_the_hash_of_names_shapes_and_256_rounded_values() -> None:
    """Written down in so many words, because fingerprints of earlier versions stand in saved adapters."""
    module = nn.Module()
    module.weight = nn.Parameter(torch.arange(3000.0).view(30, 100) / 7)
    module.lora_A = nn.Parameter(torch.ones(2))
    values = [number / 7 for number in range(0, 3000, 11)][:256]
    rounded = torch.tensor(values).to(torch.bfloat16).to(torch.float32).numpy().tobytes()
    digest = hashlib.sha256(b"weight (30, 100)" + rounded).hexdigest()[:16]
    assert fingerprint(module) == f"bfloat16:{digest}"


def test_a_model_in_float16_says_so_and_can_be_asked_in_either() -> None:
    base, half = tiny_phi3()[0], tiny_phi3()[0].half()
    assert fingerprint(half).startswith("float16:")
    assert fingerprint(half) == fingerprint(base, precision="float16")
    assert fingerprint(base).startswith("bfloat16:")


def test_one_weight_of_each_tensor_is_enough_to_tell() -> None:
    base, other = tiny_phi3()[0], tiny_phi3()[0]
    other.model.norm.weight.data[0] += 0.5
    assert fingerprint(base) != fingerprint(other)


def test_a_model_that_is_stored_otherwise_keeps_that_of_its_weights() -> None:
    model = tiny_phi3()[0]
    known, in_half = fingerprint(model), fingerprint(model, precision="float16")
    keep_fingerprint(model, "nf4")
    model.model.norm.weight.data.zero_()
    for kept in (model, copy.deepcopy(model)):
        assert split_fingerprint(fingerprint(kept)) == (known, "nf4")
        assert split_fingerprint(fingerprint(kept, precision="float16")) == (in_half, "nf4")
    assert split_fingerprint(known) == (known, "")
