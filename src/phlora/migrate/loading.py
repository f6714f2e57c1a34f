"""How models are loaded: today's names, quantisation as a configuration, and devices that may be missing."""

from __future__ import annotations

import libcst as cst

from phlora.migrate.code import NOT_LITERAL, expression
from phlora.migrate.edits import Edits
from phlora.migrate.given import Arguments, Given, entries_of, remove, update, update_arguments
from phlora.migrate.imports import Imports
from phlora.names import ARGUMENTS, FROM_PRETRAINED, Old

_LOADERS = ("transformers.", "peft.", "trl.")
_FLASH = ("flash_attention_2", "flash_attention_3")
_GPU = ("cuda", "cuda:0")
_BITS = ("load_in_4bit", "load_in_8bit")
_BNB = "transformers.BitsAndBytesConfig"
_LOAD_DATASET = {
    old.name: old
    for old in (
        Old("use_auth_token", "renamed", "token"),
        Old("ignore_verifications", "renamed", "verification_mode", values={True: "no_checks", False: None}),
        Old("trust_remote_code", "idle", says="no code beside data is run any more"),
        Old("task", "idle", says="columns are read as they are"),
    )
}
# Built into transformers; the code beside these models is of 2024, and does not run any more.
_BUILT_IN = (
    "microsoft/phi-3-mini",
    "microsoft/phi-3-medium",
    "microsoft/phi-3.5-mini",
    "microsoft/phi-4-mini-i",
)


