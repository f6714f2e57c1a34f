"""A model that was handed over as an object: it is given back as it came, after a success with the adapter on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from torch import nn

from phlora.adapters.base_view import restore_base
from phlora.adapters.speed import slow_down
from phlora.train.base import require_plain_model

_SETTINGS = ("pad_token_id", "bos_token_id", "eos_token_id", "use_cache")


class HandedOver:
    """What a run does to a model object, and what the object was before; of a model by name there is nothing to keep.

    Attributes:
        adapted: the object with the adapter on it, once it has one.
        is_trained: whether the adapter stays on the object.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self.adapted: PeftModel | None = None
        self.is_trained = False
        self._model = None if model is None else require_plain_model(model)
        if self._model is None:
            return
        given = self._model
        self._attention = given.config._attn_implementation
        self._settings = [
            (config, name, getattr(config, name))
            for config in (given.config, given.generation_config)
            for name in _SETTINGS
            if config is not None and hasattr(config, name)
        ]
        self._modules = [(m, type(m), dict(m._modules), dict(vars(m))) for m in given.modules()]
        self._parameters = [(p, p.requires_grad, p.dtype) for p in given.parameters()]

    def give_back(self) -> None:
        """Leave nothing on the object but a trained adapter."""
        if self._model is None:
            return
        slow_down(self._model)
        if self.is_trained:
            self._model.train(self._modules[0][3]["training"])
        else:
            self._take_adapter_off()
        self._model.config._attn_implementation = self._attention
        for config, name, value in self._settings:
            setattr(config, name, value)

    def _take_adapter_off(self) -> None:
        """Whatever of an adapter is there; one that PEFT could not finish has no `PeftModel` yet."""
        if self.adapted is not None:
            restore_base(self.adapted)
        for module, kind, children, attributes in self._modules:
            module.__class__ = kind
            module._modules.clear()
            module._modules.update(children)
            for name in vars(module).keys() - attributes.keys():
                delattr(module, name)
            vars(module).update(attributes)
        for parameter, trains, dtype in self._parameters:
            parameter.requires_grad_(trains)
            parameter.grad = None
            # What a stored base was widened by for its training; no bit is lost on the way back.
            parameter.data = parameter.data.to(dtype)


@contextmanager
def handed_over(model: nn.Module | None) -> Iterator[HandedOver]:
    """Within it a model object trains; however it is left, the object is given back.

    Raises:
        ModelError: no plain model of transformers.
    """
    given = HandedOver(model)
    try:
        yield given
    finally:
        given.give_back()
