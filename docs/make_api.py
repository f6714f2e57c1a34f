"""Writes docs/api.md, and tests/unit/public_names.json, from the public names and their docstrings.

    python docs/make_api.py

Run it after a change to a public name or docstring. Tests hold both files to the source.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "api.md"
NAMES = ROOT / "tests" / "unit" / "public_names.json"
MODULES = {
    "phlora": "From a chat file to a proven adapter, and the parts that this is made of.",
    "phlora.lora": "loralib's layers with torch alone; [lora.md](lora.md) tells how they are used.",
    "phlora.testing": "Tiny models, chats and commands for the tests of tools that stand on Phlora.",
}
HEAD = """\
# Python interface

Every public name, its signature and what it says of itself. What is not on this page may move between versions; what is
on it changes with a line in the [changelog](../CHANGELOG.md). Written by `python docs/make_api.py` from the docstrings.
"""
_SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Yields", "Source")
_WIDTH = 110


# ------------------------------------------------------------------------------------------------------ signatures


def signature_of(value: Any) -> str:
    """The parameters as they are written in the source, and the result."""
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return "(...)"
    parts: list[str] = []
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    for number, parameter in enumerate(signature.parameters.values()):
        if parameter.name == "self":
            continue
        first_named = inspect.Parameter.KEYWORD_ONLY not in kinds[:number]
        if parameter.kind is parameter.KEYWORD_ONLY and first_named and parameter.VAR_POSITIONAL not in kinds:
            parts.append("*")
        parts.append(_parameter(parameter))
    result = "" if inspect.isclass(value) else _annotation(signature.return_annotation, " -> ")
    return f"({', '.join(parts)}){result}"


def _parameter(parameter: inspect.Parameter) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    text = stars + parameter.name + _annotation(parameter.annotation, ": ")
    if parameter.default is parameter.empty:
        return text
    default = repr(parameter.default)
    # What is made anew for each object has no name, and a chat template fills the page.
    default = "..." if default.startswith("<") or len(default) > _WIDTH else default
    return f"{text} = {default}" if ": " in text else f"{text}={default}"


def _annotation(value: Any, before: str) -> str:
    if value is inspect.Parameter.empty or value is None:
        return f"{before}None" if value is None else ""
    return before + (value if isinstance(value, str) else inspect.formatannotation(value))


def members_of(value: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties that a class of Phlora defines itself."""
    for name, member in vars(value).items():
        if isinstance(member, staticmethod | classmethod):
            member = member.__func__
        if (
            not name.startswith("_")
            and (inspect.isfunction(member) or isinstance(member, property))
            and member.__doc__
        ):
            yield name, member


# ------------------------------------------------------------------------------------------------------ what there is


def names_of(module: ModuleType) -> list[str]:
    return [name for name in module.__all__ if not name.startswith("__")]


def public_names() -> dict[str, str]:
    """Every public name with its signature; methods as `Class.method`, fields as `Class.field`."""
    found = {}
    for path in MODULES:
        module = importlib.import_module(path)
        for name in names_of(module):
            value = getattr(module, name)
            found[f"{path}.{name}"] = signature_of(value) if callable(value) else type(value).__name__
            if not inspect.isclass(value):
                continue
            for method, member in members_of(value):
                text = "property" if isinstance(member, property) else signature_of(member)
                found[f"{path}.{name}.{method}"] = text
    return found


def groups() -> dict[str, str]:
    """The heading in the source of phlora/__init__.py under which each name stands."""
    heading, found = "", {}
    for line in (ROOT / "src" / "phlora" / "__init__.py").read_text(encoding="utf-8").splitlines():
        if comment := re.match(r"    # (.+)", line):
            heading = comment[1]
        elif entry := re.match(r'    "(\w+)": "phlora\.', line):
            found[entry[1]] = heading
    return found


# ---------------------------------------------------------------------------------------------------------- the page


def render() -> str:
    """The whole page."""
    parts = [HEAD]
    heading_of = groups()
    for path, purpose in MODULES.items():
        module = importlib.import_module(path)
        parts.append(f"## {path}\n\n{purpose}\n")
        before = ""
        for name in names_of(module):
            heading = heading_of.get(name, "") if path == "phlora" else ""
            if heading != before:
                parts.append(f"### {heading[0].upper()}{heading[1:]}\n")
                before = heading
            parts.append(_entry(path, name, getattr(module, name)))
    return "\n".join(parts)


