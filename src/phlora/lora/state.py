"""What is done with a model that has LoRA layers: freeze, save, load, merge, count.

A parameter belongs to LoRA when its own name begins with `lora_`; the names of the modules around it say
nothing (a plain layer inside a module called `lora_block` is not LoRA). Layers of other packages that name
their parameters so are understood too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from phlora.errors import ConfigError, ModelError, did_you_mean
from phlora.lora.base import LoRALayer

BIAS_CHOICES = ("none", "all", "lora_only")


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """Freezes every parameter but those of LoRA, and the biases that `bias` names.

    Args:
        bias: `none`; `all`: every bias of the model; `lora_only`: those of layers with LoRA parameters.

    Raises:
        ConfigError: `bias` is none of the three.
        ModelError: the model has no LoRA parameters, or has them where torch never uses them.
            Nothing is changed.
    """
    _check_bias(bias)
    trainable = _selected(dict(model.named_parameters(remove_duplicate=False)), bias)
    if not any(_is_lora(name) for name in trainable):
        raise _no_lora(model)
    _refuse_bypassed_layers(model)
    for parameter in model.parameters():
        parameter.requires_grad = False
    for name in trainable:
        model.get_parameter(name).requires_grad = True


def lora_state_dict(model: nn.Module, bias: str = "none") -> dict[str, Tensor]:
    """The LoRA entries of the state dict, and the biases that `bias` names: what a checkpoint needs to hold.

    Raises:
        ConfigError: `bias` is none of `none`, `all`, `lora_only`.
        ModelError: the model has no LoRA parameters.
    """
    _check_bias(bias)
    state = model.state_dict()
    selected = {name: state[name] for name in _selected(state, bias)}
    if not any(_is_lora(name) for name in selected):
        raise _no_lora(model)
    return selected


def load_lora_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> int:
    """Loads a LoRA checkpoint; unlike `load_state_dict(strict=False)`, every tensor has to find its place.

    Returns:
        The number of tensors loaded.

    Raises:
        ModelError: an entry has no place or another shape in the model, or the model has LoRA parameters that
            the checkpoint lacks. Nothing is loaded.
    """
    own = model.state_dict()
    missing = [name for name in own if _is_lora(name) and name not in state_dict]
    unknown = [name for name in state_dict if name not in own]
    if missing or unknown:
        raise ModelError(
            f"{len(unknown)} of {len(state_dict)} tensors have no place in the model, "
            f"and {len(missing)} LoRA parameters of the model are not in the checkpoint",
            where=(unknown or missing)[0],
            expected="a checkpoint of a model with the same layers adapted",
            fix=did_you_mean(unknown[0], [name for name in own if _is_lora(name)]) if unknown else "",
        )
    for name, value in state_dict.items():
        if value.shape != own[name].shape:
            raise ModelError(
                f"The checkpoint has shape {tuple(value.shape)}, the model {tuple(own[name].shape)}",
                where=name,
                fix="build the layers with the rank and the sizes of the checkpoint",
            )
    model.load_state_dict(dict(state_dict), strict=False)
    return len(state_dict)


def merge(model: nn.Module) -> None:
    """Marks every LoRA layer as merged, as loralib's `eval()` does; what the layers compute stays.

    A model that computes with `W + ΔW` and nothing else is the plain one with `merged_state_dict`.

    Raises:
        ModelError: the model has no LoRA layers.
    """
    for _, layer in _require_layers(model):
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Takes back `merge`.

    Raises:
        ModelError: the model has no LoRA layers.
    """
    for _, layer in _require_layers(model):
        layer.unmerge()


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the model without LoRA: weights with ΔW added, plain names, no `lora_` entries.

    It loads with `strict=True` into the model as it was before its layers were replaced.

    Raises:
        ModelError: the model has no LoRA layers, or one adapts a weight that another layer uses too.
    """
    state = model.state_dict()
    for prefix, layer in _require_layers(model):
        _refuse_shared_base(model, layer)
        state[f"{prefix}{layer.base_name}"] = layer.merged_weight()
    return {_plain_name(model, name): value for name, value in state.items() if not _is_lora(name)}


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Numbers of scalar parameters; a parameter that is used twice counts once."""

    lora: int
    trainable: int
    total: int

    def __str__(self) -> str:
        share = self.trainable / self.total if self.total else 0.0
        return f"{self.trainable:,} of {self.total:,} parameters trainable ({share:.2%}), {self.lora:,} LoRA"


