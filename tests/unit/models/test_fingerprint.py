"""A base model is known again by its weights, whatever they are loaded as and whatever stands on them."""

from peft import LoraConfig, get_peft_model

from phlora.models.fingerprint import fingerprint
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
