"""One module's text -> the text with Phlora and today's names, and what was done and left."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

import libcst as cst

from phlora.migrate.code import Code, dotted, expression
from phlora.migrate.edits import Edits, Remark
from phlora.migrate.given import arguments_of, remove
from phlora.migrate.imports import Imports, canonical
from phlora.migrate.loading import Loading
from phlora.migrate.trainers import OUR_CONFIG, OUR_GET_PEFT_MODEL, OUR_TRAINER, Trainers
from phlora.migrate.unsloth import Unsloth
from phlora.names import IMPORTS

_TAKEN_OVER = ("trl", "unsloth", "loralib")
_MENTIONS = re.compile(rf"\b({'|'.join(_TAKEN_OVER)})\b")
# Whole packages with the same names in them.
PACKAGES = {"loralib": "phlora.lora"}
MOVES = {
    "trl.SFTTrainer": OUR_TRAINER,
    "trl.SFTConfig": OUR_CONFIG,
    "peft.get_peft_model": OUR_GET_PEFT_MODEL,
    "unsloth.UnslothTrainer": OUR_TRAINER,
    "unsloth.UnslothTrainingArguments": OUR_CONFIG,
    "unsloth.is_bfloat16_supported": "transformers.utils.is_torch_bf16_gpu_available",
    "unsloth.is_bf16_supported": "transformers.utils.is_torch_bf16_gpu_available",
    "unsloth.standardize_sharegpt": "phlora.standardize_sharegpt",
    # Called as before, and no more in trl.commands.
    "trl.TrlParser": "trl.TrlParser",
    "trl.init_zero_verbose": "trl.init_zero_verbose",
}


class NoPythonError(Exception):
    """The rewritten module is no Python: a mistake of the rewriting."""


@dataclass(frozen=True)
class Migrated:
    """A module after the migration.

    Attributes:
        text: the whole module.
        remarks: what was changed and what is left, by the lines of the original.
    """

    text: str
    remarks: tuple[Remark, ...]


def migrate_text(text: str) -> Migrated:
    """Rewrite a module; nothing in it is run.

    Args:
        text: Python, without a byte order mark.

    Raises:
        libcst.ParserSyntaxError: it is no Python of today.
        NoPythonError: what came out of it is none, though the module was.
    """
    code = Code(text)
    edits = Edits(code)
    moves = {**{path: old.new for path, old in IMPORTS.items() if old.new and old.same}, **MOVES}
    imports = Imports(edits, {canonical(path): new for path, new in moves.items()}, PACKAGES)
    _metrics(edits, imports)
    Unsloth(edits, imports).update()
    Trainers(edits, imports).update()
    Loading(edits, imports).update()
    _adamw(edits, imports)
    _gone_names(edits, imports)
    _unreadable_imports(edits)
    imports.plan()
    remarks = sorted(edits.remarks, key=lambda remark: remark.line)
    new = edits.apply()
    _require_python(new, text)
    return Migrated(new, tuple(remarks))


def _require_python(new: str, old: str) -> None:
    """Nobody gets a file that Python cannot read for one that it could."""
    try:
        ast.parse(old)
    except (SyntaxError, ValueError):
        return  # Of a later Python than this one, perhaps.
    try:
        ast.parse(new)
    except SyntaxError as error:
        raise NoPythonError(f"{error.msg}: {(error.text or '').strip()}") from None


def _metrics(edits: Edits, imports: Imports) -> None:
    """`load_metric("rouge")` is Phlora's, which asks no hub; other metrics are those of `evaluate`."""
    code = edits.code
    calls = [call for call in code.all(cst.Call) if "datasets.load_metric" in imports.names(call.func)]
    if not calls:
        return
    for call in calls:
        entry = arguments_of(code, call).given.get("trust_remote_code")
        if entry is not None:
            remove(edits, entry, "trust_remote_code is left out: no code is fetched")
    asked = [code.literal(call.args[0].value) if call.args else None for call in calls]
    if all(name == "rouge" for name in asked):
        imports.move("datasets.load_metric", "phlora.load_metric")
    for node in code.all(cst.Attribute):
        # `scores["rouge1"].mid.fmeasure`: a score is a number now.
        if node.attr.value in ("fmeasure", "precision", "recall") and isinstance(node.value, cst.Attribute):
            inner = node.value
            if inner.attr.value not in ("low", "mid", "high"):
                continue
            if (inner.attr.value, node.attr.value) == ("mid", "fmeasure"):
                edits.change(node, lambda updated: updated.value.value)
                edits.say(node, f"{code.text(node)} is {code.text(inner.value)}: a score is a number now")
            else:
                edits.leave(node, f"{code.text(node)}: a score is one number now, the F1")


