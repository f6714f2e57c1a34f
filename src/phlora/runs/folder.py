"""The run folder: what a run was made of, what happened in it, and what can be continued or used from it.

    run.json                status, versions, seed, model, data and adapter facts; `identity` is what a resumed
                            run has to share with the one it continues; `computing` what decides last digits
    config.yaml             the resolved configuration, each value with where it came from; can be run again
    events.jsonl            what happened, one line each (`runs.events`)
    train.log               what was said while it trained, each entry with its time; also by the libraries
    checkpoints/            adapter + optimizer + scheduler + RNG + data position, as transformers writes them
    heldout.jsonl           the rows of the proof
    trained.keys            digests of the rows that were trained on (`runs.trained_rows`)
    adapter/best, last      plain PEFT adapters with tokenizer and model card
    report.json, .html      the proof: base against tuned model, as the run ended
    evaluations/            what `phlora evaluate` found later, one folder each
    .lock                   while a process trains into the folder

A checkpoint counts only once its `complete.json` is written, so one that a crash or a full disk cut short is
never resumed from; nor is one whose files are not those that it lists (`runs.checkpoints`). A run counts only once
its run.json has a status other than `opening`: that status is written first, before anything of an older run is
removed, and the facts of the run last. So whatever stops the opening of a run, also in the middle of an
`--overwrite`, leaves a folder that is known as Phlora's and is opened anew.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from phlora.errors import NoRoomError, RunError
from phlora.files import (
    Expected,
    clear_leftovers,
    is_count,
    is_object,
    is_text,
    leftover_of,
    read_json,
    require_values,
    write_json,
)
from phlora.measure import is_out_of_memory
from phlora.runs.checkpoints import complete_checkpoints, drop_incomplete, whole_checkpoint
from phlora.runs.identity import changes
from phlora.runs.lock import LOCK_FILE, hold_lock, require_unlocked

RUN_FILE = "run.json"
# The rows of the proof.
HELD_OUT_FILE = "heldout.jsonl"
# Rows that were handed over as objects, so that config.yaml can be run again.
ROWS_FILE, EVAL_ROWS_FILE = "rows.jsonl", "eval_rows.jsonl"
TRAINED_KEYS_FILE = "trained.keys"
CONFIG_FILE = "config.yaml"
LOG_FILE = "train.log"
# In run.json under `model`: the whole path of a base that was named from the working folder.
BASE_LOCATION = "location"
EVALUATIONS = "evaluations"
_ALMOST_NOTHING_BYTES = 10_000_000
_OPENING = "opening"
# What belongs to a run beside run.json, which goes last; anything else in the folder is the user's.
_OWN = (
    CONFIG_FILE,
    "events.jsonl",
    LOG_FILE,
    HELD_OUT_FILE,
    ROWS_FILE,
    EVAL_ROWS_FILE,
    TRAINED_KEYS_FILE,
    "checkpoints",
    "adapter",
    "report.json",
    "report.html",
    EVALUATIONS,
)


def _is_length(value: Any) -> bool:
    return is_count(value) and value > 0


def _are_texts(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(is_text, value.values()))


def _are_data_facts(value: Any) -> bool:
    """Counts of rows, what was read from each file, and the rows that were left out or cut."""
    if not isinstance(value, Mapping):
        return False
    contents = value.get("contents") or {}
    counts = [value.get(name, 0) for name in ("train_rows", "held_out_rows")]
    return (
        isinstance(contents, Mapping)
        and all(isinstance(found, Mapping) and is_count(found.get("rows")) for found in contents.values())
        and all(map(is_count, counts))
        and all(isinstance(value.get(name, []), list) for name in ("dropped", "cut"))
    )


def _is_environment(value: Any) -> bool:
    return isinstance(value, Mapping) and _are_texts(value.get("packages", {}))


# Keys of run.json -> what they have to be; `config` is checked where it is read.
_EXPECTED: Expected = {
    "status": (is_text, "a word, such as finished"),
    "config": (is_object, "the configuration"),
    "origins": (_are_texts, "keys of the configuration with where their values came from"),
    "identity": (is_object, "what has to be the same for the run to be continued"),
    "max_length": (_is_length, "a number of tokens from 1 on"),
    "seed": (is_count, "a whole number from 0 on"),
    "lora": (is_object, "the configuration of the adapter"),
    **{name: (is_object, "facts by their names") for name in ("model", "adapter", "timing", "computing")},
    "products": (_are_texts, "kinds of products with the library that multiplies them"),
    "data": (_are_data_facts, "counts of rows, and the rows that were left out"),
    "environment": (_is_environment, "versions of packages, and facts about the machine"),
}
_PACKAGES = ("phlora", "torch", "transformers", "peft", "trl", "datasets", "accelerate", "tokenizers")


@dataclass(frozen=True)
class RunFolder:
    """One run's folder; every file in it is written whole or not at all."""

    path: Path

    @property
    def best_adapter(self) -> Path:
        return self.path / "adapter" / "best"

    @property
    def last_adapter(self) -> Path:
        return self.path / "adapter" / "last"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def log(self) -> Path:
        return self.path / LOG_FILE

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def has_facts(self) -> bool:
        """Whether the folder holds a run; one whose opening was cut short is none."""
        return (self.path / RUN_FILE).is_file() and not self.is_half_open

    @property
    def is_half_open(self) -> bool:
        """Whether the opening of a run was cut short here: nothing was trained."""
        file = self.path / RUN_FILE
        return file.is_file() and read_json(file, RunError).get("status") == _OPENING

    def facts(self) -> dict[str, Any]:
        """The contents of run.json, without what is null there.

        Raises:
            RunError: the folder holds no run, its run.json cannot be read, or a value in it is of another type.
        """
        return {name: value for name, value in self._contents().items() if value is not None}

    def _contents(self) -> dict[str, Any]:
        file = self.path / RUN_FILE
        if not file.is_file():
            found = "The folder holds no run" if self.path.is_dir() else "The run folder does not exist"
            raise RunError(
                found, where=str(self.path), expected=f"a folder with {RUN_FILE}, written by `phlora train`"
            )
        facts = read_json(file, RunError)
        require_values(facts, _EXPECTED, RunError, where=str(file))
        return facts

    def write_facts(self, facts: Mapping[str, Any]) -> None:
        write_json(self.path / RUN_FILE, facts)

    def update_facts(self, **changes: Any) -> None:
        self.write_facts({**self._contents(), **changes})

    def latest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint, or None."""
        return next(iter(complete_checkpoints(self.checkpoints)), None)

    def identity_digest(self) -> str:
        """What tells the run from others: a digest of all that has to be the same for it to be continued."""
        return digest(self.facts().get("identity", {}))


def claim_folder(path: str | Path, *, resume: bool, overwrite: bool) -> RunFolder:
    """The folder for a run, refused before any work if it may not be used; nothing is written yet.

    Raises:
        RunError: a run is there and neither `resume` nor `overwrite` was asked for, files of somebody else are
            there, another process trains into it, or there is nothing to resume.
    """
    folder = RunFolder(Path(path))
    if resume and overwrite:
        raise RunError("Both resume and overwrite were asked for", fix="choose one of --resume, --overwrite")
    if os.path.lexists(folder.path) and not folder.path.is_dir():
        raise RunError(
            "A file stands where the run folder should be", where=str(path), fix="name another --output"
        )
    require_unlocked(folder.path)
    _require_usable(folder, resume=resume, overwrite=overwrite)
    return folder


@contextmanager
def claimed(folder: RunFolder, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """Hold a claimed folder, which is made where there is none; what a killed process left in it is cleared away.

    Raises:
        RunError: another process has taken it in the meantime, or it cannot be written.
        NoRoomError: the disk is full.
    """
    with ExitStack() as stack:
        with _writing(folder):
            folder.path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(hold_lock(folder.path))
            _require_usable(folder, resume=resume, overwrite=overwrite)
            for place in (folder.path, folder.path / "adapter", folder.checkpoints):
                clear_leftovers(place)
        yield


def _require_usable(folder: RunFolder, *, resume: bool, overwrite: bool) -> None:
    names = _names_in(folder.path)
    if not names:
        if resume:
            raise RunError(
                "There is no run to resume", where=str(folder.path), fix="leave --resume out to start one"
            )
        return
    if overwrite and names <= {RUN_FILE, *_OWN} and RUN_FILE in names:
        # Nothing of anybody else's is there, so that run.json need not be readable.
        return
    _refuse_foreign(folder, names)
    if folder.is_half_open or resume or overwrite:
        return
    status = folder.facts().get("status", "unknown")
    raise RunError(
        f"The folder already holds a run ({status})",
        where=str(folder.path),
        fix="--resume to continue it, --overwrite to replace it, or another --output",
    )


def _names_in(path: Path) -> set[str]:
    """What is in a folder, without the lock and what a killed process left half-written."""
    if not path.is_dir():
        return set()
    return {p.name for p in path.iterdir() if p.name != LOCK_FILE and leftover_of(p) is None}


def _refuse_foreign(folder: RunFolder, names: set[str]) -> None:
    """A folder with other people's files is never written to, not even when told to overwrite."""
    if RUN_FILE not in names:
        raise RunError(
            f"The folder is not empty and holds no Phlora run ({', '.join(sorted(names)[:4])})",
            where=str(folder.path),
            fix="name another --output; Phlora does not write among files that are not its own",
        )


