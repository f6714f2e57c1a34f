"""The whole story on a tiny random Phi-3: what a run folder holds, resuming, refusing, proving again."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from phlora import evaluate_run, finetune
from phlora.adapters.attach import lora_settings
from phlora.config import build_config
from phlora.display import Display
from phlora.errors import ConfigError, DataError, EnvironmentProblem, ModelError, NoRoomError, RunError
from phlora.lora import matmul
from phlora.runs import folder as checkpoints
from phlora.runs.events import read_events
from phlora.train import loop
from phlora.train.callbacks import GentleStop

TEXTS = ["salam دنیا", "namaste नमस्ते", "zdravo свете", "merhaba dünya", "xin chào"]


@pytest.fixture(scope="module")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"say {i} {TEXTS[i % 5]}"},
                {"role": "assistant", "content": "yes"},
            ]
        }
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def run_it(model_folder: Path, chat_file: Any, output: Path, **changes: Any) -> Any:
    arguments: dict[str, Any] = dict(
        model={"name": str(model_folder), "dtype": "float32", "device": "cpu"},
        data=chat_file,
        training_config={"learning_rate": 2e-2, "num_train_epochs": 2, "logging_steps": 1, "save_steps": 3},
        peft_config={"r": 4},
        evaluation={"max_answers": 3, "max_new_tokens": 4},
        output=output,
        display=Display(quiet=True),
    )
    return finetune(**{**arguments, **changes})


@pytest.fixture(scope="module")
def finished(model_folder: Path, chat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_it(model_folder, chat_file, tmp_path_factory.mktemp("runs") / "finished")


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_a_run_learns_and_leaves_everything_that_was_promised(finished: Any) -> None:
    report = finished.report.to_json()
    assert report["tuned"]["loss"] < 0.5 * report["base"]["loss"]
    for side in ("base", "tuned"):
        assert {"exact_match", "json_valid", "loss", "perplexity", "token_accuracy"} <= report[side].keys()
    facts = checkpoints.RunFolder(finished.folder).facts()
    assert (
        facts["status"] == "finished" and facts["data"]["train_rows"] + facts["data"]["held_out_rows"] == 40
    )
    assert json.loads((finished.folder / "report.json").read_text(encoding="utf-8")) == report
    assert "<html" in (finished.folder / "report.html").read_text(encoding="utf-8")
    events = read_events(finished.folder / "events.jsonl")
    assert {"start", "log", "evaluate", "save", "end"} <= {event["event"] for event in events}
    config = yaml.safe_load((finished.folder / "config.yaml").read_text(encoding="utf-8"))
    assert config["training_config"]["learning_rate"] == 2e-2 and config["peft_config"]["r"] == 4


def test_the_adapter_loads_in_stock_peft_and_gives_the_same_logits(finished: Any, model_folder: Path) -> None:
    folder = finished.folder / "adapter" / "best"
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": TEXTS[0]}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(tuned(ids).logits, finished.model.eval()(ids).logits, rtol=1e-5, atol=1e-5)
        with tuned.disable_adapter():
            assert not torch.allclose(tuned(ids).logits, finished.model(ids).logits, atol=1e-2)
    card = (folder / "README.md").read_text(encoding="utf-8")
    # `base_model` of a card names a model of a hub, which a folder is not.
    assert card.startswith("---\nlibrary_name: peft\n") and "# LoRA adapter for" in card


def test_proving_again_from_the_folder_gives_the_same_figures(finished: Any) -> None:
    before = finished.report.to_json()
    after = evaluate_run(finished.folder, display=Display(quiet=True)).to_json()
    for side in ("base", "tuned"):
        assert after[side]["loss"] == pytest.approx(before[side]["loss"], rel=1e-5)
        assert after[side]["exact_match"] == before[side]["exact_match"]
    other = evaluate_run(
        finished.folder, metrics=["contains:yes"], max_answers=2, display=Display(quiet=True)
    )
    assert "contains:yes" in other.to_json()["tuned"]
    with pytest.raises(ConfigError, match="rouge_l"):
        evaluate_run(finished.folder, metrics=["rouge_k"], display=Display(quiet=True))


def test_a_finished_run_is_left_alone_when_resumed(
    finished: Any, model_folder: Path, chat_file: Path
) -> None:
    before = adapter(finished.folder / "adapter" / "last")
    again = run_it(model_folder, chat_file, finished.folder, resume=True)
    after = adapter(finished.folder / "adapter" / "last")
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert again.report is not None


class _StopAt(GentleStop):
    """Ctrl-C at a given step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 4:
            self.signal = 2
        super().on_step_end(args, state, control)


