"""What came of a run, for people and for programs: a summary for the terminal, report.json and report.html.

The page is one file that needs no network, and its policy allows none. All texts of the user go through the template's
escaping, each in an element of its own direction, so that Persian reads from the right beside English that reads from
the left; control characters are spelled out.
"""

from __future__ import annotations

import difflib
import errno
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2

from phlora.display import printable
from phlora.errors import NoRoomError, RunError, masked
from phlora.evaluate.cell import report_cell
from phlora.evaluate.charts import Bar, loss_curve, sparkline
from phlora.evaluate.compare import AnsweredItem, Change, Comparison, ModelScores
from phlora.evaluate.findings import (
    Line,
    choice_of_headline,
    duration,
    figures,
    headline,
    label_of,
    lines_of,
    row_word,
    verdict,
)
from phlora.evaluate.metrics import is_word_part
from phlora.evaluate.summary import table, wrapped
from phlora.files import replaced_file
from phlora.plots import plot_loss

JSON_FILE = "report.json"
HTML_FILE = "report.html"

# In report.json even when the run did not ask for them.
_ALWAYS = ("exact_match", "json_valid")
_SHOWN_ANSWERS = 25
_MOST_SHOWN = 20_000
_CHANGES: tuple[Change, ...] = ("improved", "worsened")
# Aligning longer texts word by word takes seconds and helps nobody.
_MAX_DIFF_PIECES = 1500
_PATH = re.compile(r"[^\n]*[/\\][^\n]*|[^\n]*\.\w{1,7}(:\d+)?")
_ORIGIN = re.compile(r"[^\n]{1,1000}?:\d+(?=: |$)")


