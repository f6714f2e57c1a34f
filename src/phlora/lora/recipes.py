"""A tensor that is cheaper to make again than to keep.

The input of a linear layer is often one cheap pass over something that is kept anyway: a normalised hidden state, a
gated product. Whoever makes such a tensor may attach the recipe to it; a layer that has to keep its input until
backward then keeps the recipe's ingredients, which are kept already, and makes the input again. The values are the
same to the bit. A recipe that gets lost on the way (a cast, a view) costs memory and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

_ATTRIBUTE = "_phlora_recipe"


@dataclass(frozen=True)
class Recipe:
    """`make(*ingredients)` gives the tensor again.

    Attributes:
        make: without side effects, and with the same bits every time.
        ingredients: what is kept for backward by whoever made the tensor.
    """

    make: Callable[..., Tensor]
    ingredients: tuple[Tensor, ...]


def attach_recipe(tensor: Tensor, recipe: Recipe) -> Tensor:
    """The same tensor, which now carries its recipe."""
    setattr(tensor, _ATTRIBUTE, recipe)
    return tensor


def recipe_of(tensor: Tensor) -> Recipe | None:
    """The recipe that was attached to exactly this tensor, if any."""
    recipe: Recipe | None = getattr(tensor, _ATTRIBUTE, None)
    return recipe