def test_interrupted_and_resumed_equals_uninterrupted(
    finished: Any, model_folder: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(loop, "GentleStop", _StopAt)
        with pytest.raises(KeyboardInterrupt):
            run_it(model_folder, chat_file, output)
    facts = checkpoints.RunFolder(output).facts()
    assert facts["status"] == "interrupted" and facts[loop.LIBRARIES] == matmul.libraries()
    assert facts[loop.COMPUTING].items() >= {"dtype": "float32", "products": matmul.backend()}.items()
    assert (output / "checkpoints" / "checkpoint-4" / "complete.json").is_file()
    with pytest.raises(RunError, match="already holds a run"):
        run_it(model_folder, chat_file, output)
    run_it(model_folder, chat_file, output, resume=True)
    for which in ("best", "last"):
        resumed, whole = adapter(output / "adapter" / which), adapter(finished.folder / "adapter" / which)
        assert all(torch.equal(resumed[name], weight) for name, weight in whole.items()), which


class _DieAt(TrainerCallback):
    """Ends the process behind a checkpoint, as a kill does."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 5:
            raise SystemExit(9)


def test_steps_that_were_done_again_stand_once_in_the_report(
    finished: Any, model_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    with pytest.raises(SystemExit):
        run_it(model_folder, chat_file, output, callbacks=[_DieAt()])
    first = read_events(output / "events.jsonl")
    resumed = run_it(model_folder, chat_file, output, resume=True).report.to_json()
    whole = finished.report.to_json()
    for curve in ("training_curve", "evaluation_curve"):
        assert resumed[curve] == whole[curve]
    assert resumed["timing"]["training"] > first[-1]["time"] - first[0]["time"]


def test_a_resumed_run_multiplies_by_the_libraries_that_it_began_with(
    model_folder: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, before = tmp_path / "run", matmul.libraries()
    with monkeypatch.context() as patched:
        patched.setattr(loop, "GentleStop", _StopAt)
        with pytest.raises(KeyboardInterrupt):
            run_it(model_folder, chat_file, output)
    other = dict.fromkeys(before, "torch's BLAS")
    used: list[Any] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            used.append(matmul.libraries())

    checkpoints.RunFolder(output).update_facts(**{loop.LIBRARIES: other})
    try:
        run_it(model_folder, chat_file, output, resume=True, callbacks=[Watch()])
        assert used and all(libraries == other for libraries in used)
        facts = checkpoints.RunFolder(output).facts()
        assert other == facts[loop.LIBRARIES] and facts[loop.COMPUTING]["products"] == "torch's BLAS"
        assert "which may change the last digits: products " in (output / "train.log").read_text("utf-8")
    finally:
        matmul.use_libraries(before)


def test_resuming_with_other_data_or_settings_is_refused_with_the_difference(
    finished: Any, model_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(chat_file.read_text(encoding="utf-8").splitlines()[:20]), encoding="utf-8")
    with pytest.raises(RunError, match="data: "):
        run_it(model_folder, other, finished.folder, resume=True)
    with pytest.raises(RunError, match="peft_config"):
        run_it(model_folder, chat_file, finished.folder, resume=True, peft_config={"r": 8})


def test_packing_trains_the_same_rows_in_fewer_sequences(
    model_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    settings = {"learning_rate": 2e-2, "num_train_epochs": 2, "packing": True, "max_length": 128}
    run = run_it(model_folder, chat_file, tmp_path / "run", training_config=settings)
    facts = checkpoints.RunFolder(run.folder).facts()["data"]
    assert facts["train_rows"] + facts["held_out_rows"] == 40 and facts["sequences"] < 12
    assert run.report.to_json()["tuned"]["loss"] < run.report.to_json()["base"]["loss"]


def test_rows_in_memory_and_without_held_out_rows(model_folder: Path, tmp_path: Path) -> None:
    rows = [{"question": f"what is {i}", "answer": f"it is {i}"} for i in range(12)]
    run = run_it(model_folder, {"files": "x"}, tmp_path / "a", data=rows, eval_data=rows[:2])
    assert run.report is not None
    settings = {"max_steps": 2}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = run_it(
        model_folder, {"files": [str(path)], "eval_size": 0}, tmp_path / "b", training_config=settings
    )
    assert run.report is None and (run.folder / "adapter" / "best" / "adapter_model.safetensors").is_file()


def test_a_dry_run_writes_nothing(model_folder: Path, chat_file: Path, tmp_path: Path) -> None:
    run = run_it(model_folder, chat_file, tmp_path / "run", dry_run=True)
    assert run.folder is None and not (tmp_path / "run").exists()
    # What is shown is a configuration that can be run, with the origin of each value.
    assert "  r: 4  # argument" in run.config_text
    shown = build_config(yaml.safe_load(run.config_text))
    assert lora_settings(shown.peft_config).to_dict() == lora_settings({"r": 4}).to_dict()
    assert "  lora_alpha: 8  # twice r" in run.config_text
    assert "  target_modules: all-linear  # Phlora's default" in run.config_text
    assert "  lora_dropout: 0.0  # PEFT's default" in run.config_text
    assert shown.training_config["learning_rate"] == 2e-2
    again = run_it(model_folder, chat_file, tmp_path / "run", training_config={"z_loss": 1e-4}, dry_run=True)
    assert yaml.safe_load(again.config_text)["training_config"]["z_loss"] == 1e-4
    plan = run.plan.to_json()
    assert json.loads(json.dumps(plan)) == plan and plan["packs"] is None
    assert plan["train_rows"] + plan["held_out_rows"] == 40 and plan["sharing"]["reason"] in run.plan.render()


def test_the_plan_tells_packs_and_what_a_step_shares(model_folder: Path, tmp_path: Path) -> None:
    system = " ".join(TEXTS)
    rows = [
        {
            "messages": [
                {"role": r, "content": c}
                for r, c in (("system", system), ("user", f"{i}"), ("assistant", "y"))
            ]
        }
        for i in range(40)
    ]
    settings = {"packing": True, "max_length": 300, "per_device_train_batch_size": 1, "max_steps": 2}
    settings |= {"gradient_accumulation_steps": 4, "eval_strategy": "no"}
    heard = io.StringIO()
    run = run_it(
        model_folder,
        rows,
        tmp_path / "run",
        training_config=settings,
        evaluation={"enabled": False},
        display=Display(stream=heard),
    )
    plan, text = run.plan.to_json(), run.plan.render()
    assert plan["packs"]["count"] < 36 and 0.5 < plan["packs"]["filled"] <= 1
    assert f"in {plan['packs']['count']} packs ({plan['packs']['filled']:.0%} full)" in text
    forecast = plan["sharing"]["forecast"]
    assert plan["sharing"]["on"] and forecast["positions"] < forecast["padded_positions"]
    assert forecast["passes"] < forecast["micro_batches"] and "micro-batches as" in text
    assert "8 micro-batches as 2" in heard.getvalue()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"training_config": {"learning_rte": 1}}, ConfigError, "learning_rate"),
        ({"training_config": {"learning_rate": "fast"}}, ConfigError, "a number"),
        ({"peft_config": {"r": -1}}, ConfigError, "1 or more"),
        ({"peft_config": {"target_modules": ["o_proj", "nothing"]}}, ConfigError, "nothing"),
        ({"model": "./no-such-model"}, ModelError, "no-such-model"),
        ({"data": "missing.jsonl"}, DataError, "missing.jsonl"),
        ({"data": {"files": "CHATS", "eval_size": 400}}, DataError, "400"),
        ({"evaluation": {"metrics": ["exact_mach"]}}, ConfigError, "exact_match"),
        ({"evaluation": {"max_answer": 1}}, ConfigError, "max_answers"),
    ],
)
def test_a_mistake_is_one_message_and_leaves_no_folder(
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
    model_folder: Path,
    chat_file: Path,
    tmp_path: Path,
) -> None:
    if isinstance(changes.get("data"), dict):
        changes = {"data": {**changes["data"], "files": str(chat_file)}}
    with pytest.raises(error, match=message):
        run_it(model_folder, chat_file, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_several_processes_are_refused(
    model_folder: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(EnvironmentProblem, match="2 processes"):
        run_it(model_folder, chat_file, tmp_path / "run")


def test_a_disk_without_room_is_refused_before_anything_is_written(
    model_folder: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("phlora.files.shutil.disk_usage", lambda path: usage)
    with pytest.raises(NoRoomError, match="are free"):
        run_it(model_folder, chat_file, tmp_path / "run")
    assert not (tmp_path / "run").exists()
