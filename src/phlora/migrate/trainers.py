"""Trainers and their configurations: today's names, and arguments that moved from the one to the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import libcst as cst

from phlora.migrate.code import Code, expression, plain
from phlora.migrate.edits import Edits, comment_of
from phlora.migrate.given import (
    Arguments,
    Given,
    arguments_of,
    asks_for_nothing,
    remove,
    update,
    update_arguments,
    update_attributes,
)
from phlora.migrate.imports import Imports
from phlora.migrate.rows import keep_text_alone, map_to_text, may_be_taken_over
from phlora.migrate.unread import leave_old_names, leave_old_value
from phlora.names import ARGUMENTS, LORA, SETTINGS, TRAINER

OUR_TRAINER, OUR_CONFIG = "phlora.SFTTrainer", "phlora.SFTConfig"
OUR_ARGUMENTS, OUR_GET_PEFT_MODEL = "phlora.TrainingArguments", "phlora.get_peft_model"
SFT_TRAINERS = frozenset({"trl.SFTTrainer", "unsloth.UnslothTrainer", OUR_TRAINER})
SFT_CONFIGS = frozenset({"trl.SFTConfig", "unsloth.UnslothTrainingArguments", OUR_CONFIG})
PLAIN_CONFIGS = frozenset({"transformers.TrainingArguments", OUR_ARGUMENTS})
# They have the fields of TrainingArguments as well.
OTHER_CONFIGS = frozenset(
    ("transformers.Seq2SeqTrainingArguments",)
    + tuple(f"trl.{kind}Config" for kind in ("DPO", "KTO", "ORPO", "CPO", "Reward", "GRPO", "RLOO", "PPO"))
)
OTHER_TRAINERS = frozenset(
    ("transformers.Trainer", "transformers.Seq2SeqTrainer")
    + tuple(f"trl.{kind}Trainer" for kind in ("DPO", "KTO", "ORPO", "CPO", "Reward", "GRPO", "RLOO", "PPO"))
)
# What TrainingArguments does where nothing is said and SFTConfig does otherwise, and what is trained depends on it.
KEPT_DEFAULTS: Mapping[str, Any] = {"learning_rate": 5e-5, "bf16": False}
# Where the configuration stands in the calls of a trainer, in every version of TRL.
_PLACE_OF_ARGS = 1
_PRECISIONS = ("bf16", "fp16")
# What `compute_loss` is given since the end of 2024.
ITEMS = "num_items_in_batch"


class Trainers:
    """The calls of trainers in a module, and of the configurations that they get."""

    def __init__(self, edits: Edits, imports: Imports) -> None:
        self.edits, self.imports, self.code = edits, imports, edits.code
        self._added: dict[cst.Call, dict[str, str]] = {}
        self._subclasses = self._classes_of(SFT_TRAINERS)
        self._config_classes = self._classes_of(SFT_CONFIGS | PLAIN_CONFIGS | OTHER_CONFIGS)

    def _classes_of(self, names: frozenset[str]) -> dict[cst.CSTNode, frozenset[str]]:
        """Classes that are made as one of these names is, each with the names that its body binds."""
        found = {}
        for node in self.code.all(cst.ClassDef):
            if not any(self.imports.names(base.value) & names for base in node.bases):
                continue
            bound = {part.name.value for part in node.body.body if isinstance(part, cst.FunctionDef)}
            bound |= {name.value for name, _ in self._fields(node)}
            if "__init__" not in bound:
                found[node] = frozenset(bound)
        return found

    def _fields(self, node: cst.ClassDef) -> Iterator[tuple[cst.Name, cst.CSTNode]]:
        """The fields of a class, each with the statement that binds it."""
        for part in self.code.all(cst.AnnAssign, cst.Assign):
            target = part.target if isinstance(part, cst.AnnAssign) else part.targets[0].target
            if (
                isinstance(target, cst.Name)
                and self.code.enclosing(part, cst.ClassDef, cst.FunctionDef) is node
            ):
                yield target, part

    def update(self) -> None:
        for node in self._config_classes:
            self._config_class(node)
        for node in self.code.all(cst.ClassDef):
            if any(self.imports.names(base.value) & (SFT_TRAINERS | OTHER_TRAINERS) for base in node.bases):
                self._methods(node)
        configs = []
        for call in list(self.code.all(cst.Call)):
            names = self.imports.names(call.func)
            made_of = self.code.definition(call.func)
            if names & (SFT_CONFIGS | PLAIN_CONFIGS | OTHER_CONFIGS):
                configs.append(call)
                self._config(call)
            elif made_of in self._config_classes:
                configs.append(call)
                own = self._config_classes[made_of]
                update_arguments(
                    self.edits, call, ARGUMENTS[SETTINGS], only=frozenset(ARGUMENTS[SETTINGS]) - own
                )
            elif names & SFT_TRAINERS or made_of in self._subclasses:
                self._trainer(call)
            elif names & OTHER_TRAINERS:
                update_arguments(self.edits, call, ARGUMENTS[TRAINER], only=frozenset({"tokenizer"}))
                self._attributes(call, TRAINER)
            elif "peft.LoraConfig" in names:
                update_arguments(self.edits, call, ARGUMENTS[LORA])
        leave_old_names(self.edits, configs, ARGUMENTS[SETTINGS])

    def _methods(self, trainer: cst.ClassDef) -> None:
        """A loss with the arguments of 2024: its call has one more now."""
        for part in trainer.body.body:
            if not isinstance(part, cst.FunctionDef) or part.name.value != "compute_loss":
                continue
            taken = {each.name.value for each in (*part.params.params, *part.params.kwonly_params)}
            if ITEMS not in taken and part.params.star_kwarg is None:
                self.edits.leave(
                    part,
                    f"compute_loss is called with {ITEMS} now, the trained tokens of the step: add {ITEMS}=None, and "
                    "pass it to super().compute_loss, or divide a sum over the tokens by it",
                )

    # ------------------------------------------------------------------------------------------ configurations

    def _config_class(self, node: Any) -> None:
        """Fields of a class of one's own that hide what they were in an earlier version: others may read them."""
        for name, statement in self._fields(node):
            leave_old_value(self.edits, name.value, statement)
            old = ARGUMENTS[SETTINGS].get(name.value)
            if old is not None and old.new and old.fate != "moved":
                self.edits.leave(
                    statement,
                    f"{name.value} is {old.new} now: rename the field, and where it is read",
                )

    def _config(self, call: cst.Call) -> None:
        arguments = update_arguments(self.edits, call, ARGUMENTS[SETTINGS])
        for entry in arguments.given.values():
            old = ARGUMENTS[SETTINGS].get(entry.name)
            if old is not None and old.fate == "moved":
                self.edits.leave(
                    entry.value, f"{entry.name} is an argument of {old.to}: {old.to}({old.new}=...)"
                )
        self._attributes(call, SETTINGS)
        is_early = "max_seq_length" in arguments.given and self.imports.names(call.func) & SFT_CONFIGS
        if is_early and arguments.are_all_known and "learning_rate" not in arguments.given:
            self.edits.say(
                call,
                "learning_rate is not said: SFTConfig's own is 2e-5 now, and was 5e-5 in its first versions",
            )

    def _attributes(self, call: cst.Call, of: str) -> None:
        statement = self.code.parent(call)
        if isinstance(statement, cst.Assign) and len(statement.targets) == 1:
            name = statement.targets[0].target
            if isinstance(name, cst.Name) and self.code.value_of(name) is call:
                update_attributes(self.edits, name, ARGUMENTS[of])

    # ------------------------------------------------------------------------------------------------ trainers

    def _trainer(self, call: cst.Call) -> None:
        arguments = arguments_of(self.code, call)
        moved: list[Given] = []
        for entry in arguments.given.values():
            old = ARGUMENTS[TRAINER].get(entry.name)
            if old is None:
                continue
            if old.fate == "moved" and asks_for_nothing(self.code, entry, old):
                remove(self.edits, entry, f"{entry.name} is left out: it asked for nothing")
            elif old.fate == "moved":
                moved.append(entry)
            else:
                update(self.edits, entry, old, arguments)
        config = self._given_config(call, arguments)
        self._move(call, config, moved, arguments)
        if config is None or not moved:
            self._take_our_arguments(config)
        self._rows(call, arguments, config)
        self._adapter(call, arguments)
        self._attributes(call, TRAINER)

    def _given_config(self, call: cst.Call, arguments: Arguments) -> Given | None:
        if "args" in arguments.given:
            return arguments.given["args"]
        positional = [argument for argument in call.args if argument.keyword is None]
        if len(positional) > _PLACE_OF_ARGS and not any(argument.star for argument in positional):
            return Given("args", positional[_PLACE_OF_ARGS].value, call, _PLACE_OF_ARGS)
        return None

    def config_call(self, given: Given) -> cst.Call | None:
        """The call that makes a trainer's configuration, where it stands in the module."""
        value = self.code.resolved(given.value)
        known = SFT_CONFIGS | PLAIN_CONFIGS
        return value if isinstance(value, cst.Call) and self.imports.names(value.func) & known else None

    def _take_our_arguments(self, given: Given | None) -> None:
        """`TrainingArguments` of which nothing more is asked than today stay, in the kind that knows old names."""
        call = self.config_call(given) if given is not None else None
        if call is not None and "transformers.TrainingArguments" in self.imports.names(call.func):
            self.imports.retarget(call.func, OUR_ARGUMENTS)  # type: ignore[arg-type]
            self.edits.say(call, f"{self.code.text(call.func)} is {OUR_ARGUMENTS}")

    def _move(self, call: cst.Call, config: Given | None, moved: list[Given], arguments: Arguments) -> None:
        if not moved:
            return
        if config is None:
            if arguments.are_all_known and all(entry.holder is call for entry in moved):
                self._new_config(call, moved)
            else:
                self._leave(call, moved, "what is spread into this call cannot be read here")
            return
        target = self.config_call(config)
        if target is None:
            self._leave(call, moved, f"where {self.code.text(config.value)} is made cannot be read here")
            return
        known = arguments_of(self.code, target)
        if not self._as_sft_config(target, known):
            self._leave(call, moved, "TrainingArguments is made of settings that cannot be read here")
            return
        for entry in moved:
            self._move_one(call, target, entry, known)

    def _leave(self, call: cst.Call, moved: list[Given], why: str) -> None:
        for entry in moved:
            new = ARGUMENTS[TRAINER][entry.name].spelled
            self.edits.leave(call, f"{entry.name} is {new} now; {why}")

    def _move_one(self, call: cst.Call, target: cst.Call, entry: Given, known: Arguments) -> None:
        old = ARGUMENTS[TRAINER][entry.name]
        text = self.code.text(entry.value)
        added = self._added.setdefault(target, {})
        there = known.given.get(old.new) or known.given.get(entry.name)
        written = self.code.text(there.value) if there is not None else added.get(old.new)
        if written is not None:
            if written != text and not (there is not None and self._is_default_anyway(there)):
                self.edits.leave(
                    call, f"{entry.name} is {old.spelled} now, which says {written}: keep one of them"
                )
                return
            remove(self.edits, entry, f"{entry.name} is left out: {old.spelled} says it")
            return
        if not known.are_all_known:
            self.edits.leave(
                call, f"{entry.name} is {old.spelled} now; what is spread into {SETTINGS} may say it"
            )
            return
        is_inside = self._is_inside(target, call)
        if not is_inside and not self.code.is_known_before(entry.value, target, call):
            self.edits.leave(call, f"{entry.name} is {old.spelled} now; {text} is not known there yet")
            return
        added[old.new] = text
        self._add(target, old.new, entry.value, _comment(entry))
        remove(self.edits, entry, f"{entry.name} is {old.spelled}")

    def _is_default_anyway(self, entry: Given) -> bool:
        return self.code.literal(entry.value) is None

    def _is_inside(self, node: cst.CSTNode, outer: cst.CSTNode) -> bool:
        at: cst.CSTNode | None = node
        while at is not None and at is not outer:
            at = self.code.parent(at)
        return at is outer

    def _add(
        self, target: cst.Call, name: str, value: cst.BaseExpression, comment: cst.Comment | None = None
    ) -> None:
        self.edits.of(target).added.append((name, value.deep_clone(), comment))

    def _as_sft_config(self, call: cst.Call, known: Arguments) -> bool:
        """Make an SFTConfig of TrainingArguments, and say in it what TrainingArguments does by default."""
        if not self.imports.names(call.func) & PLAIN_CONFIGS or call in self._added:
            return True
        if not known.are_all_known:
            return False
        self._added[call] = {}
        kept = []
        for name, value in KEPT_DEFAULTS.items():
            if name not in known.given and not (name == "bf16" and "fp16" in known.given):
                self._add(call, name, plain(value))
                kept.append(f"{name}={value}")
        self.imports.retarget(call.func, OUR_CONFIG)  # type: ignore[arg-type]
        why = f"; {', '.join(kept)} is what {self.code.text(call.func)} did by default" if kept else ""
        self.edits.say(call, f"{self.code.text(call.func)} is {OUR_CONFIG}{why}")
        return True

    def _new_config(self, call: cst.Call, moved: list[Given]) -> None:
        """`args=SFTConfig(...)` for a trainer that had none; earlier versions made TrainingArguments then."""
        name = self.imports.need(OUR_CONFIG, call.func)
        values = [f"{ARGUMENTS[TRAINER][entry.name].new}={self.code.text(entry.value)}" for entry in moved]
        values += [f"{key}={value}" for key, value in KEPT_DEFAULTS.items()]
        made = expression(f'{name}(output_dir="tmp_trainer", {", ".join(values)})')
        self.edits.of(call).added.append(("args", made, None))
        for entry in moved:
            remove(self.edits, entry, f"{entry.name} is {ARGUMENTS[TRAINER][entry.name].spelled}")
        self.edits.say(call, f"args={SETTINGS}(...) says what the trainer did by default")

    # ---------------------------------------------------------------------------------- formatting, adapters

    def _rows(self, call: cst.Call, arguments: Arguments, config: Given | None) -> None:
        """What the rows of a script for an earlier TRL train is said so that nothing else can be trained."""
        formatting = arguments.given.get("formatting_func")
        field = self._old_text_field(arguments, config)
        if formatting is None:
            if field is not None and self._is_in_danger:
                keep_text_alone(self.edits, call, arguments, field)
            return
        made = self._formatted(formatting)
        if made is None or self.code.literal(formatting.value) is None:
            return
        if self._is_in_danger and not isinstance(formatting.value, cst.Lambda):
            map_to_text(self.edits, call, arguments, formatting, made=made, field=field)
        elif made != f"{self.code.text(formatting.value)}(row)":
            self.edits.of(formatting.holder).values[formatting.index] = expression(f"lambda row: {made}")
            self.edits.say(formatting.value, f"formatting_func gets one row now: {made}")

    @cached_property
    def _is_in_danger(self) -> bool:
        return may_be_taken_over(self.code)

    def _old_text_field(self, arguments: Arguments, config: Given | None) -> cst.BaseExpression | None:
        """The column that is trained, where it is said in the way of a TRL that trained no other."""
        if "dataset_text_field" in arguments.given:
            return arguments.given["dataset_text_field"].value
        call = self.config_call(config) if config is not None else None
        settings = arguments_of(self.code, call).given if call is not None else {}
        is_old = any(name in settings or name in arguments.given for name in ("max_seq_length", "tokenizer"))
        return settings["dataset_text_field"].value if is_old and "dataset_text_field" in settings else None

    def _formatted(self, entry: Given) -> str | None:
        """How a row becomes a text by formatting_func; None where that cannot be read.

        Earlier versions gave the function many rows and took a list of texts; now it gets one row.
        """
        text = self.code.text(entry.value)
        function = self.code.definition(entry.value)
        if not isinstance(function, cst.FunctionDef):
            is_lambda = isinstance(self.code.resolved(entry.value), cst.Lambda)
            if isinstance(entry.value, cst.Name) and not is_lambda:
                self.edits.leave(
                    entry.value,
                    f"formatting_func gets one row and returns its text now; {text} cannot be read here",
                )
            return None
        if not returns_list(self.code, function):
            return f"{text}(row)"
        if _leaves_rows_out(function):
            self.edits.leave(
                entry.value,
                f"formatting_func gets one row and returns its text now; {text} takes many and may leave some out",
            )
            return None
        return f"{text}({{name: [value] for name, value in row.items()}})[0]"

    def _adapter(self, call: cst.Call, arguments: Arguments) -> None:
        """An adapter is made once: earlier versions ignored peft_config where the model had one already."""
        config = arguments.given.get("peft_config")
        model = arguments.given.get("model")
        value = model.value if model is not None else call.args[0].value if call.args else None
        if config is None or value is None or self.code.literal(config.value) is None:
            return
        made = self._last_value(value, call)
        if isinstance(made, cst.Call) and self.imports.names(made.func) & {
            "peft.get_peft_model",
            "phlora.get_peft_model",
            "unsloth.get_peft_model",
        }:
            remove(self.edits, config, "peft_config is left out: the model has its adapter already")

    def _last_value(self, node: cst.BaseExpression, call: cst.Call) -> cst.BaseExpression | None:
        """What was last assigned to a variable before a call, at the same level of the same block."""
        if not isinstance(node, cst.Name):
            return node
        before = [bound for bound in self.code.assignments(node) if self.code.comes_before(bound, call)]
        if not before:
            return None
        target = self.code.parent(before[-1])
        statement = self.code.parent(target) if isinstance(target, cst.AssignTarget) else None
        if not isinstance(statement, cst.Assign):
            return None
        outer = self.code.enclosing(
            statement, cst.If, cst.Try, cst.For, cst.While, cst.FunctionDef, cst.Module
        )
        same = self.code.enclosing(call, cst.If, cst.Try, cst.For, cst.While, cst.FunctionDef, cst.Module)
        return statement.value if outer is same or isinstance(outer, cst.Module) else None