# What the AdamW of transformers did where nothing was said, and torch's does otherwise.
_ADAMW_DEFAULTS = {"eps": "1e-6", "weight_decay": "0.0"}


def _adamw(edits: Edits, imports: Imports) -> None:
    for call in edits.code.all(cst.Call):
        if "transformers.AdamW" not in imports.names(call.func):
            continue
        arguments = arguments_of(edits.code, call)
        for name in ("no_deprecation_warning", "correct_bias"):
            entry = arguments.given.get(name)
            if entry is None:
                continue
            if name == "correct_bias" and edits.code.literal(entry.value) is not True:
                edits.leave(call, "correct_bias is gone: torch's AdamW always corrects it")
            else:
                remove(edits, entry, f"{name} is left out: nothing else is done")
        if not arguments.are_all_known:
            edits.leave(
                call, f"torch's AdamW has other defaults: {_pairs(_ADAMW_DEFAULTS)} is what this one had"
            )
            continue
        missing = {name: text for name, text in _ADAMW_DEFAULTS.items() if name not in arguments.given}
        positional = sum(argument.keyword is None for argument in call.args)
        if positional > 3:
            edits.leave(call, "torch's AdamW takes its settings by name: lr, betas, eps, weight_decay")
            continue
        for name, text in missing.items():
            edits.of(call).added.append((name, expression(text), None))
        if missing:
            edits.say(call, f"AdamW: {_pairs(missing)} is what it did by default")


def _pairs(settings: dict[str, str]) -> str:
    return ", ".join(f"{name}={text}" for name, text in settings.items())


def _gone_names(edits: Edits, imports: Imports) -> None:
    """Imported names that other libraries no longer have, and that nothing of the same kind replaces."""
    gone = {canonical(path): old for path, old in IMPORTS.items() if not (old.new and old.same)}
    for node in edits.code.all(cst.ImportFrom):
        if node.relative or isinstance(node.names, cst.ImportStar):
            continue
        for alias in node.names:
            name = canonical(f"{dotted(node.module)}.{dotted(alias.name)}")
            if name in gone:
                edits.leave(node, _what_to_do(name, gone[name].new, gone[name].says))
    for attribute in edits.code.all(cst.Attribute):
        for name in imports.names(attribute) & gone.keys():
            if name.rpartition(".")[2] == attribute.attr.value:
                edits.leave(attribute, _what_to_do(name, gone[name].new, gone[name].says))


def _what_to_do(name: str, new: str, says: str) -> str:
    instead = f"; see {new}" if new else ""
    return f"{name} is gone{instead}{': ' + says if says else ''}"


def _unreadable_imports(edits: Edits) -> None:
    """`importlib.import_module("trl")` names a package in a text, which stays as it is, as code in a text does."""
    for call in edits.code.all(cst.Call):
        function = dotted(call.func).rpartition(".")[2]
        if not call.args or function not in ("import_module", "__import__", "exec", "eval"):
            continue
        text = edits.code.literal(call.args[0].value)
        if not isinstance(text, str):
            continue
        if function in ("exec", "eval"):
            if _MENTIONS.search(text):
                edits.leave(call, f"what {function} runs is a text, and is not read here")
        elif text.partition(".")[0] in _TAKEN_OVER:
            edits.leave(
                call,
                f"{text} is imported by its name in a text: what is taken from it cannot be read here",
            )
