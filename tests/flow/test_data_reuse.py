"""What a run does with its rows over time: other packs in every epoch, the same ones when resumed, kept tokens."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from phlora import finetune
from phlora.display import Display
from phlora.train import loop, prepare
from phlora.train.batches import SequenceCollator
from phlora.train.callbacks import GentleStop

ROWS = [{"question": f"say {n} {'na ' * (n % 9)}", "answer": f"yes {n}"} for n in range(32)]
Batch = list[int]


def run_it(model_folder: Path, output: Path, *, out: Any = None, **changes: Any) -> Any:
    arguments: dict[str, Any] = dict(
        model={"name": str(model_folder), "dtype": "float32", "device": "cpu"},
        data=ROWS,
        training_config={
            "num_train_epochs": 3,
            "packing": True,
            "max_length": 128,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "eval_strategy": "no",
        },
        peft_config={"r": 2},
        evaluation={"enabled": False},
        output=output,
        display=Display(out, quiet=out is None),
    )
    return finetune(**{**arguments, **changes})


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """The lines of the rows of each batch that is collated from now on."""
    seen: list[Batch] = []
    rows_of = SequenceCollator._rows

    def recorded(self: SequenceCollator, number: int) -> Any:
        rows = rows_of(self, number)
        seen.append([row.origin.line for row in rows])
        return rows

    monkeypatch.setattr(SequenceCollator, "_rows", recorded)
    return seen


def test_epochs_pack_anew_and_a_resumed_one_sees_the_same_packs(
    model_folder: Path, tmp_path: Path, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_it(model_folder, tmp_path / "whole")
    taken = [tuple(sorted(batch)) for batch in batches]
    per_epoch = len(taken) // 3
    epochs = [taken[start : start + per_epoch] for start in range(0, len(taken), per_epoch)]
    assert len(epochs) == 3 and len({tuple(sorted(line for pack in e for line in pack)) for e in epochs}) == 1
    assert len({tuple(sorted(epoch)) for epoch in epochs}) == 3

    steps_per_epoch = -(-per_epoch // 2)
    for stop in (steps_per_epoch, steps_per_epoch + 1):  # at the end of an epoch, and within the second

        class StopThere(GentleStop):
            def on_step_end(self, args: Any, state: Any, control: Any, *, stop: int = stop, **_: Any) -> None:
                if state.global_step == stop:
                    self.signal = 2
                super().on_step_end(args, state, control)

        output = tmp_path / f"stopped-{stop}"
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(loop, "GentleStop", StopThere)
            run_it(model_folder, output)
        batches.clear()
        run_it(model_folder, output, resume=True)
        resumed = [tuple(sorted(batch)) for batch in batches]
        assert resumed == taken[-len(resumed) :] and len(resumed) >= per_epoch
        ours, theirs = (
            load_file(folder / "adapter" / "last" / "adapter_model.safetensors")
            for folder in (output, whole.folder)
        )
        assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())


def test_a_second_start_takes_its_tokens_from_the_cache_unless_told_not_to(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHLORA_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")

    def said(**changes: Any) -> str:
        out = io.StringIO()
        data = {"files": [str(path)], **changes}
        run_it(model_folder, tmp_path / "dry", out=out, data=data, dry_run=True)
        return out.getvalue()

    assert "from cache" not in said(cache=False) and not (tmp_path / "cache" / "tokens").exists()
    assert "from cache" not in said()
    with monkeypatch.context() as patched:
        patched.setattr(prepare, "tokenize_rows", None)  # not called
        assert said().count("tokens from cache") == 2
    assert "from cache" not in said(train_on="all")
    for file in (tmp_path / "cache" / "tokens").iterdir():
        file.write_bytes(b"damaged")
    assert "from cache" not in said()
    assert "from cache" in said()
