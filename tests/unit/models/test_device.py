import pytest
import torch
from transformers import LlamaConfig, Phi3Config

from phlora.errors import ConfigError, EnvironmentProblem, MissingExtraError
from phlora.models import device as choices
from phlora.models.device import choose_attention, choose_device, choose_dtype
from phlora.models.families import widest_product

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_auto_on_a_cpu_takes_bfloat16_only_when_it_is_far_faster(monkeypatch):
    monkeypatch.setattr(choices, "_cpu_seconds", lambda dtype, product: (0.010, 0.003))
    fast = choose_dtype("auto", device=CPU)
    assert fast.value == torch.bfloat16
    assert "3.3 times as fast" in fast.reason
    monkeypatch.setattr(choices, "_cpu_seconds", lambda dtype, product: (0.010, 0.160))
    slow = choose_dtype("auto", device=CPU)
    assert slow.value == torch.float32
    assert "16.0 times slower" in slow.reason and "10.0 ms in float32" in slow.reason


def test_auto_on_this_cpu_is_not_the_slow_one():
    full, half = choices._cpu_seconds(torch.bfloat16, choices._TYPICAL_PRODUCT)
    chosen = choose_dtype("auto", device=CPU).value
    assert full > 0 and half > 0
    assert chosen == (torch.bfloat16 if full >= 3 * half else torch.float32)


def test_what_is_timed_is_the_models_own_widest_product(monkeypatch):
    asked = []
    monkeypatch.setattr(choices, "_cpu_seconds", lambda dtype, product: asked.append(product) or (1.0, 1.0))
    phi3 = Phi3Config(hidden_size=3072, intermediate_size=8192, pad_token_id=0)
    llama = LlamaConfig(hidden_size=576, intermediate_size=1536)
    for config in (phi3, llama):
        choice = choose_dtype("auto", device=CPU, product=widest_product(config))
    assert asked == [(16384, 3072), (1536, 576)]
    assert "1536 x 576" in choice.reason


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_on_a_gpu_asks_the_hardware(monkeypatch, has_bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert choose_dtype("auto", device=CUDA).value == expected
    assert choose_dtype("auto", device=torch.device("mps")).value == torch.float32


def test_asked_for_dtype_is_taken_with_a_warning_of_its_cost(monkeypatch):
    monkeypatch.setattr(choices, "_cpu_seconds", lambda dtype, product: (0.01, 0.08))
    chosen = choose_dtype("torch.bfloat16", device=CPU)
    assert chosen.value == torch.bfloat16
    assert "8.0 times slower" in chosen.reason
    assert choose_dtype("float32", device=CPU).reason == "asked for"


def test_unknown_names_get_the_nearest():
    with pytest.raises(ConfigError, match="did you mean `bfloat16`"):
        choose_dtype("bfloat6", device=CPU)
    with pytest.raises(ConfigError, match="did you mean `flash_attention_2`"):
        choose_attention("flash_attention", device=CPU)
    with pytest.raises(ConfigError, match="did you mean `cuda`"):
        choose_device("cuad")
    with pytest.raises(ConfigError, match="no device"):
        choose_device("cuda:x")


def test_device_that_is_not_there_is_told():
    if not torch.backends.mps.is_available():
        with pytest.raises(EnvironmentProblem, match="no device `mps`"):
            choose_device("mps")
    with pytest.raises(EnvironmentProblem, match="no device `cuda:99`"):
        choose_device("cuda:99")
    assert choose_device("cpu") == CPU


def test_flash_attention_is_used_where_it_is_and_never_demanded(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose_attention("auto", device=CUDA, dtype=torch.bfloat16).value == "sdpa"
    with pytest.raises(MissingExtraError, match="pip install flash-attn"):
        choose_attention("flash_attention_2", device=CUDA, dtype=torch.bfloat16)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert choose_attention("auto", device=CUDA, dtype=torch.bfloat16).value == "flash_attention_2"
    assert choose_attention("auto", device=CUDA, dtype=torch.float32).value == "sdpa"
    assert choose_attention("auto", device=CPU, dtype=torch.bfloat16).value == "sdpa"
    with pytest.raises(EnvironmentProblem, match="CUDA"):
        choose_attention("flash_attention_2", device=CPU, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="bfloat16 or float16"):
        choose_attention("flash_attention_2", device=CUDA, dtype=torch.float32)
    assert choose_attention("eager", device=CPU).value == "eager"
