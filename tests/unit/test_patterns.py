"""Regular expressions from outside: what `re` says, and an end to what would backtrack for years."""

from __future__ import annotations

import re

import pytest

from phlora.patterns import PatternProblem, matches, may_be_slow

NAMES = ["model.layers.0.self_attn.qkv_proj", "model.layers.1.mlp.down_proj", "lm_head", "", "سلام\n\ud800"]


@pytest.mark.parametrize("method", ["fullmatch", "match", "search"])
@pytest.mark.parametrize(
    "pattern",
    [".*", r".*\.(qkv_proj|down_proj)", r".*layers\.\d+\..*proj", "(lm|head|_)+", "(?i)LM_.*?", "سلام.*"],
)
def test_it_is_what_re_says(pattern: str, method: str) -> None:
    said = [getattr(re, method)(pattern, name) is not None for name in NAMES]
    assert matches(pattern, NAMES, method=method) == said  # type: ignore[arg-type]


@pytest.mark.parametrize("pattern", ["(.*a?)*(.*)*x", "(a|a)*b", "(a?a?a?a?)*b", "(?:a+a+)+b", "(a*)*b"])
def test_what_backtracks_for_long_is_ended(pattern: str) -> None:
    assert may_be_slow(pattern)
    with pytest.raises(PatternProblem, match="within 0.5 seconds"):
        matches(pattern, ["a" * 60], seconds=0.5)


@pytest.mark.parametrize("pattern", ["(", "*", "[z-a]", "a{99999999999999}", "(?P<x>a)(?P<x>b)"])
def test_what_is_no_expression_says_so(pattern: str) -> None:
    with pytest.raises(PatternProblem, match="is no regular expression"):
        matches(pattern, NAMES)


@pytest.mark.parametrize("pattern", [r".*\.(q_proj|v_proj)", "q_proj", r"model\.layers\.[01]\.mlp"])
def test_the_usual_ones_need_no_process(pattern: str) -> None:
    assert not may_be_slow(pattern)
