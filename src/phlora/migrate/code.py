"""What is known of a module's names without running it: where they come from, and what they stand for.

Everything is decided on the tree as it was read; `edits` changes it afterwards.
"""

from __future__ import annotations

import ast
import builtins
import heapq
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import libcst as cst
from libcst.metadata import (
    Assignment,
    BuiltinAssignment,
    ClassScope,
    CodeRange,
    GlobalScope,
    ImportAssignment,
    MetadataWrapper,
    ParentNodeProvider,
    PositionProvider,
    QualifiedNameSource,
    Scope,
    ScopeProvider,
)

# Names that stand for one thing alone in such scripts: where a module uses one and imports it nowhere.
UNIMPORTED = {
    **dict.fromkeys(("SFTTrainer", "SFTConfig"), "trl"),
    **dict.fromkeys(("LoraConfig", "PeftModel", "get_peft_model", "prepare_model_for_kbit_training"), "peft"),
    **dict.fromkeys(("AutoPeftModelForCausalLM",), "peft"),
    **dict.fromkeys(
        ("AutoModelForCausalLM", "AutoTokenizer", "TrainingArguments", "Trainer"), "transformers"
    ),
    **dict.fromkeys(("BitsAndBytesConfig", "DataCollatorForLanguageModeling", "pipeline"), "transformers"),
    **dict.fromkeys(("load_dataset", "Dataset", "DatasetDict", "load_metric"), "datasets"),
    "FastLanguageModel": "unsloth",
    "torch": "",
}
Statement = cst.SimpleStatementLine | cst.BaseCompoundStatement
NOT_LITERAL = object()
_KNOWN_PACKAGES = {*UNIMPORTED.values(), "loralib", "phlora"}


def _require_readable_depth(text: str) -> None:
    """Python's own parser counts how deep it goes; libcst's ends the process where its stack does."""
    try:
        ast.parse(text)
    except MemoryError:
        raise RecursionError("too deep for Python's parser") from None
    except SyntaxError as error:
        if "too many nested" in str(error):
            raise RecursionError(str(error)) from None
    except ValueError:
        pass  # A null byte: for libcst to say, as any other syntax error.


