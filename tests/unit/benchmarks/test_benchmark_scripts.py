"""The benchmark scripts run to their end on a tiny model, and their last line is JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]


def run(script: str, *arguments: str) -> tuple[str, dict[str, Any]]:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_train_step() -> None:
    pytest.importorskip("loralib")
    text, result = run("train_step.py", "--size", "tiny", "--quick", "--set", "shared")
    measured = result["sizes"]["tiny"]["sets"]["shared"]
    sides = measured["sides"]
    assert set(sides) == {"phlora", "phlora-shared", "trl-best", "trl-default", "peft", "loralib"}
    assert sides["phlora-shared"]["positions"] < 0.6 * measured["tokens"]
    assert sides["trl-best"]["faster_than_trl"] == 1
    assert max(measured["loss_differences"].values()) < 1e-5
    assert max(measured["gradient_differences"].values()) < 1e-5
    assert all(side in text for side in sides)


def test_scaling(tmp_path: Path) -> None:
    pytest.importorskip("loralib")
    _, result = run("scaling.py", "--size", "tiny", "--quick", "--axis", "modules", "--no-plots")
    points = result["axes"]["modules"]["points"]
    assert [point["value"] for point in points] == [2, 4, 6, 8]
    floors = [point["floor_seconds"] for point in points]
    assert floors == sorted(floors)


def test_scaling_draws_its_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("loralib")
    run("scaling.py", "--size", "tiny", "--quick", "--axis", "rank", "--plots", str(tmp_path))
    assert (tmp_path / "scaling_rank.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_script() -> None:
    _, result = run(
        "script.py", "--size", "tiny", "--set", "accumulated", "--trl", "--steps", "1", "--rounds", "1"
    )
    loss = result["sets"]["accumulated"]["loss"]
    # The same base, adapter, rows and order: else the seconds beside each other would say nothing.
    assert loss["train"] == loss["script"] == pytest.approx(loss["trl"], rel=1e-5)
    assert result["sets"]["accumulated"]["script_to_train"] > 0


@pytest.mark.slow
def test_samples(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHLORA_SAMPLE_MODEL", str(model_folder))
    _, result = run("samples.py", "--sample", "train_sharegpt.py", "--steps", "1")
    sides = result["results"]["train_sharegpt.py"]
    assert sides["phlora"]["trained"] == sides["trl"]["trained"] > 0
    assert sides["phlora"]["losses"] == pytest.approx(sides["trl"]["losses"], rel=1e-4)


@pytest.mark.slow
def test_end_to_end(model_folder: Path) -> None:
    _, result = run(
        "end_to_end.py",
        *("--override", f"model={model_folder}", "--override", "training_config.max_steps=4"),
        *("--layout", "row by row", "--answers", "2", "--first", "2", "--every", "2"),
    )
    for side in ("phlora", "trl"):
        assert [point["step"] for point in result["sides"][side]["points"]] == [2, 4]
        assert not result["sides"][side]["reached"]


def test_plan() -> None:
    text, result = run("plan.py", "--size", "tiny", "--case", "shared-recompute", "--steps", "2")
    (case,) = result["cases"]
    assert case["memory"] > 0 and case["measured_memory"] > 0 and case["measured_step"] > 0
    assert result["of"] == 1 and "shared-recompute" in text


def test_memory() -> None:
    text, result = run("memory.py", "--model", "tiny", "--steps", "30", "--longest", "10")
    assert result["steps"] == len(result["resident_gb"]) == 30
    assert all(held > 0.1 for held in result["resident_gb"])
    assert "goal:" in text and "too few steps" in text


@pytest.mark.slow
def test_full_size(tmp_path: Path) -> None:
    options = ("--size", "tiny", "--work", str(tmp_path), "--rows", "4", "--steps", "4", "--save-after", "2")
    short = ("--rounds", "1", "--curve-steps", "2", "--held-out", "2", "--new-tokens", "4")
    text, result = run("full_size.py", *options, *short, "--storage", "bf16")
    found = result["results"]
    parts = (
        "load",
        "plan",
        "train",
        "resume",
        "evaluate",
        "chat",
        "merge",
        "reload",
        "steps",
        "peft",
        "trl",
        "curve",
    )
    assert {f"{part}/bf16" for part in parts} <= set(found)
    assert not any("failed" in values for values in found.values())
    assert found["resume/bf16"]["same_bits"]
    assert len(found["train/bf16"]["step_seconds"]) == 4
    assert found["steps/bf16"]["positions"] < found["peft/bf16"]["positions"]
    assert abs(found["steps/bf16"]["loss"] / found["peft/bf16"]["loss"] - 1) < 1e-2
    assert found["curve/bf16"]["largest_difference"] < 1e-2
    assert found["chat/bf16"]["tokens_per_second"] > 0
    # What was measured is kept, and shown again.
    _, shown = run("full_size.py", *options, "--show")
    assert shown["results"] == found
