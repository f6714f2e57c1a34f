"""Merged models in 4 bits: refused at once where nothing can write them, measured before and after where it can."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest

from phlora import load_model
from phlora.errors import ConfigError, MissingExtraError
from phlora.export import quantize
from phlora.testing import invoke

HAS = {name: find_spec(name) is not None for name in ("auto_round", "onnxruntime_genai")}


def test_a_format_that_there_is_not_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean `gptq`"):
        quantize.merge_quantized(run, tmp_path / "m", quantize="gptk")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("format", quantize.FORMATS)
def test_what_is_not_installed_is_named_before_anything_is_loaded(
    run: Path, tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phlora.extras.is_installed", lambda module: False)
    with pytest.raises(MissingExtraError, match=r"phlora\[(gptq|onnx)\]"):
        quantize.merge_quantized(run, tmp_path / "m", quantize=format)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("format", quantize.FORMATS)
def test_both_models_are_scored_on_the_same_rows(run: Path, tmp_path: Path, format: str) -> None:
    if not HAS["onnxruntime_genai" if format == "int4-onnx" else "auto_round"]:
        pytest.skip(f"nothing that writes {format} is installed")
    output = tmp_path / "deep" / "model"
    done = invoke("merge", run, "-o", output, "--quantize", format, "--device", "cpu", "--json")
    assert done.code == 0, done.err
    report = done.json
    before, after = report["before"], report["after"]
    assert report["num_rows"] == report["num_answers"] == 6
    assert all(math.isfinite(side["loss"]) and 0 <= side["exact_match"] <= 1 for side in (before, after))
    assert math.isclose(before["loss"], report["merge"]["losses"]["full"], rel_tol=1e-5)
    assert abs(after["loss"] - before["loss"]) < 0.5 and after["num_bytes"] < before["num_bytes"]
    kept = json.loads((output / "merge.json").read_text(encoding="utf-8"))
    assert kept["quantized"]["after"] == after and kept["quantized"]["format"] == format
    assert [path.name for path in output.parent.iterdir()] == ["model"]
    assert not [path for path in output.iterdir() if path.is_dir()]
    if format != "int4-onnx":
        again = load_model(str(output), dtype="float32", device="cpu")
        assert any("packed matrices" in note for note in again.notes)
    else:
        assert {"genai_config.json", "model.onnx", "tokenizer.json"} <= {p.name for p in output.iterdir()}
