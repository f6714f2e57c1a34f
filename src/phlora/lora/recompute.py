"""A tensor that is cheaper to compute again than to keep.

The input of a linear layer is often one cheap pass over something that is kept anyway: a normalised hidden state, a
gated product. Whoever computes such a tensor may attach to it how to compute it again; a layer that has to keep its
input until backward then keeps what that takes, which is kept already, and recomputes the input. The values are the
same to the bit. A note that gets lost on the way (a cast, a view) costs memory and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

_ATTRIBUTE = "_phlora_recompute"


@dataclass(frozen=True)
class Recompute:
    """`function(*inputs)` gives the tensor again.

    Attributes:
        function: without side effects, and with the same bits every time.
        inputs: what is kept for backward by whoever made the tensor.
    """

    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]


def attach_recompute(tensor: Tensor, recompute: Recompute) -> Tensor:
    """The same tensor, which now says how it is computed again."""
    setattr(tensor, _ATTRIBUTE, recompute)
    return tensor


def recompute_of(tensor: Tensor) -> Recompute | None:
    """What was attached to exactly this tensor, if anything."""
    recompute: Recompute | None = getattr(tensor, _ATTRIBUTE, None)
    return recompute
