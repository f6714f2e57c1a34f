"""How what was found in data is put together and shown: grouped, so that a thousand rows are one line."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from phlora.data.rows import Origin, Problem

# What is found may concern every row of a large file; beyond this many they are counted and named no more.
MAX_NAMED_ORIGINS = 1000
NUM_SHOWN_ORIGINS = 8
NUM_SHOWN_FILES = 4
_OF_FILES = frozenset({"ignored_columns", "unknown_message_keys", "encoding"})
_SEVERITIES = ("error", "warning", "note")


@dataclass(slots=True)
class Noted:
    """The rows that one thing concerns: all counted, the first ones named."""

    origins: list[Origin] = field(default_factory=list)
    count: int = 0
    last: Origin | None = None

    def add(self, origin: Origin) -> None:
        # A row with several such turns says it several times in a row, and so does one that is cut.
        if origin != self.last:
            self.last = origin
            self.count += 1
            if self.count <= MAX_NAMED_ORIGINS:
                self.origins.append(origin)


def merge_problems(problems: Iterable[Problem]) -> tuple[Problem, ...]:
    """One problem for each kind and message, errors first."""
    groups: dict[tuple[str, str, str], list[Problem]] = defaultdict(list)
    for problem in problems:
        groups[problem.severity, problem.kind, problem.message].append(problem)
    merged = [
        Problem(
            kind,
            group[0].severity,
            message,
            tuple(origin for problem in group for origin in problem.origins),
            sum(problem.count for problem in group),
        )
        for (_, kind, message), group in groups.items()
    ]
    return tuple(sorted(merged, key=lambda problem: _SEVERITIES.index(problem.severity)))


def render_problem(problem: Problem) -> str:
    """One problem as plain text, with the rows concerned."""
    origins = [str(origin) for origin in problem.origins]
    shown = ", ".join(origins[:NUM_SHOWN_ORIGINS])
    more = f" and {len(origins) - NUM_SHOWN_ORIGINS} more" if len(origins) > NUM_SHOWN_ORIGINS else ""
    unit = "files" if problem.kind in _OF_FILES else "rows"
    times = f" ({problem.count} {unit})" if problem.count > 1 else ""
    return f"{problem.severity}: {problem.message}{times}" + (f"\n    {shown}{more}" if origins else "")


def problems_json(problems: Iterable[Problem]) -> list[dict[str, Any]]:
    """Problems as plain values; origins as `file:line`."""
    return [
        {
            "kind": problem.kind,
            "severity": problem.severity,
            "message": problem.message,
            "count": problem.count,
            "origins": [str(origin) for origin in problem.origins],
        }
        for problem in problems
    ]


def shown_formats(formats: Mapping[str, str]) -> list[str]:
    """A line for each source with its schema; for many sources of one schema one line."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name, schema in formats.items():
        groups[schema].append(name)
    lines = []
    for schema, names in groups.items():
        if len(names) <= NUM_SHOWN_FILES:
            lines += [f"{name}: {schema}" for name in names]
        else:
            lines.append(f"{len(names):,} files ({', '.join(names[:NUM_SHOWN_FILES])}, …): {schema}")
    return lines
