"""Unsloth's own calls, as what transformers, PEFT and Phlora offer for them.

Unsloth has defaults of its own; what a script leaves to them is written down. A call that has no counterpart stays with
its import and a comment.
"""

from __future__ import annotations

from typing import Any

import libcst as cst

from phlora.migrate.code import NOT_LITERAL, dotted, expression, plain
from phlora.migrate.edits import Edits, line_of, statements_of
from phlora.migrate.given import Arguments, Given, arguments_of, remove
from phlora.migrate.imports import Imports
from phlora.migrate.trainers import OUR_GET_PEFT_MODEL, SFT_TRAINERS

_MODELS = frozenset({"unsloth.FastLanguageModel", "unsloth.FastModel", "unsloth.FastLlamaModel"})
# Passed on as they are; the second list to the tokenizer as well.
_TO_MODEL = ("attn_implementation", "device_map")
_TO_BOTH = ("revision", "token", "trust_remote_code")
# How Unsloth computes, and nothing of what it computes.
_PLACES_IN_LOADING = ("model_name", "max_seq_length", "dtype", "load_in_4bit")
_IDLE_IN_LOADING = frozenset(
    (
        "use_gradient_checkpointing",
        "fix_tokenizer",
        "random_state",
        "use_exact_model_name",
        "disable_log_stats",
    )
    + ("gpu_memory_utilization", "max_lora_rank", "float8_kv_cache", "unsloth_vllm_standby")
)
# What is adapted where no modules are named, unless it is turned off.
_PARTS = {
    "finetune_attention_modules": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "finetune_mlp_modules": ("gate_proj", "up_proj", "down_proj"),
}
_TO_LORA = frozenset(
    ("r", "target_modules", "lora_alpha", "lora_dropout", "bias", "use_rslora", "modules_to_save", "use_dora")
    + (
        "layers_to_transform",
        "layers_pattern",
        "init_lora_weights",
        "loftq_config",
        "task_type",
        "ensure_weight_tying",
    )
)
_IDLE_IN_LORA = frozenset(
    {
        "use_gradient_checkpointing",
        "random_state",
        "max_seq_length",
        "temporary_location",
        "finetune_vision_layers",
    }
)
_LONGEST_LINE = 100
_SAVES = frozenset({"save_pretrained_merged", "push_to_hub_merged"})
_GGUF = frozenset({"save_pretrained_gguf", "push_to_hub_gguf"})
NO_COUNTERPART = {
    "train_on_responses_only": "answers alone train with rows of `messages` and SFTConfig(assistant_only_loss=True)",
    "get_chat_template": "the tokenizer's own chat template is taken; set tokenizer.chat_template for another one",
    "FastVisionModel": "Phlora trains text models",
    "UnslothVisionDataCollator": "Phlora trains text models",
    "PatchDPOTrainer": "Phlora trains on chats; stock trl.DPOTrainer needs no patch",
    "PatchFastRL": "Phlora trains on chats; stock TRL's trainers need no patch",
    "to_sharegpt": "write rows with `messages`",
    "standardize_data_formats": "write rows with `messages`",
    "apply_chat_template": "use tokenizer.apply_chat_template",
    "unsloth_train": "trainer.train() counts tokens over accumulated batches already",
}


