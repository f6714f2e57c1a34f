"""Exports, each opened in its real client and compared with the run's own model."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from phlora import export_run
from phlora.display import Display
from phlora.errors import ConfigError, Finding, ModelError, RunError
from phlora.export import verify
from phlora.testing import chat_rows, invoke, tiny_adapter, tiny_phi3
from phlora.train.finetune import finetune

QUIET = Display(quiet=True)
ROWS = chat_rows(20)
LLAMACPP = pytest.mark.skipif(find_spec("xllamacpp") is None, reason="llama.cpp (xllamacpp) is not installed")


@pytest.fixture(scope="module")
def mixed(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose layers have other ranks and scalings, on parts of fused weights and on whole ones."""
    done = finetune(
        model={"name": str(model_folder), "dtype": "float32", "device": "cpu"},
        data=ROWS[:14],
        eval_data=ROWS[14:],
        training_config={"max_steps": 2, "learning_rate": 5e-2},
        peft_config={
            "r": 4,
            "lora_alpha": 6,
            "target_modules": ["q_proj", "v_proj", "down_proj", "o_proj"],
            "rank_pattern": {"v_proj": 6, "down_proj": 3},
        },
        evaluation={"enabled": False},
        output=tmp_path_factory.mktemp("mixed") / "run",
        display=QUIET,
    )
    assert done.folder is not None
    return done.folder


def export(run: Path, output: Path, **options: Any) -> Any:
    return export_run(run, output, display=QUIET, max_rows=4, max_new_tokens=8, **options)


@pytest.mark.parametrize(
    ("options", "client", "largest"),
    [
        ({"target": "peft"}, "PEFT", 1e-4),
        ({"target": "vllm"}, "PEFT", 1e-4),
        ({"target": "vllm", "vllm_before": "0.32"}, "PEFT", 1e-4),
        ({"target": "sglang"}, "PEFT", 1e-4),
        ({"target": "merged"}, "transformers", 1e-4),
        ({"target": "merged", "type": "float16"}, "transformers", 0.05),
        pytest.param({"target": "gguf", "type": "f32"}, "llama.cpp", 0.01, marks=LLAMACPP),
        pytest.param({"target": "gguf"}, "llama.cpp", 0.01, marks=LLAMACPP),
        pytest.param({"target": "gguf", "type": "bf16"}, "llama.cpp", 0.1, marks=LLAMACPP),
        pytest.param({"target": "gguf", "type": "q8_0"}, "llama.cpp", 0.1, marks=LLAMACPP),
        pytest.param({"target": "gguf", "adapter_only": True}, "llama.cpp", 0.01, marks=LLAMACPP),
        pytest.param({"target": "ollama"}, "llama.cpp", 0.01, marks=LLAMACPP),
    ],
)
def test_the_client_answers_like_the_run(
    mixed: Path, tmp_path: Path, options: dict[str, Any], client: str, largest: float
) -> None:
    report = export(mixed, tmp_path / "out", **options)
    verdict = report.verdict
    assert verdict.verified and verdict.client.startswith(client) and verdict.num_prompts == 4
    assert verdict.prompts_differing == verdict.stops_differing == 0
    assert verdict.largest_difference < largest and verdict.largest_gap < largest
    if options["target"] in ("gguf", "ollama") and not options.get("adapter_only"):
        assert verdict.losses["file"] == pytest.approx(verdict.losses["own"], abs=0.02)
    kept = json.loads((tmp_path / "out" / "export.json").read_text(encoding="utf-8"))
    assert kept["verdict"] == json.loads(json.dumps(verdict.to_json()))
    assert str(tmp_path) not in (tmp_path / "out" / "export.json").read_text(encoding="utf-8")
    assert report.launch in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@LLAMACPP
