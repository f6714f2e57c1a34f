"""Scores of a generated answer, and how sure a difference between two models is.

A metric takes (prediction, reference) and returns a score from 0 to 1, or None where it does not apply to the row.
Texts are compared in Unicode normal form C: an accent written as one character equals the same accent written as
two.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from phlora.errors import ConfigError, did_you_mean

Metric = Callable[[str, str], float | None]

# A score of this much counts as a right answer where a row is called improved or worsened.
PASSING_SCORE = 0.5

_ZERO_WIDTH_JOINERS = "\u200c\u200d"
# A draw of the bootstrap never holds more row numbers than this at once.
_MAX_DRAWN = 4_000_000


def exact_match(prediction: str, reference: str) -> float:
    """1 when both texts are equal but for white space around them."""
    return float(_normal(prediction).strip() == _normal(reference).strip())


def json_valid(prediction: str, reference: str) -> float | None:
    """1 when the answer is a JSON object or array; applies where the reference is one."""
    if _parsed(reference) is None:
        return None
    return float(_parsed(prediction) is not None)


def json_equal(prediction: str, reference: str) -> float | None:
    """1 when both hold the same JSON value, in any order of keys; applies where the reference is JSON."""
    expected = _parsed(reference)
    if expected is None:
        return None
    return float(_same_json(_parsed(prediction), expected))


def rouge_1(prediction: str, reference: str) -> float:
    """F1 of the words that both texts share."""
    return _rouge("rouge1", prediction, reference)


def rouge_2(prediction: str, reference: str) -> float:
    """F1 of the word pairs that both texts share."""
    return _rouge("rouge2", prediction, reference)


def rouge_l(prediction: str, reference: str) -> float:
    """F1 of the longest common subsequence of words."""
    return _rouge("rougeL", prediction, reference)


METRICS: dict[str, Metric] = {
    metric.__name__: metric for metric in (exact_match, json_valid, json_equal, rouge_l, rouge_1, rouge_2)
}


def resolve_metrics(names: Iterable[str]) -> dict[str, Metric]:
    """The metrics behind their names, in the order given; `contains:TEXT` and `regex:PATTERN` carry a parameter.

    Raises:
        ConfigError: an unknown name, a missing parameter, or a pattern that is no regular expression.
    """
    return {name: _resolve(name) for name in names}


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


@dataclass(frozen=True)
class Interval:
    """The mean of `tuned - base` with the interval that holds it at the confidence asked for."""

    mean_difference: float
    low: float
    high: float

    @property
    def includes_zero(self) -> bool:
        return self.low <= 0 <= self.high


def paired_bootstrap(
    base: Sequence[float],
    tuned: Sequence[float],
    *,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    num_resamples: int = 2000,
    confidence: float = 0.95,
) -> Interval:
    """Percentile bootstrap of the mean difference, drawing rows with both of their scores.

    Args:
        base: (rows,) score of each row.
        tuned: (rows,) score of the same rows.
        weights: (rows,) for a weighted mean, such as the tokens of each row; None: all rows alike.
        seed: of the draws.
        num_resamples: how many sets of rows are drawn.
        confidence: share of the resampled means inside the interval.

    Raises:
        ValueError: no rows, or lists of different lengths.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    if not len(base) or len(base) != len(tuned) or (weights is not None and len(weights) != len(base)):
        raise ValueError(f"paired scores are needed, got {len(base)} and {len(tuned)}")
    mass = np.ones(len(base)) if weights is None else np.asarray(weights, dtype=np.float64)
    difference = (np.asarray(tuned, dtype=np.float64) - np.asarray(base, dtype=np.float64)) * mass
    means = _resampled_means(difference, mass, seed=seed, num_resamples=num_resamples)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(difference.sum() / mass.sum()), float(low), float(high))


def _resampled_means(
    sums: np.ndarray[Any, Any], mass: np.ndarray[Any, Any], *, seed: int, num_resamples: int
) -> np.ndarray[Any, Any]:
    generator = np.random.default_rng(seed)
    at_once = max(1, _MAX_DRAWN // len(sums))
    means = []
    for start in range(0, num_resamples, at_once):
        rows = generator.integers(len(sums), size=(min(at_once, num_resamples - start), len(sums)))
        means.append(sums[rows].sum(axis=1) / mass[rows].sum(axis=1))
    return np.concatenate(means)


def _resolve(name: str) -> Metric:
    kind, colon, parameter = name.partition(":")
    if kind in _PARAMETERISED:
        if not parameter:
            raise ConfigError(
                f"`{name}` names nothing to look for", where="evaluation.metrics", expected=f"{kind}:TEXT"
            )
        return _PARAMETERISED[kind](parameter)
    if name not in METRICS:
        candidates = [*METRICS, *(f"{kind}:" for kind in _PARAMETERISED)]
        raise ConfigError(
            f"Unknown metric `{name}`", where="evaluation.metrics", fix=did_you_mean(name, candidates)
        )
    return METRICS[name]


def _contains(text: str) -> Metric:
    text = _normal(text)
    return lambda prediction, _: float(text in _normal(prediction))


def _regex(pattern: str) -> Metric:
    try:
        compiled = re.compile(_normal(pattern))
    except (re.error, OverflowError) as error:
        raise ConfigError(
            f"`{pattern}` is no regular expression: {error}", where="evaluation.metrics"
        ) from None
    return lambda prediction, _: float(compiled.search(_normal(prediction)) is not None)


_PARAMETERISED: dict[str, Callable[[str], Metric]] = {"contains": _contains, "regex": _regex}


def _normal(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _parsed(text: str) -> dict[str, Any] | list[Any] | None:
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
