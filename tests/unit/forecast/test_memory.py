"""Weights as they are stored, optimizers, and what else a peak is made of."""

from __future__ import annotations

import pytest
import torch

from phlora.adapters.attach import attach, lora_settings
from phlora.config import QuantizationConfig
from phlora.forecast.blueprint import Blueprint, draw_up
from phlora.forecast.memory import Setup, forecast_memory, optimizer_bytes, weight_bytes
from phlora.forecast.trace import PassShape
from phlora.models.quantization import quantize, stored_bytes
from phlora.models.storage import Storage
from phlora.models.tiny import tiny_phi3

CPU, FULL = torch.device("cpu"), Storage(dtype=torch.float32)


@pytest.fixture(scope="module")
def blueprint() -> Blueprint:
    return draw_up(tiny_phi3()[0].config, lora_settings({"r": 4}), dtype=torch.float32)


def test_a_blueprint_counts_what_the_model_has(blueprint: Blueprint) -> None:
    model = tiny_phi3()[0]
    weights = sum(p.nbytes for p in model.parameters())
    summary = attach(model, {"r": 4}).summary
    assert blueprint.summary == summary
    assert weight_bytes(blueprint, FULL) == weights
    assert not blueprint.layers_differ and all(p.is_meta for p in blueprint.model.parameters())


@pytest.mark.parametrize("name, double", [("nf4", True), ("nf4", False), ("int8", True)])
def test_quantised_weights_take_what_bitsandbytes_stores(
    blueprint: Blueprint, name: str, double: bool
) -> None:
    pytest.importorskip("bitsandbytes")
    model = tiny_phi3()[0]
    quantization = QuantizationConfig(type=name, double_quant=double)  # type: ignore[arg-type]
    quantize(model, quantization, device=CPU)
    # bitsandbytes counts tables of 16 and 256 numbers with each layer, which a model of this size notices.
    assert weight_bytes(blueprint, Storage(dtype=torch.float32, quantization=quantization)) == pytest.approx(
        stored_bytes(model), rel=0.12
    )


def test_weights_in_16_bits_take_half(blueprint: Blueprint) -> None:
    halved, norms = weight_bytes(blueprint, Storage(dtype=torch.bfloat16)), 5 * 64 * 4
    assert 2 * (halved - norms) == weight_bytes(blueprint, FULL) - norms


@pytest.mark.parametrize(
    "name, state",
    [("adamw_torch_fused", 8), ("adamw_torch", 8), ("sgd", 0), ("adamw_8bit", 2), ("lion_8bit", 1)],
)
def test_optimizers_keep_what_they_keep(name: str, state: int) -> None:
    assert optimizer_bytes(name, 1000) == 1000 * state


def test_adamw_keeps_what_is_forecast() -> None:
    weight = torch.nn.Parameter(torch.ones(100, 7))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    kept = sum(x.nbytes for x in optimizer.state[weight].values() if x.dim())
    assert optimizer_bytes("adamw_torch", weight.numel()) == kept


def test_the_parts_add_up_and_answers_count_where_they_take_more(blueprint: Blueprint) -> None:
    def memory(cache: int) -> dict[str, int]:
        shape = PassShape(2, 40, 20, masked=True)
        setup = Setup(blueprint, FULL, CPU, shape, cache_bytes=cache, resident=1000)
        found = forecast_memory(setup)
        assert found.peak == sum(found.parts.values()) and found.by_device() == {"cpu": dict(found.parts)}
        return dict(found.parts)

    training, answering = memory(0), memory(1 << 30)
    assert training["activations"] > 0 and "keys and values of answers" not in training
    assert answering["keys and values of answers"] == 1 << 30 and "activations" not in answering
    assert training["weights"] == answering["weights"]


def test_a_stored_weight_needs_a_dense_buffer(blueprint: Blueprint) -> None:
    shape = PassShape(2, 40, 20, masked=True)
    plain, stored = (
        forecast_memory(Setup(blueprint, Storage(dtype=dtype), CPU, shape))
        for dtype in (torch.float32, torch.bfloat16)
    )
    widest = blueprint.sizes.largest
    more = stored.parts["buffers"] - plain.parts.get("buffers", 0)
    assert more == pytest.approx(4 * widest, rel=0.1)
