"""`load_metric`, against rouge-score itself."""

from __future__ import annotations

from statistics import fmean

import pytest
from rouge_score.rouge_scorer import RougeScorer

from phlora import load_metric
from phlora.errors import ConfigError

PREDICTIONS = ["the cat sat\non the mat", "a dog", ""]
REFERENCES = ["the cat is\non a mat", "two dogs ran", "nothing"]


@pytest.mark.parametrize("use_stemmer", [False, True])
def test_rouge_is_the_mean_of_rouge_score(use_stemmer: bool) -> None:
    scores = load_metric("rouge").compute(
        predictions=PREDICTIONS, references=REFERENCES, use_stemmer=use_stemmer
    )
    assert list(scores) == ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = RougeScorer(list(scores), use_stemmer=use_stemmer)
    each = [
        scorer.score(reference, answer) for answer, reference in zip(PREDICTIONS, REFERENCES, strict=True)
    ]
    assert scores == {name: fmean(score[name].fmeasure for score in each) for name in scores}


def test_answers_can_be_added() -> None:
    metric = load_metric("rouge")
    metric.add(prediction="a b", reference="a b")
    metric.add_batch(predictions=["c d"], references=["x y"])
    assert metric.compute(rouge_types=["rouge1"], use_aggregator=False) == {"rouge1": [1.0, 0.0]}
    with pytest.raises(ConfigError, match="no answers"):
        metric.compute()


def test_phlora_s_own() -> None:
    assert load_metric("exact_match").compute(predictions=["a", "b"], references=["a", "c"]) == {
        "exact_match": 0.5
    }


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match="did you mean `rouge`"):
        load_metric("rogue")
    with pytest.raises(ConfigError, match="1 predictions and 2 references"):
        load_metric("rouge").compute(predictions=["a"], references=["a", "b"])
    for given, said in (
        ("abc", "`references` is `abc`"),
        (None, "is `None`"),
        ([["a"]], r"`references\[0\]` is"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_metric("rouge").compute(predictions=["a"], references=given)
    with pytest.raises(ConfigError, match=r"`predictions\[0\]` is `5`"):
        load_metric("rouge").add(prediction=5, reference="a")