@pytest.mark.parametrize("type", ["q4_k_m", "q5_k_m", "q6_k"])
def test_rounding_on_purpose_is_told_and_not_refused(mixed: Path, tmp_path: Path, type: str) -> None:
    pytest.importorskip("libgguf")
    verdict = export(mixed, tmp_path / "out", target="gguf", type=type).verdict
    assert verdict.verified and verdict.bound is None and verdict.prompts_differing == 0
    assert "compared, no bound" in verdict.summary()
    assert 0 < verdict.weights_apart < verdict.weights_bound / 2
    assert 0 < abs(verdict.losses["file"] - verdict.losses["own"]) < 0.5


def test_a_program_that_reads_one_rank_gets_one(mixed: Path, tmp_path: Path) -> None:
    report = export(mixed, tmp_path / "out", target="sglang")
    config = LoraConfig.from_pretrained(str(tmp_path / "out"))
    assert (config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern) == (10, 10, {}, {})
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {value.shape[0] for name, value in tensors.items() if "lora_A" in name} == {10}
    assert "--max-lora-rank 10" in report.launch


def test_vllm_gets_the_rank_that_it_takes(mixed: Path, tmp_path: Path) -> None:
    report = export(mixed, tmp_path / "out", target="vllm")
    assert "--max-lora-rank 16 --lora-modules run=out" in report.launch and report.rank == 10
    assert "vllm itself was not asked" in report.summary()


@pytest.mark.parametrize("target", ["peft", "vllm", "loralib"])
def test_the_folder_has_what_a_client_needs(run: Path, tmp_path: Path, target: str) -> None:
    export(run, tmp_path / "out", target=target)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "README.md",
        "export.json",
    } <= names
    stops = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert set(stops) >= {275, 282}, "<|endoftext|> and <|end|>"


def test_loralib_tensors_are_read_again(run: Path, tmp_path: Path) -> None:
    report = export(run, tmp_path / "out", target="loralib")
    state = torch.load(tmp_path / "out" / "run.pt", weights_only=True)
    assert report.verdict.verified and len(state) == 16
    assert any("Linear(r=4" in note for note in report.notes)


def test_a_merged_folder_has_both_spellings_of_the_rotation(tmp_path: Path) -> None:
    model, tokenizer = tiny_phi3(longrope=True)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    adapter = tiny_adapter(tmp_path / "base", tmp_path / "adapter")
    report = export(adapter, tmp_path / "out", target="merged", rows=ROWS)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10_000
    assert config["rope_scaling"]["short_factor"] == config["rope_parameters"]["short_factor"]
    assert config["rope_scaling"]["type"] == config["rope_scaling"]["rope_type"] == "longrope"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert again.rope_parameters == {**model.config.rope_parameters, "type": "longrope"} or (
        again.rope_parameters == model.config.rope_parameters
    )
    assert report.verdict.verified


@LLAMACPP
def test_dora_goes_out_merged(model_folder: Path, tmp_path: Path) -> None:
    adapter = tiny_adapter(model_folder, tmp_path / "adapter", use_dora=True)
    for options in ({"target": "vllm"}, {"target": "gguf", "adapter_only": True}):
        with pytest.raises(ModelError, match="use_dora") as caught:
            export(adapter, tmp_path / "out", rows=ROWS, **options)
        assert "merged" in str(caught.value) and not (tmp_path / "out").exists()
    report = export(adapter, tmp_path / "out", target="gguf", type="f32", rows=ROWS)
    assert report.verdict.verified and any("use_dora" in note for note in report.notes)


