"""The guide's samples in examples/guide run: on the tiny model always, whole and on the embedded one in `test-all`."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat import NotebookNode

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "examples" / "guide"
NOTEBOOKS = ["inference_and_finetuning", "lora_python", "qlora_python"]


def read(name: str) -> NotebookNode:
    return nbformat.read(GUIDE / f"{name}.ipynb", as_version=4)


def text_of(notebook: NotebookNode) -> str:
    """All that the cells have shown as text."""
    outputs = (output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs)
    return "".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg", **more}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder that holds what the samples read, and takes what they write."""
    shutil.copytree(GUIDE / "data", tmp_path / "data")
    return tmp_path


@pytest.fixture
def run_notebook(place: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    execute = runpy.run_path(str(GUIDE / "execute.py"))["execute"]

    def run(notebook: NotebookNode, **variables: str) -> str:
        for name, value in {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src"), **variables}.items():
            monkeypatch.setenv(name, value)
        for name in ("HF_TOKEN", "WANDB_API_KEY", "PHLORA_SAMPLE_GPTQ"):
            monkeypatch.delenv(name, raising=False)
        return text_of(execute(notebook, folder=place))

    return run


def run_script(name: str, *options: str, place: Path, launcher: tuple[str, ...] = ()) -> str:
    command = [sys.executable, *launcher, str(GUIDE / name), *options]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(HF_DATASETS_CACHE=str(place / "cache"), HF_HOME=str(place / "home")),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# -------------------------------------------------------------------------------------------- on the tiny model


def test_all_cells_run(run_notebook: Any, model_folder: Path) -> None:
    # One kernel for the three: what they import takes longer than what they do on this model.
    whole = nbformat.v4.new_notebook(cells=[cell for name in NOTEBOOKS for cell in read(name).cells])
    text = run_notebook(whole, PHLORA_SAMPLE_MODEL=str(model_folder), PHLORA_SAMPLE_QUICK="1")
    assert text.count("3 of 3 answers are the same") == 3
    assert text.count("HF_TOKEN is not set") >= 4
    assert "Left out: " in text or "GPTQ:" in text
    assert {name for name in ("LoRA", "QLoRA", "full") if f"{name}: 2 steps" in text} == {
        "LoRA",
        "QLoRA",
        "full",
    }


@pytest.mark.parametrize("ways", [(), ("--full",)], ids=["lora", "full"])
def test_the_short_script_trains_on_sharegpt_rows(
    ways: tuple[str, ...], place: Path, model_folder: Path
) -> None:
    output = place / "out"
    said = run_script(
        "train_sharegpt.py",
        *ways,
        *("--model", str(model_folder), "--output", str(output), "--max-steps", "2", "--max-answers", "3"),
        place=place,
    )
    assert "gives the same 3 answers" in said and "held-out rows" in said
    assert (output / "report.html").is_file()
    saved = output / ("model/model.safetensors" if ways else "adapter/adapter_model.safetensors")
    assert saved.is_file()


def test_the_zero3_file_is_what_accelerate_reads() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(GUIDE / "zero3.yaml"))
    assert str(config.distributed_type).endswith("DEEPSPEED")
    assert config.deepspeed_config["zero_stage"] == 3 and config.mixed_precision == "bf16"


# ------------------------------------------------------------------------------------------ what the files hold


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_files_hold_what_their_cells_have_shown(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    text = text_of(notebook)
    assert re.search(r"\b([3-9]|\d\d) of \1 answers are the same", text)
    assert "95 % interval" in text
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users)/", json.dumps(notebook))


# -------------------------------------------------------------------------------------- whole, on the embedded model


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_whole_and_shows_what_it_says(
    run_notebook: Any, smollm2_folder: Path, name: str
) -> None:
    text = run_notebook(read(name), PHLORA_SAMPLE_MODEL=str(smollm2_folder))
    assert "8 of 8 answers are the same" in text
    # Loss, base, tuned, change and its interval: no sample is without proof that it learned.
    losses = re.findall(r"^Loss +[\d.]+ +[\d.]+ +-[\d.]+ +-[\d.]+ to (-[\d.]+)$", text, re.MULTILINE)
    assert len(losses) == {"inference_and_finetuning": 3, "lora_python": 1, "qlora_python": 2}[name]


@pytest.mark.slow
def test_the_short_script_helps(place: Path, smollm2_folder: Path) -> None:
    said = run_script(
        "train_sharegpt.py", "--model", str(smollm2_folder), "--output", str(place / "out"), place=place
    )
    assert "case_line rose from" in said and "Stock PEFT gives the same 8 answers" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "num_processes, launcher",
    [
        (1, ("accelerate.commands.launch", "--cpu", "--num_processes", "1")),
        # accelerate's launcher starts several processes on CPUs through MPI alone.
        (2, ("torch.distributed.run", "--nproc_per_node", "2")),
    ],
    ids=["accelerate", "torchrun"],
)
def test_the_model_cards_script_is_launched(
    num_processes: int, launcher: tuple[str, ...], place: Path, model_folder: Path
) -> None:
    said = run_script(
        "sample_finetune.py",
        *(
            "--model",
            str(model_folder),
            "--output",
            str(place / "out"),
            "--max-steps",
            "2",
            "--max-answers",
            "3",
        ),
        place=place,
        launcher=("-m", *launcher),
    )
    assert f"Rank 0 of {num_processes}" in said
    assert "Stock PEFT gives the same 3 answers" in said
