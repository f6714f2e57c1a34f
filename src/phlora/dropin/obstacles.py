"""What of a script needs whole rows, or layers as transformers and PEFT made them: why a faster way is not taken.

Sharing lays the rows of a step out as one stream, so that whatever else looks at a batch, or at what a layer computes,
would see that stream in the place of rows. Every question here is answered with a sentence for the log, or None.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from datasets import Dataset
from torch import nn
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from phlora.data.collate import SharedPrefixCollator
from phlora.dropin.overrides import of_script

# Whose code is known to compute each row by itself, and to be exchanged by what computes the same.
_KNOWN = ("phlora", "trl", "transformers", "peft", "accelerate", "torch", "bitsandbytes", "datasets")
# Methods that are given batches. Of a trainer that has its own of these, nothing else can be known.
_READ_BATCHES = (
    *("compute_loss", "training_step", "get_batch_samples", "_get_num_items_in_batch"),
    *("_prepare_inputs", "_prepare_input", "floating_point_ops"),
)
_READ_TRAINING_BATCHES = ("get_train_dataloader", "_get_dataloader")
_READ_HELD_OUT_BATCHES = (
    *("prediction_step", "evaluation_loop", "get_eval_dataloader", "_get_dataloader"),
    "_get_eval_sampler",
)
# Adapters that do to each position what they would do to it alone.
_BY_POSITION = ("LORA", "ADALORA", "IA3", "LOHA", "LOKR", "VERA", "FOURIERFT", "LN_TUNING", "RANDLORA")


def changed_model(model: nn.Module) -> str | None:
    """Why the layers of a model stay as they are: something in it is the script's own, or listens to it."""
    tops = _tops(model)
    for name, module in model.named_modules():
        where = name or type(module).__name__
        if module not in tops:
            if "forward" in vars(module):
                return f"the forward of {where} was replaced"
            if any(not _is_known(hook) for hook in _hooks(module)):
                return f"a hook on {where} sees what it computes"
        if not _is_known(type(module).forward) or not _is_known(type(module)):
            return f"{where} is a {type(module).__name__} of the script's own"
    return None


def listening(model: nn.Module) -> str | None:
    """Why rows of a model share nothing though its layers may be exchanged: hooks on the whole of it."""
    tops = _tops(model)
    if any(not _is_known(hook) for top in tops for hook in _hooks(top)):
        return "a hook on the model sees whole batches"
    if any("forward" in vars(top) and not _is_known(vars(top)["forward"]) for top in tops):
        return "the forward of the model was replaced"
    return None


def unknown_adapter(model: nn.Module) -> str | None:
    """Why the adapters of a model may look at more than the position that they compute."""
    for name, adapter in (getattr(model, "peft_config", None) or {}).items():
        kind = getattr(adapter.peft_type, "value", str(adapter.peft_type))
        if kind not in _BY_POSITION:
            return f"adapter {name} is {kind}, which is not known to compute each position by itself"
    return None


def random_masks(model: nn.Module) -> str | None:
    """Why rows would share one random mask: dropout of any kind, in any layer or adapter."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return f"{name} drops {module.p:g}: rows would share one random mask"
    for name, adapter in (getattr(model, "peft_config", None) or {}).items():
        for key, value in vars(adapter).items():
            if key.endswith("dropout") and isinstance(value, int | float) and value > 0:
                return f"{key} of {name} is {value:g}: rows would share one random mask"
    return None


def has_own_loss(trainer: Any) -> bool:
    """Whether the script computes the loss of a batch itself, which then may be no sum over its rows."""
    return not _is_known(inspect.getattr_static(trainer, "compute_loss"))


def own_held_out_loss(trainer: Any) -> str | None:
    """The script's method that says what the held-out loss of a batch is; None: it is that of its trained tokens."""
    names = ("compute_loss", "prediction_step")
    return next((name for name in names if not _is_known(inspect.getattr_static(trainer, name))), None)


