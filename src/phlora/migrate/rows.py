"""The column that is trained. Earlier versions of TRL took the one that was named; now `conversations`, `messages` and
`prompt` take its place where they are left in the rows. A script that means its texts gives nothing else here.
"""

from __future__ import annotations

import libcst as cst

from phlora.migrate.code import NOT_LITERAL, Code, expression
from phlora.migrate.edits import Edits
from phlora.migrate.given import Arguments, Given, remove

# They are trained in the place of a text, whatever `dataset_text_field` says.
_TAKE_OVER = frozenset({"conversations", "messages", "prompt", "completion", "chosen", "rejected"})
_DATASETS = ("train_dataset", "eval_dataset")
_READABLE = (cst.Name, cst.Attribute, cst.Subscript)


def may_be_taken_over(code: Code) -> bool:
    """Whether a module reads a column that would be trained in the place of a text."""
    for node in code.all(cst.Subscript):
        if len(node.slice) == 1 and isinstance(node.slice[0].slice, cst.Index):
            key = node.slice[0].slice.value
            if isinstance(key, cst.SimpleString) and key.evaluated_value in _TAKE_OVER:
                return True
    return False


def keep_text_alone(edits: Edits, call: cst.Call, arguments: Arguments, field: cst.BaseExpression) -> None:
    """`train_dataset=rows` with `dataset_text_field` -> the rows with that column alone."""
    code = edits.code
    text = code.text(field)
    for entry in _datasets(code, call, arguments):
        if _has_no_others(code, entry.value):
            continue
        if not isinstance(entry.value, (*_READABLE, cst.Call)):
            edits.leave(
                entry.value,
                f"{entry.name}: drop the columns beside {text}: one of them may be trained in its place",
            )
            continue
        new = f"{code.text(entry.value)}.select_columns([{text}])"
        edits.of(entry.holder).values[entry.index] = expression(new)
        edits.say(
            entry.value,
            f"{entry.name}: the column {text} alone, as dataset_text_field asks for; another one would "
            "be trained in its place",
        )


def map_to_text(
    edits: Edits,
    call: cst.Call,
    arguments: Arguments,
    formatting: Given,
    *,
    made: str,
    field: cst.BaseExpression | None,
) -> None:
    """`formatting_func=f` -> rows that `f` was applied to, without their other columns."""
    code = edits.code
    entries = _datasets(code, call, arguments)
    if not entries or not all(isinstance(entry.value, _READABLE) for entry in entries):
        edits.leave(
            formatting.value,
            "formatting_func: apply it with map(..., remove_columns=...) before: a column that is left may be "
            "trained in the place of its text",
        )
        return
    name = '"text"' if field is None else code.text(field)
    for entry in entries:
        rows = code.text(entry.value)
        new = f"{rows}.map(lambda row: {{{name}: {made}}}, remove_columns={rows}.column_names)"
        edits.of(entry.holder).values[entry.index] = expression(new)
    remove(
        edits,
        formatting,
        f"formatting_func: {code.text(formatting.value)} makes the texts before, and the other columns are left "
        "out; one of them would be trained in the place of the text",
    )


def _datasets(code: Code, call: cst.Call, arguments: Arguments) -> list[Given]:
    found = [arguments.given[name] for name in _DATASETS if name in arguments.given]
    return [entry for entry in found if entry.holder is call and code.literal(entry.value) is NOT_LITERAL]


def _has_no_others(code: Code, value: cst.BaseExpression) -> bool:
    """Whether a data set was made with the columns that it needs."""
    made = code.resolved(value)
    seen: set[cst.CSTNode] = set()
    # `rows = rows.map(...)` is made of itself.
    while isinstance(made, cst.Subscript | cst.Call | cst.Attribute) and made not in seen:
        seen.add(made)
        if isinstance(made, cst.Call) and isinstance(made.func, cst.Attribute):
            if made.func.attr.value in ("select_columns", "from_dict", "from_list"):
                return True
            if made.func.attr.value == "map" and any(
                argument.keyword is not None and argument.keyword.value == "remove_columns"
                for argument in made.args
            ):
                return True
            made = made.func
        elif isinstance(made, cst.Call):
            return False
        else:
            made = code.resolved(made.value)
    return False
