"""The imports of a module: names that come from elsewhere now, those that are needed, and those that nobody needs.

An import is changed where it stands, in a function or a `try` as well. A name that is still used for something that
was not changed keeps its import.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import libcst as cst
from libcst.metadata import ImportAssignment

from phlora.migrate.code import dotted
from phlora.migrate.edits import Edits, line_of

# Packages whose names are found in several of their modules.
_PACKAGES = ("trl", "peft", "transformers", "unsloth", "datasets", "phlora", "evaluate")


def canonical(full: str) -> str:
    """The name under which the tables know `trl.trainer.sft_trainer.SFTTrainer`: package and last part.

    >>> canonical("trl.trainer.sft_trainer.SFTTrainer")
    'trl.SFTTrainer'
    """
    package, _, rest = full.partition(".")
    if package not in _PACKAGES or not rest or full.startswith("phlora.lora"):
        return full
    return f"{package}.{rest.rpartition('.')[2]}"


@dataclass
class _Line:
    """What becomes of one import statement: aliases by their place -> their new full name, or None: nobody needs it."""

    moved: dict[int, str | None] = field(default_factory=dict)
    aliased: dict[int, str] = field(default_factory=dict)
    added: list[tuple[str, str, str]] = field(default_factory=list)


class Imports:
    """Where the names of a module come from, and where they shall come from.

    Args:
        moves: canonical old name -> full new name, for every use of it in this module.
        packages: package -> the one in its place, for whole packages of the same names.
    """

    def __init__(self, edits: Edits, moves: dict[str, str], packages: dict[str, str]) -> None:
        self._edits, self._code = edits, edits.code
        self._moves, self._packages = moves, packages
        self._retargeted: dict[cst.CSTNode, str] = {}
        self._gone: set[cst.CSTNode] = set()
        self._needed: list[tuple[cst.CSTNode, str, str]] = []
        self._lines: dict[cst.CSTNode, _Line] = {}
        # (module, name) of the imports that stand first.
        self._top: dict[tuple[str, str], None] = {}

    # ---------------------------------------------------------------------------------------------- asking

    def names(self, node: cst.CSTNode) -> set[str]:
        """The canonical names that a name or attribute has."""
        found = self._code.origins(node)
        if not found and isinstance(node, cst.Name):
            # `Trainer = SFTTrainer`
            value = self._code.resolved(node)
            found = self._code.origins(value) if isinstance(value, cst.Name | cst.Attribute) else found
        return {canonical(name) for name in found}

    # ------------------------------------------------------------------------------------------- deciding

    def move(self, old: str, new: str) -> None:
        """Every use of a canonical name is another one from here on."""
        self._moves[old] = new

    def retarget(self, node: cst.Name | cst.Attribute, new: str) -> None:
        """This use of an imported name becomes `new`, a full name."""
        self._retargeted[node] = new

    def drop(self, node: cst.CSTNode) -> None:
        """This use of an imported name goes away with what it stands in."""
        self._gone.add(node)

    def need(self, full: str, near: cst.CSTNode) -> str:
        """Import a full name where `near`, a use of an imported name, was imported; returns how to write it."""
        module, _, name = full.rpartition(".")
        known = self._local_name(full, before=near)
        if known is not None:
            return known
        local = name
        if module and self._code.is_bound(name):
            local = f"{module.partition('.')[0]}_{name}"
        self._needed.append((near, full, local))
        return local

    def need_module(self, module: str, near: cst.CSTNode) -> str:
        """As `need`, for a module that is imported whole."""
        return self.need(f".{module}", near).lstrip(".")

    # ---------------------------------------------------------------------------------------------- doing

    def plan(self) -> None:
        """Turn all decisions into edits; once, after the last of them."""
        for reference in self._static_references():
            self._retargeted[reference] = self._moved(reference)
        for statement, index, local, full in self._aliases():
            self._plan_alias(statement, index, local, full)
        self._plan_attributes()
        self._plan_stars()
        self._plan_unimported()
        for near, full, local in self._needed:
            self._add(self._anchor(near), full, local, use=near)
        lines: dict[cst.CSTNode, dict[int, _Line]] = {}
        for imported, line in self._lines.items():
            whole = self._code.parent(imported)
            if (line.moved or line.added) and isinstance(whole, cst.SimpleStatementLine):
                lines.setdefault(whole, {})[whole.body.index(imported)] = line
        self._write_top()
        for whole, changed in lines.items():
            self._edits.change(whole, self._rewriter(whole, changed))

    # ------------------------------------------------------------------------------------------- the inside

    def _static_references(self) -> Iterator[cst.Name | cst.Attribute]:
        for node in self._code.all(cst.Name, cst.Attribute):
            if node not in self._retargeted and not self.is_gone(node) and self._moved(node):
                yield node

    def _moved(self, node: cst.CSTNode) -> str:
        """The one new name of a use; empty where there is none, or more than one."""
        found = {self._new_name(name) for name in self._code.origins(node)} - {""}
        return found.pop() if len(found) == 1 else ""

    def _new_name(self, full: str) -> str:
        return self._moves.get(canonical(full), "")

    def _aliases(self) -> Iterator[tuple[cst.Import | cst.ImportFrom, int, str, str]]:
        """Every imported name: its statement, its place there, its local and its full name."""
        for node in self._code.all(cst.Import, cst.ImportFrom):
            if isinstance(node, cst.ImportFrom) and (node.relative or isinstance(node.names, cst.ImportStar)):
                continue
            module = f"{dotted(node.module)}." if isinstance(node, cst.ImportFrom) else ""
            for index, alias in enumerate(node.names):
                full = f"{module}{dotted(alias.name)}"
                yield node, index, _local(alias, is_from=bool(module)), full

    def _plan_alias(self, statement: Any, index: int, local: str, full: str) -> None:
        line = self._lines.setdefault(statement, _Line())
        package = full.partition(".")[0]
        if package in self._packages:
            new = self._packages[package]
            binds_package = isinstance(statement, cst.Import) and _alias(statement, index).asname is None
            line.moved[index] = new if binds_package else new + full[len(package) :]
            if isinstance(statement, cst.Import):
                line.aliased[index] = package
            self._edits.say(statement, f"{full} is {new + full[len(package) :]}")
            return
        uses = self._uses_of(statement, local)
        if not isinstance(statement, cst.ImportFrom):
            # A whole package: its attributes are rewritten one by one. Unsloth is imported for what it patches, too.
            if (uses or package == "unsloth") and all(self._is_covered(use) for use in uses):
                line.moved[index] = None
            return
        new = self._new_name(full)
        if new:
            line.moved[index] = new
            self._edits.say(statement, f"{full} is {new}")
            if self._is_taken(new.rpartition(".")[2], local) and _alias(statement, index).asname is None:
                line.aliased[index] = local
                return
            self._rename(uses, local, new, has_alias=_alias(statement, index).asname is not None)
            return
        if (uses or package == "unsloth") and all(self._is_covered(use) for use in uses):
            line.moved[index] = None
        for use in uses:
            if use in self._retargeted:
                new = self._retargeted[use]
                name = self.need(new, use)
                self._edits.replace(use, cst.Name(name))

    def _is_taken(self, name: str, local: str) -> bool:
        """Whether a new name means something else here already, or too little to stand alone."""
        if name == local:
            return False
        if name == "load" or self._code.is_bound(name):
            return True
        return any(there == name for _, _, there, _ in self._aliases())

    def _rename(self, uses: list[cst.CSTNode], local: str, new: str, *, has_alias: bool) -> None:
        name = new.rpartition(".")[2]
        if has_alias or name == local:
            return
        for use in uses:
            if isinstance(use, cst.Name) and not self.is_gone(use):
                self._edits.replace(use, cst.Name(name))

    def _plan_attributes(self) -> None:
        """`t.SFTTrainer` of `import trl as t`."""
        for node, new in self._retargeted.items():
            if isinstance(node, cst.Attribute):
                module = new.rpartition(".")[0]
                root = self.need_module(module, node)
                self._edits.replace(node, cst.parse_expression(f"{root}.{new.rpartition('.')[2]}"))
                self._edits.say(node, f"{self._code.text(node)} is {new}")

    def _plan_stars(self) -> None:
        for node in self._code.all(cst.ImportFrom):
            if not isinstance(node.names, cst.ImportStar) or node.relative:
                continue
            module = dotted(node.module)
            package = module.partition(".")[0]
            if package in self._packages:
                new = self._packages[package] + module[len(package) :]
                self._edits.change(node, _from_module(new))
                self._edits.say(node, f"{module} is {new}")
                continue
        stars = [node for node in self._code.all(cst.ImportFrom) if isinstance(node.names, cst.ImportStar)]
        for use, new in self._retargeted.items():
            if not stars or not isinstance(use, cst.Name) or self._is_imported(use):
                continue
            # Behind the last of them, which may bring the same name.
            name = new.rpartition(".")[2]
            entry = (new.rpartition(".")[0], name, name)
            added = self._lines.setdefault(stars[-1], _Line()).added
            if entry not in added:
                added.append(entry)
            self._edits.say(stars[-1], f"{name} is {new}")
            if name != use.value:
                self._edits.replace(use, cst.Name(name))

    def _is_imported(self, use: cst.Name) -> bool:
        scope = self._code.scope(use)
        return scope is not None and any(isinstance(entry, ImportAssignment) for entry in scope[use.value])

    def _plan_unimported(self) -> None:
        """Names that the module uses and imports nowhere."""
        for use, full in self._code.unimported().items():
            if self._is_covered(use) and use not in self._retargeted:
                continue
            new = self._retargeted.get(use, full)
            module, _, name = new.rpartition(".")
            self._top[(module, name)] = None
            self._edits.say(use, f"{use.value} was not imported: it is {new}")
            if name != use.value:
                self._edits.replace(use, cst.Name(name))

    def _write_top(self) -> None:
        """Imports above everything but the module's own text about itself."""
        groups: dict[str, list[str]] = {}
        for module, name in self._top:
            groups.setdefault(module, []).append(name)
        texts = [f"import {name}" for name in sorted(groups.pop("", []))]
        texts += [
            f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(groups.items())
        ]
        first = next((part for part in self._code.module.body if not _is_preface(part)), None)
        if texts and first is not None:
            self._edits.change(first, lambda updated: _above([line_of(text) for text in texts], updated))

    def _uses_of(self, statement: cst.CSTNode, local: str) -> list[cst.CSTNode]:
        scope = self._code.scope(statement)
        if scope is None:
            return []
        found: dict[cst.CSTNode, None] = {}
        for entry in scope[local]:
            if isinstance(entry, ImportAssignment):
                found |= {access.node: None for access in entry.references}
        return self._code.in_order(found)

    def _is_covered(self, use: cst.CSTNode) -> bool:
        """Whether a use is another name's from here on, or goes away."""
        at: cst.CSTNode | None = use
        while isinstance(at, cst.Name | cst.Attribute):
            if at in self._retargeted or at in self._gone:
                return True
            at = self._code.parent(at)
        return self.is_gone(use)

    def is_gone(self, node: cst.CSTNode) -> bool:
        at: cst.CSTNode | None = node
        while at is not None and self._gone:
            if at in self._gone:
                return True
            at = self._code.parent(at)
        return False

    def _local_name(self, full: str, *, before: cst.CSTNode) -> str | None:
        """How the module already calls a full name, where that was imported at its own level before a node."""
        wants_module = full.startswith(".")
        for statement, index, local, there in self._aliases():
            if isinstance(statement, cst.Import) is not wants_module:
                continue
            outer = self._code.enclosing(statement, cst.FunctionDef, cst.ClassDef, cst.If, cst.Try)
            if outer is not None or not self._code.comes_before(statement, before):
                continue
            alias = _alias(statement, index)
            if wants_module:
                if there == full[1:] and (alias.asname is not None or "." not in there):
                    return local
                continue
            if (self._new_name(there) or there) == full or canonical(there) == full:
                new = self._new_name(there)
                return local if alias.asname is not None or not new else new.rpartition(".")[2]
        for near, needed, local in self._needed:
            if needed == full and self._anchor(near) is self._anchor(before):
                return local
        return None

    def _anchor(self, near: cst.CSTNode) -> cst.CSTNode:
        """The import statement that brought what is used at `near`; a statement itself where it is one."""
        if isinstance(near, cst.Import | cst.ImportFrom):
            return near
        root: cst.CSTNode = near
        while isinstance(root, cst.Attribute):
            root = root.value
        scope = self._code.scope(near)
        if isinstance(root, cst.Name) and scope is not None:
            for entry in scope[root.value]:
                if isinstance(entry, ImportAssignment):
                    return entry.node
        stars = [n for n in self._code.all(cst.ImportFrom) if isinstance(n.names, cst.ImportStar)]
        before = [
            n
            for n in (stars or self._code.all(cst.Import, cst.ImportFrom))
            if self._code.comes_before(n, near)
        ]
        found: cst.CSTNode = before[-1] if before else self._code.module
        return found

    def _add(self, anchor: cst.CSTNode, full: str, local: str, *, use: cst.CSTNode) -> None:
        """Add an import to the first statement at the module's level before its use that it can stand in."""
        module, _, name = full.rpartition(".")
        is_whole = full.startswith(".")
        if anchor is self._code.module:
            self._top[(module, name)] = None
            return
        entry = ("", full[1:], full[1:]) if is_whole else (module, name, local)
        if not is_whole and self._code.enclosing(anchor, cst.FunctionDef, cst.If, cst.Try) is None:
            for statement, line in self._lines.items():
                outer = self._code.enclosing(statement, cst.FunctionDef, cst.ClassDef, cst.If, cst.Try)
                if outer is None and self._imports_from(statement, line, module):
                    if self._code.comes_before(statement, use):
                        anchor = statement
                        break
        line = self._lines.setdefault(anchor, _Line())
        if entry not in line.added:
            line.added.append(entry)

    def _imports_from(self, statement: cst.CSTNode, line: _Line, module: str) -> bool:
        moved = any(new and new.rpartition(".")[0] == module for new in line.moved.values())
        added = any(entry[0] == module for entry in line.added)
        stands = isinstance(statement, cst.ImportFrom) and dotted(statement.module) == module
        return moved or added or stands

    def _rewriter(self, whole: cst.CSTNode, changed: Mapping[int, _Line]) -> Callable[[Any], Any]:
        def rewrite(updated: Any) -> Any:
            body: list[Any] = []
            for place, statement in enumerate(updated.body):
                body += _rewritten(statement, changed[place]) if place in changed else [statement]
            if not body:
                return self._emptied(updated, whole)
            if len(updated.body) > 1:
                body = [part.with_changes(semicolon=cst.MaybeSentinel.DEFAULT) for part in body]
                return updated.with_changes(body=body)
            lines = [updated.with_changes(body=[body[0]])]
            lines += [cst.SimpleStatementLine(body=[part]) for part in body[1:]]
            return lines[0] if len(lines) == 1 else cst.FlattenSentinel(lines)

        return rewrite

    def _emptied(self, line: Any, statement: cst.CSTNode) -> Any:
        """An import line of which nothing is left; `pass` where a block has no other, or comments above it stay."""
        block = self._code.parent(statement)
        if isinstance(block, cst.IndentedBlock) and len(block.body) == 1:
            return line.with_changes(body=[cst.Pass()])
        comments = [empty for empty in line.leading_lines if empty.comment is not None]
        siblings = list(getattr(block, "body", ()))
        at = siblings.index(statement) + 1
        if comments and at < len(siblings):
            self._edits.change(siblings[at], lambda updated: _below(line.leading_lines, updated))
        return cst.RemoveFromParent()


