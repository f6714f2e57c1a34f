"""Folding an adapter into the weights of its base, and measuring what that did to the logits.

`W + ΔW` is formed in fp32 for one layer after the other, whatever the dtype of the base, and rounded once. Rounding
is all that a merge may change; what it changed is measured on logits, and `BOUNDS` says how much is accepted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from phlora.errors import ModelError
from phlora.measure import is_out_of_memory


@dataclass(frozen=True, kw_only=True)
class Bound:
    """How far a merged model may be from base and adapter.

    Attributes:
        largest: the largest difference of a logit, as a share of the largest logit.
        changed: the share of positions whose most likely token may change; one position always may.
    """

    largest: float
    changed: float


# By the dtype that is saved. fp32 leaves 1e-6 of rounding, a wrong factor or a lost layer far more than 1e-3. In 16
# bits each weight is off by up to 2^-9 (bfloat16) or 2^-12 (float16) of itself, which moves logits by some hundredths
# and turns near ties.
BOUNDS = {
    "float32": Bound(largest=1e-3, changed=0.001),
    "bfloat16": Bound(largest=0.1, changed=0.01),
    "float16": Bound(largest=0.02, changed=0.01),
}


def fold_adapter(model: PeftModel) -> tuple[nn.Module, int]:
    """The base model with its active adapter added to its weights, in place, and how many modules changed.

    Each sum is formed in fp32 and rounded once to the dtype that the base's weight has.

    Raises:
        ModelError: the adapter changes a weight that the model uses twice (tied embeddings), or it cannot be merged.
    """
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    replaced = [name for name, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    _refuse_tied(model, [*adapted, *replaced])
    try:
        for layer in adapted.values():
            _fold_layer(layer)
        merged = model.unload()
    except (ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(f"The adapter cannot be merged ({error})") from error
    return merged, len(adapted) + len(replaced)


def _fold_layer(layer: Any) -> None:
    base = layer.get_base_layer()
    dtype = next(base.parameters()).dtype
    layer.to(torch.promote_types(dtype, torch.float32))
    layer.merge()
    base.to(dtype)


def _refuse_tied(model: PeftModel, changed: Iterable[str]) -> None:
    """Raise for an adapter on a weight that stands at a second place of the model too."""
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    touched = tuple(f"{name}." for name in changed)
    for names in places.values():
        # Inside one wrapper a parameter may stand twice.
        owners = {name.rpartition(".")[0].removesuffix(".base_layer") for name in names}
        if len(owners) > 1 and any(name.startswith(touched) for name in names):
            shown = " and ".join(sorted(_plain(owner) for owner in owners))
            raise ModelError(
                f"The adapter changes a weight that {shown} share",
                where="tie_word_embeddings",
                expected="an adapter that leaves tied embeddings alone",
                fix="train without embed_tokens and lm_head among the targets, or keep the adapter unmerged",
            )


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer", "").split(".modules_to_save")[0]


@dataclass(kw_only=True)
class LogitDifferences:
    """What differs between two models' logits over the same positions, gathered piece by piece.

    Attributes:
        largest: the largest absolute difference; NaN when any logit is none.
        scale: the largest absolute logit of the reference.
        num_tokens: positions compared.
        changed_tokens: positions whose most likely token is another one.
    """

    largest: float = 0.0
    scale: float = 0.0
    num_tokens: int = 0
    changed_tokens: int = 0
    _sum: float = field(default=0.0, repr=False)
    _count: int = field(default=0, repr=False)

    def add(self, reference: Tensor, other: Tensor) -> None:
        """Count the logits (S, V) of S more positions."""
        difference = (reference.float() - other.float()).abs()
        # `max` of Python would drop a NaN.
        self.largest = float(torch.tensor([self.largest, difference.max().item()]).max())
        self.scale = max(self.scale, reference.abs().max().item())
        self.num_tokens += len(reference)
        self.changed_tokens += int((reference.argmax(-1) != other.argmax(-1)).sum())
        self._sum += difference.double().sum().item()
        self._count += difference.numel()

    @property
    def mean(self) -> float:
        """The mean absolute difference of all logits."""
        return self._sum / max(1, self._count)

    def keeps(self, bound: Bound) -> bool:
        """Whether both differences lie within the bound; never with NaN."""
        near = self.largest <= bound.largest * self.scale
        return near and self.changed_tokens <= max(1, bound.changed * self.num_tokens)
