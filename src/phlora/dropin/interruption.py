"""A script's training, interrupted by Ctrl-C or by stopping a notebook's cell: a checkpoint first, as in a run.

TRL raises KeyboardInterrupt wherever it is, and what was trained since the last checkpoint is lost. Scripts that write
no checkpoints, or heed the signal themselves, are left alone, and so are several processes, of which each has its own.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from phlora.display import Display
from phlora.train.callbacks import GentleStop
from phlora.train.field_values import word_of


@contextmanager
def stopped_with_checkpoint(trainer: Any) -> Iterator[None]:
    """Within it the first interruption ends training after the step, with a checkpoint; a second one ends it at once.

    Raises:
        KeyboardInterrupt: it was interrupted.
    """
    is_pythons_own = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if word_of(trainer.args.save_strategy) == "no" or not is_pythons_own or trainer.args.world_size > 1:
        yield
        return
    stop = GentleStop(Display(), signals=(signal.SIGINT,))
    trainer.add_callback(stop)
    try:
        yield
    finally:
        trainer.remove_callback(stop)
        stop.restore()
    if stop.signal is not None:
        step = trainer.state.global_step
        raise KeyboardInterrupt(
            f"Stopped after step {step}, with a checkpoint in {Path(trainer.args.output_dir) / f'checkpoint-{step}'}; "
            f"trainer.train(resume_from_checkpoint=True) continues from it{_without_optimizer(trainer.args)}"
        )


def _without_optimizer(args: Any) -> str:
    alone = "its weights alone, with a fresh optimizer: save_only_model leaves out what goes on exactly"
    return f", from {alone}" if args.save_only_model else ""