def begin_run(
    folder: RunFolder, facts: Mapping[str, Any], files: Mapping[str, Callable[[Path], None]]
) -> None:
    """Open a new run, replacing the files of an older run there; what is not a run's stays.

    Args:
        files: name -> a function that writes that file of the run.

    Raises:
        RunError: the folder cannot be written.
        NoRoomError: the disk is full.
    """
    with _writing(folder):
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.write_facts({"status": _OPENING})
        for name in _OWN:
            _remove(folder.path / name)
        for name, write in files.items():
            write(folder.path / name)
        folder.write_facts({**facts, "status": "running"})


def continue_run(
    folder: RunFolder,
    facts: Mapping[str, Any],
    files: Mapping[str, Callable[[Path], None]] | None = None,
    *,
    ignored: Collection[str] = (),
    warn: Callable[[str], None] = lambda text: None,
) -> Path | None:
    """Check that the run in `folder` is the same as the one asked for; returns the checkpoint to continue from.

    Args:
        facts: those of the run that was asked for.
        files: as in `begin_run`; those that are missing are written.
        ignored: as in `identity.changes`.
        warn: takes one sentence for each checkpoint that cannot be used, and one where there is none.

    Raises:
        RunError: data, base model, tokenizer or settings differ, and the message lists each difference; a
            checkpoint is of another run; or there are some, and every one is damaged.
    """
    changed = changes(folder.facts(), facts, ignored=ignored)
    if changed:
        raise RunError(
            "The run cannot be continued, because it is not the same run any more:\n  "
            + "\n  ".join(changed),
            where=str(folder.path),
            fix="restore what changed, or start a new run with another --output",
        )
    with _writing(folder):
        for cut_short in drop_incomplete(folder.checkpoints):
            warn(f"{cut_short.name} was not written to its end: it is removed")
        checkpoint = whole_checkpoint(folder.checkpoints, run=folder.identity_digest(), warn=warn)
        if checkpoint is None and complete_checkpoints(folder.checkpoints):
            raise RunError(
                "Every checkpoint of the run is damaged, so that it cannot be continued",
                where=str(folder.checkpoints),
                fix="put back a copy of what was damaged, or train from the beginning with --overwrite",
            )
        if checkpoint is None:
            warn("There is no checkpoint to continue from: training begins at its first step")
        for name, write in (files or {}).items():
            if not (folder.path / name).is_file():
                write(folder.path / name)
        folder.update_facts(status="running")
    return checkpoint