class Code:
    """A module with its names resolved.

    Args:
        text: the module as text, without a byte order mark.

    Raises:
        libcst.ParserSyntaxError: it is no Python.
        RecursionError: it is nested too deeply.
    """

    def __init__(self, text: str) -> None:
        _require_readable_depth(text)
        wrapper = MetadataWrapper(cst.parse_module(text))
        self.module = wrapper.module
        self._parents = wrapper.resolve(ParentNodeProvider)
        self._positions = wrapper.resolve(PositionProvider)
        self._scopes = wrapper.resolve(ScopeProvider)
        self.nodes = list(_walk(self.module))
        self._order = {node: number for number, node in enumerate(self.nodes)}
        self._of_kind: dict[type[Any], list[Any]] = defaultdict(list)
        for node in self.nodes:
            self._of_kind[type(node)].append(node)
        self._starred = [
            dotted(node.module)
            for node in self.all(cst.ImportFrom)
            if isinstance(node.names, cst.ImportStar) and node.module
        ]
        # What a module takes from a package that is not known may bind any name.
        self._may_be_bound = bool({name.partition(".")[0] for name in self._starred} - _KNOWN_PACKAGES)

    def all(self, *kinds: type[Any]) -> Iterator[Any]:
        """The nodes of these kinds, none of which is a kind of another, in the order of the text."""
        return heapq.merge(*(self._of_kind[kind] for kind in kinds), key=self._order.__getitem__)

    def comes_before(self, node: cst.CSTNode, other: cst.CSTNode) -> bool:
        return self._order[node] < self._order[other]

    def in_order(self, nodes: Iterable[cst.CSTNode]) -> list[cst.CSTNode]:
        """Nodes in the order of the text; those that stand in no text (names in annotations) last."""
        return sorted(nodes, key=lambda node: self._order.get(node, len(self._order)))

    def line(self, node: cst.CSTNode) -> int:
        place = self._positions.get(node)
        return place.start.line if isinstance(place, CodeRange) else 0

    def text(self, node: cst.CSTNode) -> str:
        return self.module.code_for_node(node)

    def parent(self, node: cst.CSTNode) -> cst.CSTNode | None:
        return self._parents.get(node)

    def statement(self, node: cst.CSTNode) -> Statement:
        """The statement that a node stands in, with lines of its own to write comments above."""
        at: cst.CSTNode | None = node
        while at is not None:
            if isinstance(at, cst.SimpleStatementLine) or (
                isinstance(at, cst.BaseCompoundStatement)
                and isinstance(self.parent(at), cst.Module | cst.IndentedBlock | cst.If)
            ):
                return at
            at = self.parent(at)
        raise AssertionError("every expression stands in a statement")

    def enclosing(self, node: cst.CSTNode, *kinds: type[cst.CSTNode]) -> cst.CSTNode | None:
        """The innermost node of these kinds around a node."""
        at = self.parent(node)
        while at is not None and not isinstance(at, kinds):
            at = self.parent(at)
        return at

    def is_at_top(self, node: cst.CSTNode) -> bool:
        """Whether a statement stands at the module's own level, and is always run."""
        return self.enclosing(node, cst.FunctionDef, cst.ClassDef, cst.If, cst.Try) is None

    # ------------------------------------------------------------------------------------------- where names lead

    def scope(self, node: cst.CSTNode) -> Scope | None:
        at: cst.CSTNode | None = node
        while at is not None:
            if at in self._scopes and self._scopes[at] is not None:
                return self._scopes[at]
            at = self.parent(at)
        return None

    def origins(self, node: cst.CSTNode) -> set[str]:
        """The full names (`trl.SFTTrainer`) that a name or attribute may have by the imports of the module."""
        scope = self.scope(node)
        if scope is None or not isinstance(node, cst.Name | cst.Attribute):
            return set()
        found = scope.get_qualified_names_for(node)
        imported = {name.name for name in found if name.source is QualifiedNameSource.IMPORT}
        root = _root(node)
        if imported or root is None or found:
            return imported
        unimported = self._unimported(root)
        if unimported:
            return {f"{unimported.rpartition('.')[0]}.{self.text(node)}".lstrip(".")}
        return {f"{module}.{self.text(node)}" for module in self._starred}

    def _unimported(self, root: cst.Name) -> str:
        """The full name of a well-known name that the module uses and does not have; empty for any other."""
        if self._may_be_bound or root.value not in UNIMPORTED or not self._is_read(root):
            return ""
        package = UNIMPORTED[root.value]
        if package in self._starred:
            return ""
        return f"{package}.{root.value}".lstrip(".")

    def _is_read(self, node: cst.Name) -> bool:
        """Whether a name is a variable that is read, and no keyword, attribute or import."""
        parent = self.parent(node)
        if isinstance(parent, cst.Attribute):
            return parent.value is node and self.enclosing(node, cst.Import, cst.ImportFrom) is None
        if isinstance(parent, cst.Arg):
            return parent.value is node
        return isinstance(
            parent, cst.BaseExpression | cst.Element | cst.BaseSmallStatement | cst.Index
        ) and not (isinstance(parent, cst.Import | cst.ImportFrom))

    def unimported(self) -> dict[cst.Name, str]:
        """Every use of a well-known name that the module does not import, with its full name."""
        if self._may_be_bound:
            return {}
        found = {}
        for node in self.all(cst.Name):
            scope = self.scope(node) if node.value in UNIMPORTED else None
            if scope is not None and not scope.get_qualified_names_for(node) and self._unimported(node):
                found[node] = self._unimported(node)
        return found

    def is_bound(self, name: str) -> bool:
        """Whether the module's own level has something of this name that no import brought."""
        scope = self._scopes.get(self.module)
        return isinstance(scope, GlobalScope) and any(
            not isinstance(entry, ImportAssignment | BuiltinAssignment) for entry in scope[name]
        )

    def assignments(self, node: cst.Name) -> list[cst.CSTNode]:
        """What binds this variable, wherever in its scope."""
        scope = self.scope(node)
        if scope is None:
            return []
        return self.in_order(entry.node for entry in scope[node.value] if isinstance(entry, Assignment))

    def value_of(self, node: cst.BaseExpression) -> cst.BaseExpression | None:
        """The expression behind a variable that is assigned once in its scope; None where that is not so."""
        if not isinstance(node, cst.Name):
            return None
        bound = self.assignments(node)
        if len(bound) != 1 or not isinstance(bound[0], cst.Name):
            return None
        target = self.parent(bound[0])
        statement = self.parent(target) if isinstance(target, cst.AssignTarget) else target
        if isinstance(statement, cst.Assign) and len(statement.targets) == 1:
            return statement.value
        if isinstance(statement, cst.AnnAssign) and statement.target is bound[0]:
            return statement.value
        return None

    def resolved(self, node: cst.BaseExpression) -> cst.BaseExpression:
        """A variable's value, through several variables where need be, or the node itself."""
        for _ in range(5):
            value = self.value_of(node)
            if value is None:
                return node
            node = value
        return node

    def definition(self, node: cst.BaseExpression) -> cst.CSTNode | None:
        """The function or class that a name stands for, where it is defined once."""
        if not isinstance(node, cst.Name):
            return None
        bound = self.assignments(node)
        if len(bound) == 1 and isinstance(bound[0], cst.FunctionDef | cst.ClassDef):
            return bound[0]
        return None

    def uses(self, node: cst.Name) -> list[cst.Name]:
        """Every place that reads the variable which `node` binds or reads."""
        scope = self.scope(node)
        if scope is None:
            return []
        return [
            access.node
            for entry in scope[node.value]
            for access in entry.references
            if isinstance(access.node, cst.Name)
        ]

    def is_known_before(self, value: cst.BaseExpression, place: cst.CSTNode, later: cst.CSTNode) -> bool:
        """Whether an expression says the same at `place` as at `later`, further down: nothing in it is bound between.

        Calls are never moved: they may do something.
        """
        here, there = self.scope(place), self.scope(later)
        for part in _walk(value):
            if isinstance(part, cst.Call | cst.Await | cst.Lambda | cst.BaseComp | cst.NamedExpr):
                return False
            if (
                not isinstance(part, cst.Name)
                or isinstance(self.parent(part), cst.Attribute)
                and (
                    self.parent(part).attr is part  # type: ignore[union-attr]
                )
            ):
                continue
            scope = self.scope(part)
            if scope is None:
                return False
            entries = [entry for entry in scope[part.value] if not isinstance(entry, BuiltinAssignment)]
            if not entries and part.value not in ("True", "False", "None"):
                return part.value in dir(builtins)
            for entry in entries:
                node = getattr(entry, "node", None)
                same_level = entry.scope is here or isinstance(entry.scope, GlobalScope)
                if node is None or not same_level or not self.comes_before(node, place):
                    return False
        return here is there or not isinstance(there, ClassScope)

    # ------------------------------------------------------------------------------------------------- values

    def literal(self, node: cst.BaseExpression) -> Any:
        """The value of a literal, or of a variable that is assigned a literal once; else `NOT_LITERAL`."""
        try:
            return ast.literal_eval(self.text(self.resolved(node)).strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return NOT_LITERAL


def dotted(node: cst.BaseExpression | None) -> str:
    """`a.b.c` of an import; empty for anything else."""
    if isinstance(node, cst.Name):
        return node.value
    if isinstance(node, cst.Attribute):
        head = dotted(node.value)
        return f"{head}.{node.attr.value}" if head else ""
    return ""


def expression(text: str) -> cst.BaseExpression:
    return cst.parse_expression(text)


def plain(value: Any) -> cst.BaseExpression:
    """A value as Python writes it, with double quotes."""
    if isinstance(value, str) and '"' not in value and "\\" not in value:
        return cst.SimpleString(f'"{value}"')
    if isinstance(value, list):
        return cst.List([cst.Element(plain(entry)) for entry in value])
    return cst.parse_expression(repr(value))


def _root(node: cst.BaseExpression) -> cst.Name | None:
    while isinstance(node, cst.Attribute):
        node = node.value
    return node if isinstance(node, cst.Name) else None


def _walk(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    yield node
    for child in node.children:
        yield from _walk(child)
