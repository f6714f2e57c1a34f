"""What a report says in a terminal and in its files."""

from __future__ import annotations

import errno
import json
import math
import re
from pathlib import Path

import pytest
from reports import LANGUAGES, comparison_of, improved, report_of
from rich.cells import cell_len

from phlora.errors import NoRoomError, RunError


class TestSummary:
    def test_columns_line_up(self) -> None:
        text = report_of(improved(), timing={"train": 252.4, "evaluate": 4.0}, peak_bytes=3 << 29).summary()
        lines = text.splitlines()
        assert lines[0].startswith("Exact match rose")
        table = lines[2 : lines.index("", 2)]
        assert len({len(line) for line in table if "interval" in line or "Exact" in line}) == 1
        assert re.search(r"Exact match +0\.0 % +90\.0 % +\+90\.0 +\+\d+\.\d to \+\d+\.\d", text)
        assert re.search(r"Valid JSON +n/a +n/a$", text, re.MULTILINE)
        assert "45 rows turned right, 0 turned wrong." in text
        assert "train 4 min 12 s, evaluate 4.0 s." in text
        assert "Peak memory 1.50 GiB." in text

    @pytest.mark.parametrize("width", [40, 60, 80, 120])
    def test_it_fits_a_terminal_of_any_width(self, width: int) -> None:
        wide = "東京の台所の明かりをつけてください、お願いします"
        comparison = comparison_of(
            ["no"] * 20, ["yes"] * 20, ["yes"] * 20, "exact_match", f"contains:{wide}", f"regex:{'a' * 90}"
        )
        text = report_of(comparison, notes=["chats.jsonl:3: the row was cut at 1024 tokens " * 3]).summary(
            width=width
        )
        assert all(cell_len(line) <= width for line in text.splitlines())
        assert re.search(r"Exact match +0\.0 % +100\.0 % +\+100\.0", text)
        assert re.search(r"\+\d\d\.\d to \+100\.0", text)
        # Columns stand below each other, also behind wide characters.
        rows = [line for line in text.splitlines() if re.search(r" %  [ +-]", line)]
        assert len({cell_len(line[: line.index(" %")]) for line in rows}) == 1

    def test_a_name_cannot_command_the_terminal(self) -> None:
        text = report_of(
            comparison_of(["a"], ["b"], ["b"], "contains:\x1b[2J\nx"), notes=["\x1b]0;x"]
        ).summary()
        assert "\x1b" not in text and "\\x1b[2J x" in text

    def test_notes_are_said(self) -> None:
        assert report_of(improved(), notes=["Two rows were cut."]).summary().endswith("Two rows were cut.")


