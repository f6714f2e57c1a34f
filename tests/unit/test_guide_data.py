"""The data of the guide's samples: made from a seed, right, and without overlap between the two sides."""

from __future__ import annotations

import ast
import json
import runpy
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "guide"


def rows(name: str) -> list[dict[str, Any]]:
    lines = (FOLDER / "data" / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def make() -> dict[str, Any]:
    return runpy.run_path(str(FOLDER / "make_data.py"))


def test_the_shipped_files_come_from_the_generator(make: dict[str, Any], tmp_path: Path) -> None:
    made = make["files"](11)
    assert sorted(made) == sorted(path.name for path in (FOLDER / "data").iterdir())
    for name, its_rows in made.items():
        make["write"](its_rows, tmp_path / name)
        assert (tmp_path / name).read_bytes() == (FOLDER / "data" / name).read_bytes()


@pytest.mark.parametrize("kind, sizes", [("python", [318, 82]), ("sharegpt", [320, 80])])
def test_no_question_and_no_answer_stands_on_both_sides(
    make: dict[str, Any], kind: str, sizes: list[int]
) -> None:
    train, held_out = rows(f"{kind}_train.jsonl"), rows(f"{kind}_heldout.jsonl")
    assert [len(train), len(held_out)] == sizes
    asked = [{make["asked_of"](row) for row in side} for side in (train, held_out)]
    assert not asked[0] & asked[1]
    assert list(map(len, asked)) == sizes
    # Of chats that are closed with thanks, the last answer names no day.
    last = [{json.dumps(row, ensure_ascii=False) for row in side} for side in (train, held_out)]
    assert not last[0] & last[1]


def test_no_function_is_asked_for_on_both_sides() -> None:
    sides = [{row["output"] for row in rows(f"python_{side}.jsonl")} for side in ("train", "heldout")]
    assert not sides[0] & sides[1]


def test_the_functions_do_what_is_asked() -> None:
    cases = {
        "Keep the": "keep_",
        "Count the": "count_",
        "Find the": ("largest_", "smallest_"),
        "Sort": "sort_",
        "Greet": "greet",
    }
    for row in rows("python_train.jsonl") + rows("python_heldout.jsonl"):
        (function,) = ast.parse(row["output"]).body
        assert isinstance(function, ast.FunctionDef) and function.returns is not None
        assert all(argument.annotation is not None for argument in function.args.args)
        for beginning, name in cases.items():
            assert function.name.startswith(name) or not row["instruction"].startswith(beginning)


def test_a_function_of_each_kind_computes_what_its_request_says(make: dict[str, Any]) -> None:
    def made(kind: str, slots: dict[str, Any]) -> Any:
        names: dict[str, Any] = {}
        # The generator's own text, no answer of a model.
        exec(make[kind](slots, make["random"].Random(0))["output"], names)
        return next(value for name, value in names.items() if name != "__builtins__")

    above = {"noun": "age", "condition": "above {n}", "n": 3}
    assert made("keep", above)([1, 3, 5]) == [5]
    assert made("count", above)([1, 4, 5]) == 2
    assert made("change", {"noun": "age", "operator": "-", "n": 1})([3]) == [2]
    assert made("aggregate", {"noun": "age", "which": "smallest", "n": 9})([]) == 9
    assert made("aggregate", {"noun": "age", "which": "largest", "n": 9})([1, 2]) == 2
    assert made("look_up", {"record": "book", "field": "title", "default": "अज्ञात"})({}) == "अज्ञात"
    assert made("sort", {"record": "book", "field": "year", "order": "descending"})(
        [{"year": 1}, {"year": 2}]
    ) == [{"year": 2}, {"year": 1}]
    assert made("join", {"noun": "city", "separator": "a dash"})(["a", "b"]) == "a-b"
    assert made("greet", {"who": ("Vietnamese", "Hương")})() == "Xin chào Hương!"


def test_the_desk_keeps_its_rules(make: dict[str, Any]) -> None:
    slots = {"name": "Ngọc", "item": "kite", "trouble": "broken", "days": 30}
    assert make["case"](slots) == "CASE replace | kite | day 30 | Ngọc\nWe send you a new kite tomorrow."
    assert make["case"](slots | {"days": 31}).startswith("CASE repair | kite | day 31 | Ngọc\n")
    for row in rows("sharegpt_train.jsonl") + rows("sharegpt_heldout.jsonl"):
        speakers = [turn["from"] for turn in row["conversations"]]
        assert speakers in (["system", "human", "gpt"], ["system", "human", "gpt", "human", "gpt"])
        case, _ = row["conversations"][2]["value"].split("\n")
        _, item, day, name = case.split(" | ")
        assert name in row["conversations"][1]["value"] and item in row["conversations"][1]["value"]
        assert f"{day.removeprefix('day ')} days ago" in row["conversations"][1]["value"]


@pytest.mark.parametrize("kind", ["python", "sharegpt"])
def test_the_languages_of_the_guide_are_there(make: dict[str, Any], kind: str) -> None:
    sides = (FOLDER / "data" / f"{kind}_{side}.jsonl" for side in ("train", "heldout"))
    text = "".join(side.read_text(encoding="utf-8") for side in sides)
    for language, (_, names) in make["GREETINGS"].items():
        assert sum(name in text for name in names) >= 2, language