@dataclass(frozen=True, kw_only=True)
class Report:
    """The comparison and everything that explains it. Mappings may nest; lists and plain values are their leaves.

    Attributes:
        title: what the page is called, for instance the run's name.
        comparison: both sides on the same rows.
        num_trained_rows: rows of the comparison that were trained on too; None where that is not known.
        config: the resolved configuration.
        origins: dotted key -> where its value came from; a key without one, and its sections, kept the default.
        environment: versions and machine.
        data, model, adapter: facts about each.
        timing: name -> seconds, in the order of the work.
        peak_bytes: most memory that the process held.
        training_curve: (step, loss, learning rate) of each logged step.
        evaluation_curve: (step, loss) of each evaluation during training.
        notes: what a person should know.
        folder: where it was written to.
    """

    title: str
    comparison: Comparison
    config: Mapping[str, Any] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    adapter: Mapping[str, Any] = field(default_factory=dict)
    timing: Mapping[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None
    training_curve: Sequence[tuple[int, float, float]] = ()
    evaluation_curve: Sequence[tuple[int, float]] = ()
    notes: Sequence[str] = ()
    num_trained_rows: int | None = 0
    folder: Path | None = None

    @property
    def verdict(self) -> str:
        """One sentence: what changed, on how many rows, and how sure that is."""
        return verdict(self.comparison, rows="held-out" if self.num_trained_rows == 0 else "")

    def summary(self, *, width: int | None = None) -> str:
        """The verdict and the before/after table as plain text, for so many columns; None: as wide as it comes."""
        footnotes = [wrapped(printable(note), width) for note in self._footnotes()]
        figures = table(lines_of(self.comparison), width=width)
        return "\n".join([wrapped(printable(self.verdict), width), "", *figures, "", *footnotes]).rstrip()

    def _repr_html_(self) -> str:
        """What a notebook shows: the table, the notes and some answers."""
        comparison = self.comparison
        unchanged = [item for item in comparison.answers if item.change is None]
        return report_cell(
            self.verdict,
            lines_of(self.comparison),
            self._footnotes(),
            [*comparison.changed("worsened"), *comparison.changed("improved"), *unchanged],
            page=str(self.folder / HTML_FILE) if self.folder else "",
        )

    def plot_loss(self, ax: Any = None) -> Any:
        """Training and held-out loss over optimizer steps, as a plot of matplotlib; returns its `Axes`.

        Args:
            ax: where to draw; None makes a figure.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        return plot_loss(
            [(step, loss) for step, loss, _ in self.training_curve], self.evaluation_curve, ax=ax
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values for a strict JSON parser: no NaN, no secrets, shares from 0 to 1."""
        comparison = self.comparison
        facts = {name: getattr(self, name) for name in ("environment", "data", "model", "adapter")}
        return {
            "title": self.title,
            "verdict": self.verdict,
            "base": _side_json(comparison.base),
            "tuned": _side_json(comparison.tuned),
            "num_rows": {name: comparison.num_rows(name) for name in figures(comparison.base)},
            "intervals": {name: _plain(asdict(interval)) for name, interval in comparison.intervals.items()},
            "decided_by": comparison.decided_by,
            "task": _plain(asdict(comparison.task)),
            "flips": {kind: [_plain(asdict(item)) for item in comparison.changed(kind)] for kind in _CHANGES},
            "answers": [_plain(asdict(item)) for item in comparison.answers],
            "config": masked(_plain(self.config)),
            "config_origins": dict(self.origins),
            **masked(_plain(facts)),
            "timing": _plain(self.timing),
            "peak_bytes": self.peak_bytes,
            "training_curve": _points(("step", "loss", "learning_rate"), self.training_curve),
            "evaluation_curve": _points(("step", "loss"), self.evaluation_curve),
            "num_trained_rows": self.num_trained_rows,
            "notes": list(self.notes),
        }

    def to_html(self) -> str:
        """The report as one page without outside parts."""
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(Path(__file__).parent),
            autoescape=True,
            finalize=_visible,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        return environment.get_template("report.html.jinja").render(self._page())

    def write(self, folder: str | Path) -> Path:
        """Write report.json and report.html into the folder, each whole or not at all; returns the page's path.

        Raises:
            NoRoomError: the disk is full.
            RunError: the folder cannot be written to.
        """
        folder, page = Path(folder), self.to_html()
        text = json.dumps(self.to_json(), ensure_ascii=False, allow_nan=False, indent=2) + "\n"
        # Half of a surrogate pair is no UTF-8; as an escape it is still the same JSON.
        _write_whole(folder / JSON_FILE, text.encode("utf-8", errors="backslashreplace"))
        _write_whole(folder / HTML_FILE, page.encode("utf-8", errors="replace"))
        return folder / HTML_FILE

    def _footnotes(self) -> list[str]:
        improved, worsened = (len(self.comparison.changed(kind)) for kind in _CHANGES)
        why = choice_of_headline(self.comparison)
        footnotes = [why] if why else []
        if self.comparison.decided_by:
            footnotes.append(f"{improved} {row_word(improved)} turned right, {worsened} turned wrong.")
        if self.timing:
            footnotes.append(", ".join(f"{name} {duration(s)}" for name, s in self.timing.items()) + ".")
        if self.peak_bytes:
            footnotes.append(f"Peak memory {_gibibytes(self.peak_bytes)}.")
        return [*footnotes, *self.notes]

    def _page(self) -> dict[str, Any]:
        """What the template shows."""
        lines = lines_of(self.comparison)
        head = headline(self.comparison)
        rates = [(step, rate) for step, _, rate in self.training_curve]
        return {
            "title": self.title,
            "verdict": self.verdict,
            "head": head,
            "which_rows": _which_rows(self.num_trained_rows),
            "lines": lines,
            "bars": [_bar(line) for line in lines if line.is_share and line.change is not None],
            "curve": loss_curve(
                [(step, loss) for step, loss, _ in self.training_curve], self.evaluation_curve
            ),
            "rate_line": sparkline(rates),
            "peak_rate": f"{max((rate for _, rate in rates), default=0.0):.3g}",
            "why_this_headline": choice_of_headline(self.comparison),
            "answer_lists": self._answer_lists(),
            "decided_by": label_of(self.comparison.decided_by) if self.comparison.decided_by else None,
            "facts": self._fact_tables(),
            "config": _config_rows(self.config, self.origins),
            "notes": [split_origin(note) for note in self.notes],
            "is_path": is_path,
        }

    def _answer_lists(self) -> list[AnswerList]:
        """Worsened and improved answers first; without any of them, or with no metric to tell, all answers."""
        comparison = self.comparison
        worsened, improved = comparison.changed("worsened"), comparison.changed("improved")
        unchanged = [item for item in comparison.answers if item.change is None]
        lists = []
        if comparison.decided_by:
            lists.append(AnswerList.of("worsened", "Right before, wrong now", worsened))
            lists.append(AnswerList.of("improved", "Wrong before, right now", improved))
        if unchanged:
            title = "Unchanged" if comparison.decided_by else "Side by side"
            lists.append(AnswerList.of("unchanged", title, unchanged))
        return lists

    def _fact_tables(self) -> list[tuple[str, list[tuple[str, str]]]]:
        effort = {name: duration(seconds) for name, seconds in self.timing.items()}
        if self.peak_bytes:
            effort["peak memory"] = _gibibytes(self.peak_bytes)
        tables = {
            "Model": self.model,
            "Adapter": self.adapter,
            "Data": self.data,
            "Time and memory": effort,
            "Environment": self.environment,
        }
        return [
            (name, [(key, _grouped(value)) for key, value in _leaves(masked(_plain(facts)))])
            for name, facts in tables.items()
            if facts
        ]


@dataclass(frozen=True, kw_only=True)
class AnswerList:
    """Answers under one heading of the page: all of their number, the first of them themselves."""

    kind: str
    title: str
    count: int
    shown: list[dict[str, Any]]

    @classmethod
    def of(cls, kind: str, title: str, items: Sequence[AnsweredItem]) -> AnswerList:
        return cls(
            kind=kind, title=title, count=len(items), shown=[_shown_item(i) for i in items[:_SHOWN_ANSWERS]]
        )


def _visible(value: Any) -> Any:
    """What the template writes, with control characters spelled out: they could hide or turn what stands beside them.

    Line ends become one kind. What is markup already is made of parts that went through here.
    """
    return printable(value.replace("\r\n", "\n")) if type(value) is str else value


def is_path(text: str) -> bool:
    """Whether a text looks like a file: its parts then stand in their order, whatever script they are in."""
    return len(text) <= 1000 and bool(_PATH.fullmatch(text))


def split_origin(note: str) -> tuple[str, str]:
    """`file:line` at the beginning of a note, and the rest of it; the first may be empty."""
    found = _ORIGIN.match(note)
    return (found[0], note[found.end() :]) if found else ("", note)


def marked_words(answer: str, reference: str) -> list[tuple[str, str]]:
    """The answer word by word against the reference: stretches of text with their kind.

    `same` and `differs` are text of the answer; `missing` is text of the reference that the answer leaves out.
    """
    pieces, wanted = _pieces(answer), _pieces(reference)
    if max(len(pieces), len(wanted)) > _MAX_DIFF_PIECES:
        return [(answer, "same" if answer == reference else "differs")]
    kinds = {"equal": "same", "delete": "differs", "replace": "differs", "insert": "missing"}
    stretches = []
    matcher = difflib.SequenceMatcher(None, pieces, wanted, autojunk=False)
    for operation, start, end, wanted_start, wanted_end in matcher.get_opcodes():
        shown = wanted[wanted_start:wanted_end] if operation == "insert" else pieces[start:end]
        stretches.append(("".join(shown), kinds[operation]))
    return _joined(stretches)


def _joined(stretches: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """One stretch for differing words that only white space in common keeps apart."""
    joined: list[tuple[str, str]] = []
    for index, (text, kind) in enumerate(stretches):
        following = stretches[index + 1][1] if index + 1 < len(stretches) else "same"
        if (
            joined
            and joined[-1][1] == "differs"
            and (kind, following) == ("same", "differs")
            and text.isspace()
        ):
            kind = "differs"
        if joined and joined[-1][1] == kind == "differs":
            joined[-1] = (joined[-1][0] + text, kind)
        else:
            joined.append((text, kind))
    return joined


def _pieces(text: str) -> list[str]:
    """Words, white space, and every other character alone; joined they are the text."""
    pieces: list[str] = []
    for kind, run in groupby(unicodedata.normalize("NFC", text), key=_kind_of):
        characters = list(run)
        pieces += characters if kind == "other" else ["".join(characters)]
    return pieces


def _kind_of(character: str) -> str:
    if is_word_part(character):
        return "word"
    return "space" if character.isspace() else "other"


def _side_json(side: ModelScores) -> dict[str, Any]:
    return {**dict.fromkeys(_ALWAYS), **figures(side), "num_tokens": side.loss.num_tokens}


def _points(names: tuple[str, ...], points: Iterable[Sequence[float]]) -> list[dict[str, Any]]:
    return [_plain(dict(zip(names, point, strict=True))) for point in points]


def _bar(line: Line) -> Bar:
    base, tuned = line.base or 0.0, line.tuned or 0.0
    whisker = None
    if line.low is not None and line.high is not None:
        low, high = (100 * min(1.0, max(0.0, base + change)) for change in (line.low, line.high))
        whisker = (low, high)
    return Bar(line=line, base=100 * base, tuned=100 * tuned, whisker=whisker)


def _shown_item(item: AnsweredItem) -> dict[str, Any]:
    messages = [
        (str(message.get("role", "")), _clipped(_content(message.get("content"))))
        for message in item.messages
    ]
    reference = _clipped(item.reference)
    return {
        "origin": item.origin,
        "earlier": messages[:-1],
        "question": messages[-1] if messages else None,
        "reference": reference,
        "base": marked_words(_clipped(item.base_answer), reference),
        "tuned": marked_words(_clipped(item.tuned_answer), reference),
    }


def _clipped(text: str) -> str:
    """The beginning of a text that would make the page slow; report.json holds the whole."""
    hidden = len(text) - _MOST_SHOWN
    return text if hidden <= 0 else f"{text[:_MOST_SHOWN]} … ({hidden:,} more characters in report.json)"


def _content(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return json.dumps(content, ensure_ascii=False, default=str)


def _config_rows(config: Mapping[str, Any], origins: Mapping[str, str]) -> list[tuple[str, str, str]]:
    return [(key, _shown(value), _origin_of(key, origins)) for key, value in _leaves(masked(_plain(config)))]


def _origin_of(key: str, origins: Mapping[str, str]) -> str:
    """The origin of the key or of the nearest section around it."""
    while key:
        if key in origins:
            return origins[key]
        key = key.rpartition(".")[0]
    return "default"


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(value: Any) -> str:
    if value is None or value == {} or value == []:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list) and all(isinstance(entry, str | int | float) for entry in value):
        return ", ".join(map(str, value))
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else str(value)


def _grouped(value: Any) -> str:
    """A fact as text, its thousands set apart."""
    is_count = isinstance(value, int) and abs(value) >= 10_000
    return f"{value:,}".replace(",", "\u202f") if is_count else _shown(value)


def _gibibytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


def _plain(value: Any) -> Any:
    """Values that strict JSON knows; numbers that are none become null."""
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, set | frozenset):
        return [_plain(entry) for entry in sorted(value, key=str)]
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _write_whole(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(path) as part:
            part.write_bytes(content)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoRoomError("The disk is full", where=str(path), fix="free some room and repeat") from None
        raise RunError(f"The report cannot be written: {error.strerror}", where=str(path)) from None


def _which_rows(num_trained: int | None) -> str:
    if num_trained == 0:
        return "on rows that training did not see"
    if num_trained is None:
        return "on rows that training may have seen"
    verb = "was" if num_trained == 1 else "were"
    return f"on rows of which {num_trained} {verb} trained on"
