from __future__ import annotations

import unicodedata

import pytest

from phlora.errors import ConfigError
from phlora.evaluate.metrics import KNOWN_AS, METRICS, resolve_metrics, split_words

SENTENCES = {
    "persian": "چراغ آشپزخانه را روشن می‌کنم",
    "hindi": "मैं रसोई की बत्ती जला रहा हूँ",
    "serbian": "Palim svetlo u kuhinji, važi?",
    "turkish": "Işıkları İstanbul'da açıyorum",
    "vietnamese": "Tôi đang bật đèn trong nhà bếp",
}


def score(name: str, prediction: str, reference: str) -> float | None:
    return resolve_metrics([name])[name](prediction, reference)


@pytest.mark.parametrize("text", SENTENCES.values(), ids=SENTENCES)
def test_every_language_matches_itself_in_any_normal_form(text) -> None:
    other_form = unicodedata.normalize("NFD", text)
    for name in ("exact_match", "rouge_1", "rouge_2", "rouge_l", f"contains:{text}"):
        assert score(name, other_form, text) == 1.0, name


@pytest.mark.parametrize("text", SENTENCES.values(), ids=SENTENCES)
def test_rouge_counts_the_words_of_every_language(text) -> None:
    words = text.split()
    assert score("rouge_1", " ".join(words[:-1]), text) == pytest.approx(
        2 * len(split_words(" ".join(words[:-1]))) / (len(split_words(text)) * 2 - 1)
    )
    assert score("rouge_1", "qwerty", text) == 0.0


def test_words_keep_their_marks_and_joiners() -> None:
    assert split_words("नमस्ते, दुनिया!") == ["नमस्ते", "दुनिया"]
    assert split_words("«می‌روم» خانه") == ["می‌روم", "خانه"]
    assert split_words("東京 tower") == ["東", "京", "tower"]


def test_rouge_is_the_reference_implementation_for_english() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    prediction, reference = "The cat sat on the mat today.", "the cat, today, sat on a mat"
    oracle = RougeScorer(["rouge1", "rouge2", "rougeL"]).score(reference, prediction)
    for ours, theirs in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
        assert score(ours, prediction, reference) == oracle[theirs].fmeasure


@pytest.mark.parametrize("name", KNOWN_AS)
@pytest.mark.parametrize(
    ("prediction", "reference"),
    [
        ("The cat sat.\nOn the mat today.", "the cat, today, sat on a mat\nand slept"),
        ("It's 5 o'clock; go-to_bed!", "go to bed at 5 o'clock"),
        ("def f(x):\n    return x + 1\n\nprint(f(2))", "def f(x):\n    return 1 + x"),
        ("one two three", "three two one"),
        ("", "something"),
        ("a b c", "a b c"),
    ],
)
def test_the_known_names_give_the_values_of_rouge_score(name: str, prediction: str, reference: str) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    oracle = RougeScorer([name]).score(reference, prediction)[name].fmeasure
    assert score(name, prediction, reference) == oracle
    assert score(KNOWN_AS[name], prediction, reference) == oracle


def test_a_summary_is_compared_line_by_line() -> None:
    swapped = ("slept all day\nthe cat sat", "the cat sat\nslept all day")
    assert score("rougeLsum", *swapped) == 1.0 and score("rougeL", *swapped) == 0.5


@pytest.mark.parametrize(
    ("prediction", "expected"), [(" yes\n", 1.0), ("Yes", 0.0), ("yes.", 0.0), ("ye s", 0.0)]
)
def test_exact_match_forgives_only_outer_white_space(prediction, expected) -> None:
    assert score("exact_match", prediction, "yes") == expected


@pytest.mark.parametrize("name", ["json_valid", "json_equal"])
@pytest.mark.parametrize("reference", ["plain words", "12", '"text"', "{broken", "null"])
def test_json_metrics_apply_to_objects_and_arrays_only(name, reference) -> None:
    assert score(name, reference, reference) is None


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ('{"a": 2}', 1.0),
        (" [1]\n", 1.0),
        ("7", 0.0),
        ('{"a": NaN}', 0.0),
        ('{"a": 1} and more', 0.0),
        ('```json\n{"a": 1}\n```', 0.0),
        ("", 0.0),
        ("[" * 200_000, 0.0),
        ("[" + "9" * 5000 + "]", 0.0),
    ],
    ids=range(9),
)
def test_json_valid(prediction, expected) -> None:
    assert score("json_valid", prediction, '{"a": 1}') == expected


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ('{"b": [1, 2], "a": "é"}', '{"a":"\\u00e9","b":[1,2]}', 1.0),
        ('{"a": 1.0}', '{"a": 1}', 1.0),
        ('{"a": true}', '{"a": 1}', 0.0),
        ('{"a": [2, 1]}', '{"a": [1, 2]}', 0.0),
        ('{"a": 1, "b": null}', '{"a": 1}', 0.0),
        ("{", "{}", 0.0),
        ("[]", "{}", 0.0),
    ],
)
def test_json_equal_ignores_order_of_keys_only(prediction, reference, expected) -> None:
    assert score("json_equal", prediction, reference) == expected


def test_parameterised_metrics() -> None:
    assert score("contains:a:b", "x a:b y", "") == 1.0
    assert score("contains:Light", "light", "") == 0.0
    assert score(r"regex:^\d+ °C$", "21 °C", "") == 1.0
    assert score(r"regex:^\d+ °C$", "about 21 °C", "") == 0.0
    assert score(r"regex:(\d+ ?)+°", "about 21 °C", "") == 1.0


def test_metrics_keep_their_order() -> None:
    names = ["rouge_l", "contains:x", "exact_match"]
    assert list(resolve_metrics(names)) == names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exact_mach", "did you mean `exact_match`"),
        ("rougel", "did you mean `rougeL`"),
        ("ROUGE-L", "did you mean `rouge"),
        ("ROUGE1", "did you mean `rouge1`"),
        ("RougeLSum", "did you mean `rougeLsum`"),
        ("bleu", "`rougeLsum`"),
        ("contain:x", "did you mean `contains:`"),
        ("contains", "contains:TEXT"),
        ("regex:", "regex:TEXT"),
        ("regex:(", "no regular expression"),
        ("", "exact_match"),
    ],
)
def test_a_wrong_name_is_answered_with_the_right_one(name, message) -> None:
    with pytest.raises(ConfigError) as error:
        resolve_metrics(["exact_match", name])
    assert message in str(error.value)


def test_registry_holds_what_it_names() -> None:
    assert all(METRICS[name].__name__ == name for name in METRICS)


def test_auto_stands_for_what_fits_the_task() -> None:
    assert list(resolve_metrics(["auto", "contains:x"], auto=("rouge_l",))) == ["rouge_l", "contains:x"]
    assert list(resolve_metrics(["auto"])) == []


def test_an_expression_that_backtracks_for_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phlora.patterns.matches.__kwdefaults__", {"method": "fullmatch", "seconds": 0.5})
    with pytest.raises(ConfigError, match="within 0.5 seconds"):
        score("regex:(.*a?)*(.*)*x", "a" * 60, "")
