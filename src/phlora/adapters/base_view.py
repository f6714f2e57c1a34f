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
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from phlora.models.stored_layers import widen_named

# Initialisations with which PEFT changes the base weight of what they adapt.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga", "eva")
_KEPT = "_base_before_adapter"

Kept = dict[str, tuple[nn.Parameter, Tensor]]


def widen_what_trains(model: nn.Module, config: PeftConfig) -> None:
    """Before PEFT copies or reads them: modules of the base that train as a whole are stored as they are computed."""
    tokens = getattr(config, "trainable_token_indices", None)
    names = {
        *(getattr(config, "modules_to_save", None) or ()),
        *(tokens if isinstance(tokens, Mapping) else ()),
    }
    if tokens:
        names.add("embed_tokens")
    widen_named(model, names)


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
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS):
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
