"""`phlora data check` and `phlora data preview`: what they show, and with which exit code."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from command_line import CHATS, CommandLine

from phlora.testing import write_rows


def test_check_reports_and_exits_with_its_code(phlora: CommandLine, chats: Path, tmp_path: Path) -> None:
    twice = write_rows(tmp_path / "twice.jsonl", [*CHATS, CHATS[0]])
    broken = write_rows(tmp_path / "broken.jsonl", [*CHATS, {"messages": [{"role": "usr", "content": "x"}]}])
    assert phlora("data", "check", str(chats)).code == 0
    assert phlora("data", "check", str(twice)).code == 0
    assert phlora("data", "check", str(twice), "--strict").code == 1
    done = phlora("data", "check", str(broken))
    assert done.code == 2 and f"{broken}:3" in done.out


def test_check_finds_held_out_rows_in_the_data(phlora: CommandLine, chats: Path) -> None:
    done = phlora("data", "check", str(chats), "--eval-data", str(chats), "--json", "--strict")
    assert done.code == 1
    assert done.json["num_leaked_eval_rows"] == 2


def test_check_needs_a_tokenizer_to_count_tokens(phlora: CommandLine, chats: Path) -> None:
    done = phlora("data", "check", str(chats), "--max-length", "10")
    assert done.code == 2 and "--model" in done.err


def test_check_does_not_import_torch(chats: Path) -> None:
    code = (
        "import sys; from phlora.cli import main\n"
        f"try: main(['data', 'check', {str(chats)!r}])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_what_a_file_says_cannot_command_the_terminal(phlora: CommandLine, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "x.jsonl", [*CHATS, {"messages": [{"role": "\x1b[31m", "content": "x"}]}])
    done = phlora("data", "check", str(file))
    assert "\x1b" not in done.out and "\\x1b[31m" in done.out


def test_preview_marks_what_is_trained(phlora: CommandLine, chats: Path, model_folder: Path) -> None:
    done = phlora("data", "preview", chats, "--model", model_folder, "--rows", "1")
    plain = done.out.replace("│", "")
    assert f"{chats}:1" in plain and f"{chats}:2" not in plain
    assert "⟦درود بر شما<|end|>" in plain
    assert "سلام" in plain.partition("⟦")[0]
    assert "⟦ ⟧" in done.err and "\x1b" not in done.out


def test_preview_in_json_gives_every_token(phlora: CommandLine, chats: Path, model_folder: Path) -> None:
    document = phlora("data", "preview", chats, "--model", model_folder, "--json", "--train-on", "all").json
    first, second = document["rows"]
    assert "".join(token["text"] for token in first["tokens"]).count("سلام") == 1
    assert any(token["trained"] and token["weight"] == 1.0 for token in second["tokens"])


def test_preview_shows_weights_and_rows_left_out(
    phlora: CommandLine, tmp_path: Path, model_folder: Path
) -> None:
    weighted = {"messages": [CHATS[0]["messages"][0], {**CHATS[0]["messages"][1], "weight": 0.5}]}
    long = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y" * 99}]}
    file = write_rows(tmp_path / "x.jsonl", [weighted, long])
    done = phlora("data", "preview", file, "--model", model_folder, "--max-length", "50")
    assert "⟦×0.5 " in done.out
    assert "left out: " in done.out


def test_preview_of_a_good_beginning_does_not_need_a_good_end(
    phlora: CommandLine, tmp_path: Path, model_folder: Path
) -> None:
    file = write_rows(tmp_path / "x.jsonl", [*CHATS, {"messages": "broken"}])
    assert phlora("data", "preview", file, "--model", model_folder, "--rows", "2").code == 0
    assert phlora("data", "preview", file, "--model", model_folder, "--rows", "3").code == 2


def test_columns_are_named_on_the_command_line(phlora: CommandLine, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("Frage;Antwort\nHi;Hello\n", encoding="utf-8")
    done = phlora("data", "check", str(table))
    assert done.code == 2 and "--columns question=Frage,answer=Antwort" in done.err
    columns = ["--columns", "question=Frage,answer=Antwort"]
    assert phlora("data", "check", str(table), *columns).code == 0
    out = tmp_path / "out.jsonl"
    done = phlora("data", "convert", str(table), str(out), *columns, "--json")
    assert done.code == 0 and done.json["num_rows"] == 1
    assert "Hello" in out.read_text(encoding="utf-8")
    assert phlora("data", "convert", str(table), str(out), *columns).code == 2
    assert phlora("data", "convert", str(table)).code == 2
    assert phlora("data", "check", str(table), "--columns", "question").code == 2


def test_what_could_mislead_on_a_terminal_is_spelled_out(phlora: CommandLine, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "x.jsonl", [{"messages": [{"role": "a\u202eb\u200c", "content": "x"}]}])
    done = phlora("data", "check", str(file))
    assert "\u202e" not in done.out + done.err and "\\u202e" in done.out and "\u200c" in done.out


def test_many_files_are_one_line_and_long_values_are_cut(phlora: CommandLine, tmp_path: Path) -> None:
    folder = tmp_path / "chats"
    folder.mkdir()
    for number in range(300):
        write_rows(folder / f"{number:03}.jsonl", [{**CHATS[0], "note": 1, "x" * 3000: number}])
    done = phlora("data", "check", str(folder))
    assert len(done.out.splitlines()) < 25 and len(done.out) < 5000
    file = write_rows(tmp_path / "x.jsonl", [{"y" * 30_000: 1, **{f"k{n}" * 20: n for n in range(500)}}])
    assert len(phlora("data", "check", str(file)).err) < 4000


def test_a_folder_without_weights_has_a_tokenizer(
    phlora: CommandLine, chats: Path, model_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(model_folder, folder, ignore=shutil.ignore_patterns("*.safetensors*", "*.bin"))
    assert phlora("data", "check", str(chats), "--model", str(folder)).code == 0
    assert phlora("data", "preview", str(chats), "--model", str(folder), "--plain").code == 0
    done = phlora("train", "--model", str(folder), "--data", str(chats), "-o", str(tmp_path / "run"))
    assert done.code == 2 and "lacks weights" in done.err
