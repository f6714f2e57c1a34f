"""What other libraries say that no user of Phlora can act on: each by its own words, with why, and for a while only.

Nothing here changes a filter for good, or silences a kind of message as a whole.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from phlora.display import Display

# Whose loggers follow `log_level`, as the training scripts of transformers set them.
LIBRARIES = ("transformers", "datasets", "trl", "peft", "accelerate", "huggingface_hub")

# Beginning of a warning, and its kind -> why nobody has to hear it.
_WARNINGS: Mapping[tuple[str, type[Warning]], str] = {
    ("`is_gradient_checkpointing` is deprecated", FutureWarning): (
        "PEFT asks transformers by the name of before, at every adapter"
    ),
    ("`gradient_checkpointing(_kwargs)?` is deprecated", FutureWarning): (
        "TRL sets its own default by the name of before"
    ),
    ("IProgress not found", Warning): (
        "tqdm's, at its import in a notebook without widgets; Phlora's bars need none"
    ),
}
# Logger, beginning of its message -> why nobody has to hear it.
_MESSAGES: Mapping[tuple[str, str], str] = {
    ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward"): (
        "said at its import, whether or not anything is in 4 bits; it then takes its own kernel"
    ),
    ("transformers.trainer_utils", "mtime may not be reliable"): (
        "checkpoints of steps that follow in less than a second; they are told apart by their numbers"
    ),
    # These come at `info`; at `debug` they are let through.
    (
        "transformers.configuration_utils",
        "Model config ",
    ): "a whole configuration, at every save of an adapter",
    (
        "transformers.generation.configuration_utils",
        "Generate config ",
    ): "a whole configuration, at every load",
    ("transformers.trainer", "Training completed. Do not forget to share"): "an invitation to a hub",
}


@contextmanager
def without_known_warnings() -> Iterator[None]:
    """Within it the warnings that are listed above are not shown; all others are."""
    with warnings.catch_warnings():
        for beginning, kind in _WARNINGS:
            warnings.filterwarnings("ignore", message=beginning, category=kind)
        yield


@contextmanager
def without_known_messages() -> Iterator[None]:
    """Within it the log messages that are listed above do not come through; all others do."""
    with ExitStack() as stack:
        for name, beginning in _MESSAGES:
            logger, drop = logging.getLogger(name), _Drop(beginning)
            logger.addFilter(drop)
            stack.callback(logger.removeFilter, drop)
        yield


class _Drop(logging.Filter):
    def __init__(self, beginning: str) -> None:
        super().__init__()
        self.beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        wants_all = logging.getLogger(record.name).isEnabledFor(logging.DEBUG)
        return wants_all or not record.getMessage().lstrip().startswith(self.beginning)


@contextmanager
def libraries_logged(display: Display, *, level: int | None) -> Iterator[None]:
    """Within it what the libraries log comes through the display, above its bars and into its file.

    Args:
        level: from which on (`logging.INFO`, ...); None leaves levels as they are, and shows what was shown before.
    """
    with ExitStack() as stack:
        stack.enter_context(without_known_messages())
        for name in LIBRARIES:
            logger = logging.getLogger(name)
            stack.callback(_restore, logger, _State.of(logger))
            if level is not None:
                logger.setLevel(level)
            speaks = bool(logger.handlers) or level is not None
            logger.handlers = [_ToDisplay(display, speaks=speaks)]
        yield


class _ToDisplay(logging.Handler):
    """Hands on what a library logs.

    Args:
        speaks: whether it is to be seen, and not only to stand in the file.
    """

    def __init__(self, display: Display, *, speaks: bool) -> None:
        super().__init__()
        self.display, self.speaks = display, speaks
        self.setFormatter(logging.Formatter("%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        is_shown = self.speaks and not _is_shown_elsewhere(record)
        text = self.format(record).strip()
        self.display.relay(text, level=record.levelname, source=record.name, is_shown=is_shown)


def _is_shown_elsewhere(record: logging.LogRecord) -> bool:
    """Whether the program's own set-up writes it to the screen."""
    logger = logging.getLogger(record.name.partition(".")[0])
    screens = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    return logger.propagate and any(
        isinstance(handler, logging.StreamHandler)
        and handler.stream in screens
        and record.levelno >= handler.level
        for handler in logging.getLogger().handlers
    )


@dataclass(frozen=True)
class _State:
    level: int
    handlers: list[logging.Handler] = field(default_factory=list)

    @classmethod
    def of(cls, logger: logging.Logger) -> _State:
        return cls(logger.level, list(logger.handlers))


def _restore(logger: logging.Logger, before: _State) -> None:
    logger.setLevel(before.level)
    logger.handlers = list(before.handlers)
