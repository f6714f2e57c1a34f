"""`phlora export`: a run or an adapter as what another program takes, whole, and proven in that program.

One story for every target: write the folder, open it in its client, ask both it and the run's own model the same
held-out prompts, keep the verdict in export.json and in the card. Where the client is not installed the folder says
"written, not verified", and the same command with `--verify-only` catches up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from phlora.display import Display
from phlora.errors import ConfigError, Finding, RunError
from phlora.export.agreement import REPORT_IT, Verdict, require_verified
from phlora.export.gguf_types import require_type
from phlora.export.job import ExportJob, Written
from phlora.export.output import require_new
from phlora.export.received import CARD, EXPORT_FILE, Received, digests_of, read_export, what_changed
from phlora.export.targets import Target, launch_line, reads_patterns, require_target
from phlora.export.verify import unverified, verify_export
from phlora.export.writing import write_companions, write_export
from phlora.files import replaced_folder, write_json, write_text
from phlora.models.device import DTYPES
from phlora.runs.resolve import load_tokenizer_of, resolve_adapter


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was exported, and how its client answers.

    Attributes:
        folder: the new folder.
        target: what it is for.
        type: of a GGUF file, or of merged weights; empty for an adapter.
        base_model: that the adapter belongs to.
        base: `full` or `dequantized`: the weights that a whole model was merged into.
        rank: the largest of the exported adapter; 0 for a whole model.
        files: names and bytes.
        digests: names and SHA-256 of all but the card, by which `verify_only` knows them again.
        launch: the line that starts it.
        notes: what the user should hear.
        verdict: see `Verdict`.
    """

    folder: str
    target: Target
    type: str
    base_model: str
    base: str
    rank: int
    files: dict[str, int]
    digests: dict[str, str]
    launch: str
    notes: tuple[str, ...]
    verdict: Verdict

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)

    def summary(self) -> str:
        """A few lines for people."""
        megabytes = sum(self.files.values()) / 1e6
        kind = f"{self.target}, {self.type}" if self.type else self.target
        return "\n".join(
            [
                f"{self.base_model} with its adapter, for {kind}: {self.folder} ({megabytes:,.1f} MB)",
                *(f"  {note}" for note in self.notes),
                self.verdict.summary(),
                f"Start it: {self.launch}",
            ]
        )


def export_run(
    source: str | Path,
    output: str | Path,
    *,
    target: str,
    type: str | None = None,
    adapter_only: bool = False,
    vllm_before: str | None = None,
    model: str | None = None,
    rows: Any = None,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    max_rows: int = 16,
    max_new_tokens: int = 32,
    verify: bool = True,
    verify_only: bool = False,
    offline: bool = False,
    display: Display | None = None,
) -> ExportReport:
    """Write a run's adapter as what another program takes, open it there, and compare the answers.

    Args:
        source: a run folder (its best adapter is taken), or an adapter folder.
        output: the new folder; with `verify_only` one that was exported.
        target: `peft`, `vllm`, `sglang`, `loralib`, `merged`, `gguf` or `ollama`.
        type: of a GGUF file: `f32`, `f16` (the default), `bf16`, `q8_0`, `q6_k`, `q5_k_m`, `q4_k_m`; of merged weights
            a key of `DTYPES`, by default that of the base's files.
        adapter_only: the adapter alone as GGUF, for a GGUF file of its base.
        vllm_before: versions of vLLM below this are to read it, such as "0.32".
        model: the base, in the place of the one that the run or the adapter names.
        rows: file(s) or rows for the comparison, in the place of the run's held-out rows.
        format, columns: how files named in `rows` are read, in the place of the run's own settings.
        max_rows: prompts that are compared at most.
        max_new_tokens: tokens that are answered at most.
        verify: compare; otherwise the folder is only written.
        verify_only: write nothing but the verdict, which replaces the one that stood there, whatever it is.
        offline: never ask a hub.
        display: where progress goes; standard error by default.

    Raises:
        Finding: the client does not answer like the run's own model; nothing is kept. With `verify_only` as well:
            the files are not those that were exported.
        ConfigError: an unknown target or type, or an option that is for another target.
        ModelError: the target cannot take this adapter or model; the message says which can.
        RunError: the output exists, or with `verify_only` holds no export.
        MissingExtraError: what writes the file is not installed.
        NoRoomError: the disk has no room.
    """
    display = display or Display()
    wanted = require_target(target)
    output = Path(output).expanduser()
    _require_options(wanted, type, adapter_only)
    if verify_only and not verify:
        raise ConfigError(
            "--verify-only and --no-verify contradict each other", where="phlora export", fix="leave one out"
        )
    in_gguf = wanted in ("gguf", "ollama")
    file_type = require_type(type or "f16") if in_gguf else type or ""
    patterns = reads_patterns(wanted, vllm_before=vllm_before)
    said = read_export(output) if verify_only else None
    if said is None:
        require_new(output)
    else:
        _require_same(said, output, wanted, file_type if type else "", adapter_only=adapter_only)
    found = resolve_adapter(source, model=model, offline=offline)
    job = ExportJob(
        source=source,
        found=found,
        tokenizer=load_tokenizer_of(found),
        target=wanted,
        type=file_type,
        adapter_only=adapter_only,
        uniform=not patterns,
        rows=rows,
        reading={"format": format, "columns": columns},
        max_rows=max_rows,
        max_new_tokens=max_new_tokens,
        offline=offline,
        model=model,
        display=display,
    )
    if said is not None:
        return _verify_again(job, output, said)
    with replaced_folder(output) as part:
        display.stage(f"Writing it for {wanted}")
        written = write_export(job, part)
        write_companions(job, part)
        verdict = verify_export(job, part, written) if verify else unverified("it was not asked for")
        require_verified(verdict, where=str(output), kept="nothing was kept", fix=REPORT_IT)
        report = _report(job, written, verdict, output)
        report = replace(report, files=_files(part), digests=digests_of(part))
        _keep(report, part)
    return report


