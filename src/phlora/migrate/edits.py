"""Changes to a module, collected on the tree as it was read and made in one go: layout and comments stay."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import libcst as cst

from phlora.migrate.code import Code

MARK = "# phlora: "
Entries = cst.Call | cst.Dict
Change = Callable[[Any], Any]
_NOTHING = cst.SimpleWhitespace("")


@dataclass
class EntryChanges:
    """What happens to the arguments of a call, or to the entries of a dictionary, by their places."""

    renamed: dict[int, str] = field(default_factory=dict)
    values: dict[int, cst.BaseExpression] = field(default_factory=dict)
    removed: set[int] = field(default_factory=set)
    added: list[tuple[str, cst.BaseExpression, cst.Comment | None]] = field(default_factory=list)


@dataclass(frozen=True)
class Remark:
    """A line of the summary: what was changed, or what is left to the user."""

    line: int
    text: str
    is_left: bool = False


class Edits:
    """The changes of one module, and what is said about them."""

    def __init__(self, code: Code) -> None:
        self.code = code
        self.remarks: list[Remark] = []
        self._entries: dict[cst.CSTNode, EntryChanges] = defaultdict(EntryChanges)
        self._changes: dict[cst.CSTNode, list[Change]] = defaultdict(list)
        self._last: dict[cst.CSTNode, Change] = {}
        self._comments: dict[cst.CSTNode, list[str]] = defaultdict(list)
        # What stands above the first statement is the module's.
        lines = [line.comment.value for line in code.module.header if line.comment is not None]
        self._header = {line.removeprefix(MARK) for line in lines}

    def of(self, node: Entries) -> EntryChanges:
        return self._entries[node]

    def change(self, node: cst.CSTNode, change: Change) -> None:
        """Exchange a node for what `change` makes of it, after all that is inside it was changed."""
        self._changes[node].append(change)

    def change_last(self, node: cst.CSTNode, change: Change) -> None:
        """Exchange a statement for what `change` makes of it with its comments, after everything else."""
        self._last[node] = change

    def replace(self, node: cst.CSTNode, new: cst.CSTNode) -> None:
        self.change(node, lambda _: new)

    def is_touched(self, node: cst.CSTNode) -> bool:
        return node in self._changes

    def say(self, node: cst.CSTNode, text: str) -> None:
        """A line of the summary."""
        remark = Remark(self.code.line(node), text)
        if remark not in self.remarks:
            self.remarks.append(remark)

    def leave(self, node: cst.CSTNode, text: str) -> None:
        """What cannot be decided: a comment above its statement, and a line of the summary."""
        remark = Remark(self.code.line(node), text, is_left=True)
        if remark in self.remarks:
            return
        self.remarks.append(remark)
        statement = self.code.statement(node)
        if text not in self._comments[statement]:
            self._comments[statement].append(text)

    def apply(self) -> str:
        """The changed module as text."""
        return self.code.module.visit(_Apply(self)).code

    def changed(self, original: cst.CSTNode, updated: Any) -> Any:
        """What becomes of a node."""
        if original in self._entries:
            updated = _with_entries(updated, self._entries[original])
        comments = self._comments.get(original, [])
        for change in self._changes.get(original, ()):
            updated = change(updated)
        if comments:
            updated = _with_comments(updated, [text for text in comments if text not in self._header])
        return self._last[original](updated) if original in self._last else updated


class _Apply(cst.CSTTransformer):
    def __init__(self, edits: Edits) -> None:
        super().__init__()
        self._edits = edits

    def on_leave(self, original_node: Any, updated_node: Any) -> Any:
        return self._edits.changed(original_node, updated_node)


# ---------------------------------------------------------------------------------------------------- comments


def _with_comments(statement: Any, comments: Sequence[str]) -> Any:
    """Comments above a statement, or above the first of several; those that stand there already stay as they are."""
    if isinstance(statement, cst.FlattenSentinel):
        first, *rest = statement
        return cst.FlattenSentinel([_with_comments(first, comments), *rest])
    there = {line.comment.value for line in statement.leading_lines if line.comment is not None}
    new = [
        cst.EmptyLine(comment=cst.Comment(f"{MARK}{text}"))
        for text in comments
        if f"{MARK}{text}" not in there
    ]
    return statement.with_changes(leading_lines=[*statement.leading_lines, *new])


def statements_of(statement: Any) -> list[Any]:
    """A statement, or the several that it has become."""
    return list(statement) if isinstance(statement, cst.FlattenSentinel) else [statement]


def line_of(text: str) -> cst.SimpleStatementLine:
    """A statement from its text."""
    parsed = cst.parse_statement(text)
    assert isinstance(parsed, cst.SimpleStatementLine)
    return parsed


# ---------------------------------------------------------------------------------------- arguments and entries


def _with_entries(node: Any, changes: EntryChanges) -> Any:
    entries = list(node.args if isinstance(node, cst.Call) else node.elements)
    for index, name in changes.renamed.items():
        entries[index] = _renamed(entries[index], name)
    for index, value in changes.values.items():
        entries[index] = entries[index].with_changes(value=value)
    for index in sorted(changes.removed, reverse=True):
        node, entries = _without(node, entries, index)
    for name, value, comment in changes.added:
        entries = _with_argument(node, entries, name, value, comment)
    return node.with_changes(**{"args" if isinstance(node, cst.Call) else "elements": entries})


def _renamed(entry: Any, name: str) -> Any:
    if isinstance(entry, cst.Arg):
        assert entry.keyword is not None
        return entry.with_changes(keyword=entry.keyword.with_changes(value=name))
    quote = entry.key.value[0] if entry.key.value[0] in "'\"" else '"'
    return entry.with_changes(key=cst.SimpleString(f"{quote}{name}{quote}"))


def _without(node: Any, entries: list[Any], index: int) -> tuple[Any, list[Any]]:
    """Entries without one of them; comments on lines of their own stay, the line of the entry goes."""
    gone, is_call = entries[index], isinstance(node, cst.Call)
    has_comma = isinstance(gone.comma, cst.Comma)
    is_last = index == len(entries) - 1
    behind = gone.comma.whitespace_after if has_comma else gone.whitespace_after_arg if is_call else _NOTHING
    rest = entries[:index] + entries[index + 1 :]
    if index == 0:
        before = node.whitespace_before_args if is_call else node.lbrace.whitespace_after
        joined = _joined(before, behind)
        if not rest and not _has_comments(joined):
            joined = _NOTHING
        if is_call:
            return node.with_changes(whitespace_before_args=joined), rest
        return node.with_changes(lbrace=node.lbrace.with_changes(whitespace_after=joined)), rest
    last = rest[index - 1]
    comma = last.comma if isinstance(last.comma, cst.Comma) else cst.Comma()
    if not is_last or has_comma:
        joined = _joined(comma.whitespace_after, behind)
        rest[index - 1] = last.with_changes(comma=comma.with_changes(whitespace_after=joined))
    elif is_call:
        joined = _joined(comma.whitespace_after, behind)
        if not isinstance(behind, cst.ParenthesizedWhitespace) and not _has_comments(joined):
            joined = _NOTHING
        rest[index - 1] = last.with_changes(comma=cst.MaybeSentinel.DEFAULT, whitespace_after_arg=joined)
    else:
        rest[index - 1] = last.with_changes(comma=cst.MaybeSentinel.DEFAULT)
    return node, rest


def _joined(before: cst.BaseParenthesizableWhitespace, behind: cst.BaseParenthesizableWhitespace) -> Any:
    """The white space around what was removed, as one: the comment before it, the lines and the indent behind it."""
    if not isinstance(behind, cst.ParenthesizedWhitespace):
        return before
    if not isinstance(before, cst.ParenthesizedWhitespace):
        return behind.with_changes(first_line=cst.TrailingWhitespace())
    return behind.with_changes(
        first_line=before.first_line, empty_lines=[*before.empty_lines, *behind.empty_lines]
    )


def _has_comments(space: Any) -> bool:
    return isinstance(space, cst.ParenthesizedWhitespace) and (
        space.first_line.comment is not None or any(line.comment for line in space.empty_lines)
    )


def comment_of(entry: Any) -> cst.Comment | None:
    """The comment on the line of an argument, behind it."""
    comma = entry.comma
    space = (
        comma.whitespace_after
        if isinstance(comma, cst.Comma)
        else getattr(entry, "whitespace_after_arg", None)
    )
    return space.first_line.comment if isinstance(space, cst.ParenthesizedWhitespace) else None


def _with_argument(
    node: Any, entries: list[Any], name: str, value: cst.BaseExpression, comment: cst.Comment | None
) -> list[Any]:
    """A keyword argument behind the others, laid out as they are; a comment where its line ends with it."""
    assert isinstance(node, cst.Call)
    equal = cst.AssignEqual(_NOTHING, _NOTHING)
    new = cst.Arg(value, keyword=cst.Name(name), equal=equal)
    if not entries:
        return [new]
    last = entries[-1]
    inner: cst.BaseParenthesizableWhitespace
    between = entries[-2].comma.whitespace_after if len(entries) > 1 else node.whitespace_before_args
    has_comma = isinstance(last.comma, cst.Comma)
    behind = last.comma.whitespace_after if has_comma else last.whitespace_after_arg
    if isinstance(behind, cst.ParenthesizedWhitespace):
        # One argument a line, the closing bracket on its own.
        indent = between if isinstance(between, cst.ParenthesizedWhitespace) else node.whitespace_before_args
        inner = (
            behind.with_changes(indent=indent.indent, last_line=indent.last_line)
            if isinstance(indent, cst.ParenthesizedWhitespace)
            else behind
        )
        closing = behind.with_changes(first_line=_ended_by(comment), empty_lines=[])
        if has_comma:
            new = new.with_changes(comma=last.comma.with_changes(whitespace_after=closing))
        else:
            new = new.with_changes(whitespace_after_arg=closing)
    elif isinstance(between, cst.ParenthesizedWhitespace) and len(entries) > 1:
        inner = between.with_changes(first_line=cst.TrailingWhitespace(), empty_lines=[])
    else:
        inner = cst.SimpleWhitespace(" ")
    last = last.with_changes(comma=cst.Comma(whitespace_after=inner), whitespace_after_arg=_NOTHING)
    return [*entries[:-1], last, new]


def _ended_by(comment: cst.Comment | None) -> cst.TrailingWhitespace:
    if comment is None:
        return cst.TrailingWhitespace()
    return cst.TrailingWhitespace(whitespace=cst.SimpleWhitespace("  "), comment=comment)
