from __future__ import annotations

import json
import subprocess
import sys

import pytest

from phlora.data.checks import check, preview
from phlora.data.dataset import load_rows
from phlora.data.lengths import histogram, percentiles, whole_at
from phlora.data.tokenize import tokenize_rows
from phlora.errors import DataError
from phlora.testing import LANGUAGES, chatml_tokenizer, llama2_tokenizer, phi3_tokenizer
from phlora.testing.tokenizers import CHATML


def test_the_package_is_light():
    names = "checks, formats, labels, packing, chat_template, prompts, tokenize"
    code = f"import sys; from phlora.data import {names}; print(*sorted(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "transformers", "peft", "trl", "datasets", "tokenizers"} & set(loaded)


def _chat(question="Hi", answer="Hello"):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _write(path, rows):
    path.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8"
    )
    return path


def _found(report):
    return {problem.kind: [origin.line for origin in problem.origins] for problem in report.problems}


def _role(*roles):
    return {"messages": [{"role": role, "content": f"{role} {roles}"} for role in roles]}


def test_all_findings_come_in_one_pass_with_their_lines(tmp_path):
    rows = [
        _chat(),
        "{broken",
        _role("user", "narrator"),
        _role("user"),
        _role("assistant", "user", "assistant"),
        _chat("empty", " "),
        _chat(),
        _chat("long " * 90),
        {"messages": []},
        _chat("fine"),
    ]
    path = _write(tmp_path / "chats.jsonl", rows)
    held_out = _write(tmp_path / "eval.jsonl", [_chat("new"), _chat("fine ")])
    report = check(path, phi3_tokenizer(), eval_sources=held_out, max_length=120)
    assert _found(report) == {
        "broken_json": [2],
        "unknown_role": [3],
        "no_answer": [4],
        "empty_chat": [9],
        "turn_order": [5],
        "empty_answer": [6],
        "duplicate": [7],
        "leaked_eval_row": [2],
        "too_long": [8],
        "leading_whitespace": [6],
    }
    assert (report.num_rows, report.num_usable_rows) == (10, 5)
    assert (report.num_duplicates, report.num_leaked_eval_rows) == (1, 1)
    assert 0 < report.num_trained_tokens < report.num_tokens
    assert sum(item.count for item in report.lengths) == 5
    assert report.exit_code() == 2
    assert [problem.severity for problem in report.problems][:4] == ["error"] * 4


def test_structure_is_checked_without_a_tokenizer(tmp_path):
    path = _write(tmp_path / "chats.jsonl", [_chat(), _chat(), _role("user")])
    report = check(path)
    assert _found(report) == {"no_answer": [3], "duplicate": [2]}
    assert (report.num_usable_rows, report.num_tokens, report.lengths) == (2, None, ())


def test_exit_codes():
    assert check([_chat()]).exit_code(strict=True) == 0
    repeated = check([_chat(), _chat()])
    assert (repeated.exit_code(), repeated.exit_code(strict=True)) == (0, 1)
    assert check([_chat(), _role("user")]).exit_code() == 2
    assert check([_chat("long " * 60)], phi3_tokenizer(), max_length=20).exit_code() == 2
    noted = check([{**_chat(), "id": 1}])
    assert (noted.problems[0].severity, noted.exit_code(strict=True)) == ("note", 0)
    with pytest.raises(DataError):
        check("no-such-file.jsonl")


def test_cut_history_and_too_long_as_an_error():
    chat = {"messages": [*_chat("a " * 20)["messages"], *_chat("b")["messages"]]}
    report = check([chat], phi3_tokenizer(), max_length=40)
    assert _found(report) == {"history_cut": [1]}
    report = check([chat, _chat()], phi3_tokenizer(), max_length=40, too_long="error")
    assert [(problem.kind, problem.severity) for problem in report.problems] == [("too_long", "error")]


@pytest.mark.parametrize(
    ("roles", "text"),
    [
        (("user", "system", "assistant"), "system message does not stand first"),
        (("user", "user", "assistant"), "Two user turns"),
        (("user", "assistant", "assistant"), "Two assistant turns"),
        (("user", "tool", "assistant"), "tool turn does not follow"),
        (("user", "assistant", "user"), "ends with a user turn"),
    ],
)
def test_turn_order(roles, text):
    (problem,) = check([_role(*roles)]).problems
    assert (problem.kind, problem.severity) == ("turn_order", "warning")
    assert text in problem.message


def test_good_turn_orders_pass():
    good = [_role("system", "user", "assistant"), _role("user", "assistant", "tool", "tool", "assistant")]
    assert check(good).problems == ()