def count_parameters(model: nn.Module) -> ParameterCounts:
    """Counts the parameters of a model: of LoRA, trainable, all."""
    named = list(model.named_parameters())
    return ParameterCounts(
        lora=sum(p.numel() for name, p in named if _is_lora(name)),
        trainable=sum(p.numel() for _, p in named if p.requires_grad),
        total=sum(p.numel() for _, p in named),
    )


def _refuse_bypassed_layers(model: nn.Module) -> None:
    """Raises a ModelError for a LoRA layer that torch would read the weight of, but never call."""
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and isinstance(module.out_proj, LoRALayer):
            raise bypassed_by_attention(f"{name}.out_proj" if name else "out_proj")


def bypassed_by_attention(name: str) -> ModelError:
    return ModelError(
        "nn.MultiheadAttention reads the weight of its out_proj without calling it; LoRA would do nothing",
        where=name,
        fix="leave out_proj as it is, or use an attention module that calls its projections",
    )


def _is_lora(name: str) -> bool:
    return name.rpartition(".")[2].startswith("lora_")


def _selected(names: Mapping[str, object], bias: str) -> list[str]:
    """The names that belong to LoRA or to the chosen biases, in the order of the model."""
    owners = {name.rpartition(".")[0] for name in names if _is_lora(name)}
    chosen = []
    for name in names:
        owner, _, own_name = name.rpartition(".")
        is_bias = "bias" in own_name
        # A convolution keeps its bias one module deeper, in `conv`.
        is_beside_lora = own_name == "bias" and (owner in owners or _without_conv(owner) in owners)
        if _is_lora(name) or (bias == "all" and is_bias) or (bias == "lora_only" and is_beside_lora):
            chosen.append(name)
    return chosen


def _without_conv(owner: str) -> str | None:
    outer, _, last = owner.rpartition(".")
    return outer if last == "conv" else None


def _check_bias(bias: str) -> None:
    if bias not in BIAS_CHOICES:
        raise ConfigError(f"`{bias}` is no choice", where="bias", fix=did_you_mean(str(bias), BIAS_CHOICES))


def _layers(model: nn.Module) -> list[tuple[str, LoRALayer]]:
    """The adapted layers with their state dict prefixes; a layer that is held twice appears twice."""
    return [
        (f"{name}." if name else "", module)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, LoRALayer) and module.is_adapted()
    ]


def _require_layers(model: nn.Module) -> list[tuple[str, LoRALayer]]:
    layers = _layers(model)
    if not layers:
        raise _no_lora(model)
    return layers


def _no_lora(model: nn.Module) -> ModelError:
    return ModelError(
        f"The {type(model).__name__} has no LoRA parameters",
        expected="at least one layer with r > 0",
        fix="replace layers first, for example lora.replace(model, ['q_proj', 'v_proj'], r=16)",
    )


def _refuse_shared_base(model: nn.Module, layer: LoRALayer) -> None:
    own = {f"{prefix}{layer.base_name}" for prefix, other in _layers(model) if other is layer}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter is layer.base and name not in own:
            raise ModelError(
                f"The adapted weight is also `{name}`, which the merge would change",
                where=min(own),
                fix="untie the two weights first (give one its own copy)",
            )


def _plain_name(model: nn.Module, name: str) -> str:
    """`c.conv.weight` of a LoRA convolution `c` -> `c.weight`; other names unchanged."""
    owner, _, own_name = name.rpartition(".")
    outer = _without_conv(owner)
    if outer is None or not isinstance(model.get_submodule(outer), LoRALayer):
        return name
    return f"{outer}.{own_name}" if outer else own_name