def _below(lines: Sequence[cst.EmptyLine], updated: Any) -> Any:
    if isinstance(updated, cst.FlattenSentinel):
        first, *rest = updated
        return cst.FlattenSentinel([_below(lines, first), *rest])
    if not hasattr(updated, "leading_lines"):
        return updated
    return updated.with_changes(leading_lines=[*lines, *updated.leading_lines])


def _above(new: Sequence[cst.BaseStatement], updated: Any) -> Any:
    """Statements above another one, and below what is written above it, if that is for the whole module."""
    first, *rest = list(updated) if isinstance(updated, cst.FlattenSentinel) else [updated]
    is_import = isinstance(first, cst.SimpleStatementLine) and isinstance(
        first.body[0], cst.Import | cst.ImportFrom
    )
    lines = list(getattr(first, "leading_lines", ()))
    if not is_import and (not lines or lines[0].comment is not None):
        first = _below([cst.EmptyLine(indent=False)], first)
    return cst.FlattenSentinel([*new, first, *rest])


def _is_preface(statement: cst.CSTNode) -> bool:
    """A module's docstring, imports from the future, and the stand-ins of a notebook."""
    if not isinstance(statement, cst.SimpleStatementLine):
        return False
    first = statement.body[0]
    if isinstance(first, cst.ImportFrom):
        return dotted(first.module) == "__future__"
    if not isinstance(first, cst.Expr):
        return False
    value = first.value
    is_stand_in = isinstance(value, cst.Name) and value.value.startswith("_phlora_")
    return is_stand_in or isinstance(value, cst.SimpleString | cst.ConcatenatedString)


