"""What a run's `speed` says, done to a model with its adapters: every exact and faster way, or none of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from phlora.adapters import peft_layer
from phlora.config import Speed
from phlora.lora import matmul
from phlora.models.allocator import return_freed_memory
from phlora.models.lean_layers import slow_down, speed_pass


@contextmanager
def at_speed(model: nn.Module, speed: Speed) -> Iterator[str]:
    """Compute at this setting: `auto` with everything that is exact and faster, `reference` with nothing of it.

    The layers stay as they were made when the context is left; both kinds compute the same. Memory that was kept goes
    back to the system then.

    Yields:
        One line for the log.
    """
    if speed == "auto":
        try:
            yield speed_pass(peft_layer.speed_up(model)).describe()
        finally:
            return_freed_memory()
        return
    slow_down(peft_layer.slow_down(model))
    with matmul.torch_alone():
        yield "speed is reference: the layers of PEFT and transformers, products by torch"