def test_the_report_reads_as_text_and_as_json():
    report = check([_chat(), *[_chat() for _ in range(20)]], phi3_tokenizer())
    text = report.render()
    assert "21 of 21 rows usable" in text
    assert "warning: The row repeats an earlier one (20 rows)" in text
    assert "rows:2, rows:3" in text and "and 12 more" in text
    values = json.loads(json.dumps(report.to_json()))
    assert values["problems"][0]["origins"][0] == "rows:2"
    assert values["num_usable_rows"] == 21


def test_histogram_counts_every_row_once():
    bins = histogram([3, 3, 4, 90, 100], num_bins=5)
    assert sum(item.count for item in bins) == 5
    assert bins[0].low == 3 and bins[-1].high >= 100
    assert [item.count for item in histogram([7, 7])] == [2]
    assert histogram([]) == ()


@pytest.mark.parametrize(
    "tokenizer", [phi3_tokenizer(), llama2_tokenizer()], ids=["byte-level", "byte-fallback"]
)
@pytest.mark.parametrize("language", LANGUAGES)
def test_preview_shows_whole_characters(tokenizer, language):
    text = LANGUAGES[language] + " 👩‍👩‍👧"
    (shown,) = preview(load_rows([_chat("x", text)]).rows, tokenizer, 3)
    assert not any("\ufffd" in piece for piece, _, _ in shown.tokens)
    trained = "".join(piece for piece, is_trained, _ in shown.tokens if is_trained)
    assert trained.strip().startswith(text)
    assert len(shown.tokens) > 10


@pytest.mark.parametrize(
    ("rows", "found", "where"),
    [
        ([{"messages": []}], "an object was given", "rows[0]"),
        (["chats.jsonl"], "a text was given", "rows[0]"),
        ("chats.jsonl", "a text was given", "rows"),
        ({"text": "a"}, "an object was given", "rows"),
        (None, "nothing (null) was given", "rows"),
        (load_rows([[_chat("x", "y")]]), "was given", "rows"),
        ([*load_rows([[_chat("x", "y")]]).rows, 7], "a number (7) was given", "rows[1]"),
    ],
    ids=["dict", "path among rows", "path", "one dict", "nothing", "what load_rows returns", "after a row"],
)
def test_what_are_no_rows_is_refused_with_the_way_to_rows(rows, found, where):
    for use in (lambda: preview(rows, phi3_tokenizer(), 3), lambda: tokenize_rows(rows, phi3_tokenizer())):
        with pytest.raises(DataError) as error:
            use()
        assert found in str(error.value).lower() and error.value.where == where
        assert "load_rows(...).rows" in str(error.value)


def test_preview_weights_and_skipped_rows():
    chat = _chat()
    chat["messages"][1]["weight"] = 0.5
    good, bad = preview(load_rows([chat, _role("user")]).rows, phi3_tokenizer(), 5)
    assert {weight for _, is_trained, weight in good.tokens if is_trained} == {0.5}
    assert {weight for _, is_trained, weight in good.tokens if not is_trained} == {0.0}
    assert bad.skipped and not bad.tokens


def test_limits_say_what_they_keep():
    lengths = [*range(1, 100), 5000]
    assert percentiles(lengths) == {50: 50, 90: 90, 99: 99, 100: 5000}
    assert whole_at(lengths, 50) == {12: 0.12, 25: 0.25, 50: 0.5, 100: 0.99, 200: 0.99}
    assert whole_at([10, 20], 2048) == {512: 1.0, 2048: 1.0}
    rows = [_chat(f"question {n}", "word " * n) for n in range(1, 40)] + [_chat("long", "word " * 2000)]
    report = check(rows, phi3_tokenizer())
    assert report.max_length == 2048 and report.num_usable_rows == 39
    assert ("too_long", "warning") in {(p.kind, p.severity) for p in report.problems}
    assert report.percentiles[100] > 2048 > report.percentiles[99 - 9]
    assert "max_length" in report.render() and "2048 keeps 97.5 %" in report.render()


def test_reasoning_is_left_out_and_said_or_kept_as_text():
    row = _chat()
    row["messages"][1]["reasoning_content"] = "Be polite."
    report = check([row], phi3_tokenizer())
    assert [(p.kind, p.severity) for p in report.problems] == [("reasoning_dropped", "warning")]
    kept = check([row], phi3_tokenizer(), keep_reasoning=True)
    assert not kept.problems and kept.num_trained_tokens > report.num_trained_tokens
    native = CHATML.replace(
        "+ message['content']",
        "+ ('<think>\n' + message.reasoning_content + '\n</think>\n\n' if message.reasoning_content else '') "
        "+ message['content']",
    )
    written = check([row], chatml_tokenizer(native))
    assert (
        not written.problems
        and written.num_trained_tokens > check([_chat()], chatml_tokenizer()).num_trained_tokens
    )
