"""What a run may report to, what may compile it and how it is checkpointed: names of other packages, checked before
anything begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from phlora.errors import ConfigError, did_you_mean, shown
from phlora.extras import require
from phlora.train.field_values import WHERE

# What `report_to` names, and the module that it needs; a test holds this against the installed transformers.
TRACKERS: dict[str, str | None] = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "trackio": "trackio",
    "comet_ml": "comet_ml",
    "swanlab": "swanlab",
    "clearml": "clearml",
    "azure_ml": "azureml",
    "codecarbon": "codecarbon",
    "dagshub": "dagshub",
    "dvclive": "dvclive",
    "flyte": "flytekit",
    "neptune": "neptune",
    # Talks to the cluster that it runs in, and needs no package.
    "kubeflow": None,
}
_WORDS = ("all", "none")
# Of torch.utils.checkpoint, as far as a configuration can say it; a test holds this against the installed torch.
_CHECKPOINTING = {
    "use_reentrant": bool,
    "preserve_rng_state": bool,
    "determinism_check": str,
    "early_stop": bool,
    "debug": bool,
}


def check_trackers(report_to: Any) -> None:
    """
    Raises:
        ConfigError: a name that is no tracker's, with the nearest one.
        MissingExtraError: a tracker whose package is not installed.
    """
    for name in _names(report_to):
        if name not in INTEGRATION_TO_CALLBACK and name not in _WORDS:
            raise ConfigError(
                f"{shown(name)} is no tracker",
                where=f"{WHERE}.report_to",
                fix=did_you_mean(str(name), [*INTEGRATION_TO_CALLBACK, *_WORDS]),
            )
    require(needed_by_trackers(report_to), where=f"{WHERE}.report_to")


def needed_by_trackers(report_to: Any) -> dict[str, str]:
    """The packages of `training_config.report_to`; see `extras.require`."""
    modules = {name: TRACKERS.get(name) for name in _names(report_to) if isinstance(name, str)}
    return {module: f"report_to: {name}" for name, module in modules.items() if module}


def check_compiler(values: Mapping[str, Any]) -> None:
    """
    Raises:
        ConfigError: a backend or a mode that torch.compile or accelerate does not have, with the nearest one.
    """
    backend, mode = values.get("torch_compile_backend"), values.get("torch_compile_mode")
    if backend is None and mode is None:
        return
    # Imported here: only who compiles waits for torch's compiler.
    import torch._dynamo
    from accelerate.utils import DynamoBackend

    # accelerate is handed the name, and torch is called by it.
    here = {name.lower() for name in torch._dynamo.list_backends(exclude_tags=())}
    known = {
        "torch_compile_backend": sorted(here & {name.value.lower() for name in DynamoBackend}),
        "torch_compile_mode": sorted(torch._inductor.list_mode_options()),
    }
    for key, value in (("torch_compile_backend", backend), ("torch_compile_mode", mode)):
        if value is not None and value not in known[key]:
            raise ConfigError(
                f"{shown(value)} is not known",
                where=f"{WHERE}.{key}",
                fix=did_you_mean(str(value), known[key]),
            )


def check_checkpointing(values: Mapping[str, Any]) -> None:
    """
    Raises:
        ConfigError: what torch's checkpointing does not take, with the nearest name.
    """
    for key in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        for name, value in (values.get(key) or {}).items():
            where = f"{WHERE}.{key}"
            if name not in _CHECKPOINTING:
                raise ConfigError(
                    f"Unknown key {shown(name)}", where=where, fix=did_you_mean(str(name), _CHECKPOINTING)
                )
            if not isinstance(value, _CHECKPOINTING[name]):
                expected = "true or false" if _CHECKPOINTING[name] is bool else "text"
                raise ConfigError(f"{shown(value)} was given", where=f"{where}.{name}", expected=expected)


def _names(report_to: Any) -> list[Any]:
    names = report_to if isinstance(report_to, list | tuple | set) else [report_to]
    return [name for name in names if name is not None]