class Unsloth:
    """The calls of Unsloth in a module."""

    def __init__(self, edits: Edits, imports: Imports) -> None:
        self.edits, self.imports, self.code = edits, imports, edits.code
        imported = [name for node in self.code.all(cst.ImportFrom, cst.Import) for name in _modules(node)]
        used = [*imported, *self.code.unimported().values()]
        self.is_used = any(name.startswith("unsloth") for name in used)

    def update(self) -> None:
        if not self.is_used:
            return
        for call in list(self.code.all(cst.Call)):
            if isinstance(call.func, cst.Attribute):
                method = call.func.attr.value
                if self.imports.names(call.func.value) & _MODELS:
                    self._model_call(call, method)
                elif method in _SAVES:
                    self._save(call, is_hub=method.startswith("push"))
                elif method in _GGUF:
                    self.edits.leave(
                        call,
                        "for GGUF save the merged model, and let llama.cpp's convert_hf_to_gguf.py convert it",
                    )
            elif self.imports.names(call.func) & {"unsloth.get_chat_template"}:
                self._chat_template(call)
            if self.imports.names(call.func) & {"unsloth.UnslothTrainingArguments"}:
                self._config(call)
        self._rest()

    def _model_call(self, call: cst.Call, method: str) -> None:
        if method == "from_pretrained":
            self._load(call)
        elif method == "get_peft_model":
            self._adapter(call)
        elif method in ("for_inference", "for_training") and len(call.args) == 1:
            model = self.code.text(call.args[0].value)
            new = f"{model}.eval()" if method == "for_inference" else f"{model}.train()"
            self._exchange(call, new)
        else:
            self.edits.leave(call, f"{self.code.text(call.func)} has no counterpart here")

    def _exchange(self, call: cst.Call, text: str) -> None:
        self.imports.drop(call.func)
        self.edits.replace(call, expression(text))
        self.edits.say(call, f"{self.code.text(call.func)} is {text.partition('(')[0]}")

    # ------------------------------------------------------------------------------------------------ loading

    def _load(self, call: cst.Call) -> None:
        statement = self.code.parent(call)
        targets = self._two_targets(statement)
        arguments = self._by_name(call)
        given = {name: self.code.text(entry.value) for name, entry in arguments.given.items()}
        name = given.get("model_name")
        if statement is None or targets is None or name is None or not arguments.are_all_known:
            self.edits.leave(
                call,
                "load with AutoModelForCausalLM.from_pretrained and AutoTokenizer.from_pretrained; "
                "this call cannot be read here",
            )
            return
        near = call.func
        model_class = self.imports.need("transformers.AutoModelForCausalLM", near)
        tokenizer_class = self.imports.need("transformers.AutoTokenizer", near)
        both = [f"{key}={given[key]}" for key in _TO_BOTH if key in given]
        to_model = [f"dtype={self._dtype(arguments)}", *self._bits(arguments, near)]
        to_model += [f"{key}={given[key]}" for key in _TO_MODEL if key in given] + both
        new = [
            _call(f"{targets[0]} = {model_class}.from_pretrained", [name, *to_model]),
            _call(f"{targets[1]} = {tokenizer_class}.from_pretrained", [name, *both]),
        ]
        self.imports.drop(call.func)
        self._say_about(
            call,
            arguments,
            {"model_name", "max_seq_length", "dtype", "load_in_4bit", "load_in_8bit", *_TO_BOTH, *_TO_MODEL},
            _IDLE_IN_LOADING,
        )
        self._length(call, arguments)
        self.edits.say(call, f"{self.code.text(call.func)} is {model_class} and {tokenizer_class}")
        _exchange_statement(self.edits, statement, new)

    def _by_name(self, call: cst.Call) -> Arguments:
        """The arguments of a loading call, those that are given by their place too."""
        arguments = arguments_of(self.code, call)
        places = [
            place for place, argument in enumerate(call.args) if not (argument.keyword or argument.star)
        ]
        named = {
            name: Given(name, call.args[place].value, call, place)
            for name, place in zip(_PLACES_IN_LOADING, places, strict=False)
        }
        known = arguments.are_all_known and len(places) <= len(_PLACES_IN_LOADING)
        return Arguments({**named, **arguments.given}, known)

    def _length(self, call: cst.Call, arguments: Arguments) -> None:
        """Unsloth's trainer cuts rows where its model was told to; TRL's has a setting of its own."""
        entry = arguments.given.get("max_seq_length")
        if entry is None:
            return
        trains = any(self.imports.names(other.func) & SFT_TRAINERS for other in self.code.all(cst.Call))
        said = any(
            argument.keyword is not None and argument.keyword.value in ("max_seq_length", "max_length")
            for other in self.code.all(cst.Call)
            if other is not call
            for argument in other.args
        )
        text = self.code.text(entry.value)
        if trains and not said:
            self.edits.leave(
                call, f"max_seq_length={text} was told to the model: say SFTConfig(max_length={text})"
            )
        else:
            self.edits.say(entry.value, "max_seq_length is left out: the trainer's configuration says it")

    def _two_targets(self, statement: cst.CSTNode | None) -> tuple[str, str] | None:
        if not isinstance(statement, cst.Assign) or len(statement.targets) != 1:
            return None
        target = statement.targets[0].target
        if not isinstance(target, cst.Tuple | cst.List) or len(target.elements) != 2:
            return None
        if any(isinstance(element, cst.StarredElement) for element in target.elements):
            return None
        first, second = (self.code.text(element.value) for element in target.elements)
        return first, second

    def _dtype(self, arguments: Arguments) -> str:
        entry = arguments.given.get("dtype")
        if entry is None or isinstance(entry.value, cst.Name) and entry.value.value == "None":
            return '"auto"'
        text = self.code.text(entry.value)
        if isinstance(entry.value, cst.Name) and self.code.literal(entry.value) in (None, NOT_LITERAL):
            return f'{text} or "auto"'
        return text

    def _bits(self, arguments: Arguments, near: cst.CSTNode) -> list[str]:
        """Unsloth loads in 4 bits where nothing is said."""
        four, eight = (arguments.given.get(f"load_in_{bits}bit") for bits in (4, 8))
        full = arguments.given.get("full_finetuning")
        said = None if eight is None else self.code.literal(eight.value)
        if said is True:
            name = self.imports.need("transformers.BitsAndBytesConfig", near)
            return [f"quantization_config={name}(load_in_8bit=True)"]
        if eight is not None and said is NOT_LITERAL:
            text = self.code.text(eight.value)
            self.edits.leave(
                eight.value,
                f"load_in_8bit={text}: where it is true, say quantization_config=BitsAndBytesConfig(load_in_8bit=True)",
            )
        asked = (
            self.code.literal(four.value)
            if four is not None
            else not (full and self.code.literal(full.value) is True)
        )
        if asked in (False, None):
            return []
        name = self.imports.need("transformers.BitsAndBytesConfig", near)
        made = f'{name}(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)'
        condition = "True" if four is None else self.code.text(four.value)
        return [f"quantization_config={made}" + (f" if {condition} else None" if condition != "True" else "")]

    def _say_about(self, call: cst.Call, arguments: Arguments, used: Any, idle: frozenset[str]) -> None:
        for name, entry in arguments.given.items():
            value = self.code.literal(entry.value)
            if name in used or value in (None, False, {}, "no"):
                continue
            if name in idle:
                self.edits.say(
                    entry.value, f"{name} is left out: how Unsloth computes, and nothing that is trained"
                )
            else:
                self.edits.leave(
                    call, f"{name}={self.code.text(entry.value)} of Unsloth has no counterpart here"
                )

    # ----------------------------------------------------------------------------------------------- adapters

    def _adapter(self, call: cst.Call) -> None:
        arguments = arguments_of(self.code, call)
        positional = [argument for argument in call.args if argument.keyword is None and not argument.star]
        model = arguments.given.get("model")
        value = model.value if model is not None else positional[0].value if positional else None
        if value is None or len(positional) > 1 or not arguments.are_all_known:
            self.edits.leave(call, "make the adapter with phlora.get_peft_model(model, LoraConfig(...))")
            return
        given = {
            name: self.code.text(entry.value)
            for name, entry in arguments.given.items()
            if name in _TO_LORA
            and not (name == "loftq_config" and self.code.literal(entry.value) in (None, {}))
        }
        defaults = {"r": "16", "target_modules": self._targets(arguments), "lora_alpha": "16"}
        left_to_defaults = {name: text for name, text in defaults.items() if name not in given}
        settings = {**given, **left_to_defaults, "task_type": given.get("task_type", '"CAUSAL_LM"')}
        make = self.imports.need(OUR_GET_PEFT_MODEL, call.func)
        config = self.imports.need("peft.LoraConfig", call.func)
        self.imports.drop(call.func)
        self._say_about(
            call, arguments, {"model", *_TO_LORA, *_PARTS, "finetune_language_layers"}, _IDLE_IN_LORA
        )
        language = arguments.given.get("finetune_language_layers")
        if language is not None and self.code.literal(language.value) is not True:
            self.edits.leave(
                call, "finetune_language_layers: the layers of the language model are what is adapted here"
            )
        self.edits.say(call, f"{self.code.text(call.func)} is {OUR_GET_PEFT_MODEL} with a {config}")
        if "random_state" in arguments.given:
            seed = self.code.text(arguments.given["random_state"].value)
            self.edits.say(
                call, f"transformers.set_seed({seed}) before it starts the adapter the same each time"
            )
        values = ",\n".join(f"        {name}={text}" for name, text in settings.items())
        text = f"{make}(\n    {self.code.text(value)},\n    {config}(\n{values},\n    ),\n)"
        self.edits.replace(call, expression(text))

    def _targets(self, arguments: Arguments) -> str:
        """The modules that Unsloth adapts where none are named."""
        names: list[str] = []
        for part, modules in _PARTS.items():
            entry = arguments.given.get(part)
            asked = True if entry is None else self.code.literal(entry.value)
            if entry is not None and asked is NOT_LITERAL and "target_modules" not in arguments.given:
                self.edits.leave(
                    entry.value, f"{part}: name the modules of target_modules, as the value is not known here"
                )
            names += modules if asked is not False else ()
        return self.code.text(plain(names))

    def _config(self, call: cst.Call) -> None:
        entry = arguments_of(self.code, call).given.get("embedding_learning_rate")
        if entry is not None and self.code.literal(entry.value) is None:
            remove(self.edits, entry, "embedding_learning_rate is left out: it asked for nothing")
        elif entry is not None:
            self.edits.leave(
                entry.value,
                "embedding_learning_rate is Unsloth's: take it out; embeddings learn at learning_rate here",
            )

    # ------------------------------------------------------------------------------------------------- saving

    def _save(self, call: cst.Call, *, is_hub: bool) -> None:
        """The model with its adapter folded in, and the tokenizer, as stock transformers saves them."""
        arguments = arguments_of(self.code, call)
        positional = [self.code.text(argument.value) for argument in call.args if argument.keyword is None]
        method = arguments.given.get("save_method")
        way = self.code.literal(method.value) if method is not None else "merged_16bit"
        outer = self.code.parent(call)
        if way not in ("merged_16bit", "lora") or not positional or not isinstance(outer, cst.Expr):
            self.edits.leave(
                call, "save with model.merge_and_unload().save_pretrained(...), or save the adapter alone"
            )
            return
        assert isinstance(call.func, cst.Attribute)
        model = self.code.text(call.func.value)
        tokenizer = positional[1] if len(positional) > 1 else None
        if "tokenizer" in arguments.given:
            tokenizer = self.code.text(arguments.given["tokenizer"].value)
        verb = "push_to_hub" if is_hub else "save_pretrained"
        rest = (
            [f"token={self.code.text(arguments.given['token'].value)}"] if "token" in arguments.given else []
        )
        to = ", ".join([positional[0], *rest])
        whole = f"{model}.merge_and_unload()" if way == "merged_16bit" else model
        new = [f"{whole}.{verb}({to})"] + ([f"{tokenizer}.{verb}({to})"] if tokenizer else [])
        _exchange_statement(self.edits, outer, new)
        self.edits.say(call, f"{call.func.attr.value} is {whole}.{verb}")

    # ------------------------------------------------------------------------------------------------ the rest

    def _chat_template(self, call: cst.Call) -> None:
        """A template that is the tokenizer's own needs no setting."""
        arguments = arguments_of(self.code, call)
        tokenizer = arguments.given.get("tokenizer")
        first = tokenizer.value if tokenizer is not None else call.args[0].value if call.args else None
        asked = arguments.given.get("chat_template")
        name = self.code.literal(asked.value) if asked is not None else None
        mapping = arguments.given.get("mapping")
        is_plain = mapping is None or self.code.literal(mapping.value) in (
            {},
            {"role": "role", "content": "content", "user": "user", "assistant": "assistant"},
        )
        models = [
            self.code.literal(part)
            for part in self.code.all(cst.SimpleString)
            if "phi-3" in part.value.lower() and "/" in part.value
        ]
        if first is None or name not in ("phi-3", "phi-3.5") or not models or not is_plain:
            return
        self.imports.drop(call.func)
        self.edits.replace(call, first.deep_clone())
        self.edits.say(call, f"get_chat_template is left out: {name} is the tokenizer's own template")

    def _rest(self) -> None:
        """Names that stay Unsloth's, each with what to do instead."""
        for node in self.code.all(cst.Name):
            for full in self.imports.names(node):
                package, _, name = full.partition(".")
                if package != "unsloth" or name not in NO_COUNTERPART or self.imports.is_gone(node):
                    continue
                if isinstance(self.code.parent(node), cst.ImportAlias | cst.AsName):
                    continue
                self.edits.leave(node, f"{name} stays Unsloth's: {NO_COUNTERPART[name]}")


