"""What the syntax of a chat template proves about it, without rendering anything."""

from __future__ import annotations

import re
from typing import Any

import jinja2
from jinja2 import nodes

# The function by which templates ask for the date.
CLOCK = "strftime_now"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_END_GENERATION = re.compile(r"\{%-?\s*endgeneration\s*-?%\}")
# By these a message gives away more than one of its keys.
_DICT_METHODS = frozenset(dir(dict))
# What a template may be made of for its contents to be sure to be written as they are.
_STATEMENTS = (nodes.Template, nodes.Output, nodes.TemplateData, nodes.For, nodes.If, nodes.Assign)


def writes_contents_only(template: str) -> bool:
    """Whether a chat template provably writes contents as they are and decides nothing by what they say.

    Sufficient, not necessary: contents are only added to texts and written, or asked whether they are empty;
    messages are only looped over and asked for their role, or for keys that plain messages do not have. What is
    kept in a variable, filtered, compared or captured counts as looked into.
    """
    try:
        # Generation markers write what stands between them as it is.
        tree = jinja2.Environment().parse(
            _GENERATION.sub("{% if true %}", _END_GENERATION.sub("{% endif %}", template))
        )
    except jinja2.TemplateError:
        return False  # tags of other extensions
    parents = {child: node for node in _all_nodes(tree) for child in node.iter_child_nodes()}
    loops = [loop for loop in tree.find_all(nodes.For) if _is_name(loop.iter, "messages")]
    items = {loop.target.name for loop in loops if isinstance(loop.target, nodes.Name)}
    if any(isinstance(n, nodes.Stmt) and not isinstance(n, _STATEMENTS) for n in _all_nodes(tree)):
        return False
    return all(_is_harmless(node, parents, items) for node in _all_nodes(tree))


def _is_harmless(node: nodes.Node, parents: dict[nodes.Node, nodes.Node], items: set[str]) -> bool:
    """Whether one node uses messages and contents only as `writes_contents_only` allows."""
    key = _key_of(node)
    if key == "content":
        return _is_written(node, parents) or _is_condition(node, parents)
    if key in ("previtem", "nextitem") or _is_name(node, "self") or _is_name(node, CLOCK):
        return False
    if _is_name(node, "messages"):
        parent = parents[node]
        is_first_or_last = isinstance(parent, nodes.Getitem) and _is_constant(parent.arg)
        return isinstance(parent, nodes.For) or (is_first_or_last and _key_of(parents[parent]) == "role")
    if isinstance(node, nodes.Name) and node.name in items:
        parent = parents[node]
        if isinstance(parent, nodes.For):
            return parent.target is node
        if isinstance(parent, nodes.Operand):
            asks = parents[parent]
            return (
                parent.op in ("in", "notin")
                and isinstance(asks, nodes.Compare)
                and isinstance(asks.expr, nodes.Const)
            )
        asked = _key_of(parent)
        return isinstance(asked, str) and asked not in _DICT_METHODS
    return True


def _is_written(node: nodes.Node, parents: dict[nodes.Node, nodes.Node]) -> bool:
    """Whether a value is only put among texts that are written."""
    parent = parents[node]
    while isinstance(parent, nodes.Add | nodes.Concat):
        parent = parents[parent]
    return isinstance(parent, nodes.Output)


def _is_condition(node: nodes.Node, parents: dict[nodes.Node, nodes.Node]) -> bool:
    """Whether a value only chooses a branch by being empty or not."""
    while isinstance(parents[node], nodes.And | nodes.Or | nodes.Not):
        node = parents[node]
    parent = parents[node]
    return isinstance(parent, nodes.If) and parent.test is node


def _is_constant(node: nodes.Node) -> bool:
    return isinstance(node.node if isinstance(node, nodes.Neg) else node, nodes.Const)


def _all_nodes(tree: nodes.Node) -> list[nodes.Node]:
    return [tree, *tree.find_all(nodes.Node)]


def _is_name(node: nodes.Node, name: str) -> bool:
    return isinstance(node, nodes.Name) and node.name == name


def _key_of(node: nodes.Node) -> Any:
    """The key of `a.key` or `a['key']`; None for other nodes."""
    if isinstance(node, nodes.Getattr):
        return node.attr
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        return node.arg.value
    return None
