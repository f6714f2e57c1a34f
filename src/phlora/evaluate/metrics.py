"""Scores of a generated answer.

A metric takes (prediction, reference) and returns a score from 0 to 1, or None where it does not apply to the row.
Texts are compared in Unicode normal form C: an accent written as one character equals the same accent written as
two.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from phlora.errors import ConfigError, did_you_mean, nearest, shown
from phlora.patterns import PatternProblem, compiled, matches

Metric = Callable[[str, str], float | None]

# In a list of metrics: those that fit the expected answers.
AUTO = "auto"

# A score of this much counts as a right answer where a row is called improved or worsened.
PASSING_SCORE = 0.5

_ZERO_WIDTH_JOINERS = "\u200c\u200d"


def exact_match(prediction: str, reference: str) -> float:
    """1 when both texts are equal but for white space around them."""
    return float(_normal(prediction).strip() == _normal(reference).strip())


def json_valid(prediction: str, reference: str) -> float | None:
    """1 when the answer is a JSON object or array; applies where the reference is one."""
    if parsed_json(reference) is None:
        return None
    return float(parsed_json(prediction) is not None)


def json_equal(prediction: str, reference: str) -> float | None:
    """1 when both hold the same JSON value, in any order of keys; applies where the reference is JSON."""
    expected = parsed_json(reference)
    if expected is None:
        return None
    return float(_same_json(parsed_json(prediction), expected))


def rouge_1(prediction: str, reference: str) -> float:
    """F1 of the words that both texts share."""
    return _rouge("rouge1", prediction, reference)


def rouge_2(prediction: str, reference: str) -> float:
    """F1 of the word pairs that both texts share."""
    return _rouge("rouge2", prediction, reference)


def rouge_l(prediction: str, reference: str) -> float:
    """F1 of the longest common subsequence of words."""
    return _rouge("rougeL", prediction, reference)


def rouge_lsum(prediction: str, reference: str) -> float:
    """F1 of the words that the longest common subsequences of each line with all lines of the other text cover."""
    return _rouge("rougeLsum", prediction, reference)


METRICS: dict[str, Metric] = {
    metric.__name__: metric
    for metric in (exact_match, json_valid, json_equal, rouge_l, rouge_1, rouge_2, rouge_lsum)
}

# The names that rouge-score and `evaluate` give them -> ours; a report has the name that was asked for.
KNOWN_AS = {"rouge1": "rouge_1", "rouge2": "rouge_2", "rougeL": "rouge_l", "rougeLsum": "rouge_lsum"}


def resolve_metrics(names: Iterable[str], *, auto: Iterable[str] = ()) -> dict[str, Metric]:
    """The metrics behind their names, in the order given; `contains:TEXT` and `regex:PATTERN` carry a parameter.

    Args:
        names: names of `METRICS` or `KNOWN_AS`, names with a parameter, or `auto`.
        auto: what stands for `auto`: the metrics that fit the task.

    Raises:
        ConfigError: an unknown name, a missing parameter, or a pattern that is no regular expression.
    """
    chosen = [entry for name in names for entry in (auto if name == AUTO else [name])]
    return {name: _resolve(name) for name in chosen}


def names_and_functions(metrics: Iterable[Any]) -> tuple[list[Any], dict[str, Metric]]:
    """A list of metrics apart: what stands there by name, and the functions, each under its own name.

    Raises:
        ConfigError: two of them have one name, so that one would take the other's place.
    """
    named: list[Any] = []
    functions: dict[str, Metric] = {}
    for metric in metrics:
        if not callable(metric):
            named.append(metric)
            continue
        name = getattr(metric, "__name__", type(metric).__name__)
        if name in functions:
            raise _of_one_name(name)
        functions[name] = metric
    for name in functions:
        if name in named:
            raise _of_one_name(name)
    return named, functions


def _of_one_name(name: str) -> ConfigError:
    return ConfigError(
        f"Two metrics are called {shown(name)}",
        where="evaluation.metrics",
        fix="give one of them a name of its own: `def my_metric(answer, reference)`, or set its `__name__`",
    )


def split_words(text: str) -> list[str]:
    """Words of any script: letters and digits with their combining marks and zero-width joiners.

    Chinese and Japanese characters, written without spaces, are words of their own.
    """
    return "".join(_as_word_part(character) for character in _normal(text)).split()


def is_word_part(character: str) -> bool:
    """Whether a character belongs to a word; `str.isalnum` alone would tear the vowel signs off Hindi words."""
    return (
        character.isalnum()
        or unicodedata.category(character).startswith("M")
        or character in _ZERO_WIDTH_JOINERS
    )


def _resolve(name: str) -> Metric:
    kind, colon, parameter = name.partition(":")
    if kind in _PARAMETERISED:
        if not parameter:
            raise ConfigError(
                f"`{name}` names nothing to look for", where="evaluation.metrics", expected=f"{kind}:TEXT"
            )
        return _PARAMETERISED[kind](parameter)
    if name not in METRICS and name not in KNOWN_AS:
        candidates = {
            known.casefold(): known
            for known in (AUTO, *KNOWN_AS, *METRICS, *(f"{kind}:" for kind in _PARAMETERISED))
        }
        meant = candidates.get(nearest(name.casefold(), candidates) or "")
        fix = f"did you mean `{meant}`?" if meant else did_you_mean(name, candidates.values())
        raise ConfigError(f"Unknown metric {shown(name)}", where="evaluation.metrics", fix=fix)
    return METRICS[KNOWN_AS.get(name, name)]


def _contains(text: str) -> Metric:
    text = _normal(text)
    return lambda prediction, _: float(text in _normal(prediction))


def _regex(pattern: str) -> Metric:
    expression = _normal(pattern)

    def found(prediction: str, reference: str) -> float:
        with _said_of(expression):
            return float(matches(expression, [_normal(prediction)], method="search")[0])

    with _said_of(expression):
        compiled(expression)
    return found


@contextmanager
def _said_of(pattern: str) -> Iterator[None]:
    try:
        yield
    except PatternProblem as problem:
        raise ConfigError(f"{shown(pattern)} {problem}", where="evaluation.metrics") from None


_PARAMETERISED: dict[str, Callable[[str], Metric]] = {"contains": _contains, "regex": _regex}


def _normal(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def parsed_json(text: str) -> dict[str, Any] | list[Any] | None:
    """The JSON object or array that the text is, or None."""
    try:
        value = json.loads(_normal(text), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        # A model that repeats itself can nest brackets deeper than the parser goes.
        return None
    return value if isinstance(value, dict | list) else None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _same_json(left: Any, right: Any) -> bool:
    """Equality that, unlike Python's, tells true from 1."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same_json(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_same_json, left, right))
    return bool(left == right)


def _as_word_part(character: str) -> str:
    if "\u3040" <= character <= "\u30ff" or "\u3400" <= character <= "\u9fff":
        return f" {character} "
    return character if is_word_part(character) else " "


class _WordTokenizer:
    """What rouge-score asks for; its own tokenizer keeps nothing but a-z and 0-9."""

    def tokenize(self, text: str) -> list[str]:
        return split_words(text.casefold())


@cache
def _rouge_scorer(kind: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], tokenizer=_WordTokenizer())


def _rouge(kind: str, prediction: str, reference: str) -> float:
    return float(_rouge_scorer(kind).score(reference, prediction)[kind].fmeasure)
