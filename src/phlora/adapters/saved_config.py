"""The configuration beside an adapter's tensors, checked before PEFT takes its values as they stand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key
from torch import nn

from phlora.adapters.lora_values import LARGEST_RANK, expected_type
from phlora.errors import ModelError, shown
from phlora.files import Expected, is_number, is_text, read_json, repr_of, require_values
from phlora.patterns import PatternProblem, compiled, matches, may_be_slow

# Names of parameters in PEFT's files -> the dimension that is the rank.
_RANK_OF = {".lora_A.weight": 0, ".lora_embedding_A": 0}
_PREFIX = "base_model.model."
# What PEFT needs another library, or tensors that no file of an adapter holds, for.
_NOT_HERE = ("megatron_config", "layer_replication", "arrow_config")


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST_RANK


def _are_names(value: Any) -> bool:
    return is_text(value) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _maps_to(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(is_right, value.values()))


# Key -> what its value has to be; PEFT's own names. Keys that are left out have PEFT's defaults.
_EXPECTED: Expected = {
    "r": (_is_rank, f"a whole number from 1 to {LARGEST_RANK:,}"),
    "lora_alpha": (is_number, "a number"),
    "lora_dropout": (is_number, "a number"),
    "rank_pattern": (_maps_to(_is_rank), f"layers with whole numbers from 1 to {LARGEST_RANK:,}"),
    "alpha_pattern": (_maps_to(is_number), "layers with numbers"),
    "target_modules": (_are_names, "names of layers"),
    "modules_to_save": (_are_names, "names of layers"),
    "base_model_name_or_path": (is_text, "the name of a model"),
    "revision": (is_text, "a revision"),
}
# For those null is none of PEFT's values.
_NEVER_NULL = ("r", "lora_alpha", "lora_dropout")


def read_adapter_config(file: Path) -> Mapping[str, Any]:
    """The contents of an adapter_config.json of a LoRA adapter.

    Raises:
        ModelError: it cannot be read, is of another kind, or a value is none that PEFT could have written.
    """
    facts, where = read_json(file, ModelError), str(file)
    if facts.get("peft_type") != "LORA":
        raise ModelError(
            f"The adapter is of the kind {facts.get('peft_type')}", where=where, expected="a LoRA adapter"
        )
    for key in _NEVER_NULL:
        if key in facts and facts[key] is None:
            raise ModelError(f"`{key}` is `None`", where=where, expected=_EXPECTED[key][1])
    require_values(facts, _EXPECTED, ModelError, where=where)
    for key, value in facts.items():
        if key not in _EXPECTED and (words := expected_type(key, value)):
            raise ModelError(f"`{key}` is {shown(repr_of(value))}", where=where, expected=words)
        if key in _NOT_HERE and value:
            raise ModelError(
                f"`{key}` is {shown(repr_of(value))}",
                where=where,
                expected="an adapter on the layers that its base has",
                fix="load it with PEFT",
            )
    for key, own, whole in _patterns(facts):
        try:
            compiled(whole)
        except PatternProblem as problem:
            raise ModelError(f"`{key}`: {shown(own)} {problem}", where=where) from None
    return facts


def require_quick(facts: Mapping[str, Any], names: Iterable[str], *, where: str) -> None:
    """Refuse regular expressions that PEFT would match against these names of layers for too long.

    Raises:
        ModelError: there is one.
    """
    names = list(names)
    for key, own, whole in _patterns(facts):
        try:
            if may_be_slow(own):
                matches(whole, names)
        except PatternProblem as problem:
            raise ModelError(
                f"`{key}`: {shown(own)} {problem}", where=where, fix="name the layers one by one"
            ) from None


def require_fitting(
    facts: Mapping[str, Any], model: nn.Module, shapes: Mapping[str, tuple[int, ...]], *, where: str
) -> None:
    """Refuse a configuration with which PEFT would build other layers than the tensors are of, or build for ever.

    Args:
        facts: what `read_adapter_config` returned.
        model: the base.
        shapes: of the tensors in the adapter's file, by their names there.
        where: the configuration's file.

    Raises:
        ModelError: an expression takes too long, a rank is not that of the tensors, or modules
            that are said to be saved are not in the file.
    """
    require_quick(facts, (name for name, _ in model.named_modules() if name), where=where)
    _require_ranks(facts, shapes, where)
    saved = facts.get("modules_to_save") or []
    for name in [saved] if isinstance(saved, str) else saved:
        if not any(f".{name}." in f".{key}" for key in shapes):
            raise ModelError(
                f"`modules_to_save` names {name}, and the adapter has no tensor of it", where=where
            )
    if facts.get("trainable_token_indices") and not any("token_adapter" in key for key in shapes):
        raise ModelError(
            "`trainable_token_indices` is set, and the adapter has no tensor of them", where=where
        )


def _require_ranks(facts: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Layers are made in the ranks of the configuration, before their tensors are looked at."""
    ranks = facts.get("rank_pattern") or {}
    for key, shape in shapes.items():
        ending = next((ending for ending in _RANK_OF if key.endswith(ending)), None)
        if ending is None or not shape:
            continue
        layer = key.removeprefix(_PREFIX).removesuffix(ending)
        said = ranks.get(get_pattern_key(list(ranks), layer), facts.get("r", 8))
        if shape[_RANK_OF[ending]] != said:
            raise ModelError(
                f"{layer} has the rank {said} there, and {shape[_RANK_OF[ending]]} in the tensors",
                where=where,
                expected="the configuration that was saved with them",
                fix="copy the adapter again, both of its files",
            )


def _patterns(facts: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The regular expressions of a configuration: key, as they stand there, and as PEFT matches them."""
    for key in ("target_modules", "exclude_modules"):
        if isinstance(facts.get(key), str):
            yield key, facts[key], facts[key]
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in facts.get(key) or ():
            yield key, pattern, rf"(.*\.)?({pattern})$"
    layers = facts.get("layers_pattern") or ()
    for pattern in [layers] if isinstance(layers, str) else layers:
        yield "layers_pattern", pattern, rf".*\.[^.]*{pattern}\.(\d+)\."
