"""What an adapter of a run does with every field of PEFT's `LoraConfig`: it is honoured or refused, none is ignored.

A test walks the fields of the installed PEFT and fails on one that nobody has decided about, and on a way to start an
adapter that it does not know.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig
from torch import nn

from phlora.errors import ConfigError, did_you_mean, shown

_WHERE = "peft_config"
_IN_A_SCRIPT = "use phlora.SFTTrainer in a script of your own"

# Have their PEFT meaning.
HONOURED = frozenset(
    (
        *(
            "r",
            "lora_alpha",
            "lora_dropout",
            "target_modules",
            "exclude_modules",
            "rank_pattern",
            "alpha_pattern",
        ),
        *("bias", "use_rslora", "use_dora", "lora_bias", "init_lora_weights", "modules_to_save", "task_type"),
        *("layers_to_transform", "layers_pattern", "trainable_token_indices", "target_parameters"),
        *("ensure_weight_tying", "fan_in_fan_out", "velora_config", "use_bdlora", "runtime_config"),
        # PEFT's own notes.
        *("peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    )
)


@dataclass(frozen=True)
class Refused:
    """What to do in the place of setting a field, and which values are accepted because they ask for nothing."""

    fix: str
    harmless: tuple[Any, ...] = (None, False)


_OF_AN_INIT = Refused(
    "leave it out: it is for a way to start an adapter that is refused", harmless=(None, {})
)
_OWN_LOSS = Refused(f"it adds a term to the loss that the trainer does not have: {_IN_A_SCRIPT}")

REFUSED: Mapping[str, Refused] = {
    "inference_mode": Refused("leave it out: an adapter for inference has nothing that trains"),
    "layer_replication": Refused(
        "repeat the layers in the base model and save it, then train on that", harmless=(None, [])
    ),
    "alora_invocation_tokens": Refused(
        f"an adapter that begins inside a row cannot share rows' beginnings: {_IN_A_SCRIPT}",
        harmless=(None, []),
    ),
    "eva_config": _OF_AN_INIT,
    "corda_config": _OF_AN_INIT,
    "lora_ga_config": _OF_AN_INIT,
    "loftq_config": _OF_AN_INIT,
    "monteclora_config": _OWN_LOSS,
    "kasa_config": _OWN_LOSS,
    "arrow_config": Refused("it routes between adapters that are trained already: load these with PEFT"),
    "use_qalora": Refused("it is for GPTQ weights; say model.quantization: nf4 for a quantised base"),
    "qalora_group_size": Refused("it is for GPTQ weights; leave it out", harmless=(16,)),
    "megatron_config": Refused("a Phlora run has no Megatron layers", harmless=(None,)),
    "megatron_core": Refused("a Phlora run has no Megatron layers", harmless=(None, "megatron.core")),
}

# Ways to start an adapter that are computed when it is made.
INITS = (True, False, "gaussian", "olora", "pissa", "pissa_niter_[number of iters]", "orthogonal", "mica")
# Those that PEFT takes as names only, while something else has to compute them first.
NOT_COMPUTED: Mapping[str, str] = {
    "eva": f"PEFT starts it by `initialize_lora_eva_weights`, from data: {_IN_A_SCRIPT}, or use pissa or olora",
    "corda": f"PEFT starts it by `preprocess_corda`, from data: {_IN_A_SCRIPT}, or use pissa or olora",
    "lora_ga": f"PEFT starts it by `preprocess_loraga`, from gradients: {_IN_A_SCRIPT}, or use pissa or olora",
    "loftq": "it replaces the base weights by quantised ones: say model.quantization: nf4 for a quantised base",
}


def require_supported(values: Mapping[str, Any]) -> None:
    """
    Raises:
        ConfigError: a field, a way to start the adapter or a kind of task that a run does not have.
    """
    _require_init(values.get("init_lora_weights", True))
    for key, refused in REFUSED.items():
        if key in values and not any(
            type(values[key]) is type(harmless) and values[key] == harmless for harmless in refused.harmless
        ):
            raise ConfigError(
                f"`{key}` cannot be set here ({shown(values[key])} was given)", where=_WHERE, fix=refused.fix
            )
    task = values.get("task_type")
    if task is not None and getattr(task, "value", task) != "CAUSAL_LM":
        raise ConfigError(
            f"{shown(getattr(task, 'value', task))} was given",
            where=f"{_WHERE}.task_type",
            expected="CAUSAL_LM: Phlora trains chat models",
            fix="leave it out",
        )


def _require_init(init: Any) -> None:
    if not isinstance(init, str):
        return
    name = init.lower()
    for start, fix in NOT_COMPUTED.items():
        if name.startswith(start):
            raise ConfigError(
                f"`{init}` would not be computed here, and the adapter would start like any other",
                where=f"{_WHERE}.init_lora_weights",
                fix=fix,
            )
    known = [str(choice) for choice in INITS if isinstance(choice, str)]
    if not init.startswith("pissa_niter_") and name not in known:
        raise ConfigError(
            f"{shown(init)} is not known",
            where=f"{_WHERE}.init_lora_weights",
            expected="true, false, " + ", ".join(known),
            fix=did_you_mean(init, known),
        )


# ------------------------------------------------------------------------------- names in the model


def require_known_names(model: nn.Module, lora: LoraConfig) -> None:
    """Every name and number of layers, modules, parameters and tokens stands for something in the model.

    PEFT raises only where *none* of them does, if then.

    Raises:
        ConfigError: one matches nothing, with the nearest that does.
    """
    modules = [name for name, _ in model.named_modules() if name]
    _require_each("modules_to_save", lora.modules_to_save, modules, ends=True)
    _require_each("target_parameters", lora.target_parameters, [name for name, _ in model.named_parameters()])
    _require_layers(modules, lora)
    _require_tokens(model, modules, lora.trainable_token_indices)


def _require_each(key: str, wanted: Iterable[str] | None, names: list[str], *, ends: bool = False) -> None:
    """PEFT takes a name that is, or ends, the last part of a full name."""
    for name in [wanted] if isinstance(wanted, str) else wanted or ():
        if any(full == name or full.endswith(name if ends else f".{name}") for full in names):
            continue
        parts = name.count(".") + 1
        raise ConfigError(
            f"`{name}` matches nothing in the model",
            where=f"{_WHERE}.{key}",
            fix=did_you_mean(name, {".".join(full.split(".")[-parts:]) for full in names}),
        )


def _require_layers(modules: list[str], lora: LoraConfig) -> None:
    """Indices of layers, and what the lists of them are called."""
    lists: dict[str, set[int]] = {}
    for name in modules:
        parent, _, last = name.rpartition(".")
        if last.isdigit():
            lists.setdefault(parent.rpartition(".")[2], set()).add(int(last))
    patterns = [lora.layers_pattern] if isinstance(lora.layers_pattern, str) else lora.layers_pattern or []
    for pattern in patterns:
        if pattern not in lists:
            raise ConfigError(
                f"`{pattern}` is no list of layers in the model",
                where=f"{_WHERE}.layers_pattern",
                fix=did_you_mean(pattern, lists),
            )
    there = set().union(*(lists[name] for name in patterns or lists)) if lists else set()
    wanted = lora.layers_to_transform
    indices = [wanted] if isinstance(wanted, int) else wanted or []
    if missing := [index for index in indices if index not in there]:
        raise ConfigError(
            f"The model has no layer {', '.join(map(str, missing))}",
            where=f"{_WHERE}.layers_to_transform",
            expected=f"numbers from 0 to {max(there)}" if there else "a model with numbered layers",
        )


def _require_tokens(model: nn.Module, modules: list[str], wanted: Any) -> None:
    if not wanted:
        return
    if isinstance(wanted, Mapping):
        named = dict(wanted)
    else:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        named = {next(name for name in modules if model.get_submodule(name) is embedding): wanted}
    _require_each("trainable_token_indices", named, modules, ends=True)
    for name, indices in named.items():
        layer = model.get_submodule(next(full for full in modules if full.endswith(name)))
        size = int(layer.weight.shape[0]) if isinstance(layer.weight, nn.Parameter) else 0
        for index in indices:
            if not 0 <= index < size:
                raise ConfigError(
                    f"There is no token {index} in {name}",
                    where=f"{_WHERE}.trainable_token_indices",
                    expected=f"ids from 0 to {size - 1:,}",
                )
