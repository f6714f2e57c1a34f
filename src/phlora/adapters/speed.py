"""Acceleration, whole: every exact and faster way to compute a model with its adapters, or none of them.

What is exchanged stands in `adapters.peft_layer` (LoRA layers) and `models.lean_layers` (all other layers); here alone
it is decided whether a model has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import get_args

from torch import nn

from phlora.adapters.peft_layer import fuse_lora, unfuse_lora
from phlora.config import Speed
from phlora.lora import matmul
from phlora.models import lean_layers
from phlora.models.allocator import return_freed_memory
from phlora.models.lean_layers import SpeedPass, speed_pass
from phlora.models.products import choose_libraries
from phlora.parameters import require_choice


def speed_up(model: nn.Module) -> nn.Module:
    """Compute with everything that is exact and faster, in place: fused LoRA layers, lean layers around them, products
    by the library that is faster for each kind of them, memory that is kept from step to step.

    Parameters, their names and what is saved stay as they are, also for an optimizer that holds them. Call it once it
    is known what trains: a layer whose own weight trains is left as it is, and adapters with DoRA or another variant,
    and layers on other kinds of weights, are computed by PEFT. `slow_down` takes it back.

    Returns:
        The same model.
    """
    _hasten(model)
    return model


def slow_down(model: nn.Module) -> nn.Module:
    """Undo `speed_up`: the layers are those of PEFT and transformers again, in place; adapters stay as they are.

    Returns:
        The same model.
    """
    return lean_layers.slow_down(unfuse_lora(model))


@contextmanager
def at_speed(model: nn.Module, speed: Speed, *, libraries: Mapping[str, str] | None = None) -> Iterator[str]:
    """Compute as a run's `speed` says: `auto` is `speed_up`, `reference` is `slow_down` and products by torch alone.

    The layers stay as they were made when the context is left; both kinds compute the same. Memory that was kept goes
    back to the system then.

    Args:
        model: with its adapters in place.
        speed: the run's setting.
        libraries: which library multiplies each kind of product, as `matmul.libraries` gave it to a run that is
            continued: so that it goes on with the same bits. None: those that are faster here.

    Yields:
        One line for the log.
    """
    require_choice(speed, get_args(Speed), where="speed")
    if speed == "auto":
        try:
            yield _hasten(model, libraries).describe()
        finally:
            return_freed_memory()
        return
    slow_down(model)
    with matmul.torch_alone():
        yield "speed is reference: the layers of PEFT and transformers, products by torch"


def _hasten(model: nn.Module, libraries: Mapping[str, str] | None = None) -> SpeedPass:
    if libraries:
        matmul.use_libraries(libraries)
    else:
        choose_libraries(model)
    return speed_pass(fuse_lora(model))
