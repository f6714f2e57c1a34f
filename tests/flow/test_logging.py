"""What a run says, where, and how often: real runs of the tiny model, their output and their files read."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from phlora.display import Display
from phlora.errors import MissingExtraError
from phlora.testing import chat_rows, write_rows
from phlora.train.finetune import Run, finetune

SCRIPT = """
from phlora import finetune, load
run = finetune(
    model={{"name": {model!r}, "dtype": "float32"}},
    data={data!r},
    training_config={training_config!r},
    evaluation={{"max_answers": 1, "max_new_tokens": 4}},
    output={output!r},
)
load(run.folder).generate("hi", max_new_tokens=2)
"""


def events(run: Run, kind: str) -> list[dict[str, Any]]:
    assert run.folder is not None
    lines = (run.folder / "events.jsonl").read_text("utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def trained(model_folder: Path, output: Path, display: Display | None = None, **training_config: Any) -> Run:
    rows = chat_rows(14)
    return finetune(
        model={"name": str(model_folder), "dtype": "float32"},
        data=rows[:12],
        eval_data=rows[12:],
        training_config={"per_device_train_batch_size": 4, "num_train_epochs": 2, **training_config},
        evaluation={"enabled": False},
        output=output,
        display=display or Display(quiet=True),
    )


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"logging_strategy": "no"}, []),
        ({"logging_strategy": "epoch"}, [3, 6]),
        ({"logging_strategy": "steps", "logging_steps": 2, "logging_first_step": False}, [2, 4, 6]),
        ({"logging_steps": 3}, [1, 3, 6]),
        ({"logging_strategy": "epoch", "logging_first_step": True}, [1, 3, 6]),
        ({"logging_steps": 0.5, "logging_first_step": False}, [3, 6]),
    ],
    ids=str,
)
def test_losses_are_logged_by_the_strategy(
    model_folder: Path, tmp_path: Path, settings: dict[str, Any], steps: list[int]
) -> None:
    heard = io.StringIO()
    run = trained(model_folder, tmp_path / "run", Display(heard), **settings)
    assert [event["step"] for event in events(run, "log") if "loss" in event] == steps
    assert [f"step {step}/6" for step in range(7) if f"  step {step}/6  loss" in heard.getvalue()] == [
        f"step {step}/6" for step in steps
    ]
    assert (tmp_path / "run" / "train.log").read_text("utf-8").count("/6  loss") == len(steps)


@pytest.mark.parametrize("log_level", ["passive", "info", "error"])
def test_a_run_leaves_levels_and_handlers_as_they_were(
    model_folder: Path, tmp_path: Path, log_level: str
) -> None:
    loggers = [logging.getLogger(name) for name in ("transformers", "datasets")]
    before = [(logger.level, list(logger.handlers), logger.propagate) for logger in loggers]
    heard = io.StringIO()
    run = trained(model_folder, tmp_path / "run", Display(heard), log_level=log_level, max_steps=1)
    assert [(logger.level, logger.handlers, logger.propagate) for logger in loggers] == before
    assert ("***** Running training *****" in heard.getvalue()) is (log_level == "info")
    assert "Phi3Config {" not in heard.getvalue() and "GenerationConfig {" not in heard.getvalue()
    assert run.folder is not None
    log = (run.folder / "train.log").read_text("utf-8")
    assert "INFO phlora: Training 1 step" in log and "1 optimizer step of 4 rows" in log
    assert ("INFO transformers.trainer: ***** Running training *****" in log) is (log_level == "info")


def test_a_plain_run_shows_nothing_of_other_libraries(model_folder: Path, tmp_path: Path) -> None:
    """In a process of its own: many warnings come once, at an import or a first use."""
    data = write_rows(tmp_path / "chats.jsonl", chat_rows(20))
    script = SCRIPT.format(
        model=str(model_folder),
        data=str(data),
        training_config={"max_steps": 4},
        output=str(tmp_path / "run"),
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout == ""
    strange = [
        line for line in done.stderr.splitlines() if not line.startswith(("> ", "  ")) or "Warning" in line
    ]
    assert strange == [] and "> Training 4 steps" in done.stderr


def test_a_continued_run_adds_to_its_log(model_folder: Path, tmp_path: Path) -> None:
    run = trained(model_folder, tmp_path / "run", max_steps=2)
    assert run.folder is not None
    for overwrite in (False, True):
        finetune(
            model={"name": str(model_folder), "dtype": "float32"},
            data=chat_rows(14)[:12],
            eval_data=chat_rows(14)[12:],
            training_config={"per_device_train_batch_size": 4, "num_train_epochs": 2, "max_steps": 2},
            evaluation={"enabled": False},
            output=tmp_path / "run",
            resume=not overwrite,
            overwrite=overwrite,
            display=Display(quiet=True),
        )
        log = (run.folder / "train.log").read_text("utf-8")
        assert log.count("INFO phlora: Training 2 steps") == (1 if overwrite else 2)


# --------------------------------------------------------------------------------------------------- trackers


def test_tensorboard_gets_losses_and_settings_and_no_secret(model_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    secret = "hf_" + "abcdefghij" * 3
    heard = io.StringIO()
    run = trained(
        model_folder,
        tmp_path / "run",
        Display(heard),
        report_to="tensorboard",
        logging_steps=2,
        hub_token=secret,
    )
    assert run.folder is not None
    (file,) = run.folder.rglob("events.out.tfevents.*")
    found = EventAccumulator(str(file.parent)).Reload()
    assert [scalar.step for scalar in found.Scalars("train/loss")] == [1, 2, 4, 6]
    assert "eval/loss" in found.Tags()["scalars"]
    for path in run.folder.rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes(), path
    assert secret not in heard.getvalue()


@pytest.mark.parametrize("tracker", ["wandb", "mlflow", "trackio"])
def test_a_tracker_that_is_not_installed_is_one_error_with_the_command(
    model_folder: Path, tmp_path: Path, tracker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phlora.extras.is_installed", lambda module: module != tracker)
    with pytest.raises(MissingExtraError) as error:
        trained(model_folder, tmp_path / "run", report_to=[tracker])
    assert f"pip install {tracker}" in error.value.fix and not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["wandb", "mlflow", "trackio"])
def test_other_trackers_get_the_run_by_its_name(model_folder: Path, tmp_path: Path, tracker: str) -> None:
    """Each in a process of its own, with everything that it writes in the folder of the test."""
    pytest.importorskip(tracker)
    data = write_rows(tmp_path / "chats.jsonl", chat_rows(20))
    secret = "hf_" + "abcdefghij" * 3
    config = {"max_steps": 3, "report_to": tracker, "logging_steps": 1, "hub_token": secret}
    script = SCRIPT.format(
        model=str(model_folder), data=str(data), training_config=config, output=str(tmp_path / "support")
    )

    environment = {
        **os.environ,
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=True,
    )
    assert secret not in done.stdout + done.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(secret.encode() in path.read_bytes() for path in written)
    places = {"wandb": "wandb", "mlflow": "mlflow.db", "trackio": "trackio"}
    assert any(path.relative_to(tmp_path).parts[0].startswith(places[tracker]) for path in written)
    assert any(b"support" in path.read_bytes() for path in written if places[tracker] in str(path))
