"""Rows to measure an adapter on: those that the run held out, or files that are given later, read as its own were."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phlora.config import DataConfig, DataFile, RunConfig
from phlora.data.dataset import load_rows
from phlora.data.rows import Row
from phlora.errors import ConfigError, DataError
from phlora.runs.resolve import Resolved


def rows_or_held_out(
    found: Resolved, data: Any, *, command: str, option: str, **how: Any
) -> list[Row] | None:
    """The rows that are named, or those that the run held out; None where there are neither.

    Args:
        data, how: as in `read_like_run`; None: none are named.
        command, option: what is given the rows, and by what, such as `phlora evaluate` and `--data`.

    Raises:
        DataError, ConfigError: as `read_like_run`; or it is said how rows are read, and none are named.
    """
    if data is not None:
        return read_like_run(data, found.config, **how)
    if any(value is not None for value in how.values()):
        raise ConfigError(
            "--format and --columns are for rows that are named",
            where=command,
            fix=f"name them: {option} FILE",
        )
    if found.rows is None or not found.rows.is_file() or not found.rows.stat().st_size:
        return None
    return load_rows(found.rows).rows


def read_like_run(
    data: Any,
    config: RunConfig | None,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[Row]:
    """The rows of files that are named, or of a data set or rows that are handed over.

    Args:
        data: what `load_rows` takes. Names of files are read with the run's settings, anything else as it stands.
        config: the run's; None: there is none.
        format, columns: in the place of the run's own.

    Raises:
        DataError, ConfigError: the rows cannot be read; with the run's settings, where they come from there.
    """
    own = config.data if config else None
    keep_reasoning = own is not None and own.reasoning == "keep"
    names = [data] if isinstance(data, str | Path) else data
    if not (isinstance(names, list | tuple) and names and all(isinstance(n, str | Path) for n in names)):
        return load_rows(data, format=format or "auto", keep_reasoning=keep_reasoning).rows
    taken: dict[str, Any] = {}
    if own and format is None and own.format != "auto":
        taken["format"] = own.format
    if own and columns is None and (common := _common_columns(own)):
        taken["columns"] = common
    columns = taken.get("columns", columns or {})
    files = [DataFile(path=str(name), columns=columns) for name in names]
    try:
        return load_rows(
            files, format=taken.get("format", format or "auto"), keep_reasoning=keep_reasoning
        ).rows
    except (DataError, ConfigError) as error:
        if not taken:
            raise
        said = ", ".join(f"{name} {_words(value)}" for name, value in taken.items())
        turned_off = " ".join({"format": "--format auto", "columns": '--columns ""'}[name] for name in taken)
        fix = f"{error.fix}; " if error.fix else ""
        raise type(error)(
            f"{error.found} (read as the run's own files were: {said})",
            where=error.where,
            expected=error.expected,
            fix=f"{fix}{turned_off} to read without the run's settings",
        ) from None


def _common_columns(data: DataConfig) -> Mapping[str, str]:
    """The names of columns, where all of the run's files have the same ones."""
    first, *others = [dict(file.columns) for file in (*data.files, *data.eval)] or [{}]
    return first if all(columns == first for columns in others) else {}


def _words(value: Any) -> str:
    return (
        ",".join(f"{new}={old}" for new, old in value.items()) if isinstance(value, Mapping) else str(value)
    )
