"""Trackers and compilers are names of other packages, and are checked before a run begins."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from phlora.display import Display
from phlora.errors import ConfigError, MissingExtraError
from phlora.extras import PACKAGES
from phlora.testing import chat_rows, tiny_folder
from phlora.train.arguments import training_arguments
from phlora.train.backends import (
    _CHECKPOINTING,
    TRACKERS,
    check_checkpointing,
    check_compiler,
    check_trackers,
    needed_by_trackers,
)
from phlora.train.finetune import finetune


def test_every_tracker_of_the_installed_transformers_is_known_with_its_package() -> None:
    assert TRACKERS.keys() == INTEGRATION_TO_CALLBACK.keys()
    assert {module for module in TRACKERS.values() if module} <= PACKAGES.keys()


@pytest.mark.parametrize("name", ["evil", ["tensorboard", "wnadb"], "WandB"])
def test_an_unknown_tracker_is_refused_with_the_nearest_name(name: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"(?s)training_config.report_to: .* is no tracker.*(did you|one of)"
    ):
        check_trackers(name)


@pytest.mark.parametrize("name", ["neptune", ["dvclive", "codecarbon"], "azure_ml", "flyte", "dagshub"])
def test_a_tracker_without_its_package_is_refused(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phlora.extras.is_installed", lambda module: False)
    with pytest.raises(MissingExtraError, match="pip install"):
        check_trackers(name)


@pytest.mark.parametrize("name", [None, "none", ["none"], "all", "kubeflow", []])
def test_what_needs_no_package_is_let_through(name: Any) -> None:
    check_trackers(name)
    assert needed_by_trackers(name) == {}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"torch_compile_backend": "inductr"}, "(?s)torch_compile_backend.*did you mean `inductor`"),
        ({"torch_compile_backend": "evil"}, "(?s)torch_compile_backend.*`evil` is not known"),
        ({"torch_compile_mode": "max-autotun"}, "(?s)torch_compile_mode.*did you mean `max-autotune`"),
    ],
)
def test_an_unknown_compiler_is_refused_with_the_nearest_name(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_compiler(settings)


def test_known_compilers_are_let_through() -> None:
    check_compiler({"torch_compile_backend": "inductor", "torch_compile_mode": "reduce-overhead"})
    check_compiler({"torch_compile_backend": "aot_eager"})
    check_compiler({"torch_compile": True})


@pytest.mark.parametrize(
    "settings",
    [
        {"report_to": "evil"},
        {"torch_compile_backend": "evil"},
        {"torch_compile_mode": "evil"},
        {"adam_beta1": 1},
        {"adam_beta2": -0.1},
        {"adam_epsilon": -1e-8},
        {"lr_scheduler_kwargs": {"evil": 1}},
        {"optim": "rmsprop", "optim_args": "evil"},
        {"use_liger_kernel": True},
        {"debug": "underflow_overflow"},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"evil": 1}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": "evil"}},
        {"accelerator_config": {"evil": 1}},
        {"dataloader_prefetch_factor": 2},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_it_is_said_before_anything_is_written(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        finetune(
            model={"name": str(tiny_folder(tmp_path / "base")), "device": "cpu"},
            data=chat_rows(8),
            training_config={"max_steps": 1, **settings},
            output=tmp_path / "run",
            display=Display(quiet=True),
        )
    assert list(settings)[-1] in str(error.value)
    assert not (tmp_path / "run").exists()


def test_what_checkpointing_takes_is_what_torch_takes() -> None:
    known = set(inspect.signature(torch.utils.checkpoint.checkpoint).parameters)
    # The first are what is called, one is a function, and one is taken from what is left over.
    assert set(_CHECKPOINTING) == known - {"function", "args", "kwargs", "context_fn"} | {
        "preserve_rng_state"
    }
    check_checkpointing({"gradient_checkpointing_kwargs": {"use_reentrant": False, "early_stop": True}})
    with pytest.raises(ConfigError, match="did you mean `use_reentrant`"):
        check_checkpointing({"activation_checkpointing_kwargs": {"use_reentrent": False}})


def test_liger_without_its_package_is_refused_on_a_gpu_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phlora.extras.is_installed", lambda module: module != "liger_kernel")
    with pytest.raises(MissingExtraError, match="(?s)use_liger_kernel.*liger-kernel"):
        training_arguments({"use_liger_kernel": True}, output_dir=tmp_path, device="cuda")
    for device in ("cpu", "mps"):
        with pytest.raises(ConfigError, match=f"need CUDA, and this run is on the {device}"):
            training_arguments({"use_liger_kernel": True}, output_dir=tmp_path, device=device)
