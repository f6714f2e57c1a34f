"""The run folder: who may write into it, what counts as a checkpoint, and that every file is whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from phlora.errors import NoRoomError, RunError
from phlora.files import write_text
from phlora.runs import folder as runs_folder
from phlora.runs.checkpoints import mark_complete
from phlora.runs.folder import RunFolder, begin_run, claim_folder, continue_run


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = claim_folder(tmp_path / "run", resume=False, overwrite=False)
    begin_run(
        folder,
        {"identity": {"data": "a", "r": 16}},
        {"config.yaml": lambda path: write_text(path, "model: tiny\n")},
    )
    return folder


def add_checkpoint(run: RunFolder, step: int, *, complete: bool) -> Path:
    path = run.checkpoints / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "adapter_model.safetensors").write_bytes(b"x")
    if complete:
        mark_complete(path, {"step": step}, run=run.identity_digest())
    return path


def test_claiming_a_new_folder_writes_nothing(tmp_path: Path) -> None:
    claim_folder(tmp_path / "run", resume=False, overwrite=False)
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_not_overwritten_unless_told(run: RunFolder) -> None:
    with pytest.raises(RunError, match="already holds a run") as refusal:
        claim_folder(run.path, resume=False, overwrite=False)
    assert "--resume" in str(refusal.value) and "--overwrite" in str(refusal.value)
    claim_folder(run.path, resume=False, overwrite=True)
    claim_folder(run.path, resume=True, overwrite=False)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_foreign_folder_is_refused_even_when_told_to_overwrite(tmp_path: Path, overwrite: bool) -> None:
    thesis = tmp_path / "thesis.tex"
    thesis.write_text("years of work")
    with pytest.raises(RunError, match="no Phlora run"):
        claim_folder(tmp_path, resume=False, overwrite=overwrite)
    assert thesis.read_text() == "years of work"


def test_nothing_to_resume_and_contradicting_wishes(tmp_path: Path, run: RunFolder) -> None:
    with pytest.raises(RunError, match="no run to resume"):
        claim_folder(tmp_path / "other", resume=True, overwrite=False)
    with pytest.raises(RunError, match="Both"):
        claim_folder(run.path, resume=True, overwrite=True)


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(RunError, match="A file stands"):
        claim_folder(tmp_path / "run", resume=False, overwrite=False)


def test_beginning_again_removes_only_what_belongs_to_a_run(run: RunFolder) -> None:
    add_checkpoint(run, 5, complete=True)
    (run.path / "notes.txt").write_text("mine")
    begin_run(run, {"identity": {}}, {})
    assert run.latest_checkpoint() is None
    assert (run.path / "notes.txt").read_text() == "mine"


def test_only_complete_checkpoints_count_and_the_newest_wins(run: RunFolder) -> None:
    add_checkpoint(run, 9, complete=True)
    newest = add_checkpoint(run, 10, complete=True)
    broken = add_checkpoint(run, 11, complete=False)
    said: list[str] = []
    assert continue_run(run, {"identity": {"data": "a", "r": 16}}, warn=said.append) == newest
    assert not broken.exists() and said == ["checkpoint-11 was not written to its end: it is removed"]


def test_where_all_checkpoints_are_damaged_nothing_begins_anew(run: RunFolder) -> None:
    """And where there is none, that is said."""
    asked, said = {"identity": {"data": "a", "r": 16}}, list[str]()
    assert continue_run(run, asked, warn=said.append) is None
    assert said == ["There is no checkpoint to continue from: training begins at its first step"]
    only = add_checkpoint(run, 9, complete=True)
    (only / "complete.json").write_text("{")
    for _ in range(2):
        with pytest.raises(RunError, match="Every checkpoint of the run is damaged"):
            continue_run(run, asked)
    assert only.is_dir()


def test_resuming_another_run_names_every_difference(run: RunFolder) -> None:
    with pytest.raises(RunError) as refusal:
        continue_run(run, {"identity": {"data": "b", "r": 32}})
    assert "data: " in str(refusal.value) and "r: 16 -> 32" in str(refusal.value)


def test_the_status_tells_how_the_training_ended(run: RunFolder) -> None:
    with runs_folder.recorded_status(run):
        pass
    assert run.facts()["status"] == "trained"
    with pytest.raises(KeyboardInterrupt), runs_folder.recorded_status(run):
        raise KeyboardInterrupt
    assert run.facts()["status"] == "interrupted"
    with pytest.raises(ValueError), runs_folder.recorded_status(run):
        raise ValueError
    assert run.facts()["status"] == "failed"


@pytest.mark.parametrize(
    "full",
    [
        OSError(28, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError(
            "[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file data/3"
        ),
    ],
    ids=["system", "safetensors", "torch"],
)
def test_a_full_disk_is_said_in_one_message(
    full: Exception, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = runs_folder.shutil.disk_usage(run.path)._replace(free=0)
    monkeypatch.setattr(runs_folder.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(NoRoomError, match="disk is full"), runs_folder.recorded_status(run):
        # Nothing can be recorded either once the disk is full.
        no_room = OSError(28, "No space left on device")
        monkeypatch.setattr(runs_folder, "write_json", lambda *_: (_ for _ in ()).throw(no_room))
        raise full


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
    ids=["device", "cpu", "python"],
)
def test_a_full_memory_is_said_with_what_helps(error: Exception, run: RunFolder) -> None:
    with pytest.raises(NoRoomError, match="activation_memory"), runs_folder.recorded_status(run):
        raise error
    assert run.facts()["status"] == "failed"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_length", "big"),
        ("max_length", -4),
        ("max_length", 0),
        ("config", []),
        ("origins", {"a": 1}),
        ("model", [1]),
        ("data", {"contents": {"a.jsonl": 5}}),
        ("data", {"dropped": 1}),
        ("data", {"train_rows": "many"}),
        ("environment", {"packages": [1]}),
        ("timing", 5),
        ("computing", "oneDNN"),
        ("products", 5),
        ("products", {"forward": 5}),
        ("identity", "x"),
        ("seed", 1.5),
        ("status", 7),
    ],
)
def test_a_value_of_another_type_is_named_with_its_file(run: RunFolder, key: str, value: object) -> None:
    run.write_facts({**run.facts(), key: value})
    with pytest.raises(RunError, match=rf"run\.json: `{key}` is"):
        run.facts()


def test_what_is_null_is_as_good_as_left_out_and_stays_in_the_file(run: RunFolder) -> None:
    run.update_facts(model=None, max_length=None)
    run.update_facts(seed=3)
    assert run.facts().keys() == {"identity", "seed", "status"}
    assert json.loads((run.path / "run.json").read_text())["max_length"] is None
    assert continue_run(run, {"identity": {"data": "a", "r": 16}}) is None


def test_a_broken_run_file_is_named(run: RunFolder) -> None:
    (run.path / "run.json").write_text("{")
    with pytest.raises(RunError, match=r"run\.json: The file is no valid JSON"):
        claim_folder(run.path, resume=True, overwrite=False)


def test_the_environment_names_versions_but_no_person_or_path() -> None:
    facts = runs_folder.environment()
    assert facts["packages"]["torch"]
    assert str(Path.home()) not in json.dumps(facts)
