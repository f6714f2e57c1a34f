"""What watches the training: events, progress, the best adapter, complete checkpoints, and real signals."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from phlora.display import Display
from phlora.stop import STOP_SIGNALS, is_ignored
from phlora.train.callbacks import BestAdapter, CompleteCheckpoints, EventLog, GentleStop, TrainingProgress


@pytest.fixture
def args(tmp_path: Path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True)


def at(step: int, most: int = 10) -> TrainerState:
    return TrainerState(global_step=step, max_steps=most, epoch=step / most)


# --------------------------------------------------------------------------------------- events and checkpoints


def test_events_are_one_json_line_each(args: TrainingArguments, tmp_path: Path) -> None:
    log, control = EventLog(tmp_path / "events.jsonl"), TrainerControl()
    log.on_train_begin(args, at(0), control)
    log.on_log(args, at(1), control, logs={"loss": 2.5, "learning_rate": 1e-3})
    log.on_log(args, at(2), control, logs={"eval_loss": 2.0})
    log.on_train_end(args, at(2), control)
    events = [json.loads(line) for line in log.path.read_text(encoding="utf-8").splitlines()]
    assert [event["event"] for event in events] == ["start", "log", "evaluate", "end"]
    assert events[0]["max_steps"] == 10 and events[1]["loss"] == 2.5 and events[2]["step"] == 2


def test_a_checkpoint_is_declared_complete_and_noted(args: TrainingArguments, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    CompleteCheckpoints(tmp_path, tmp_path / "events.jsonl", run="a").on_save(args, at(3), TrainerControl())
    facts = json.loads((tmp_path / "checkpoint-3" / "complete.json").read_text(encoding="utf-8"))
    assert facts["step"] == 3
    event = json.loads((tmp_path / "events.jsonl").read_text(encoding="utf-8"))
    assert (event["event"], event["checkpoint"]) == ("save", "checkpoint-3")


def test_the_lowest_held_out_loss_is_kept(args: TrainingArguments) -> None:
    saved: list[tuple[int, float]] = []
    best = BestAdapter(lambda step, loss: saved.append((step, loss)))
    for step, loss in enumerate([3.0, 2.0, 2.0, 2.5, float("nan"), 1.0], start=1):
        best.on_evaluate(args, at(step), TrainerControl(), metrics={"eval_loss": loss})
    best.on_evaluate(args, at(9), TrainerControl(), metrics={})
    assert saved == [(1, 3.0), (2, 2.0), (6, 1.0)] and (best.step, best.loss) == (6, 1.0)


def test_a_resumed_run_goes_by_the_best_loss_before(args: TrainingArguments) -> None:
    saved: list[tuple[int, float]] = []
    best = BestAdapter(lambda step, loss: saved.append((step, loss)), step=4, loss=1.5)
    best.on_evaluate(args, at(6), TrainerControl(), metrics={"eval_loss": 1.6})
    assert saved == [] and best.step == 4


# ------------------------------------------------------------------------------------------------------ progress


@pytest.mark.parametrize("fancy", [False, True])
def test_progress_says_loss_rate_speed_and_time_left(args: TrainingArguments, fancy: bool) -> None:
    heard = io.StringIO()
    progress, control = TrainingProgress(Display(stream=heard, fancy=fancy)), TrainerControl()
    progress.on_train_begin(args, at(2), control)
    for step in (3, 4):
        progress.on_step_end(args, at(step), control)
        logs = {"loss": 1.25, "learning_rate": 2e-4, "num_tokens": 100.0 * step}
        progress.on_log(args, at(step), control, logs=logs)
    progress.on_log(args, at(4), control, logs={"eval_loss": 1.5})
    progress.on_train_end(args, at(4), control)
    progress.close()
    text = heard.getvalue()
    assert "held-out loss 1.5000" in text and progress.bar is None
    if not fancy:
        assert "step 3/10  loss 1.2500  lr 2.0e-04" in text and "GB" in text and "left" in text
        assert text.count("tokens/s") == 1  # not before there is a first log to count from


def test_quiet_progress_is_silent(args: TrainingArguments) -> None:
    heard = io.StringIO()
    progress = TrainingProgress(Display(stream=heard, quiet=True, fancy=True))
    progress.on_train_begin(args, at(0), TrainerControl())
    progress.on_log(args, at(1), TrainerControl(), logs={"loss": 1.0})
    assert heard.getvalue() == ""


# ------------------------------------------------------------------------------------------------------- signals

SIGNALS = [number for number in STOP_SIGNALS if not is_ignored(number)]


@pytest.fixture
def stop() -> Iterator[GentleStop]:
    stop = GentleStop(Display(stream=io.StringIO()))
    yield stop
    stop.restore()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_finishes_the_step_and_asks_for_a_checkpoint(
    args: TrainingArguments, stop: GentleStop, number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    control = TrainerControl()
    stop.on_train_begin(args, at(0), control)
    stop.on_step_end(args, at(1), control)
    assert not control.should_training_stop and stop.signal is None
    os.kill(os.getpid(), number)
    assert stop.signal == number  # and no exception in the middle of the step
    assert "once more" in stop.display.stream.getvalue()  # type: ignore[attr-defined]
    stop.on_step_end(args, at(2), control)
    assert control.should_save and control.should_training_stop
    stop.on_train_end(args, at(2), control)
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_stops_at_once(args: TrainingArguments, stop: GentleStop) -> None:
    before = signal.getsignal(signal.SIGINT)
    stop.on_train_begin(args, at(0), TrainerControl())
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        signal.sigtimedwait([], 0.1)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_while_a_line_is_written_waits_with_its_own(args: TrainingArguments, tmp_path: Path) -> None:
    """Streams of Python refuse to be written to by a handler that has interrupted them."""
    told = threading.Event()

    class Stream(io.StringIO):
        is_writing = False

        def write(self, text: str) -> int:
            assert not self.is_writing, "written to within a write"
            self.is_writing = True
            if "a fact" in text:
                signal.raise_signal(signal.SIGINT)
            length = super().write(text)
            self.is_writing = False
            if "Stopping" in text:
                told.set()
            return length

    stream = Stream()
    display = Display(stream=stream)
    stop = GentleStop(display)
    stop.on_train_begin(args, at(0), TrainerControl())
    try:
        with display.logged(tmp_path / "train.log"):
            display.note("a fact")
            assert told.wait(5) and stop.signal == signal.SIGINT
    finally:
        stop.restore()
    shown = stream.getvalue()
    assert shown.index("a fact") < shown.index("Stopping after this step")
    assert "Stopping after this step" in (tmp_path / "train.log").read_text(encoding="utf-8")


def test_a_thread_that_gets_no_signals_leaves_them_alone(args: TrainingArguments, stop: GentleStop) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    failed: list[BaseException] = []

    def train() -> None:
        try:
            stop.on_train_begin(args, at(0), TrainerControl())
            stop.on_train_end(args, at(1), TrainerControl())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert not failed and [signal.getsignal(number) for number in SIGNALS] == before


def test_events_hold_what_callers_pass(args: TrainingArguments, tmp_path: Path) -> None:
    """Logs may hold any name and other objects than numbers; the file stays JSON."""
    log = EventLog(tmp_path / "events.jsonl")
    odd: Any = {"loss": 1.0, "text": "سلام", "path": tmp_path, "step": 7, "event": "mine"}
    log.on_log(args, at(1), TrainerControl(), logs=odd)
    event = json.loads(log.path.read_text(encoding="utf-8"))
    assert event["text"] == "سلام" and event["path"] == str(tmp_path)
    assert event["step"] == 1 and event["event"] == "log"
