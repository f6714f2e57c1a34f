"""The command line: what reaches the public functions, what comes out, and with which exit code."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from command_line import CommandLine

from phlora import cli, errors
from phlora.config import RunConfig, TrainOn

CHATS = [
    {"messages": [{"role": "user", "content": "سلام"}, {"role": "assistant", "content": "درود بر شما"}]},
    {"messages": [{"role": "user", "content": "Xin chào"}, {"role": "assistant", "content": "Chào bạn"}]},
]


@dataclass
class FakeReport:
    def summary(self) -> str:
        return "exact_match 0.02 -> 0.91"

    def to_json(self) -> dict[str, Any]:
        return {"base": {"exact_match": 0.02}, "tuned": {"exact_match": 0.91}}


@dataclass
class FakeTraining:
    """Stands for `finetune` and `evaluate_run`; remembers what it was given, and prints as libraries do."""

    raises: BaseException | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)

    def finetune(self, config: RunConfig, **options: Any) -> Any:
        self.calls.append({"config": config, **options})
        print("{'loss': 1.0}")  # noqa: T201
        if self.raises:
            raise self.raises
        report = None if options["dry_run"] else FakeReport()
        plan = SimpleNamespace(to_json=lambda: {"num_optimizer_steps": 7})
        text = "peft_config:\n  r: 16  # --set\n"
        return SimpleNamespace(folder=None, report=report, config_text=text, plan=plan)

    def evaluate_run(self, run: str, **options: Any) -> FakeReport:
        self.calls.append({"run": run, **options})
        if self.raises:
            raise self.raises
        return FakeReport()


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeTraining:
    fake = FakeTraining()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "phlora.train.finetune", fake)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "phlora.train.proof", fake)  # type: ignore[arg-type]
    return fake


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "chats.jsonl", CHATS)


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_config(text: str = "model: m\ndata: file.jsonl\noutput: runs/file\n") -> str:
    Path("run.yaml").write_text(text, encoding="utf-8")
    return "run.yaml"


# --------------------------------------------------------------------------------------------------- train


def test_a_model_and_data_are_enough(phlora: CommandLine, training: FakeTraining) -> None:
    done = phlora("train", "--model", "m", "--data", "a.jsonl", "--data", "b.jsonl", "--eval-data", "c.jsonl")
    config = training.calls[0]["config"]
    assert done.code == 0
    assert config.model.name == "m"
    assert [file.path for file in config.data.files] == ["a.jsonl", "b.jsonl"]
    assert [file.path for file in config.data.eval] == ["c.jsonl"]
    assert config.output == "runs/a"


@pytest.mark.parametrize(
    ("data", "output"),
    [
        ("chats.jsonl", "runs/chats"),
        ("deep/chats.v2.jsonl.gz", "runs/chats.v2"),
        ("گفتگو.csv", "runs/گفتگو"),
        ("owner/chats:train", "runs/chats-train"),
        ("..", "runs/run"),
    ],
)
def test_the_run_folder_is_named_after_the_data(
    phlora: CommandLine, training: FakeTraining, data: str, output: str
) -> None:
    phlora("train", "--model", "m", "--data", data)
    assert training.calls[0]["config"].output == output


def test_a_script_s_output_dir_names_the_run_folder(phlora: CommandLine, training: FakeTraining) -> None:
    phlora("train", "--model", "m", "--data", "d", "--set", "training_config.output_dir=elsewhere")
    assert training.calls[0]["config"].output == "elsewhere"


def test_options_and_assignments_override_the_file(phlora: CommandLine, training: FakeTraining) -> None:
    file = write_config("model: {name: m, revision: abc}\ndata: file.jsonl\npeft_config: {r: 8}\n")
    phlora("train", file, "-m", "other", "-o", "here", "--offline", "--set", "peft_config.r=16")
    config = training.calls[0]["config"]
    assert (config.model.name, config.model.revision, config.model.offline) == ("other", None, True)
    assert config.data.files[0].path == "file.jsonl"
    assert config.peft_config == {"r": 16}
    assert config.origins == {
        "model.name": "--model",
        "model.offline": "--offline",
        "data.files": "run.yaml",
        "output": "--output",
        "peft_config.r": "--set",
    }
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_names_are_never_read_as_yaml(phlora: CommandLine, training: FakeTraining) -> None:
    phlora("train", "--model", "12", "--data", "a: [b].jsonl")
    config = training.calls[0]["config"]
    assert (config.model.name, config.data.files[0].path) == ("12", "a: [b].jsonl")


def test_flags_reach_the_training(phlora: CommandLine, training: FakeTraining) -> None:
    phlora("train", write_config(), "--resume", "--quiet")
    phlora("train", write_config(), "--overwrite")
    first, second = training.calls
    assert (first["resume"], first["overwrite"], first["display"].quiet) == (True, False, True)
    assert (second["resume"], second["overwrite"], second["display"].quiet) == (False, True, False)


def test_the_result_alone_stands_on_standard_output(phlora: CommandLine, training: FakeTraining) -> None:
    done = phlora("train", write_config())
    assert done.out == "exact_match 0.02 -> 0.91\n"
    assert "phlora chat runs/file" in done.err and "{'loss': 1.0}" in done.err


def test_json_holds_the_run_and_its_report(phlora: CommandLine, training: FakeTraining) -> None:
    done = phlora("train", write_config(), "--json")
    assert done.json == {"run": "runs/file", "report": FakeReport().to_json()}


def test_a_dry_run_shows_the_configuration_and_its_origins(
    phlora: CommandLine, training: FakeTraining
) -> None:
    arguments = ["train", write_config(), "--dry-run", "--set", "peft_config.r=16"]
    text, document = phlora(*arguments), phlora(*arguments, "--json").json
    assert training.calls[0]["dry_run"] is True
    assert text.out.strip() == "peft_config:\n  r: 16  # --set"
    assert document["config"]["peft_config"] == {"r": 16}
    assert document["plan"] == {"num_optimizer_steps": 7}
    assert document["origins"]["model.name"] == "run.yaml"


# ------------------------------------------------------------------------------------------------ evaluate


def test_evaluate_passes_its_options_on(phlora: CommandLine, training: FakeTraining) -> None:
    done = phlora(
        *("evaluate", "runs/x", "--data", "d", "--metric", "rouge_l", "--metric", "contains:a"),
        *("--max-answers", "0", "--max-new-tokens", "5", "--json"),
    )
    call = training.calls[0]
    assert done.json["tuned"] == {"exact_match": 0.91}
    assert (call["run"], call["data"], call["metrics"]) == ("runs/x", ["d"], ["rouge_l", "contains:a"])
    assert (call["max_answers"], call["max_new_tokens"]) == (0, 5)


def test_evaluate_leaves_the_run_s_own_settings(phlora: CommandLine, training: FakeTraining) -> None:
    done = phlora("evaluate", "runs/x")
    assert done.out == "exact_match 0.02 -> 0.91\n"
    assert {training.calls[0][key] for key in ("data", "metrics", "max_answers", "max_new_tokens")} == {None}


# ---------------------------------------------------------------------------------------------------- data


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


@pytest.fixture
def tokenizer(monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any) -> Any:
    from phlora.models import load

    loaded = SimpleNamespace(tokenizer=tiny_tokenizer, training_template=None, notes=("a note",))
    monkeypatch.setattr(load, "load_tokenizer", lambda name: loaded)
    return tiny_tokenizer


def test_preview_marks_what_is_trained(phlora: CommandLine, chats: Path, tokenizer: Any) -> None:
    done = phlora("data", "preview", str(chats), "--rows", "1")
    plain = done.out.replace("│", "")
    assert f"{chats}:1" in plain and f"{chats}:2" not in plain
    assert "⟦درود بر شما<|end|>" in plain
    assert "سلام" in plain.partition("⟦")[0]
    assert "⟦ ⟧" in done.err and "\x1b" not in done.out


def test_preview_in_json_gives_every_token(phlora: CommandLine, chats: Path, tokenizer: Any) -> None:
    document = phlora("data", "preview", str(chats), "--json", "--train-on", "all").json
    first, second = document["rows"]
    assert "".join(token["text"] for token in first["tokens"]).count("سلام") == 1
    assert any(token["trained"] and token["weight"] == 1.0 for token in second["tokens"])


def test_preview_shows_weights_and_rows_left_out(phlora: CommandLine, tmp_path: Path, tokenizer: Any) -> None:
    weighted = {"messages": [CHATS[0]["messages"][0], {**CHATS[0]["messages"][1], "weight": 0.5}]}
    long = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y" * 99}]}
    file = write_rows(tmp_path / "x.jsonl", [weighted, long])
    done = phlora("data", "preview", str(file), "--max-length", "50")
    assert "⟦×0.5 " in done.out
    assert "left out: " in done.out


def test_preview_of_a_good_beginning_does_not_need_a_good_end(
    phlora: CommandLine, tmp_path: Path, tokenizer: Any
) -> None:
    file = write_rows(tmp_path / "x.jsonl", [*CHATS, {"messages": "broken"}])
    assert phlora("data", "preview", str(file), "--rows", "2").code == 0
    assert phlora("data", "preview", str(file), "--rows", "3").code == 2


# ----------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("train", "`model` is missing"),
        ("train --model m", "`data` is missing"),
        ("train --data d", "`model` is missing"),
        ("train none.yaml", "none.yaml: The configuration file does not exist"),
        ("train rnu.yaml", "did you mean `run.yaml`?"),
        ("train broken.yaml", "broken.yaml:3"),
        ("train unknown.yaml", "did you mean `training_config`?"),
        ("train run.yaml --set learning_rate", "is no assignment"),
        ("train run.yaml --set a=[", "no valid YAML"),
        ("train run.yaml --set evaluation.metrik=x", "did you mean `metrics`?"),
        ("train run.yaml --set evaluation.max_answers=many", "a whole number"),
        ("train run.yaml --lr 3", "No such option"),
        ("trian run.yaml", "Did you mean"),
        ("train run.yaml more.yaml", "unexpected extra argument"),
        ("evaluate", "Missing argument"),
        ("evaluate runs/x --max-answers -1", "'--max-answers'"),
        ("evaluate runs/x --max-answers many", "'--max-answers'"),
        ("chat", "Missing argument"),
        ("chat ./none", "The folder does not exist"),
        ("chat smollm2-135n", "smollm2-135m"),
        ("data", "Usage"),
        ("data check", "Missing argument"),
        ("data check none.jsonl", "none.jsonl"),
        ("data check empty.jsonl", "empty.jsonl: The file is empty"),
        ("data check run.yaml", "run.yaml"),
        ("data check chats.jsonl --format mesages", "did you mean `messages`?"),
        ("data check chats.jsonl --train-on answers", "answers"),
        ("data check chats.jsonl --eval-data none.jsonl", "none.jsonl"),
        ("data check chats.jsonl --model ./none", "The folder does not exist"),
        ("data preview none.jsonl", "none.jsonl"),
        ("data preview chats.jsonl --rows 0", "'--rows'"),
        ("data preview chats.jsonl --model ./none", "The folder does not exist"),
    ],
)
def test_bad_input_is_one_clear_message(
    phlora: CommandLine, training: FakeTraining, chats: Path, arguments: str, says: str
) -> None:
    write_config()
    Path("broken.yaml").write_text("model: m\ndata: [a\n", encoding="utf-8")
    Path("unknown.yaml").write_text("model: m\ndata: d\ntrainig_config: {}\n", encoding="utf-8")
    Path("empty.jsonl").touch()
    before = sorted(Path().rglob("*"))
    done = phlora(*arguments.split())
    assert done.code == 2, done.err
    assert says in done.err
    assert done.out == "" and "Traceback" not in done.err
    assert training.calls == [] and sorted(Path().rglob("*")) == before

    document = phlora(*arguments.split(), "--json")
    if "chat" not in arguments.split()[0]:
        assert document.code == 2 and document.json["error"]["exit_code"] == 2


def test_a_run_folder_without_a_run(phlora: CommandLine, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "x"
    run.mkdir(parents=True)
    (run / "run.json").write_text('{"status": "interrupted"}', encoding="utf-8")
    done = phlora("chat", str(run))
    assert done.code == 2 and "no adapter yet (interrupted)" in done.err


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (errors.DataError("A role", where="d.jsonl:3", fix="rename it"), 2, "DataError"),
        (errors.MissingExtraError.of("x", extra="qlora", purpose="this"), 3, "MissingExtraError"),
        (errors.NetworkError("No hub"), 3, "NetworkError"),
        (errors.NonFiniteError("NaN at step 3"), 1, "NonFiniteError"),
        (OSError(errno.ENOSPC, "No space left on device", "/disk/x"), 3, "NoRoomError"),
        (PermissionError(errno.EACCES, "Permission denied", "/root/runs"), 2, "InputError"),
        (MemoryError(), 3, "NoRoomError"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"), 3, "NoRoomError"),
    ],
)
def test_errors_become_a_message_and_an_exit_code(
    phlora: CommandLine, training: FakeTraining, error: Exception, code: int, kind: str
) -> None:
    training.raises = error
    done = phlora("train", write_config(), "--json")
    assert done.code == code
    assert done.json["error"]["kind"] == kind and done.json["error"]["exit_code"] == code
    assert done.json["error"]["message"] in done.err
    assert "Traceback" not in done.err
    if isinstance(error, OSError):
        assert error.filename in done.err


def test_a_bug_is_called_one_and_its_traceback_kept(
    phlora: CommandLine, training: FakeTraining, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cli.tempfile, "tempdir", str(tmp_path))
    training.raises = ZeroDivisionError("division by zero")
    done = phlora("train", write_config(), "--json")
    (log,) = tmp_path.glob("phlora-*.log")
    assert done.code == done.json["error"]["exit_code"] == cli.EXIT_BUG
    assert "bug in Phlora: ZeroDivisionError" in done.err and str(log) in done.err
    assert "Traceback" not in done.err
    text = log.read_text(encoding="utf-8")
    assert "Traceback" in text and "phlora train run.yaml --json" in text


def test_debugging_shows_the_traceback(
    phlora: CommandLine, training: FakeTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHLORA_DEBUG", "1")
    training.raises = ZeroDivisionError("division by zero")
    assert "Traceback" in phlora("train", write_config()).err
    training.raises = errors.ModelError("no such model")
    assert "Traceback" in phlora("train", write_config()).err


def test_a_full_temporary_folder_does_not_hide_the_bug(
    phlora: CommandLine, training: FakeTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.tempfile, "tempdir", "/does/not/exist")
    training.raises = ZeroDivisionError("division by zero")
    done = phlora("train", write_config())
    assert done.code == cli.EXIT_BUG and "Traceback" in done.err


# --------------------------------------------------------------------------------------------- interruption


def test_an_interrupted_run_says_what_is_kept_and_how_to_go_on(
    phlora: CommandLine, training: FakeTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Path("runs/file/checkpoints/checkpoint-40")
    checkpoint.mkdir(parents=True)
    (checkpoint / "complete.json").write_text("{}", encoding="utf-8")
    training.raises = KeyboardInterrupt()
    arguments = ["train", write_config(), "--overwrite", "--set", "peft_config.r=16"]
    monkeypatch.setattr(sys, "argv", ["phlora", *arguments])
    done = phlora(*arguments)
    assert done.code == 130
    assert done.err.splitlines()[-1] == (
        f"Interrupted. Kept: {checkpoint}. "
        "Continue with: phlora train run.yaml --set peft_config.r=16 --resume"
    )


def test_an_early_interruption_says_that_nothing_is_kept(phlora: CommandLine, training: FakeTraining) -> None:
    training.raises = KeyboardInterrupt()
    done = phlora("train", write_config(), "--json")
    assert done.code == 130 and "No checkpoint" in done.err and "--overwrite" not in done.err
    assert done.json["error"]["kind"] == "Interrupted"
    Path("runs/file").mkdir(parents=True)
    Path("runs/file/run.json").touch()
    assert "runs/file again with --overwrite" in phlora("train", write_config()).err


# ------------------------------------------------------------------------------------------ streams and log


def test_warnings_of_libraries_go_to_the_log(
    phlora: CommandLine, training: FakeTraining, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def noisy(config: RunConfig, **options: Any) -> None:
        logging.getLogger("trl").warning("a warning")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("python's own", stacklevel=1)
        logging.getLogger("peft").error("an error")
        raise ZeroDivisionError

    monkeypatch.setattr(cli.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(training, "finetune", noisy)
    done = phlora("train", write_config())
    log = next(tmp_path.glob("phlora-*.log")).read_text(encoding="utf-8")
    assert "an error" in done.err and "a warning" not in done.err and "python's own" not in done.err
    assert "a warning" in log and "python's own" in log


def test_importing_phlora_leaves_logging_alone() -> None:
    code = "import logging, phlora.cli; print(logging.getLogger().handlers, logging.getLogger().level)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] 30"


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "many.jsonl", [{"messages": [{"role": f"r{i}"}]} for i in range(20_000)])
    with subprocess.Popen(
        [sys.executable, "-m", "phlora", "data", "check", str(file), "--json", "--quiet"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode in (cli.EXIT_DONE, 2)


def test_every_script_passes_where_the_locale_has_no_utf8(chats: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    chats.rename(chats.with_name("گفتگو.jsonl"))
    done = subprocess.run(
        [sys.executable, "-m", "phlora", "data", "check", str(chats.with_name("گفتگو.jsonl"))],
        capture_output=True,
        env=environment,
        check=True,
    )
    assert "گفتگو.jsonl: messages" in done.stdout.decode("utf-8")


# -------------------------------------------------------------------------------------------------- the help


@pytest.mark.parametrize(
    "command", ["", "train", "evaluate", "chat", "data", "data check", "data preview"], ids=lambda c: c or "-"
)
def test_every_command_has_a_useful_help(phlora: CommandLine, command: str) -> None:
    done = phlora(*command.split(), "--help")
    assert done.code == 0 and done.err == ""
    if command != "data":
        assert "Examples:\n    phlora" in done.out
        assert all(len(line) <= 110 for line in done.out.splitlines())


@pytest.mark.parametrize("command", ["train", "evaluate", "chat", "data check", "data preview"])
def test_the_page_on_the_command_line_knows_every_option(phlora: CommandLine, command: str) -> None:
    page = (Path(__file__).parents[3] / "docs" / "cli.md").read_text(encoding="utf-8")
    section = page.partition(f"## phlora {command}\n")[2].partition("\n## ")[0]
    table = section.partition("| option | |")[2].partition("\n\n")[0]
    in_help = re.findall(r"^ +(?:-\w, )?(--[a-z-]+)", phlora(*command.split(), "--help").out, re.MULTILINE)
    documented = {option for line in table.splitlines() for option in re.findall(r"`(--[a-z-]+)`", line[:50])}
    assert documented == set(in_help) - {"--help"}


def test_the_version(phlora: CommandLine) -> None:
    from phlora import __version__

    assert phlora("--version").out == f"phlora {__version__}\n"


def test_the_choices_of_train_on_are_those_of_the_configuration() -> None:
    assert {choice.value for choice in cli.TrainOn} == set(get_args(TrainOn))


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_help_comes_at_once(arguments: list[str]) -> None:
    def seconds() -> float:
        start = time.process_time(), os.times()
        subprocess.run([sys.executable, "-m", "phlora", *arguments], capture_output=True, check=True)
        end = os.times()
        return end.children_user + end.children_system - start[1].children_user - start[1].children_system

    # Processor time: the wall clock of a machine that runs other tests too says nothing.
    assert min(seconds() for _ in range(3)) < 0.3