class Loading:
    """The calls of a module that load models, tokenizers and pipelines."""

    def __init__(self, edits: Edits, imports: Imports) -> None:
        self.edits, self.imports, self.code = edits, imports, edits.code

    def update(self) -> None:
        for call in list(self.code.all(cst.Call)):
            if self._loads(call):
                arguments = update_arguments(self.edits, call, ARGUMENTS[FROM_PRETRAINED])
                self._quantization(call, arguments)
                self._inner(call, arguments)
                self._machine(call, arguments)
                self._own_code(call, arguments)
            elif "datasets.load_dataset" in self.imports.names(call.func):
                update_arguments(self.edits, call, _LOAD_DATASET)
            elif isinstance(call.func, cst.Attribute) and call.func.attr.value == "to":
                self._to_cuda(call)

    def _loads(self, call: cst.Call) -> bool:
        if "transformers.pipeline" in self.imports.names(call.func):
            return True
        if not isinstance(call.func, cst.Attribute) or call.func.attr.value not in (
            "from_pretrained",
            "from_config",
        ):
            return False
        return any(name.startswith(_LOADERS) for name in self.imports.names(call.func.value))

    def _quantization(self, call: cst.Call, arguments: Arguments) -> None:
        given = [arguments.given[name] for name in _BITS if name in arguments.given]
        if not given:
            return
        other = arguments.given.get("quantization_config")
        for entry in given:
            if other is not None or self.code.literal(entry.value) in (False, None):
                why = "quantization_config says it" if other is not None else "it asked for nothing"
                remove(self.edits, entry, f"{entry.name} is left out: {why}")
        left = [entry for entry in given if entry.index not in self.edits.of(entry.holder).removed]
        if not left:
            return
        name = self.imports.need(_BNB, _callee(call))
        asked = ", ".join(f"{entry.name}={self.code.text(entry.value)}" for entry in left)
        made = f"{name}({asked})"
        unsure = [
            self.code.text(entry.value) for entry in left if self.code.literal(entry.value) is NOT_LITERAL
        ]
        if len(unsure) == len(left):
            made = f"{made} if {' or '.join(unsure)} else None"
        first = left[0]
        self.edits.of(first.holder).renamed[first.index] = "quantization_config"
        self.edits.of(first.holder).values[first.index] = expression(made)
        for entry in left:
            self.edits.say(entry.value, f"{entry.name} is quantization_config={name}({entry.name}=...)")
        for entry in left[1:]:
            self.edits.of(entry.holder).removed.add(entry.index)

    def _inner(self, call: cst.Call, arguments: Arguments) -> None:
        """`pipeline(model_kwargs={...})`: what the model is loaded with."""
        if "model_kwargs" not in arguments.given:
            return
        entries = entries_of(self.code, self.code.resolved(arguments.given["model_kwargs"].value)) or []
        inner = Arguments({entry.name: entry for entry in entries}, True)
        for entry in entries:
            if entry.name in ARGUMENTS[FROM_PRETRAINED]:
                update(self.edits, entry, ARGUMENTS[FROM_PRETRAINED][entry.name], inner)
        self._quantization(call, inner)

    # --------------------------------------------------------------------------------------- devices, kernels

    def _machine(self, call: cst.Call, arguments: Arguments) -> None:
        for entry in self._with_inner(arguments):
            if entry.name == "attn_implementation" and self._says(entry, _FLASH):
                value = self.code.text(entry.value)
                test = self.imports.need("transformers.utils.is_flash_attn_2_available", _callee(call))
                self._set(
                    entry, f'{value} if {test}() else "sdpa"', f"{value} where it is installed, else sdpa"
                )
            elif entry.name == "use_flash_attention_2" and self.code.literal(entry.value) is True:
                test = self.imports.need("transformers.utils.is_flash_attn_2_available", _callee(call))
                self._set(
                    entry,
                    f'"flash_attention_2" if {test}() else "sdpa"',
                    "flash_attention_2 where it is installed, else sdpa",
                )
            elif entry.name in ("device_map", "device") and self._says(entry, _GPU):
                self._on_cuda(entry, call)
            elif entry.name == "device" and self.code.text(self.code.resolved(entry.value)) == "0":
                self._on_cuda(entry, call)
            elif entry.name == "device_map" and self.code.literal(entry.value) in (
                {"": 0},
                {"": "cuda"},
                {"": "cuda:0"},
            ):
                self._on_cuda(entry, call)

    def _with_inner(self, arguments: Arguments) -> list[Given]:
        """The arguments of a loader, with those in `model_kwargs`."""
        found = list(arguments.given.values())
        for name in ("model_kwargs", "model_init_kwargs"):
            if name in arguments.given:
                value = self.code.resolved(arguments.given[name].value)
                found += entries_of(self.code, value) or []
        return found

    def _says(self, entry: Given, values: tuple[str, ...]) -> bool:
        given = self.code.literal(entry.value)
        return isinstance(given, str) and given in values

    def _on_cuda(self, entry: Given, call: cst.Call) -> None:
        torch = self.imports.need_module("torch", _callee(call))
        value = self.code.text(entry.value)
        self._set(
            entry,
            f'{value} if {torch}.cuda.is_available() else "cpu"',
            f"{entry.name}: {self.code.text(self.code.resolved(entry.value))} where there is a GPU, else the CPU",
        )

    def _set(self, entry: Given, text: str, why: str) -> None:
        changes = self.edits.of(entry.holder)
        if entry.index not in changes.values or entry.name == "use_flash_attention_2":
            changes.values[entry.index] = expression(text)
            self.edits.say(entry.value, why)

    def _to_cuda(self, call: cst.Call) -> None:
        """`inputs.to("cuda")`, on machines without a GPU as well."""
        if len(call.args) != 1 or not isinstance(call.args[0].value, cst.SimpleString):
            return
        if call.args[0].value.evaluated_value not in _GPU:
            return
        anchor = self._torch_anchor(call)
        if anchor is None:
            return
        torch = self.imports.need_module("torch", anchor, before=call)
        text = self.code.text(call.args[0].value)
        self.edits.of(call).values[0] = expression(f'{text} if {torch}.cuda.is_available() else "cpu"')
        self.edits.say(call, f"to({text}) where there is a GPU, else to the CPU")

    def _torch_anchor(self, call: cst.Call) -> cst.CSTNode | None:
        imports = [
            node
            for node in self.code.all(cst.Import, cst.ImportFrom)
            if self.code.comes_before(node, call) and self.code.is_at_top(node)
        ]
        return imports[0] if imports else None

    def _own_code(self, call: cst.Call, arguments: Arguments) -> None:
        entry = arguments.given.get("trust_remote_code")
        name = arguments.given.get("pretrained_model_name_or_path") or arguments.given.get("model")
        value = name.value if name is not None else call.args[0].value if call.args else None
        if (
            entry is None
            or entry.holder is not call
            or value is None
            or self.code.literal(entry.value) is not True
        ):
            return
        model = self.code.literal(value)
        if isinstance(model, str) and model.lower().startswith(_BUILT_IN):
            remove(
                self.edits,
                entry,
                f"trust_remote_code is left out: transformers has {model}, and its own code is for older versions",
            )


def _callee(call: cst.Call) -> cst.CSTNode:
    return call.func.value if isinstance(call.func, cst.Attribute) else call.func
