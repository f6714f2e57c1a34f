"""The base of a model with an adapter, as it was before the adapter came.

Turning an adapter off is not enough where it changed the base too: biases that train with it (`bias: all`,
`lora_only`), and weights that PEFT took the start of the adapter out of (`init_lora_weights: pissa` and its kin, which
it does again at every load). What of the base an adapter changes is therefore kept, and put in place for as long as the
base is asked.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from phlora.models.stored_layers import is_stored, widen, widen_named, widen_trained

# Initialisations with which PEFT changes the base weight of what they adapt.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga", "eva")
_KEPT = "_base_before_adapter"

Kept = dict[str, tuple[nn.Parameter, Tensor]]


def widen_what_trains(model: nn.Module, config: PeftConfig) -> None:
    """Before PEFT copies, reads or writes them: what of the base trains as a whole, and what the start of the adapter
    is taken out of (PiSSA and its kin), is stored as it is computed, so that nothing of it is rounded."""
    tokens = getattr(config, "trainable_token_indices", None)
    names = {
        *(getattr(config, "modules_to_save", None) or ()),
        *(tokens if isinstance(tokens, Mapping) else ()),
    }
    if tokens:
        names.add("embed_tokens")
    widen_named(model, names)
    if _changes_base(config):
        widen_named(
            model, [name for name, module in model.named_modules() if _is_target(config, name, module)]
        )


def widen_adapted(model: nn.Module) -> list[str]:
    """The same for a model on which an adapter is already, or which trains without one; what is to be said about it.

    What trains has the values that it had, to the bit. What PiSSA has written into 16 bits stays rounded.
    """
    said = []
    layers = [module for module in model.modules() if isinstance(module, TrainableTokensLayer)]
    layers = [layer for layer in layers if is_stored(layer.get_base_layer())]
    for layer in layers:
        dtype = layer.get_base_layer().compute_dtype
        widen(layer.get_base_layer())
        for rows in layer.trainable_tokens_delta.values():
            rows.data = rows.data.to(dtype)
    num_widened = widen_trained(model) + len(layers)
    if num_widened:
        said.append(
            f"{num_widened} layers stored in 16 bits train and are widened, so that no step is rounded"
        )
    rounded = [name for name in getattr(model, "peft_config", {}) if _has_rounded_start(model, name)]
    if rounded:
        said.append(
            f"The start of the adapter {rounded[0]} was taken out of weights stored in 16 bits, which rounded them: "
            "give peft_config to the trainer, or use phlora.attach or storage_dtype: float32"
        )
    return said


def _changes_base(config: PeftConfig) -> bool:
    init = getattr(config, "init_lora_weights", None)
    return isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS)


def _is_target(config: PeftConfig, name: str, module: nn.Module) -> bool:
    """Whether PEFT will adapt this stored layer; every linear one where it looks their names up itself."""
    targets = getattr(config, "target_modules", None)
    if targets is None or targets == "all-linear":
        return isinstance(module, nn.Linear)
    return bool(check_target_module_exists(config, name))


def _has_rounded_start(model: nn.Module, adapter: str) -> bool:
    config: PeftConfig = model.peft_config[adapter]  # type: ignore[index, assignment]
    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and adapter in m.lora_A]
    return _changes_base(config) and any(is_stored(layer.get_base_layer()) for layer in layers)


def keep_trained(model: PeftModel, base: Mapping[str, nn.Parameter]) -> None:
    """Keep the values of the parameters of a base that train with the adapter which was just put on it.

    Args:
        base: the parameters of the base by name, from before.
    """
    _keep(model, {name: (p, p.detach().clone()) for name, p in base.items() if p.requires_grad})


def keep_before_load(model: nn.Module, config: LoraConfig) -> Kept:
    """The parameters that loading an adapter of this configuration would change, with their values; nothing else is
    copied."""
    kept: Kept = {}
    if config.bias != "none":
        kept |= {
            name: (p, p.detach().clone()) for name, p in model.named_parameters() if name.endswith("bias")
        }
    if _changes_base(config):
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
                continue
            if check_target_module_exists(config, name):
                kept[f"{name}.weight"] = weight, weight.detach().clone()
    return kept


def keep_loaded(model: PeftModel, kept: Kept) -> None:
    """Keep what `keep_before_load` found with the model that has the adapter now."""
    _keep(model, kept)


@contextmanager
def as_base(model: PeftModel) -> Iterator[None]:
    """Within it the model computes as its base did before the adapter came; afterwards with the adapter again."""
    kept: Kept = getattr(model, _KEPT, {})
    tuned = {name: parameter.data for name, (parameter, _) in kept.items()}
    with ExitStack() as off:
        with warnings.catch_warnings():
            # PEFT's, that biases stay what training made of them: they do not here.
            warnings.filterwarnings("ignore", message=".*disabling adapter layers with bias")
            off.enter_context(model.disable_adapter())
        try:
            for parameter, before in kept.values():
                parameter.data = before.to(parameter.device, parameter.dtype)
            yield
        finally:
            for name, (parameter, _) in kept.items():
                parameter.data = tuned[name]


def restore_base(model: PeftModel) -> None:
    """Give the base the values that it had before the adapter came, for good; the adapter is left as it is."""
    kept: Kept = getattr(model, _KEPT, {})
    for parameter, before in kept.values():
        parameter.data = before.to(parameter.device, parameter.dtype)


def _keep(model: PeftModel, kept: Kept) -> None:
    if kept:
        # Past nn.Module, whose own lists would take the parameters for its children.
        object.__setattr__(model, _KEPT, kept)
