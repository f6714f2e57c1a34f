"""What is forecast of a step's bytes is what autograd keeps and what operations make of a real one."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from phlora.adapters.attach import attach, lora_settings
from phlora.adapters.speed import speed_up
from phlora.data.collate import Collator, PackedCollator, SharedPrefixCollator
from phlora.forecast.blueprint import draw_up
from phlora.forecast.passes import shape_of
from phlora.forecast.trace import LiveBytes, step_bytes
from phlora.models.activation_memory import recomputing_mlps
from phlora.models.lm_head import trained_tokens
from phlora.models.tiny import tiny_phi3

CPU = torch.device("cpu")
START = list(range(5, 45))
ROWS = [
    {
        "input_ids": [*START, *range(50, 50 + n)],
        "labels": [-100] * len(START) + [*range(50, 50 + n)],
    }
    for n in (21, 9, 15, 33)
]
LAYOUTS = {"padded": Collator(0), "packed": PackedCollator(), "shared": SharedPrefixCollator()}


def config_of(layers: int) -> Any:
    config = tiny_phi3()[0].config
    config.num_hidden_layers = layers
    return config


def real_model(layers: int, settings: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    model = tiny_phi3()[0]
    made = type(model)(config_of(layers)).to(dtype)
    model = attach(made, settings).model
    speed_up(model)
    return model.train()


def without_numbers() -> list[Any]:
    return [x for x in gc.get_objects() if type(x) is FakeTensor]


@contextmanager
def at_level(model: Any, level: str) -> Iterator[None]:
    if level == "recompute":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    with recomputing_mlps(model) if level == "recompute_mlp" else nullcontext():
        yield


def measured(model: nn.Module, batch: dict[str, Any], level: str) -> tuple[int, int]:
    """The most that operations of a real step had alive at once, and the bytes of the gradients."""
    live = LiveBytes()
    tensors = [value for value in batch.values() if isinstance(value, torch.Tensor)]
    live.leave_out([*model.parameters(), *model.buffers(), *tensors])
    with at_level(model, level), live:
        trained_tokens(model, batch, entropy=True).losses.sum().backward()
    return live.peak, sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("level", ["keep", "recompute_mlp", "recompute"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_peak_is_that_of_a_real_step(layout: str, level: str) -> None:
    batch = LAYOUTS[layout](ROWS)
    blueprint = draw_up(config_of(3), lora_settings({"r": 4}), dtype=torch.float32)
    forecast = step_bytes(blueprint, shape_of(batch), device=CPU, level=level)
    peak, gradients = measured(real_model(3, {"r": 4}, torch.float32), batch, level)
    assert forecast.gradients == gradients
    # Index tensors and masks of so small a model are a percent of its bytes.
    assert forecast.peak == pytest.approx(peak, rel=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_is_what_autograd_keeps(dtype: torch.dtype) -> None:
    batch = LAYOUTS["shared"](ROWS)
    blueprint = draw_up(config_of(2), lora_settings({"r": 4}), dtype=dtype)
    forecast = step_bytes(blueprint, shape_of(batch), device=CPU)
    model, kept = real_model(2, {"r": 4}, dtype), {}
    others = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in others:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held = trained_tokens(model, batch, entropy=True)
    assert held.losses is not None
    # The head keeps a row of the model's width for each trained token, which is counted with it.
    assert forecast.kept + forecast.head >= sum(kept.values())
    assert forecast.kept == pytest.approx(sum(kept.values()), rel=0.03)


def test_layers_that_are_alike_are_laid_on() -> None:
    shape = shape_of(LAYOUTS["shared"](ROWS))
    for level in ("keep", "recompute_mlp", "recompute"):
        deep = step_bytes(
            draw_up(config_of(7), lora_settings({"r": 4}), dtype=torch.float32),
            shape,
            device=CPU,
            level=level,
        )
        batch = LAYOUTS["shared"](ROWS)
        peak, gradients = measured(real_model(7, {"r": 4}, torch.float32), batch, level)
        assert deep.gradients == gradients and deep.peak == pytest.approx(peak, rel=0.03), level


def test_gradients_of_an_earlier_pass_are_counted() -> None:
    blueprint = draw_up(config_of(2), lora_settings({"r": 4}), dtype=torch.float32)
    shape = shape_of(LAYOUTS["shared"](ROWS))
    first, later = (
        step_bytes(blueprint, shape, device=CPU, accumulates=accumulates) for accumulates in (False, True)
    )
    assert first.gradients == later.gradients and first.peak < later.peak <= first.peak + later.gradients


def test_an_adapter_that_singles_layers_out_is_traced_whole() -> None:
    settings = {"r": 4, "layers_to_transform": [0, 5], "target_modules": ["o_proj", "down_proj"]}
    shape = shape_of(LAYOUTS["shared"](ROWS))
    blueprint = draw_up(config_of(6), lora_settings(settings), dtype=torch.float32)
    assert blueprint.layers_differ
    peak, gradients = measured(real_model(6, settings, torch.float32), LAYOUTS["shared"](ROWS), "keep")
    forecast = step_bytes(blueprint, shape, device=CPU)
    assert forecast.gradients == gradients and forecast.peak == pytest.approx(peak, rel=0.03)


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"lora_dropout": 0.1}, {"target_modules": ["q_proj"]}]
)
def test_whatever_an_adapter_does_is_counted(settings: dict[str, Any]) -> None:
    settings = {"r": 4, **settings}
    batch = LAYOUTS["padded"](ROWS)
    blueprint = draw_up(config_of(2), lora_settings(settings), dtype=torch.float32)
    peak, gradients = measured(real_model(2, settings, torch.float32), batch, "keep")
    forecast = step_bytes(blueprint, shape_of(batch), device=CPU)
    assert forecast.gradients == gradients and forecast.peak == pytest.approx(peak, rel=0.05)


LONG = [
    {"input_ids": [*START, *[50 + n % 100 for n in range(k, k + 200)]], "labels": [-100] * 40 + [*range(200)]}
    for k in (0, 7)
]


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 32}, {"longrope": True}], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_of_a_forecast_stays_behind(layout: str, changes: dict[str, Any]) -> None:
    """A tensor without numbers in some cache would be computed with later, as any numbers that lie there."""
    batch = LAYOUTS[layout](LONG)
    model = attach(tiny_phi3(**changes)[0], {"r": 4}).model.train()
    speed_up(model)
    before = trained_tokens(model, batch).losses
    blueprint = draw_up(tiny_phi3(**changes)[0].config, lora_settings({"r": 4}), dtype=torch.float32)
    # A compiler that ran earlier in this process may have left some of its own.
    earlier = without_numbers()
    for level in ("keep", "recompute_mlp", "recompute"):
        step_bytes(blueprint, shape_of(batch), device=CPU, level=level)
    gc.collect()
    assert not [x for x in without_numbers() if all(x is not y for y in earlier)]
    after = trained_tokens(model, batch).losses
    assert before is not None and after is not None and torch.equal(before, after)


SMALL = dict(
    vocab_size=300, hidden_size=64, intermediate_size=112, num_hidden_layers=3, num_attention_heads=4
)


@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig, Qwen2Config], ids=lambda kind: kind.model_type)
@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_other_families_are_counted_too(kind: Any, layout: str) -> None:
    config = kind(**SMALL, num_key_value_heads=2)
    batch = LAYOUTS[layout](ROWS)
    model = attach(AutoModelForCausalLM.from_config(copy.deepcopy(config)), {"r": 4}).model
    peak, gradients = measured(speed_up(model).train(), batch, "keep")
    blueprint = draw_up(config, lora_settings({"r": 4}), dtype=torch.float32)
    forecast = step_bytes(blueprint, shape_of(batch), device=CPU)
    assert forecast.gradients == gradients and forecast.peak == pytest.approx(peak, rel=0.03)
