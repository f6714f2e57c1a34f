"""Replacing the layers of an existing model by LoRA layers, base weights shared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from phlora.errors import ConfigError, ModelError, did_you_mean
from phlora.lora.base import LoRALayer
from phlora.lora.layers import Conv1d, Conv2d, Conv3d, ConvLoRA, Embedding, Linear, MergedLinear
from phlora.lora.state import bypassed_by_attention


@dataclass(frozen=True, kw_only=True)
class _Settings:
    r: int
    lora_alpha: float
    lora_dropout: float
    merge_weights: bool
    enable_lora: Sequence[bool] | None
    out_features_per_block: Sequence[int] | None
    lora_dtype: torch.dtype | None

    def common(self) -> dict[str, Any]:
        """What every layer takes; on the meta device, because the weight comes from the replaced layer."""
        return {
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "merge_weights": self.merge_weights,
            "device": "meta",
        }


def replace(
    model: nn.Module,
    targets: str | Iterable[str],
    *,
    r: int,
    lora_alpha: float = 1,
    lora_dropout: float = 0.0,
    merge_weights: bool = True,
    enable_lora: Sequence[bool] | None = None,
    out_features_per_block: Sequence[int] | None = None,
    lora_dtype: torch.dtype | None = None,
) -> list[str]:
    """Replaces layers of `model` in place by LoRA layers that share, not copy, their weight and bias.

    Args:
        model: changed in place.
        targets: names of modules: full (`layers.0.q_proj`) or the last parts of it (`q_proj`, `attn.out`).
        r, lora_alpha, lora_dropout, merge_weights: as in the layers.
        enable_lora: adapt row blocks of the targets, which must be linear: see `MergedLinear`.
        out_features_per_block: the sizes of those blocks when they are unequal.
        lora_dtype: dtype of lora_A and lora_B; None: that of the weight.

    Replaced are `nn.Linear`, `nn.Embedding`, `nn.Conv1d/2d/3d` and GPT-2's `Conv1D` of transformers, not
    their subclasses, whose forward may differ. The weights of the replaced layers are frozen. `lora_dropout`
    does not apply to embeddings.

    Returns:
        The names of the replaced modules.

    Raises:
        ConfigError: a target matches nothing, or a setting is out of range. The model is unchanged.
        ModelError: a target cannot be replaced. The model is unchanged.
    """
    settings = _Settings(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        merge_weights=merge_weights,
        enable_lora=enable_lora,
        out_features_per_block=out_features_per_block,
        lora_dtype=lora_dtype,
    )
    names = _matching_names(model, [targets] if isinstance(targets, str) else list(targets))
    for name in names:
        _refuse_attention_output(model, name)
    old_layers = {name: model.get_submodule(name) for name in names}
    # By identity: a layer that the model holds under two names stays one layer.
    new_layers = {id(old): _adapted(old, settings, where=name) for name, old in old_layers.items()}
    for name, old in old_layers.items():
        parent, _, child = name.rpartition(".")
        _share_base(old, new_layers[id(old)])
        setattr(model.get_submodule(parent), child, new_layers[id(old)])
    return names


def _matching_names(model: nn.Module, targets: list[str]) -> list[str]:
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    chosen: set[str] = set()
    for target in targets:
        matches = [name for name in names if name == target or name.endswith(f".{target}")]
        if not matches:
            raise ConfigError(
                f"`{target}` matches no module of the model",
                where="targets",
                expected="the name of a module, or the last parts of it",
                fix=did_you_mean(target, _candidates(model)),
            )
        chosen.update(matches)
    return [name for name in names if name in chosen]


def _candidates(model: nn.Module) -> set[str]:
    """Last parts of the names of modules that can be replaced."""
    return {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if name and _kind(module) in _BUILDERS
    }


def _refuse_attention_output(model: nn.Module, name: str) -> None:
    parent, _, child = name.rpartition(".")
    if child == "out_proj" and isinstance(model.get_submodule(parent), nn.MultiheadAttention):
        raise bypassed_by_attention(name)


def _adapted(old: nn.Module, settings: _Settings, *, where: str) -> LoRALayer:
    """A LoRA layer for `old` with A and B in place; its own weight is not allocated."""
    build = _BUILDERS.get(_kind(old))
    if build is None:
        inner = sorted(_candidates(old))
        raise ModelError(
            f"A {type(old).__name__} cannot be replaced",
            where=where,
            expected="a plain Linear, Embedding, Conv1d, Conv2d or Conv3d",
            fix=f"name layers inside it: {', '.join(inner)}" if inner else "",
        )
    if settings.enable_lora is not None and build not in (_linear, _transposed_linear):
        raise ModelError(
            f"A {type(old).__name__} has no row blocks", where=where, fix="leave out enable_lora"
        )
    new = build(old, settings)
    weight = old.get_parameter("weight")
    if new.is_adapted():
        for name in ("lora_A", "lora_B"):
            dtype = settings.lora_dtype or weight.dtype
            values = torch.empty_like(new.get_parameter(name), device=weight.device, dtype=dtype)
            setattr(new, name, nn.Parameter(values))
        new.reset_lora_parameters()
    return new.train(old.training)


def _share_base(old: nn.Module, new: LoRALayer) -> None:
    holder = new.conv if isinstance(new, ConvLoRA) else new
    holder.weight = old.weight
    new.base.requires_grad = False
    if hasattr(old, "bias"):
        holder.bias = old.bias


def _linear(old: Any, settings: _Settings) -> LoRALayer:
    return _row_blocks(settings, old.in_features, old.out_features, bias=old.bias is not None)


def _transposed_linear(old: Any, settings: _Settings) -> LoRALayer:
    return _row_blocks(settings, *old.weight.shape, fan_in_fan_out=True)


def _row_blocks(settings: _Settings, in_features: int, out_features: int, **kwargs: Any) -> LoRALayer:
    kwargs |= {"lora_dropout": settings.lora_dropout} | settings.common()
    if settings.enable_lora is None:
        return Linear(in_features, out_features, **kwargs)
    return MergedLinear(
        in_features,
        out_features,
        enable_lora=settings.enable_lora,
        out_features_per_block=settings.out_features_per_block,
        **kwargs,
    )


def _embedding(old: Any, settings: _Settings) -> LoRALayer:
    kept = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    kwargs = {name: getattr(old, name) for name in kept} | settings.common()
    return Embedding(old.num_embeddings, old.embedding_dim, **kwargs)


def _convolution(old: Any, settings: _Settings) -> LoRALayer:
    kept = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    )
    kwargs = {name: getattr(old, name) for name in kept} | settings.common()
    build = {nn.Conv1d: Conv1d, nn.Conv2d: Conv2d, nn.Conv3d: Conv3d}[type(old)]
    return build(bias=old.bias is not None, lora_dropout=settings.lora_dropout, **kwargs)


_BUILDERS: dict[str, Callable[[Any, _Settings], LoRALayer]] = {
    "Linear": _linear,
    "Conv1D": _transposed_linear,
    "Embedding": _embedding,
    "Conv1d": _convolution,
    "Conv2d": _convolution,
    "Conv3d": _convolution,
}


def _kind(module: nn.Module) -> str:
    """The exact torch class, or `Conv1D` for GPT-2's transposed linear layer; empty for anything else."""
    kind = type(module).__name__
    is_torch = getattr(nn, kind, None) is type(module)
    return kind if is_torch or (kind == "Conv1D" and hasattr(module, "nf")) else ""
