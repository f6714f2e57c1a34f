"""What the layers of a model keep for backward, and what they compute again: `activation_memory`.

Legend: `T` tokens, `D` model width, `I` width inside the MLP.

- `keep`: everything that backward needs is kept.
- `recompute_mlp`: a gated MLP keeps nothing of width I. Backward computes its first product again, for a fifth more of
  the step's products; in fp32 that is close to half of what a layer of Phi-3-mini keeps.
- `recompute`: a layer keeps its input (T, D) alone and is computed again as a whole: transformers' gradient
  checkpointing, for a third to a half more.

The values and the gradients are the same to the bit: the same operations run again on the same numbers, with the same
random state where dropout is at work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# From what costs least time to what costs least memory.
LEVELS = ("keep", "recompute_mlp", "recompute")


def can_recompute_mlps(model: nn.Module) -> bool:
    """Whether the model has gated MLPs that can be told to compute again, once the speed pass is over it."""
    return any(hasattr(module, "recomputes") for module in model.modules())


@contextmanager
def recomputing_mlps(model: nn.Module) -> Iterator[int]:
    """Let the gated MLPs of a model compute again in backward what they would keep; yields how many do."""
    mlps: list[Any] = [module for module in model.modules() if hasattr(module, "recomputes")]
    for mlp in mlps:
        mlp.recomputes = True
    try:
        yield len(mlps)
    finally:
        for mlp in mlps:
            mlp.__dict__.pop("recomputes", None)


def computed_again(tensor: Tensor, compute: Callable[[], Tensor]) -> AbstractContextManager[object]:
    """A context in which autograd, where it would keep `tensor` or a view of it, keeps `compute` in its place.

    Backward calls it once for all that would have kept the tensor, under the autocast of the call. `compute` has to
    give the same bits.
    """
    again = _Again(tensor, compute)
    return torch.autograd.graph.saved_tensors_hooks(again.pack, again.unpack)


class _Again:
    def __init__(self, tensor: Tensor, compute: Callable[[], Tensor]) -> None:
        # Not the tensor: it is what nobody shall hold. Who is given this number afterwards is not packed here.
        self._storage = tensor.untyped_storage()._cdata
        self._compute, self._device = compute, tensor.device.type
        self._autocast = torch.is_autocast_enabled(self._device), torch.get_autocast_dtype(self._device)
        self._value: Tensor | None = None
        self._saved = self._taken = 0

    def pack(self, tensor: Tensor) -> Any:
        if tensor.untyped_storage()._cdata != self._storage:
            return tensor
        self._saved += 1
        return tensor.shape, tensor.stride(), tensor.storage_offset()

    def unpack(self, kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if self._value is None:
            enabled, dtype = self._autocast
            with torch.no_grad(), torch.autocast(self._device, dtype=dtype, enabled=enabled):
                self._value = self._compute()
        value, self._taken = self._value, self._taken + 1
        if self._taken % self._saved == 0:
            self._value = None
        return value.as_strided(*kept)


def with_same_randomness(
    module: nn.Module, compute: Callable[[], Tensor], *, device: torch.device
) -> Callable[[], Tensor]:
    """`compute` with the random state of now, where dropout is at work in a module that is about to run."""
    if not any(isinstance(part, nn.Dropout) and part.training and part.p > 0 for part in module.modules()):
        return compute
    devices = [device] if device.type == "cuda" else []
    states = torch.get_rng_state(), [torch.cuda.get_rng_state(each) for each in devices]

    def with_states() -> Tensor:
        with torch.random.fork_rng(devices=devices):
            torch.set_rng_state(states[0])
            for each, state in zip(devices, states[1], strict=True):
                torch.cuda.set_rng_state(state, each)
            return compute()

    return with_states
