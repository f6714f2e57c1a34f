"""The imports of a module: names that come from elsewhere now, those that are needed, and those that nobody needs.

An import is changed where it stands, in a function or a `try` as well. A name that is still used for something that
was not changed keeps its import.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import libcst as cst
from libcst.metadata import ImportAssignment

from phlora.migrate.code import dotted
from phlora.migrate.edits import Edits, line_of
from phlora.migrate.import_lines import (
    ImportLine,
    alias_at,
    from_module,
    is_preface,
    local_name,
    rewritten,
    with_lines_above,
    with_statements_above,
)

# Packages whose names are found in several of their modules.
_PACKAGES = ("trl", "peft", "transformers", "unsloth", "datasets", "phlora", "evaluate")
_LINES = cst.SimpleStatementLine | cst.SimpleStatementSuite


def canonical(full: str) -> str:
    """The name under which the tables know `trl.trainer.sft_trainer.SFTTrainer`: package and last part.

    >>> canonical("trl.trainer.sft_trainer.SFTTrainer")
    'trl.SFTTrainer'
    """
    package, _, rest = full.partition(".")
    if package not in _PACKAGES or not rest or full.startswith("phlora.lora"):
        return full
    return f"{package}.{rest.rpartition('.')[2]}"


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
        self._lines: dict[cst.CSTNode, ImportLine] = {}
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

    def need(self, full: str, near: cst.CSTNode, *, before: cst.CSTNode | None = None) -> str:
        """Import a full name where `near`, a use of an imported name, was imported; returns how to write it.

        Args:
            before: where it is needed, if that is not at `near`; an import above it does.
        """
        module, _, name = full.rpartition(".")
        known = self._local_name(full, before=before or near)
        if known is not None:
            return known
        local = name
        if module and self._code.is_bound(name):
            local = f"{module.partition('.')[0]}_{name}"
        self._needed.append((near, full, local))
        return local

    def need_module(self, module: str, near: cst.CSTNode, *, before: cst.CSTNode | None = None) -> str:
        """As `need`, for a module that is imported whole."""
        return self.need(f".{module}", near, before=before).lstrip(".")

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
        lines: dict[cst.CSTNode, dict[int, ImportLine]] = {}
        for imported, line in self._lines.items():
            whole = self._code.parent(imported)
            if (line.moved or line.added) and isinstance(whole, _LINES):
                lines.setdefault(whole, {})[whole.body.index(imported)] = line
        for whole, changed in lines.items():
            self._edits.change(whole, self._rewriter(whole, changed))
        self._write_top()

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
        new = self._moves.get(canonical(full), "")
        return "" if new == full else new

    def _aliases(self) -> Iterator[tuple[cst.Import | cst.ImportFrom, int, str, str]]:
        """Every imported name: its statement, its place there, its local and its full name."""
        for node in self._code.all(cst.Import, cst.ImportFrom):
            if isinstance(node, cst.ImportFrom) and (node.relative or isinstance(node.names, cst.ImportStar)):
                continue
            module = f"{dotted(node.module)}." if isinstance(node, cst.ImportFrom) else ""
            for index, alias in enumerate(node.names):
                full = f"{module}{dotted(alias.name)}"
                yield node, index, local_name(alias, is_from=bool(module)), full

    def _plan_alias(self, statement: Any, index: int, local: str, full: str) -> None:
        line = self._lines.setdefault(statement, ImportLine())
        package = full.partition(".")[0]
        if package in self._packages:
            new = self._packages[package]
            binds_package = isinstance(statement, cst.Import) and alias_at(statement, index).asname is None
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
            if self._is_taken(new.rpartition(".")[2], local) and alias_at(statement, index).asname is None:
                line.aliased[index] = local
                return
            self._rename(uses, local, new, has_alias=alias_at(statement, index).asname is not None)
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
                self._edits.change(node, from_module(new))
                self._edits.say(node, f"{module} is {new}")
        stars = [node for node in self._code.all(cst.ImportFrom) if isinstance(node.names, cst.ImportStar)]
        for use, new in self._retargeted.items():
            if not stars or not isinstance(use, cst.Name) or self._is_imported(use):
                continue
            # Behind the last of them, which may bring the same name.
            name = new.rpartition(".")[2]
            entry = (new.rpartition(".")[0], name, name)
            added = self._lines.setdefault(stars[-1], ImportLine()).added
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
            found = "" if new == use.value else f": it is {new}"
            self._edits.say(use, f"{use.value} was not imported{found}")
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
        first = next((part for part in self._code.module.body if not is_preface(part)), None)
        if texts and first is not None:
            new = [line_of(text) for text in texts]
            self._edits.change_last(first, lambda updated: with_statements_above(new, updated))

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
            if not self._code.is_at_top(statement) or not self._code.comes_before(statement, before):
                continue
            alias = alias_at(statement, index)
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
            if self._code.comes_before(n, near) and self._code.is_at_top(n)
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
                if self._code.is_at_top(statement) and self._imports_from(statement, line, module):
                    if self._code.comes_before(statement, use):
                        anchor = statement
                        break
        line = self._lines.setdefault(anchor, ImportLine())
        if entry not in line.added:
            line.added.append(entry)

    def _imports_from(self, statement: cst.CSTNode, line: ImportLine, module: str) -> bool:
        moved = any(new and new.rpartition(".")[0] == module for new in line.moved.values())
        added = any(entry[0] == module for entry in line.added)
        stands = isinstance(statement, cst.ImportFrom) and dotted(statement.module) == module
        return moved or added or stands

    def _rewriter(self, whole: cst.CSTNode, changed: Mapping[int, ImportLine]) -> Callable[[Any], Any]:
        def rewrite(updated: Any) -> Any:
            body: list[Any] = []
            for place, statement in enumerate(updated.body):
                body += rewritten(statement, changed[place]) if place in changed else [statement]
            # `if x: from trl import ...` stays one line.
            is_suite = isinstance(updated, cst.SimpleStatementSuite)
            if not body:
                return updated.with_changes(body=[cst.Pass()]) if is_suite else self._emptied(updated, whole)
            if len(updated.body) > 1 or is_suite:
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
            self._edits.change(siblings[at], lambda updated: with_lines_above(line.leading_lines, updated))
        return cst.RemoveFromParent()