def _entry(path: str, name: str, value: Any) -> str:
    kind = "class " if inspect.isclass(value) else ""
    if not callable(value):
        return f"#### `{path}.{name}`\n\nA {type(value).__name__}.\n"
    if inspect.isclass(value) and issubclass(value, Exception):
        parents = [base.__name__ for base in value.__bases__]
        head = f"#### `{name}({', '.join(parents)})`\n"
        return head + f"\n{_text(value)}\n"
    parts = [
        f"#### `{name}`\n",
        f"```text\n{_wrapped(kind + name, signature_of(value))}\n```\n",
        _text(value) + "\n",
    ]
    if inspect.isclass(value):
        parts += _fields(value)
        listed = [_member(method, member) for method, member in members_of(value)]
        if listed:
            parts.append("\n".join(listed) + "\n")
    return "\n".join(parts)


def _fields(value: type) -> list[str]:
    """What the fields of a configuration say of themselves; those of another library are told there."""
    is_own = dataclasses.is_dataclass(value) and "__dataclass_fields__" in vars(value)
    fields = dataclasses.fields(value) if is_own else ()
    told = [
        f"- `{field.name}`: {_inline(field.metadata['help'])}" for field in fields if "help" in field.metadata
    ]
    return ["\n".join(told) + "\n"] if told else []


def _member(name: str, member: Any) -> str:
    signature = "" if isinstance(member, property) else signature_of(member)
    summary = _inline(inspect.getdoc(member) or "").split("\n\n")[0].replace("\n", " ")
    return f"- `.{name}{signature}`: {summary}"


def _wrapped(name: str, signature: str) -> str:
    """On one line where that fits, else a parameter a line."""
    if len(name + signature) <= _WIDTH:
        return name + signature
    inner, _, result = signature.removeprefix("(").rpartition(")")
    lines = "".join(f"    {part},\n" for part in _split(inner))
    return f"{name}(\n{lines}){result}"


def _split(text: str) -> list[str]:
    """At the commas that stand in no bracket or quotation."""
    parts, depth, start, quote = [], 0, 0, ""
    for place, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append(text[start:place].strip())
            start = place + 1
    return [*parts, text[start:].strip()]


def _text(value: Any) -> str:
    """A docstring in Google's style as Markdown."""
    own = value.__doc__ if not inspect.isclass(value) or "__doc__" in vars(value) else None
    if dataclasses.is_dataclass(value) and (own or "").startswith(f"{value.__name__}("):
        own = None
    blocks: list[str] = []
    for block in re.split(r"\n\n", inspect.cleandoc(own or "")):
        head, _, body = block.partition("\n")
        section = head.removesuffix(":")
        if head.endswith(":") and section in _SECTIONS and body:
            blocks.append(f"*{section}*\n\n{_listed(textwrap.dedent(body))}")
        elif block.startswith((">>>", "    ")):
            blocks.append(f"```text\n{inspect.cleandoc(block) if block.startswith('    ') else block}\n```")
        else:
            blocks.append(_inline(block))
    return "\n\n".join(blocks)


def _listed(body: str) -> str:
    """Entries `name: text`, each with the lines that go on with it."""
    entries: list[str] = []
    for line in body.splitlines():
        if line.startswith(" ") and entries:
            entries[-1] += "\n  " + _inline(line.strip())
            continue
        name, colon, text = line.partition(": ")
        is_named = colon and re.fullmatch(r"[\w, .*()\[\]]+", name)
        entries.append(f"- `{name}`: {_inline(text)}" if is_named else f"- {_inline(line)}")
    return "\n".join(entries)


def _inline(text: str) -> str:
    """Angle brackets would be taken for tags outside of code."""
    return "".join(
        part if number % 2 else part.replace("<", "&lt;")
        for number, part in enumerate(re.split(r"(`[^`]*`)", text))
    )


def write(path: Path, make: Callable[[], str]) -> None:
    path.write_text(make(), encoding="utf-8")


def render_names() -> str:
    return json.dumps(public_names(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    write(PAGE, render)
    write(NAMES, render_names)
