"""Which modules `target_modules` means; nothing that was requested may stay unmatched.

PEFT raises only when *nothing* matches. On a Phi-3 the usual seven names (q, k, v, o, gate, up, down) match two
modules a layer, because q|k|v and gate|up are stored as one weight each, and two thirds of the adapter is missing
without a word. Here every name is accounted for: it matches modules, it stands for a part of a fused weight, or it is
an error that lists what the model has.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from phlora.errors import ConfigError, did_you_mean

ALL_LINEAR = "all-linear"
_WHERE = "peft_config.target_modules"

# The fused weights of Phi-3, and the projections that they hold, in the order of their rows.
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


@dataclass(frozen=True)
class Targets:
    """The modules that get an adapter.

    Attributes:
        modules: full names, in the model's order.
        names: their last parts with how many of each, in the model's order.
        notes: what was understood beyond the letter of the request.
    """

    modules: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def names(self) -> dict[str, int]:
        return dict(Counter(_leaf(module) for module in self.modules))


def resolve_targets(model: nn.Module, target_modules: str | Sequence[str] | None = None) -> Targets:
    """The modules that `target_modules` means in this model.

    Args:
        target_modules: None or `all-linear` for every linear layer of the blocks (never the head), a regular expression
            that full module names have to match, or names (exact, or the end of a module's name).

    Raises:
        ConfigError: a name or the expression matches nothing, or names only a part of a fused weight.
    """
    candidates = adaptable_modules(model)
    if target_modules is None or target_modules == ALL_LINEAR:
        return Targets(tuple(block_linears(model)))
    if isinstance(target_modules, str):
        return Targets(_matching_expression(target_modules, candidates))
    names, notes = _unfuse(list(dict.fromkeys(target_modules)), candidates)
    wanted = [name for name in names if not _matching_name(name, candidates)]
    if wanted:
        raise _unmatched(wanted, candidates)
    matched = {module for name in names for module in _matching_name(name, candidates)}
    return Targets(tuple(module for module in candidates if module in matched), notes)


def adaptable_modules(model: nn.Module) -> list[str]:
    """Names of all modules that a LoRA adapter can sit on, the head and the embedding included."""
    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [
        name
        for name, module in model.named_modules()
        if name and (isinstance(module, kinds) or type(module).__name__ == "Conv1D")
    ]


def block_linears(model: nn.Module) -> list[str]:
    """Names of the linear layers except the output head, which is what PEFT means by `all-linear`."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head else None
    return [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    ]


def _matching_name(name: str, candidates: Sequence[str]) -> list[str]:
    return [module for module in candidates if module == name or module.endswith(f".{name}")]


def _matching_expression(expression: str, candidates: Sequence[str]) -> tuple[str, ...]:
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise ConfigError(f"`{expression}` is no regular expression: {error}", where=_WHERE) from None
    matched = tuple(module for module in candidates if pattern.fullmatch(module))
    if not matched:
        raise _unmatched([expression], candidates)
    return matched


def _unfuse(names: list[str], candidates: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """Put the fused weight in the place of its projections where all of them were named."""
    leaves = {_leaf(module) for module in candidates}
    notes = []
    for fused, parts in FUSED.items():
        asked = [part for part in parts if part in names and part not in leaves]
        if fused not in leaves or not asked:
            continue
        if len(asked) < len(parts) and fused not in names:
            raise _partly_fused(asked, fused, parts)
        names = list(dict.fromkeys(fused if name in parts else name for name in names))
        notes.append(f"{', '.join(parts)} are one weight in this model: {fused} is adapted")
    return names, tuple(notes)


def _partly_fused(asked: list[str], fused: str, parts: tuple[str, ...]) -> ConfigError:
    missing = [part for part in parts if part not in asked]
    return ConfigError(
        f"{', '.join(asked)} is a part of {fused}, which this model stores as one weight "
        f"({' | '.join(parts)}); adapting it without {', '.join(missing)} is not supported",
        where=_WHERE,
        fix=f"name {fused}, or all of {', '.join(parts)}",
    )


def _unmatched(wanted: list[str], candidates: Sequence[str]) -> ConfigError:
    has = Counter(_leaf(module) for module in candidates)
    listed = ", ".join(f"{name} ({count}×)" for name, count in has.items())
    return ConfigError(
        f"No module is called {', '.join(f'`{name}`' for name in wanted)}",
        where=_WHERE,
        expected=f"`{ALL_LINEAR}`, or names that the model has: {listed}",
        fix=did_you_mean(wanted[0], {*has, ALL_LINEAR}),
    )


def _leaf(module: str) -> str:
    return module.rpartition(".")[2]