class TestJson:
    def test_sides_are_shares_and_null(self) -> None:
        values = report_of(improved()).to_json()
        for name in ("base", "tuned"):
            assert {"exact_match", "json_valid", "loss", "perplexity", "token_accuracy"} <= values[
                name
            ].keys()
        assert values["base"]["exact_match"] == 0.0
        assert values["tuned"]["exact_match"] == 0.9
        assert values["tuned"]["json_valid"] is None
        assert values["intervals"]["exact_match"]["method"] == "exact"
        assert values["num_rows"]["exact_match"] == 50
        assert len(values["flips"]["improved"]) == 45
        assert values["flips"]["improved"][0]["origin"] == "heldout.jsonl:1"
        assert len(values["answers"]) == 50 and values["answers"][49]["change"] is None

    def test_metrics_that_were_not_asked_for_are_null(self) -> None:
        values = report_of(comparison_of(["a"], ["b"], ["b"], "rouge_l")).to_json()
        assert values["base"]["exact_match"] is None and values["tuned"]["rouge_l"] == 1.0

    def test_strict_json_without_nan(self, tmp_path: Path) -> None:
        comparison = comparison_of(["a"], ["b"], ["b"], base_loss=800.0)
        report = report_of(
            comparison,
            config={"a": math.inf, "path": Path("x"), "names": {"b", "a"}},
            training_curve=[(1, math.nan, 0.1), (2, 1.0, 0.1), (3, 0.5, 0.0)],
        )
        report.write(tmp_path)

        def refuse(name: str) -> None:
            raise AssertionError(name)

        values = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=refuse)
        assert values["base"]["perplexity"] is None and values["base"]["loss"] == 800.0
        assert values["config"] == {"a": None, "path": "x", "names": ["a", "b"]}
        assert values["training_curve"][0] == {"step": 1, "loss": None, "learning_rate": 0.1}

    @pytest.mark.parametrize("text", LANGUAGES.values(), ids=LANGUAGES)
    def test_every_language_stands_in_the_files_as_written(self, text, tmp_path: Path) -> None:
        report_of(comparison_of(["no"], [text], [text], f"contains:{text}", "exact_match")).write(tmp_path)
        raw = (tmp_path / "report.json").read_text(encoding="utf-8")
        assert text in raw
        assert json.loads(raw)["tuned"][f"contains:{text}"] == 1.0
        assert text in (tmp_path / "report.html").read_text(encoding="utf-8")

    def test_half_a_surrogate_pair_does_not_stop_the_report(self, tmp_path: Path) -> None:
        report_of(comparison_of(["no"], ["\ud83d!"], ["\ud83d!"])).write(tmp_path)
        values = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
        assert values["flips"]["improved"][0]["reference"] == "\ud83d!"
        assert r"\ud83d!" in (tmp_path / "report.html").read_text(encoding="utf-8")


class TestSecrets:
    CONFIG = {
        "training_config": {
            "hub_token": "hf_abcdefghijklmnopqrstuv",
            "eos_token": "<|end|>",
            "wandb_api_key": "k1",
        },
        "command": "train --hub-token hf_abcdefghijklmnopqrstuv",
        "model": {"token": "s3cret", "revision": None},
    }

    def test_are_in_neither_file(self, tmp_path: Path) -> None:
        report_of(improved(), config=self.CONFIG, environment=self.CONFIG).write(tmp_path)
        for name in ("report.json", "report.html"):
            text = (tmp_path / name).read_text(encoding="utf-8")
            assert not re.search(r"hf_abc|s3cret|\bk1\b", text), name
            assert "(not shown)" in text

    def test_tokens_of_the_vocabulary_are_no_secrets(self) -> None:
        values = report_of(improved(), config=self.CONFIG).to_json()
        assert values["config"]["training_config"]["eos_token"] == "<|end|>"
        assert values["config"]["model"]["revision"] is None

    def test_a_metric_may_be_about_passwords(self) -> None:
        values = report_of(comparison_of(["a"], ["password"], ["b"], "contains:password")).to_json()
        assert values["tuned"]["contains:password"] == 1.0


class TestWrite:
    def test_creates_the_folder_and_leaves_nothing_else(self, tmp_path: Path) -> None:
        page = report_of(improved()).write(tmp_path / "a" / "b")
        assert page == tmp_path / "a" / "b" / "report.html"
        assert sorted(p.name for p in page.parent.iterdir()) == ["report.html", "report.json"]

    def test_replaces_an_older_report(self, tmp_path: Path) -> None:
        report_of(improved(40)).write(tmp_path)
        report_of(improved(45)).write(tmp_path)
        assert json.loads((tmp_path / "report.json").read_text())["tuned"]["exact_match"] == 0.9

    def test_a_full_disk_keeps_the_old_report(self, tmp_path: Path, monkeypatch) -> None:
        report_of(improved(40)).write(tmp_path)

        def full(self: Path, content: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", full)
        with pytest.raises(NoRoomError):
            report_of(improved(45)).write(tmp_path)
        assert json.loads((tmp_path / "report.json").read_text())["tuned"]["exact_match"] == 0.8
        assert len(list(tmp_path.iterdir())) == 2

    def test_a_file_in_the_way(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(RunError, match="cannot be written"):
            report_of(improved()).write(tmp_path / "file")
