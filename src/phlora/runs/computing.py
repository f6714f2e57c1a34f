"""What a run computes with, as far as another process or machine may compute otherwise: `computing` in run.json.

Whoever repeats a run finds here what decides its last digits besides versions and settings. A run that is continued
says what of it has changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from phlora.lora import matmul
from phlora.models import kernels
from phlora.models.lean_layers import chains_of

COMPUTING = "computing"


@dataclass(frozen=True, kw_only=True)
class Computing:
    """What a run computes with.

    Attributes:
        dtype: of what the layers compute: that of autocast, where it is at work.
        adapter_dtypes: of the parameters that train.
        storage: what the frozen weights are stored as.
        products: the library that multiplies in float32; torch chooses for other dtypes.
        matmul_precision: `torch.get_float32_matmul_precision()`.
        kernels: what computes chains of element-wise operations: `compiled` code, or `torch`.
        kernels_digest: of the compiled code; None where torch computes.
        threads: of a product on the CPU; cpu_capability: the instructions that torch uses there.
    """

    dtype: str
    adapter_dtypes: tuple[str, ...]
    storage: str
    products: str
    matmul_precision: str
    kernels: str
    kernels_digest: str | None
    threads: int
    cpu_capability: str

    @classmethod
    def of(cls, model: nn.Module, *, dtype: torch.dtype, storage: str) -> Computing:
        """What a model computes with now, its adapters and its layers as they are in training.

        Args:
            dtype: what is computed in.
            storage: what the frozen weights are stored as.
        """
        parameters = list(model.parameters())
        device = parameters[0].device
        compiled = kernels.digest() if chains_of(model, dtype=dtype, device=device) else None
        return cls(
            dtype=_name(dtype),
            adapter_dtypes=tuple(sorted({_name(p.dtype) for p in parameters if p.requires_grad})),
            storage=storage,
            products=matmul.backend(device),
            matmul_precision=torch.get_float32_matmul_precision(),
            kernels="torch" if compiled is None else "compiled",
            kernels_digest=compiled,
            threads=torch.get_num_threads(),
            cpu_capability=torch.backends.cpu.get_cpu_capability(),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "adapter_dtypes": list(self.adapter_dtypes)}


def changed(before: Mapping[str, Any], now: Computing) -> str | None:
    """One sentence about what a run that is continued computes with otherwise than before; None: all is as it was.

    Args:
        before: `computing` of run.json.
    """
    found = now.to_json()
    names = [name for name, value in found.items() if name in before and before[name] != value]
    if not names:
        return None
    told = ", ".join(f"{name} {before[name]} -> {found[name]}" for name in names)
    return f"The run goes on with other means than before, which may change the last digits: {told}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