def own_batches(trainer: Any, *, training: bool) -> str | None:
    """Why the batches of a trainer have to be those that TRL makes."""
    collator = trainer.data_collator
    if type(collator) is SharedPrefixCollator:
        return "not chosen here: data_collator shares them"
    if type(collator) is not DataCollatorForLanguageModeling or collator.return_position_ids:
        return f"data_collator is a {_name_of(collator)}"
    names = (*_READ_BATCHES, *(_READ_TRAINING_BATCHES if training else _READ_HELD_OUT_BATCHES))
    for name in names:
        if not _is_known(inspect.getattr_static(trainer, name)):
            return f"{type(trainer).__name__} has a {name} of its own, which may need whole rows"
    return own_loss_of(trainer) or _other_layout(trainer, training=training)


def unreadable_rows(rows: Any) -> str | None:
    """Why nothing is known of the rows of a data set before they are trained."""
    if not isinstance(rows, Dataset):
        return "the rows are a stream" if isinstance(rows, Iterable) else "the rows are no Dataset"
    if rows.format["type"] == "custom":
        return "the rows are made as they are read"
    return None if "input_ids" in rows.column_names else "the rows hold no input_ids"


def sharded(trainer: Any) -> str | None:
    """Why layers have to be called for what they hold: their weights are elsewhere until then."""
    if trainer.is_fsdp_enabled:
        return "FSDP gathers the weights of a layer when it is called"
    plugin = trainer.args.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        return "ZeRO-3 gathers the weights of a layer when it is called"
    return None


def own_loss_of(trainer: Any) -> str | None:
    """Why the loss of a trainer is computed from the logits of whole rows."""
    if trainer._why_trls_loss is not None:
        return f"{trainer._why_trls_loss}: TRL's own loss needs whole rows"
    if trainer.compute_loss_func is not None:
        return "compute_loss_func needs the logits of whole rows"
    if trainer._needs_logits:
        return f"loss_type {trainer.args.loss_type} needs the logits of whole rows"
    return None


def _other_layout(trainer: Any, *, training: bool) -> str | None:
    args = trainer.args
    parallel = trainer.accelerator.parallelism_config
    obstacles = {
        "compute_metrics needs the logits of whole rows": not training
        and trainer.compute_metrics is not None,
        "include_num_input_tokens_seen counts what batches hold": training
        and args.include_num_input_tokens_seen not in ("no", False),
        "the model does not take the number of trained tokens": not trainer.model_accepts_loss_kwargs,
        "split_batches would cut the stream apart": args.accelerator_config.split_batches,
        "dispatch_batches would cut the stream apart": args.accelerator_config.dispatch_batches,
        "sequences are cut over several devices": parallel is not None
        and (parallel.cp_enabled or parallel.sp_enabled),
    }
    return next((reason for reason, holds in obstacles.items() if holds), None)


def _tops(model: Any) -> list[nn.Module]:
    """A model, and the one of transformers in it where it is a PeftModel."""
    return [model, *([model.get_base_model()] if hasattr(model, "get_base_model") else [])]


def _hooks(module: nn.Module) -> Iterator[Any]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return itertools.chain.from_iterable(getattr(module, kind).values() for kind in kinds)


def _is_known(thing: Any) -> bool:
    """Whether a function, a method, a class or a callable object comes from a package whose code is known.

    So does what it wraps: a decorator of a library's around a script's method is the script's.
    """
    if _home(thing).partition(".")[0] not in _KNOWN:
        return False
    wrapped = getattr(of_script(thing), "__wrapped__", None)
    return wrapped is None or _is_known(wrapped)


def _home(thing: Any) -> str:
    """The module in which something was written; of a wrapper, that of the wrapper."""
    if isinstance(thing, functools.partial):
        return _home(thing.func)
    thing = of_script(getattr(thing, "__func__", thing))
    written = getattr(thing, "__globals__", None)
    if written is not None:
        return str(written.get("__name__", ""))
    return str(thing.__module__ if isinstance(thing, type) else type(thing).__module__)


def _name_of(thing: Any) -> str:
    return getattr(thing, "__name__", type(thing).__name__)
