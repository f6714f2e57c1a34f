"""Methods that a script's subclass overrides with the arguments that they had in 2024.

Since then transformers calls `compute_loss` with `num_items_in_batch`, the trained tokens of the optimizer step, and
`log` with `start_time`, `_get_train_sampler` with the rows. A method that takes neither them nor `**kwargs` is called
without.

A loss of 2024 was the mean over a micro-batch, which the trainer divided by their number G, and so it is again. What
`super().compute_loss` contributes is made `G * sum over the micro-batch / trained tokens of the step`: divided by G
that is the exact loss of the step, however unlike its micro-batches are.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from phlora.dropin.tell import warn
from phlora.errors import ConfigError

# Method -> the argument that it is given since.
_LATER = {
    "compute_loss": "num_items_in_batch",
    "log": "start_time",
    "_get_train_sampler": "train_dataset",
}


def let_run(subclass: type) -> None:
    """Wrap the methods of a subclass that do not take what they are given now."""
    for name, argument in _LATER.items():
        method = vars(subclass).get(name)
        if inspect.isfunction(method) and not _takes(method, argument):
            setattr(
                subclass, name, _averaged(method) if name == "compute_loss" else _without(method, argument)
            )


def require_whole_step(kind: type) -> None:
    """
    Raises:
        ConfigError: a `training_step` of 2024: whether its loss is normalised by the step cannot be told.
    """
    method = of_script(inspect.getattr_static(kind, "training_step"))
    if inspect.isfunction(method) and not _takes(method, "num_items_in_batch"):
        raise ConfigError(
            f"{method.__qualname__} does not take num_items_in_batch, the trained tokens of the step",
            where="SFTTrainer",
            expected="training_step(self, model, inputs, num_items_in_batch=None)",
            fix="add it, and pass it on to super().training_step, or to self.compute_loss",
        )


def of_script(method: Any) -> Any:
    """The script's own method behind such a wrapper; any other as it is."""
    return getattr(method, "of_script", method)


def tell_if_not_passed_on(trainer: Any) -> None:
    """Say that a loss of the script's takes `num_items_in_batch` and keeps it, so that its mean counts G times."""
    several = getattr(trainer, "current_gradient_accumulation_steps", 1)
    kind = type(trainer)
    if (
        several > 1
        and trainer.model.training
        and trainer.loss_is_scaled_for_ga is None
        and kind not in trainer.told_of
    ):
        trainer.told_of.add(kind)
        warn(
            f"{kind.__name__}.compute_loss does not pass num_items_in_batch on: super().compute_loss returns the mean "
            f"over a micro-batch then, which nobody divides by the {several} of a step, in TRL neither; pass it on"
        )


def _takes(method: Callable[..., Any], argument: str) -> bool:
    parameters = inspect.signature(method).parameters
    return argument in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _without(method: Callable[..., Any], argument: str) -> Callable[..., Any]:
    taken = len(inspect.signature(method).parameters)

    @functools.wraps(method)
    def called(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop(argument, None)
        return method(*args[:taken], **kwargs)

    called.of_script = method  # type: ignore[attr-defined]
    return called


def _averaged(method: Callable[..., Any]) -> Callable[..., Any]:
    """A loss that does not know the optimizer step: the mean over a micro-batch, made its share of the step."""

    @functools.wraps(method)
    def compute_loss(
        self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if num_items_in_batch is None:
            return method(self, model, inputs, return_outputs)
        _tell_once(self, method)
        # True: the script says that it has normalised by the step itself.
        micro_batches = 1 if self.loss_is_scaled_for_ga is True else self.current_gradient_accumulation_steps
        before, self.items_for_super = self.items_for_super, num_items_in_batch / micro_batches
        try:
            result = method(self, model, inputs, return_outputs)
        finally:
            self.items_for_super = before
        if self.loss_is_scaled_for_ga is False:
            return result
        if isinstance(result, tuple):
            return (result[0] / micro_batches, *result[1:])
        return result / micro_batches

    compute_loss.of_script = method  # type: ignore[attr-defined]
    return compute_loss


def _tell_once(trainer: Any, method: Callable[..., Any]) -> None:
    if method in trainer.told_of:
        return
    trainer.told_of.add(method)
    warn(
        f"{method.__qualname__} does not take num_items_in_batch: its loss counts as the mean over a micro-batch, and "
        "what it gets from super().compute_loss is normalised over the trained tokens of the whole step; add "
        "num_items_in_batch=None to its arguments, and pass it on, to normalise all of it so"
    )