def _comment(entry: Given) -> cst.Comment | None:
    entries = entry.holder.args if isinstance(entry.holder, cst.Call) else entry.holder.elements
    return comment_of(entries[entry.index])


def returns_list(code: Code, function: cst.FunctionDef) -> bool:
    """Whether a function returns a list of texts, as far as its own text tells."""
    lists = set()
    for node in _inside(function):
        if (
            isinstance(node, cst.Assign)
            and len(node.targets) == 1
            and isinstance(node.targets[0].target, cst.Name)
        ):
            value = node.value
            is_call = (
                isinstance(value, cst.Call)
                and isinstance(value.func, cst.Name)
                and value.func.value == "list"
            )
            if isinstance(value, cst.List | cst.ListComp) or is_call:
                lists.add(node.targets[0].target.value)
    return any(
        isinstance(node, cst.Return)
        and (
            isinstance(node.value, cst.List | cst.ListComp)
            or (isinstance(node.value, cst.Name) and node.value.value in lists)
        )
        for node in _inside(function)
    )


def _leaves_rows_out(function: cst.FunctionDef) -> bool:
    """Whether texts are appended under a condition, or not at all for some rows."""
    for node in _inside(function):
        if isinstance(node, cst.Continue | cst.Break):
            return True
        if isinstance(node, cst.CompIf):
            return True
        if isinstance(node, cst.If) and not node.orelse and _appends(node):
            return True
    return False


def _appends(node: cst.CSTNode) -> bool:
    return any(
        isinstance(part, cst.Call)
        and isinstance(part.func, cst.Attribute)
        and part.func.attr.value in ("append", "extend")
        for part in _inside(node)
    )


def _inside(node: cst.CSTNode) -> Any:
    for child in node.children:
        yield child
        if not isinstance(child, cst.FunctionDef | cst.Lambda | cst.ClassDef):
            yield from _inside(child)
