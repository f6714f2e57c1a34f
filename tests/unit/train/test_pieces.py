"""A micro-batch that does not fit into memory is done in pieces: the same step, and the smaller size is kept."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback
from transformers.models.phi3.modeling_phi3 import Phi3Model

from phlora.display import Display
from phlora.errors import NoRoomError
from phlora.measure import is_out_of_memory
from phlora.runs.events import read_events
from phlora.runs.folder import RunFolder
from phlora.testing import tiny_folder
from phlora.train import lookahead
from phlora.train.finetune import finetune

CPU = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "99 bytes. Error code 12 (Cannot allocate memory)"
)
# Of different lengths, and with nothing in common.
ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"{n} {'say ' * (n % 5)}"},
            {"role": "assistant", "content": f"{n}" * 3},
        ]
    }
    for n in range(24)
]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("base"))


def train(model_folder: Path, output: Path, **changes: Any) -> dict[str, torch.Tensor]:
    settings = {
        "max_steps": 3,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "eval_strategy": "no",
        "save_strategy": "no",
        **changes.pop("training_config", {}),
    }
    finetune(
        model={"name": str(model_folder), "dtype": "float32", "device": "cpu"},
        training_config=settings,
        peft_config={"r": 2},
        evaluation={"enabled": False},
        output=output,
        display=Display(quiet=True),
        **{"data": ROWS, **changes},
    )
    return load_file(output / "adapter" / "last" / "adapter_model.safetensors")


def curve(output: Path) -> list[tuple[float, ...]]:
    """What was logged of each step: loss, gradient norm, accuracy, entropy, tokens."""
    names = ("loss", "grad_norm", "mean_token_accuracy", "entropy", "num_tokens")
    events = read_events(RunFolder(output).events)
    return [
        tuple(float(event[name]) for name in names)
        for event in events
        if event["event"] == "log" and "loss" in event
    ]


@pytest.fixture(autouse=True)
def _without_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its probe runs passes of its own, which are not those that are counted here."""
    monkeypatch.setattr(lookahead, "_not_forecast", lambda *_: "not asked for")


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Let larger passes fail, in forward, in backward or without gradients; returns the positions of the others."""

    def limited(most: int, *, where: str = "forward", error: type[Exception] = RuntimeError) -> list[int]:
        fitting: list[int] = []
        original = Phi3Model.forward

        def full(*_: Any) -> Any:
            raise error(CPU)

        def forward(self: nn.Module, *args: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
            is_limited = torch.is_grad_enabled() != (where == "evaluation")
            too_large = is_limited and input_ids.numel() > most
            if too_large and where != "backward":
                full()
            if not too_large:
                fitting.extend([input_ids.numel()] * is_limited)
                return original(self, *args, input_ids=input_ids, **kwargs)
            # When the adapters of the last layer have their gradients, and those of the first have not.
            hook = self.layers[0].register_forward_hook(
                lambda _, __, states: states.register_hook(full) and None
            )
            try:
                return original(self, *args, input_ids=input_ids, **kwargs)
            finally:
                hook.remove()

        monkeypatch.setattr(Phi3Model, "forward", forward)
        return fitting

    return limited


KIND = {"role": "system", "content": "be kind " * 6}
LAYOUTS: dict[str, dict[str, Any]] = {
    # Who looks at logits shares nothing.
    "padded": {"compute_metrics": lambda _: {}},
    "packed": {"compute_metrics": lambda _: {}, "training_config": {"packing": True, "max_length": 96}},
    "shared": {
        "data": [
            {"messages": [{"role": "system", "content": "be kind " * 6}, *row["messages"]]} for row in ROWS
        ]
    },
}


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_step_is_the_same_in_pieces(
    layout: str, where: str, model_folder: Path, tmp_path: Path, memory: Any
) -> None:
    recorded = memory(10**9)
    whole, sizes = train(model_folder, tmp_path / "whole", **LAYOUTS[layout]), list(recorded)
    most = max(sizes) // 2 + 1
    fitting = memory(most, where=where)
    pieces = train(model_folder, tmp_path / "pieces", **LAYOUTS[layout])
    assert max(fitting) <= most and len(fitting) > len(sizes)
    assert whole.keys() == pieces.keys()
    for name, value in whole.items():
        torch.testing.assert_close(pieces[name], value, rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(curve(tmp_path / "pieces"), curve(tmp_path / "whole"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_held_out_loss_is_the_same_in_pieces(
    layout: str, model_folder: Path, tmp_path: Path, memory: Any, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {**LAYOUTS[layout], "eval_data": ROWS[:6]}
    changes.pop("compute_metrics", None)
    changes["training_config"] = {
        **changes.get("training_config", {}),
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    recorded = memory(10**9, where="evaluation")
    train(model_folder, tmp_path / "whole", **changes)
    sizes = list(recorded)
    fitting = memory(max(sizes) // 2 + 1, where="evaluation")
    train(model_folder, tmp_path / "pieces", **changes)
    assert max(fitting) < max(sizes) and "in the held-out loss after step 1 with" in caplog.text
    ours, theirs = (
        [
            event["eval_loss"]
            for event in read_events(RunFolder(tmp_path / name).events)
            if "eval_loss" in event
        ]
        for name in ("pieces", "whole")
    )
    assert len(ours) == 3 and ours == pytest.approx(theirs, rel=1e-5)


def test_the_smaller_size_is_kept_and_said_once(
    model_folder: Path, tmp_path: Path, memory: Any, caplog: pytest.LogCaptureFixture
) -> None:
    memory(100)
    with caplog.at_level(logging.WARNING, logger="phlora.train.pieces"):
        train(model_folder, tmp_path / "run", training_config={"max_steps": 6, "num_train_epochs": 2})
    said = [record.getMessage() for record in caplog.records if "Out of memory" in record.getMessage()]
    assert 1 <= len(said) <= 3 and all("at step 1 " in line or "at step 2 " in line for line in said)
    assert "all that follows" in said[0] and "the result is the same" in said[0]


def test_noise_is_said_to_be_drawn_anew(
    model_folder: Path, tmp_path: Path, memory: Any, caplog: pytest.LogCaptureFixture
) -> None:
    memory(100)
    train(model_folder, tmp_path / "run", training_config={"neftune_noise_alpha": 5.0})
    assert "the result is the same but for dropout and noise, which are drawn anew" in caplog.text


def test_a_continued_run_does_not_forget_what_did_not_fit(
    model_folder: Path, tmp_path: Path, memory: Any
) -> None:
    """The memory is larger after the interruption; the passes are as they were, and so is every bit."""

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 4:
                raise KeyboardInterrupt

    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "num_train_epochs": 2}
    memory(100)
    whole = train(model_folder, tmp_path / "whole", training_config=settings)
    with pytest.raises(KeyboardInterrupt):
        train(model_folder, tmp_path / "cut", training_config=settings, callbacks=[Stop()])
    fitting = memory(10**9)
    resumed = train(model_folder, tmp_path / "cut", training_config=settings, resume=True)
    assert max(fitting) <= 100
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_a_row_that_does_not_fit_alone_is_named(model_folder: Path, tmp_path: Path, memory: Any) -> None:
    file = tmp_path / "chats.jsonl"
    rows = [
        *ROWS,
        {"messages": [{"role": "user", "content": "long " * 200}, {"role": "assistant", "content": "x"}]},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    memory(150)
    with pytest.raises(
        NoRoomError, match=r"(?s)chats.jsonl:25: One row alone, of \d+ tokens.*max_length"
    ) as error:
        train(
            model_folder,
            tmp_path / "run",
            data={"files": [str(file)], "eval_size": 0},
            training_config={"max_steps": 7, "num_train_epochs": 3},
        )
    assert error.value.exit_code == 3
    assert RunFolder(tmp_path / "run").facts()["status"] == "failed"


def test_another_error_is_not_retried(model_folder: Path, tmp_path: Path, memory: Any) -> None:
    fitting = memory(60, error=ValueError)
    with pytest.raises(ValueError, match="DefaultCPUAllocator"):
        train(model_folder, tmp_path / "run")
    assert len(fitting) < 3


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (RuntimeError(CPU), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 2 GB)"), True),
        (MemoryError(), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED."), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError(CPU), False),
    ],
)
def test_running_out_of_memory_is_known_on_every_device(error: Exception, is_memory: bool) -> None:
    assert is_out_of_memory(error) == is_memory