@pytest.mark.slow
@LLAMACPP
@pytest.mark.parametrize("options", [{"target": "merged"}, {"target": "gguf", "type": "f32"}])
def test_what_was_trained_on_nf4_answers_as_it_was_trained(
    model_folder: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    pytest.importorskip("bitsandbytes")
    done = finetune(
        model={"name": str(model_folder), "dtype": "float32", "device": "cpu", "quantization": "nf4"},
        data=ROWS[:14],
        eval_data=ROWS[14:],
        training_config={"max_steps": 4, "learning_rate": 2e-2},
        peft_config={"r": 4},
        evaluation={"enabled": False},
        output=tmp_path / "run",
        display=QUIET,
    )
    assert done.folder is not None
    report = export(done.folder, tmp_path / "out", **options)
    assert report.verdict.verified and report.verdict.largest_difference < 0.01
    assert report.base in ("full", "dequantized")
    told = "it was trained on one in nf4" in report.summary()
    assert told == (report.base == "full")


def test_an_adapter_without_rows_is_written_and_says_so(adapter: Path, tmp_path: Path) -> None:
    report = export(adapter, tmp_path / "out", target="peft")
    assert not report.verdict.verified
    assert "Written, not verified: there are no held-out rows; name some: --rows" in report.summary()
    again = export(adapter, tmp_path / "out", target="peft", verify_only=True, rows=ROWS)
    assert again.verdict.verified and again.files.keys() >= {"adapter_model.safetensors"}
    assert json.loads((tmp_path / "out" / "export.json").read_text())["verdict"]["verified"]


@LLAMACPP
def test_a_missing_client_is_caught_up_with_later(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(verify, "is_installed", lambda module: False)
        done = export(mixed, tmp_path / "out", target="gguf", adapter_only=True)
    assert "Written, not verified: llama.cpp is not installed: pip install" in done.summary()
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*.gguf")}
    again = invoke("export", mixed, "--for", "gguf", "--verify-only", "-o", tmp_path / "out", "--json")
    assert again.code == 0 and again.json["verdict"]["verified"], again.err
    assert {file: file.stat().st_mtime_ns for file in written} == written


@LLAMACPP
def test_other_weights_than_the_runs_are_a_finding(mixed: Path, run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out", target="gguf", type="f32")
    done = invoke("export", mixed, "--for", "gguf", "--verify-only", "-o", tmp_path / "out")
    assert done.code == 1 and "does not answer like the run's own model" in done.err
    assert "NOT verified" in done.err and (tmp_path / "out" / "run-f32.gguf").is_file()


def test_nothing_is_kept_of_what_its_client_runs_otherwise(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = verify.own_answers

    def other(*arguments: Any, **options: Any) -> Any:
        return [
            replace(answer, logprobs=[x - 1 for x in answer.logprobs])
            for answer in own(*arguments, **options)
        ]

    monkeypatch.setattr(verify, "own_answers", other)
    with pytest.raises(Finding, match="nothing was kept"):
        export(mixed, tmp_path / "out", target="peft")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": "gguff"}, ConfigError, "did you mean `gguf`"),
        ({"target": "gguf", "type": "q4_k"}, ConfigError, "q4_k_m"),
        ({"target": "peft", "type": "f16"}, ConfigError, "--type is for"),
        ({"target": "peft", "adapter_only": True}, ConfigError, "--adapter-only is for"),
        ({"target": "peft", "vllm_before": "0.32"}, ConfigError, "--vllm-before is for"),
        ({"target": "vllm", "vllm_before": "new"}, ConfigError, "is no version"),
        ({"target": "merged", "type": "q8_0"}, ConfigError, "There is no dtype"),
        ({"target": "gguf", "verify_only": True}, RunError, "holds no export"),
    ],
)
def test_wrong_input_is_one_message(
    run: Path, tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        export(run, tmp_path / "out", **options)
    assert not any(tmp_path.iterdir())


def test_what_stands_there_is_never_replaced(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(RunError, match="exists already"):
        export(run, tmp_path / "out", target="peft")


def test_the_page_names_what_is_accepted() -> None:
    page = (Path(__file__).parents[3] / "docs" / "export.md").read_text(encoding="utf-8")
    for type, bound in verify._BOUNDS.items():
        if bound.weights is not None:
            told = "compared, no bound" if bound.largest is None else f"{bound.largest:g}"
            weights = "1e-5" if bound.weights == 1e-5 else f"{bound.weights:g}"
            assert f"| `{type}` | {told} | {weights} | +{bound.loss:g} |" in page