def _from_module(name: str) -> Callable[[Any], Any]:
    return lambda old: old.with_changes(module=_module(name))


def _rewritten(statement: Any, line: _Line) -> list[Any]:
    """The import statements that stand in the place of one."""
    is_from = isinstance(statement, cst.ImportFrom)
    groups: dict[str, list[cst.ImportAlias]] = {}
    kept = []
    aliases = [] if isinstance(statement.names, cst.ImportStar) else statement.names
    for index, alias in enumerate(aliases):
        if index not in line.moved:
            kept.append(alias)
            continue
        new = line.moved[index]
        if new is None:
            continue
        module, _, name = new.rpartition(".")
        if is_from:
            as_part = cst.AsName(cst.Name(line.aliased[index])) if index in line.aliased else alias.asname
            groups.setdefault(module, []).append(alias.with_changes(name=cst.Name(name), asname=as_part))
        else:
            local = dotted(alias.asname.name) if alias.asname is not None else line.aliased.get(index)
            groups.setdefault("", []).append(_import_alias(new, local))
    for module, name, local in line.added:
        as_name = None if local == name else local
        groups.setdefault(module, []).append(_import_alias(name, as_name))
    whole = groups.pop("", [])
    if is_from and not kept and aliases and not whole and len(groups) == 1:
        # Everything moved to one place: the statement keeps its layout.
        ((module, entries),) = groups.items()
        return [statement.with_changes(module=_module(module), names=_laid_out(aliases, entries))]
    result: list[Any] = []
    if isinstance(statement.names, cst.ImportStar):
        result.append(statement)
    elif kept:
        own = groups.pop(dotted(statement.module), []) if is_from else []
        result.append(statement.with_changes(names=_laid_out(aliases, [*kept, *own])))
    result += [cst.Import(_laid_out([], [alias])) for alias in _unique(whole)]
    result += [
        cst.ImportFrom(module=_module(module), names=_laid_out([], entries))
        for module, entries in groups.items()
    ]
    return result


