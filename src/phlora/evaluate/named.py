"""Metrics as older scripts have them: `load_metric("rouge").compute(predictions=..., references=...)`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from phlora.errors import ConfigError, did_you_mean, shown
from phlora.evaluate.metrics import METRICS

ROUGE = "rouge"
ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class NamedMetric:
    """A metric over many answers.

    Attributes:
        name: what it is called.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._predictions: list[str] = []
        self._references: list[str] = []

    def add(self, *, prediction: str, reference: str) -> None:
        """Keep one answer for `compute`."""
        self.add_batch(predictions=[prediction], references=[reference])

    def add_batch(self, *, predictions: Sequence[str], references: Sequence[str]) -> None:
        """Keep answers for `compute`.

        Raises:
            ConfigError: what are no texts, or not one reference for each.
        """
        answers, expected = self._texts("predictions", predictions), self._texts("references", references)
        if len(answers) != len(expected):
            raise ConfigError(
                f"{len(answers)} predictions and {len(expected)} references were given",
                where=f'load_metric("{self.name}")',
                expected="one reference for each prediction",
            )
        self._predictions += answers
        self._references += expected

    def _texts(self, name: str, given: Any) -> list[str]:
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise self._no_texts(name, given)
        texts = list(given)
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise self._no_texts(f"{name}[{number}]", text)
        return texts

    def _no_texts(self, name: str, given: Any) -> ConfigError:
        where = f'load_metric("{self.name}")'
        return ConfigError(f"`{name}` is {shown(given)}", where=where, expected="texts in a list")

    def compute(
        self,
        *,
        predictions: Sequence[str] = (),
        references: Sequence[str] = (),
        rouge_types: Sequence[str] = ROUGE_TYPES,
        use_aggregator: bool = True,
        use_stemmer: bool = False,
    ) -> dict[str, Any]:
        """The score of all answers: of these, and of those that were added before.

        Args:
            rouge_types: for `rouge`: which of them; the score is the F1 as rouge-score computes it, its mean over the
                answers. (`evaluate` takes the middle of a bootstrap, which is this mean up to its chance.)
            use_aggregator: the mean; else the score of each answer.
            use_stemmer: for `rouge`: words by their Porter stem.

        Raises:
            ConfigError: no answers, what are no texts, or not one reference for each.
        """
        self.add_batch(predictions=predictions, references=references)
        pairs = list(zip(self._predictions, self._references, strict=True))
        self._predictions, self._references = [], []
        if not pairs:
            raise ConfigError("There are no answers to score", where=f'load_metric("{self.name}")')
        scores = (
            _rouge(pairs, rouge_types, use_stemmer=use_stemmer) if self.name == ROUGE else self._own(pairs)
        )
        return {name: fmean(values) if use_aggregator else values for name, values in scores.items()}

    def _own(self, pairs: Sequence[tuple[str, str]]) -> dict[str, list[float]]:
        scores = [METRICS[self.name](prediction, reference) for prediction, reference in pairs]
        return {self.name: [score for score in scores if score is not None] or [0.0]}


def load_metric(name: str) -> NamedMetric:
    """The metric `rouge`, or one of Phlora's own by its name, without asking a hub.

    Raises:
        ConfigError: an unknown name.
    """
    if name != ROUGE and name not in METRICS:
        raise ConfigError(
            f"The metric {shown(name)} is not known",
            where="load_metric",
            fix=f"{did_you_mean(name, [ROUGE, *METRICS])}; others are in the package evaluate: evaluate.load({name!r})",
        )
    return NamedMetric(name)


def _rouge(
    pairs: Sequence[tuple[str, str]], types: Sequence[str], *, use_stemmer: bool
) -> dict[str, list[float]]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(types), use_stemmer=use_stemmer)
    scores = [scorer.score(reference, prediction) for prediction, reference in pairs]
    return {kind: [float(score[kind].fmeasure) for score in scores] for kind in types}