def _call(head: str, arguments: list[str]) -> str:
    """A call on one line, or with a line for each argument where that would be a long one."""
    line = f"{head}({', '.join(arguments)})"
    if len(line) <= _LONGEST_LINE:
        return line
    return "\n".join([f"{head}(", *(f"    {argument}," for argument in arguments), ")"])


def _modules(node: Any) -> list[str]:
    if isinstance(node, cst.ImportFrom):
        return [dotted(node.module)]
    return [dotted(alias.name) for alias in node.names]


def _exchange_statement(edits: Edits, statement: cst.CSTNode, new: list[str]) -> None:
    """Statements in the place of one: on lines of their own where it has one, else on its line."""
    line = edits.code.parent(statement)
    if isinstance(line, cst.SimpleStatementLine) and len(line.body) == 1:
        edits.change(line, lambda old: _in_place(old, new))
    else:
        small = [line_of(text).body[0] for text in new]
        edits.replace(statement, cst.FlattenSentinel(small))  # type: ignore[arg-type]


def _in_place(old: Any, new: list[str]) -> Any:
    """Lines in the place of one; its comments stay with the first and the last."""
    lines = [line_of(text) for text in new]
    first, last = statements_of(old)[0], statements_of(old)[-1]
    lines[0] = lines[0].with_changes(leading_lines=first.leading_lines)
    lines[-1] = lines[-1].with_changes(trailing_whitespace=last.trailing_whitespace)
    return cst.FlattenSentinel(lines)
