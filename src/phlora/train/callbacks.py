"""What happens beside the training loop: progress, events.jsonl, the best adapter, and a gentle stop."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from phlora.display import Bar, Display
from phlora.measure import peak_bytes
from phlora.runs.checkpoints import mark_complete
from phlora.runs.events import append_event
from phlora.stop import STOP_SIGNALS, is_ignored


class EventLog(TrainerCallback):
    """Writes each log, evaluation and save to events.jsonl."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        append_event(self.path, "start", step=state.global_step, max_steps=state.max_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        event = "evaluate" if logs and "eval_loss" in logs else "log"
        append_event(self.path, event, **{**(logs or {}), "step": state.global_step})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        append_event(self.path, "end", step=state.global_step)


class TrainingProgress(TrainerCallback):
    """Loss, learning rate, tokens/s, time left and peak memory: a rich bar on a terminal, else plain lines."""

    def __init__(self, display: Display) -> None:
        self.display = display
        self.bar: Bar | None = None
        self.started = 0.0
        self.first_step = 0
        self.first_tokens: float | None = None
        self.shown = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.started, self.first_step = time.monotonic(), state.global_step
        self.bar = self.display.bar("Training", state.max_steps, "steps", done=state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.bar:
            self.bar.show(state.global_step, self.shown)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        logs = logs or {}
        if "eval_loss" in logs:
            self.display.note(f"step {state.global_step}: held-out loss {logs['eval_loss']:.4f}")
        elif "loss" in logs:
            self.shown = f"loss {float(logs['loss']):.4f}  lr {float(logs.get('learning_rate', 0)):.1e}"
            self.shown += self._tokens_per_second(logs) + f"  peak {peak_bytes() / 1e9:.1f} GB"
            line = f"step {state.global_step}/{state.max_steps}  {self.shown}  {self._time_left(state)}"
            if self.bar:
                self.bar.show(state.global_step, self.shown)
                self.display.log(line)
            else:
                self.display.note(line)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the bar; also after an interruption, so that the terminal is left in order."""
        if self.bar:
            self.bar.close()
            self.bar = None

    def _tokens_per_second(self, logs: dict[str, Any]) -> str:
        """Counted from the first log on, so that the start-up of the first step does not blur it."""
        if "num_tokens" not in logs:
            return ""
        now, tokens = time.monotonic(), float(logs["num_tokens"])
        if self.first_tokens is None:
            self.first_tokens, self.counted_from = tokens, now
            return ""
        return f"  {(tokens - self.first_tokens) / (now - self.counted_from):,.0f} tokens/s"

    def _time_left(self, state: TrainerState) -> str:
        done = state.global_step - self.first_step
        if not done:
            return ""
        seconds = (time.monotonic() - self.started) / done * (state.max_steps - state.global_step)
        return f"{seconds // 60:.0f}:{seconds % 60:02.0f} left"


class BestAdapter(TrainerCallback):
    """Keeps the adapter with the lowest held-out loss, and the step at which it was reached.

    Args:
        save: writes the adapter as it is now; called with the step and its held-out loss.
    """

    def __init__(
        self, save: Callable[[int, float], None], *, step: int = 0, loss: float = float("inf")
    ) -> None:
        self.save, self.step, self.loss = save, step, loss

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        loss = (metrics or {}).get("eval_loss")
        if loss is not None and loss < self.loss:
            self.step, self.loss = state.global_step, loss
            self.save(self.step, self.loss)


class CompleteCheckpoints(TrainerCallback):
    """Declares each checkpoint whole, and the run's, once all its files are written."""

    def __init__(self, folder: Path, events: Path, *, run: str) -> None:
        self.folder, self.events, self.run = folder, events, run

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        checkpoint = self.folder / f"checkpoint-{state.global_step}"
        mark_complete(checkpoint, {"step": state.global_step, "epoch": state.epoch}, run=self.run)
        append_event(self.events, "save", step=state.global_step, checkpoint=checkpoint.name)


class GentleStop(TrainerCallback):
    """On Ctrl-C, SIGTERM or SIGHUP: finish the step, write a checkpoint, then stop. A second one stops at once.

    Args:
        signals: which of them are heeded.
    """

    def __init__(self, display: Display, *, signals: Collection[int] = STOP_SIGNALS) -> None:
        self.display, self.signals = display, signals
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # Python delivers signals to the main thread only
        for number in self.signals:
            if not is_ignored(number):
                self._before[number] = signal.signal(number, self._ask)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.signal is not None:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.restore()

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _ask(self, number: int, frame: Any) -> None:
        if self.signal is not None:
            self.restore()
            raise KeyboardInterrupt
        self.signal = number
        # By another thread: the signal may have come while this one writes, and a stream refuses to be written to
        # by one that it has interrupted.
        text = "Stopping after this step, with a checkpoint; once more to stop at once"
        threading.Thread(target=self.display.warn, args=(text,), daemon=True).start()
