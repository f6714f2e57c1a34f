"""What other libraries say: shown as it is asked for, dropped by its own words, and nothing is changed for good."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from phlora.display import Display
from phlora.others import LIBRARIES, libraries_logged, without_known_messages, without_known_warnings

TRAINER = logging.getLogger("transformers.trainer")


@pytest.fixture(autouse=True)
def as_libraries_begin() -> Iterator[None]:
    """transformers with a handler of its own, as when it is imported; afterwards as it was."""
    logger = logging.getLogger("transformers")
    before = logger.level, list(logger.handlers), logger.propagate
    logger.setLevel(logging.WARNING)
    logger.handlers, logger.propagate = [logging.StreamHandler(io.StringIO())], False
    yield
    logger.level, logger.handlers, logger.propagate = before


def said(level: int | None, *, quiet: bool = False) -> str:
    stream = io.StringIO()
    with libraries_logged(Display(stream, quiet=quiet), level=level):
        TRAINER.debug("a debug")
        TRAINER.info("an info")
        TRAINER.warning("a warning")
    return stream.getvalue()


def test_libraries_log_from_the_level_that_is_asked_for() -> None:
    info, warning = "  transformers.trainer: an info\n", "! transformers.trainer: a warning\n"
    assert said(None) == warning
    assert said(logging.INFO) == info + warning
    assert said(logging.DEBUG) == "  transformers.trainer: a debug\n" + info + warning
    assert said(logging.ERROR) == ""
    assert said(logging.INFO, quiet=True) == warning


def test_levels_and_handlers_are_as_before_also_after_an_error() -> None:
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    before = [(logger.level, logger.handlers, logger.filters) for logger in loggers]
    with pytest.raises(ZeroDivisionError), libraries_logged(Display(quiet=True), level=logging.DEBUG):
        assert all(logger.level == logging.DEBUG for logger in loggers)
        _ = 1 / 0
    assert [(logger.level, logger.handlers, logger.filters) for logger in loggers] == before


def test_what_was_not_shown_before_is_shown_only_when_it_is_asked_for() -> None:
    """As on the command line, where the libraries' own handlers are taken away."""
    logging.getLogger("transformers").handlers = []
    assert said(None) == ""
    assert "an info" in said(logging.INFO)


def test_what_the_program_itself_writes_to_the_screen_is_not_shown_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    screen = logging.StreamHandler(sys.stderr)
    screen.setLevel(logging.WARNING)
    monkeypatch.setattr(logging.getLogger(), "handlers", [screen])
    assert said(logging.INFO) == "  transformers.trainer: an info\n"


def say_dumps() -> None:
    """As transformers does."""
    logging.getLogger("transformers.configuration_utils").info("Model config Phi3Config {\n  1\n}\n")
    logging.getLogger("transformers.generation.configuration_utils").info(
        "Generate config GenerationConfig {\n  1\n}\n"
    )


def test_at_info_there_is_no_dump_of_configurations_and_at_debug_there_is_all(tmp_path: Path) -> None:
    stream = io.StringIO()
    display = Display(stream)
    with display.logged(tmp_path / "log"), libraries_logged(display, level=logging.INFO):
        say_dumps()
        TRAINER.info(
            "\n\nTraining completed. Do not forget to share your model on huggingface.co/models =)\n\n"
        )
        TRAINER.info("Model config is read")
    assert stream.getvalue() == "  transformers.trainer: Model config is read\n"
    assert (tmp_path / "log").read_text("utf-8").count("\n") == 1
    stream = io.StringIO()
    with libraries_logged(Display(stream), level=logging.DEBUG):
        say_dumps()
    assert "Model config Phi3Config" in stream.getvalue() and "Generate config" in stream.getvalue()


def test_known_messages_are_dropped_by_their_own_words(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    with without_known_messages():
        logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please", "x")
        logger.warning("Failed to load something else")
    logger.warning("Failed to load CPU gemm_4bit_forward again")
    assert [record.getMessage().split()[3] for record in caplog.records] == ["something", "CPU"]


def test_known_warnings_are_dropped_by_their_own_words() -> None:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with without_known_warnings():
            warnings.warn("`is_gradient_checkpointing` is deprecated and so on", FutureWarning, stacklevel=1)
            warnings.warn("`is_gradient_checkpointing` is deprecated and so on", UserWarning, stacklevel=1)
            warnings.warn("`something` is deprecated", FutureWarning, stacklevel=1)
    assert len(heard) == 2


def test_no_secret_comes_through(tmp_path: Path) -> None:
    stream = io.StringIO()
    display, token = Display(stream), "hf_" + "abcdefghij" * 3
    with display.logged(tmp_path / "log"), libraries_logged(display, level=logging.INFO):
        TRAINER.info(f"asked the hub with {token}")
    assert token not in stream.getvalue() + (tmp_path / "log").read_text("utf-8")
