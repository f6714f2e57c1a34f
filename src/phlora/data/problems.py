"""How what was found in data is put together and shown: grouped, so that a thousand rows are one line."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
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
    unit = "files" if problem.kind in _OF_FILES else "rows"
    times = f" ({problem.count} {unit})" if problem.count > 1 else ""
    where = f"\n    {named_origins(problem.origins, problem.count)}" if problem.origins else ""
    return f"{problem.severity}: {problem.message}{times}{where}"


def named_origins(
    origins: Sequence[Origin], count: int | None = None, *, most: int = NUM_SHOWN_ORIGINS
) -> str:
    """The first origins, and how many more there are; `count` where some were counted without being named."""
    shown = origins[:most]
    num_more = (len(origins) if count is None else count) - len(shown)
    return ", ".join(map(str, shown)) + (f" and {num_more} more" if num_more > 0 else "")


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
