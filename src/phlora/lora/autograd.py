"""What the autograd functions of this package owe to those who differentiate otherwise than once and backward.

An autograd function replaces formulas that torch could follow by products that it cannot. So:

- `sees_through()` tells that somebody follows the operations themselves: the compiler, a tracer, the transforms of
  `torch.func`, forward-mode differentiation. The plain formulas are computed then.
- A backward pass that is recorded itself (`create_graph=True`) computes its gradients by the plain formulas too
  (`recorded_gradients`), so that second derivatives are right. Where the formulas' inputs are not kept, the
  gradients come with an error for whoever differentiates them (`first_derivatives_only`). torch's own
  `once_differentiable` is silent there unless the incoming gradient depends on something.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_Backward = Callable[..., tuple[Tensor | None, ...]]


def sees_through() -> bool:
    """Whether the plain formulas have to be computed, because somebody follows each operation."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def is_recorded_backward() -> bool:
    """Whether a backward pass has to be made of operations that are followed: it is recorded, or batched by vmap."""
    return torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()


def recorded_gradients(
    formula: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    gradients: Tensor | Sequence[Tensor],
) -> list[Tensor | None]:
    """`Jᵀ dy` of a formula, by operations that autograd can follow: what a backward pass that is recorded returns.

    Args:
        formula: takes `inputs`.
        inputs: as they were saved for backward, None where there is none. Those that require no gradient get none.
        gradients: of each output.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views: one input may have been computed from another.
        own = [x.view_as(x) if x is not None and x.requires_grad else x for x in inputs]
        outputs = formula(*own)
    wanted = [x for x in own if x is not None and x.requires_grad]
    found = iter(
        torch.autograd.grad(outputs, wanted, gradients, create_graph=create_graph, allow_unused=True)
        if wanted
        else ()
    )
    return [next(found) if x is not None and x.requires_grad else None for x in own]


def first_derivatives_only(what: str) -> Callable[[_Backward], _Backward]:
    """A backward pass whose results cannot be differentiated: an error names `what` as soon as somebody does."""

    def decorate(backward: _Backward) -> _Backward:
        @functools.wraps(backward)
        def wrapped(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
            if not torch.is_grad_enabled():
                return backward(ctx, *gradients)
            with torch.no_grad():
                results = backward(ctx, *gradients)
            return only_first(results, gradients, what)

        return wrapped

    return decorate


def only_first(
    results: Sequence[Tensor | None], sources: Sequence[Tensor | None], what: str
) -> tuple[Tensor | None, ...]:
    """The same gradients, made from `sources`; a RuntimeError for whoever differentiates them."""
    given = [x.detach().requires_grad_() for x in results if x is not None]
    guarded = iter(_OnlyFirst.apply(what, len(given), *given, *sources))  # type: ignore[no-untyped-call]
    return tuple(None if x is None else next(guarded) for x in results)


class _OnlyFirst(torch.autograd.Function):
    """The first `count` tensors as they are."""

    @staticmethod
    def forward(ctx: Any, what: str, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.what = what
        return tuple(None if x is None else x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(f"{ctx.what} cannot be differentiated twice")