@contextmanager
def _writing(folder: RunFolder) -> Iterator[None]:
    """A folder that cannot be written is said in one message."""
    try:
        yield
    except OSError as error:
        where = str(error.filename or folder.path)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoRoomError(
                "The disk is full", where=where, fix="make room, or name an --output on another disk"
            ) from error
        if isinstance(error, PermissionError) or error.errno == errno.EROFS:
            found = f"No permission to write: {where}"
        else:
            found = f"The run folder cannot be written ({error.strerror}): {where}"
        raise RunError(found, where=str(folder.path), fix="name another --output") from error


@contextmanager
def recorded_status(folder: RunFolder) -> Iterator[None]:
    """Record in run.json how the training ended, whatever ended it.

    Raises:
        NoRoomError: disk or device memory became full; the checkpoints written before are intact.
    """
    status = "failed"
    try:
        yield
        status = "trained"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    except (OSError, RuntimeError, MemoryError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise NoRoomError(
                "The memory is full; the checkpoints written before are intact",
                where=str(folder.path),
                fix="halve per_device_train_batch_size and double gradient_accumulation_steps, "
                "set activation_memory: recompute, or lower max_length; then start anew with --overwrite",
            ) from error
        if not _says_disk_full(error, folder.path):
            raise
        raise NoRoomError(
            "The disk is full; the checkpoints written before are intact",
            where=str(folder.path),
            fix="make room and run again with --resume",
        ) from error
    finally:
        # On a full disk this line cannot be written either, and must not hide the message above.
        with suppress(OSError):
            folder.update_facts(status=status)


def _says_disk_full(error: Exception, folder: Path) -> bool:
    """Each library has its own words for a full disk: an errno, safetensors' text, torch's broken file writer."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error)
    if "No space left" in text:
        return True
    return "PytorchStreamWriter" in text and shutil.disk_usage(folder).free < _ALMOST_NOTHING_BYTES


def environment() -> dict[str, Any]:
    """Versions and machine facts that a reader needs to repeat a run; no user, host or path names."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        "packages": versions,
    }


def digest(value: Any) -> str:
    """A short stable hash of plain values; of sets too, whose order differs from process to process."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=_in_order)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _in_order(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