def _laid_out(old: Sequence[cst.ImportAlias], new: list[cst.ImportAlias]) -> list[cst.ImportAlias]:
    """Aliases as a list, with what stood between the old ones between them, and behind the last what stood there."""
    new = _unique(new)
    if not any(alias in old for alias in new):
        new.sort(key=lambda alias: (not dotted(alias.name)[:1].isupper(), dotted(alias.name)))
    commas = [alias.comma for alias in old if isinstance(alias.comma, cst.Comma)]
    is_closed = bool(old) and isinstance(old[-1].comma, cst.Comma)
    if len(commas) > is_closed:
        between = commas[0].with_changes(whitespace_after=_bare(commas[0].whitespace_after))
    else:
        between = cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
    *rest, last = new
    listed = [
        alias
        if isinstance(alias.comma, cst.Comma) and alias is not _last(old)
        else alias.with_changes(comma=between)
        for alias in rest
    ]
    ending = old[-1].comma if old else cst.MaybeSentinel.DEFAULT
    return [*listed, last if last is _last(old) else last.with_changes(comma=ending)]


def _last(old: Sequence[cst.ImportAlias]) -> cst.ImportAlias | None:
    return old[-1] if old else None


def _bare(space: Any) -> Any:
    """White space without the comments in it."""
    if not isinstance(space, cst.ParenthesizedWhitespace):
        return space
    return space.with_changes(first_line=cst.TrailingWhitespace(), empty_lines=[])


def _unique(aliases: list[cst.ImportAlias]) -> list[cst.ImportAlias]:
    seen: dict[tuple[str, str], cst.ImportAlias] = {}
    for alias in aliases:
        seen.setdefault((dotted(alias.name), _local(alias, is_from=True)), alias)
    return list(seen.values())


def _import_alias(name: str, as_name: str | None) -> cst.ImportAlias:
    as_part = cst.AsName(cst.Name(as_name)) if as_name else None
    return cst.ImportAlias(name=_module(name), asname=as_part)


def _module(name: str) -> Any:
    return cst.parse_expression(name)


def _alias(statement: cst.Import | cst.ImportFrom, index: int) -> cst.ImportAlias:
    assert not isinstance(statement.names, cst.ImportStar)
    return statement.names[index]


def _local(alias: cst.ImportAlias, *, is_from: bool) -> str:
    if alias.asname is not None:
        return dotted(alias.asname.name)
    name = dotted(alias.name)
    return name if is_from else name.partition(".")[0]