# ------------------------------------------------------------------------------------------------ writing


def _require_options(target: Target, type: str | None, adapter_only: bool) -> None:
    if type is not None and target not in ("gguf", "ollama", "merged"):
        raise ConfigError(
            "--type is for --for gguf, ollama and merged", where="phlora export", fix="leave it out"
        )
    if type is not None and target == "merged" and type not in DTYPES:
        raise ConfigError(f"There is no dtype `{type}`", where="--type", expected=", ".join(DTYPES))
    if adapter_only and target != "gguf":
        raise ConfigError("--adapter-only is for --for gguf", where="phlora export", fix="leave it out")


def _require_same(said: Received, folder: Path, target: Target, type: str, *, adapter_only: bool) -> None:
    """Refuse options that say otherwise than what was exported."""
    where = str(folder / EXPORT_FILE)
    if said.target != target:
        raise RunError(f"It was exported for {said.target}", where=where, fix=f"--for {said.target}")
    if type and type != said.written.type:
        kind = f"--type {said.written.type}" if said.written.type else "an adapter alone"
        raise ConfigError(f"It was exported as {kind}", where=f"--type {type}", fix="leave it out")
    if adapter_only and not said.written.rank:
        raise ConfigError("It was exported as a whole model", where="--adapter-only", fix="leave it out")


def _verify_again(job: ExportJob, folder: Path, said: Received) -> ExportReport:
    """Compare what lies there, and keep the verdict in any case: nobody is to read an old one beside other files."""
    is_adapter = said.target == "gguf" and bool(said.written.rank)
    job = replace(job, type=said.written.type or job.type, adapter_only=is_adapter)

    def report_of(verdict: Verdict) -> ExportReport:
        report = _report(job, said.written, verdict, folder)
        return replace(report, notes=said.notes, files=said.files, digests=said.digests)

    try:
        changed = what_changed(folder, said)
        if changed:
            raise Finding(changed, where=str(folder), fix="export it again")
        verdict = verify_export(job, folder, said.written)
    except Finding as finding:
        _keep(report_of(unverified(finding.found)), folder)
        raise
    report = report_of(verdict)
    _keep(report, folder)
    require_verified(verdict, where=str(folder), kept="export.json says so now", fix="export it again")
    return report


def _files(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file()}


def _report(job: ExportJob, written: Written, verdict: Verdict, output: Path) -> ExportReport:
    launch = launch_line(
        job.target,
        folder=output.name,
        base=job.found.base_name,
        name=job.title,
        rank=written.rank,
        file=written.file,
        context=job.context,
    )
    if job.adapter_only:
        launch = f"llama-server -m BASE.gguf --lora {output.name}/{written.file} --jinja -c {job.context}"
    return ExportReport(
        folder=str(output),
        target=job.target,
        type=written.type,
        base_model=job.found.base_name,
        base=written.base,
        rank=written.rank,
        files={},
        digests={},
        launch=launch,
        notes=written.notes,
        verdict=verdict,
    )


_CARD_MARK = "\n## Exported for "


def _in_json(value: Any) -> Any:
    """JSON has no infinities: they are told as text."""
    if isinstance(value, dict):
        return {name: _in_json(entry) for name, entry in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _keep(report: ExportReport, folder: Path) -> None:
    """export.json, and the same for people at the end of the card; neither says where things lie on this machine."""
    kept = {name: value for name, value in report.to_json().items() if name != "folder"}
    kept["verdict"] = {name: _in_json(value) for name, value in kept["verdict"].items()}
    write_json(folder / EXPORT_FILE, kept)
    card = folder / CARD
    # A link would bring what lies elsewhere into a folder that is handed on.
    own = card.is_file() and not card.is_symlink()
    before = card.read_text(encoding="utf-8", errors="replace") if own else ""
    before = before or f"# {report.base_model}, with an adapter\n"
    section = f"{_CARD_MARK}{report.target}\n\n```\n{report.launch}\n\n{report.verdict.summary()}\n```\n"
    write_text(card, before.partition(_CARD_MARK)[0] + section)
