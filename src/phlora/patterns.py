"""Regular expressions that a person, or a file from somewhere, has written: compiled and matched within bounds.

Python's `re` backtracks: `(.*a?)*x` on a text of thirty letters runs for years, and nothing in the process can stop
it. With at most one repetition, and none of a group, an expression takes at most the square of the text's length, and
is matched here. Any other is matched in a process of its own, which is ended after `MOST_SECONDS`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from typing import Literal

Method = Literal["fullmatch", "match", "search"]

MOST_SECONDS = 10.0
# Also an escaped one counts, which costs a process and nothing else.
_REPEATS = re.compile(r"[*+?{]")
_REPEATED_GROUP = re.compile(r"\)[*+?{]")
_CHILD = (
    "import json, re, sys; pattern, method, texts = json.load(sys.stdin); "
    "match = getattr(re.compile(pattern), method); "
    "json.dump([match(text) is not None for text in texts], sys.stdout)"
)


class PatternProblem(ValueError):
    """An expression is none, or takes too long; the message is the rest of a sentence about it."""


def compiled(pattern: str) -> re.Pattern[str]:
    """The expression, compiled.

    Raises:
        PatternProblem: it is none.
    """
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError, MemoryError) as error:
        raise PatternProblem(f"is no regular expression: {error}") from None


def matches(
    pattern: str, texts: Iterable[str], *, method: Method = "fullmatch", seconds: float = MOST_SECONDS
) -> list[bool]:
    """Whether the expression matches each text, as `re` says it.

    Raises:
        PatternProblem: it is none, or the texts took longer than so many seconds.
    """
    expression, texts = compiled(pattern), list(texts)
    if may_be_slow(pattern):
        return _matches_in_a_process(pattern, texts, method, seconds)
    match = getattr(expression, method)
    return [match(text) is not None for text in texts]


def may_be_slow(pattern: str) -> bool:
    """Whether the expression has several repetitions, or one of a group, and so may backtrack for long."""
    return len(_REPEATS.findall(pattern)) > 1 or _REPEATED_GROUP.search(pattern) is not None


def _matches_in_a_process(pattern: str, texts: Sequence[str], method: Method, seconds: float) -> list[bool]:
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            input=json.dumps([pattern, method, texts]).encode(),
            capture_output=True,
            timeout=seconds,
            check=True,
        )
    except subprocess.TimeoutExpired:
        raise PatternProblem(
            f"was not matched within {seconds:g} seconds: its repetitions stand for the same text"
        ) from None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines() or ["it was ended"]
        raise PatternProblem(f"cannot be matched ({lines[-1]})") from None
    answers: list[bool] = json.loads(done.stdout)
    return answers
