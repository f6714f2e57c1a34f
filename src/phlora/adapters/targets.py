"""Which modules, and which row blocks of them, `target_modules` means; nothing requested may stay unmatched.

PEFT raises only when *nothing* matches. On a Phi-3 the usual seven names (q, k, v, o, gate, up, down) match two
modules a layer, because q|k|v and gate|up are stored as one weight each, and two thirds of the adapter is missing
without a word. Here every name is accounted for: it matches modules, it is a row block of a fused weight, or it is an
error that lists what the model has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from phlora.errors import ConfigError, did_you_mean, shown
from phlora.models.families import block_linears, fused_row_blocks
from phlora.patterns import PatternProblem, matches

ALL_LINEAR = "all-linear"
_WHERE = "peft_config.target_modules"
_EXCLUDE = "peft_config.exclude_modules"


@dataclass(frozen=True)
class Targets:
    """The modules that get an adapter.

    Attributes:
        modules: full names, in the model's order.
        blocks: module -> the row blocks that are adapted, where not the whole weight is, in the order of the rows.
        notes: what was understood beyond the letter of the request.
    """

    modules: tuple[str, ...]
    notes: tuple[str, ...] = ()
    blocks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def resolve_targets(
    model: nn.Module,
    target_modules: str | Sequence[str] | None = None,
    *,
    exclude_modules: str | Sequence[str] | None = None,
) -> Targets:
    """The modules and row blocks that `target_modules` means in this model.

    Args:
        target_modules: None or `all-linear` for every linear layer of the blocks (never the head), a regular expression
            that full names have to match, or names (exact, or the end of a full name). A row block is called as the
            projection that it is, `model.layers.0.self_attn.q_proj`; where its whole weight matches too, that wins.
        exclude_modules: row blocks to leave out, by expression or names. Modules are left to PEFT's own exclusion.

    Raises:
        ConfigError: a name or an expression matches nothing.
    """
    candidates, parts = adaptable_modules(model), row_block_names(model)
    if target_modules is None or target_modules == ALL_LINEAR:
        matched = set(block_linears(model))
    else:
        matched = matching(target_modules, candidates, parts)
    excluded = matching(exclude_modules, candidates, parts, where=_EXCLUDE) if exclude_modules else set()
    blocks = _enabled_blocks(parts, matched, excluded)
    halved = {parts[name] for name in excluded if name in parts}
    modules = tuple(
        module for module in candidates if module in blocks or (module in matched and module not in halved)
    )
    return Targets(modules, _notes(blocks, parts, matched), blocks)


def row_block_names(model: nn.Module) -> dict[str, str]:
    """Full names of all row blocks of the fused weights -> the name of the weight's module, in the model's order."""
    sizes = fused_row_blocks(getattr(model, "config", None))
    return {
        block_name(module, part): module
        for module in adaptable_modules(model)
        for part in sizes.get(_leaf(module), ())
    }


def block_name(module: str, part: str) -> str:
    """`model.layers.0.self_attn.q_proj` for the row block `q_proj` of `model.layers.0.self_attn.qkv_proj`."""
    parent, dot, _ = module.rpartition(".")
    return f"{parent}{dot}{part}"


def matching(
    wanted: str | Iterable[str], candidates: Iterable[str], parts: Iterable[str], *, where: str = ""
) -> set[str]:
    """The modules and row blocks that an expression or names mean.

    Raises:
        ConfigError: the expression, or one of the names, matches nothing.
    """
    candidates = list(candidates)
    pool = [*candidates, *parts]
    if isinstance(wanted, str):
        return _matching_expression(wanted, pool, candidates, where or _WHERE)
    found = {name: _matching_name(name, pool) for name in wanted}
    if unmatched := [name for name, names in found.items() if not names]:
        raise _unmatched(unmatched, candidates, pool, where or _WHERE)
    return {name for names in found.values() for name in names}


def adaptable_modules(model: nn.Module) -> list[str]:
    """Names of all modules that a LoRA adapter can sit on, the head and the embedding included."""
    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [
        name
        for name, module in model.named_modules()
        if name and (isinstance(module, kinds) or type(module).__name__ == "Conv1D")
    ]


def _matching_name(name: str, pool: Sequence[str]) -> list[str]:
    return [module for module in pool if module == name or module.endswith(f".{name}")]


def _matching_expression(
    expression: str, pool: Sequence[str], candidates: Sequence[str], where: str
) -> set[str]:
    try:
        found = matches(expression, pool)
    except PatternProblem as problem:
        raise ConfigError(f"{shown(expression)} {problem}", where=where) from None
    matched = {module for module, is_matched in zip(pool, found, strict=True) if is_matched}
    if not matched:
        raise _unmatched([expression], candidates, pool, where)
    return matched


def _enabled_blocks(
    parts: Mapping[str, str], matched: set[str], excluded: set[str]
) -> dict[str, tuple[str, ...]]:
    """Fused module -> its adapted blocks: those asked for, or those that an exclusion leaves of the whole."""
    halved = {parts[name] for name in excluded if name in parts}
    blocks: dict[str, tuple[str, ...]] = {}
    for name, module in parts.items():
        wanted = module in halved if module in matched else name in matched
        if wanted and name not in excluded:
            blocks[module] = (*blocks.get(module, ()), _leaf(name))
    return blocks


def _notes(
    blocks: Mapping[str, tuple[str, ...]], parts: Mapping[str, str], matched: set[str]
) -> tuple[str, ...]:
    split = {(_leaf(module), names) for module, names in blocks.items()}
    whole = {
        (_leaf(parts[name]), _leaf(name)) for name in parts if name in matched and parts[name] in matched
    }
    return (
        *(
            f"{', '.join(names)}: rows of {fused}, each with its own A and B"
            for fused, names in sorted(split)
        ),
        *(
            f"{part} is a part of {fused}, which is adapted as a whole: what was asked for matches {fused} too"
            for fused, part in sorted(whole)
        ),
    )


def _unmatched(wanted: list[str], candidates: Sequence[str], pool: Sequence[str], where: str) -> ConfigError:
    has = Counter(_leaf(module) for module in candidates)
    listed = ", ".join(f"{name} ({count}×)" for name, count in has.items())
    return ConfigError(
        f"No module is called {', '.join(f'`{name}`' for name in wanted)}",
        where=where,
        expected=f"`{ALL_LINEAR}`, or names that the model has: {listed}",
        fix=did_you_mean(wanted[0], {ALL_LINEAR, *map(_leaf, pool)}),
    )


def _leaf(module: str) -> str:
    return module.rpartition(".")[2]
