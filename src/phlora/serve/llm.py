"""A model in memory that answers: a run, an adapter on its base, a merged model or a base model."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeAlias, TypedDict, Unpack, overload, runtime_checkable

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from phlora.adapters.base_view import as_base
from phlora.adapters.speed import speed_up
from phlora.data.rows import kind_of
from phlora.display import Display, printable
from phlora.errors import ConfigError, InputError, ModelError, shown
from phlora.models.causal_lm import as_causal_lm
from phlora.models.families import context_lengths
from phlora.models.generate import generate, stream
from phlora.models.sampling import Sampling
from phlora.models.tokenizer import LoadedTokenizer, ModelFields, model_config, prepare_tokenizer
from phlora.runs.resolve import load_pair, resolve
from phlora.runs.system_prompt import system_prompts_of
from phlora.serve.prompts import Asked, asked, chats_as_ids, require_room, texts_as_ids

Chat: TypeAlias = Sequence[Mapping[str, Any]]


class Options(TypedDict, total=False):
    """What `LLM.generate` takes beside the prompts."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    batch_size: int | Literal["auto"]
    tools: Sequence[Any] | None
    use_adapter: bool
    raw: bool
    display: Display | None


@runtime_checkable
class InMemory(Protocol):
    """What `finetune` returns: a model with its tokenizer, and the folder that it was trained into."""

    model: Any
    tokenizer: Any
    folder: Any


@dataclass(kw_only=True)
class LLM:
    """A model that answers, with its tokenizer; `phlora.load` makes it.

    Attributes:
        model: a `peft.PeftModel` where there is an adapter, else a model of transformers.
        tokenizer: with the chat template that the adapter was trained with.
        stop_token_ids: the tokens that end a reply, the end of a turn first.
        system: the system prompt of chats that have none of their own; None for none. It may be set anew, to a text
            or None.
        trained_system: the one that the rows of the training shared; None for none.
        name: what was loaded.
        notes: what a person should know about it.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    words: LoadedTokenizer = field(repr=False)
    system: str | None = None
    trained_system: str | None = None
    name: str = ""
    notes: tuple[str, ...] = ()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "system":
            _require_system(value)
        super().__setattr__(name, value)

    @classmethod
    def of(
        cls,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        name: str = "",
    ) -> LLM:
        """One around a model and a tokenizer that are in memory already; neither is changed.

        Raises:
            InputError: a system prompt that is no text.
            ModelError: no token of the tokenizer ends a turn.
        """
        _require_system(system)
        lm = as_causal_lm(model)
        words = prepare_tokenizer(
            copy.deepcopy(tokenizer),
            config=lm.config,
            generation_config=getattr(lm, "generation_config", None),
        )
        return cls(
            model=model,
            tokenizer=words.tokenizer,
            words=words,
            system=system or None,
            name=name or str(getattr(lm.config, "name_or_path", "")),
            notes=words.notes,
        )

    @property
    def has_adapter(self) -> bool:
        return isinstance(self.model, PeftModel)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        return self.words.stop_token_ids

    @overload
    def generate(
        self, prompts: str | Chat, *, stream: Literal[True], **options: Unpack[Options]
    ) -> Iterator[str]: ...

    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompts: str | Chat, *, stream: Literal[False] = False, **options: Unpack[Options]
    ) -> str: ...

    @overload
    def generate(
        self, prompts: Sequence[str | Chat], *, stream: Literal[False] = False, **options: Unpack[Options]
    ) -> list[str]: ...

    def generate(
        self,
        prompts: Any,
        *,
        stream: bool = False,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        batch_size: int | Literal["auto"] = "auto",
        tools: Sequence[Any] | None = None,
        use_adapter: bool = True,
        raw: bool = False,
        display: Display | None = None,
    ) -> str | list[str] | Iterator[str]:
        """Answer a question, a chat, or a list of them.

        What one is answered does not depend on those beside it: a batch gives the answers that each would get alone.

        Args:
            prompts: a question; a chat as a list of messages that ends with what is to be answered; or a list of
                questions and chats. A question, and a chat without a system message, get `system`.
            stream: yield the pieces of one reply as they come.
            max_new_tokens: longest reply, in tokens; a reply also ends where the model's context does.
            temperature: 0 always takes the likeliest token; otherwise logits are divided by it and a token is drawn.
            top_p: above temperature 0: draw among the fewest tokens whose probabilities reach this sum.
            top_k: above temperature 0: draw among so many of the likeliest tokens; 0: among all.
            seed: makes draws repeatable; prompt number n (from 0) gets `seed + n`.
            batch_size: prompts answered together; `auto` takes as many as their keys and values fit into 1 GiB.
            tools: descriptions of tools that may be called, as in a training row.
            use_adapter: False: the base model answers, as it was before the adapter came.
            raw: prompts are texts to continue, without chat template and system prompt.
            display: where progress over a list goes; nowhere by default.

        Returns:
            The reply; a list of them, in the order of the prompts, for a list; with `stream` an iterator over pieces.

        Raises:
            InputError: what is no question and no chat, a chat that is too long or waits for no answer, or one that
                the chat template refuses; each with its number.
            ConfigError: a setting out of range, or one that contradicts another.
            ModelError: a chat, where the model has no chat template.
        """
        sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
        _require_count(max_new_tokens)
        given = asked(prompts)
        if stream and not given.is_one:
            raise InputError(
                f"`stream` shows one reply as it comes, and {len(given.items)} prompts were given",
                fix="call it for each of them, or leave `stream` out",
            )
        ids = self._ids(given, tools=tools, raw=raw)
        if stream:
            return self._pieces(ids[0], sampling, max_new_tokens, use_adapter=use_adapter)
        replies = self._replies(ids, sampling, max_new_tokens, batch_size, use_adapter, display)
        return replies[0] if given.is_one else replies

    def _ids(self, given: Asked, *, tools: Any, raw: bool) -> list[list[int]]:
        if raw:
            if tools:
                raise ConfigError("Tools belong to a chat, and raw=True is none", fix="leave one of them out")
            found = texts_as_ids(given, self.words)
        else:
            found = chats_as_ids(given, self.words, system=self.system, tools=tools)
        most = context_lengths(as_causal_lm(self.model).config).max_tokens
        for number, ids in enumerate(found):
            require_room(ids, most, whose="It", where=given.where(number), fix="shorten it")
        return found

    def _replies(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        max_new_tokens: int,
        batch_size: int | Literal["auto"],
        use_adapter: bool,
        display: Display | None,
    ) -> list[str]:
        bar = (display or Display(quiet=True)).progress("Answers", len(prompts), unit="prompts")
        with bar as advance, nullcontext() if use_adapter else self._base():
            answers = generate(
                self.model,
                prompts,
                max_new_tokens=max_new_tokens,
                stop_token_ids=self.stop_token_ids,
                pad_token_id=self.tokenizer.pad_token_id,
                batch_size=batch_size,
                sampling=sampling,
                progress=advance,
            )
        return [str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in answers]

    def _pieces(
        self, prompt: list[int], sampling: Sampling, max_new_tokens: int, *, use_adapter: bool
    ) -> Iterator[str]:
        most = context_lengths(as_causal_lm(self.model).config).max_tokens
        room = max_new_tokens if most is None else min(max_new_tokens, most - len(prompt))
        pieces = stream(
            self.model,
            prompt,
            self.tokenizer,
            max_new_tokens=room,
            stop_token_ids=self.stop_token_ids,
            sampling=sampling,
        )
        return pieces if use_adapter else piecewise(pieces, self._base)

    def _base(self) -> AbstractContextManager[None]:
        return as_base(self.model) if self.has_adapter else nullcontext()


def piecewise(pieces: Iterator[str], within: Callable[[], AbstractContextManager[None]]) -> Iterator[str]:
    """The pieces, each made within a context that is left before it is handed on.

    Whoever stops listening, or asks something else between two pieces, meets the model as it was.
    """
    while True:
        with within():
            piece = next(pieces, None)
        if piece is None:
            return
        yield piece


def load(
    source: str | os.PathLike[str] | Any,
    *,
    base: str | None = None,
    system: str | None = None,
    display: Display | None = None,
    **fields: Unpack[ModelFields],
) -> LLM:
    """Load what answers: a run, an adapter, a merged model or a base model: `phlora.load("runs/support")`.

    Args:
        source: a run folder (its best adapter is taken), one of its adapters or checkpoints, any PEFT adapter folder,
            a merged model's folder, or a base model by embedded name, folder, `.gguf` file or hub id; or what
            `finetune` returned, whose model is in memory already.
        base: the base model, in the place of the one that the run or the adapter names.
        system: the system prompt of chats that have none of their own; None takes the one that the rows of the
            training share, "" none.
        display: where progress and notes go; standard error by default.
        fields: settings of the base model, as in `load_model`, in the place of the run's own: dtype, device,
            quantization and so on.

    Raises:
        RunError: a run without an adapter.
        ModelError: no such model, or an adapter that does not fit it.
        ConfigError: a setting that there is not, or settings for a model that is in memory already.
        InputError: a system prompt that is no text.
    """
    _require_system(system)
    display = display or Display()
    if isinstance(source, InMemory):
        return _in_memory(source, base=base, system=system, fields=fields)
    if not isinstance(source, str | os.PathLike):
        raise InputError(
            f"{shown(type(source).__name__)} was given",
            where="source",
            expected="a run, an adapter or a model by its path or name, or what finetune returned",
        )
    found = resolve(source, model=base, offline=bool(fields.get("offline")))
    if base is not None and found.adapter is None:
        raise ConfigError(
            f"There is no adapter in `{os.fspath(source)}` for the base `{base}`",
            fix="name the base alone, or a run or an adapter folder first",
        )
    found = replace(found, base=model_config(found.base, fields))
    display.stage(f"Loading {found.base_name}" + (f" with {found.adapter}" if found.adapter else ""))
    pair = load_pair(found, use_cache=True, display=display)
    prompts = system_prompts_of(found)
    notes = [*pair.notes]
    if prompts and system is None:
        notes += [note for note in [prompts.note()] if note]
        notes += [f"System prompt of the training rows: {shortened(prompts.text)}"] if prompts.text else []
    for note in notes:
        display.note(note)
    speed_up(pair.model.requires_grad_(False))
    trained = prompts.text if prompts else None
    return LLM(
        model=pair.model,
        tokenizer=pair.tokenizer.tokenizer,
        words=pair.tokenizer,
        system=trained if system is None else system or None,
        trained_system=trained,
        name=os.fspath(source),
        notes=tuple(notes),
    )


def _in_memory(run: InMemory, *, base: str | None, system: str | None, fields: ModelFields) -> LLM:
    """Around the model of a run that was just trained, which stays as it is."""
    if base is not None or fields:
        raise ConfigError(
            f"The model is in memory already, so `{next(iter(fields), 'base')}` cannot be set",
            fix="load the run from its folder: phlora.load(run.folder, ...)",
        )
    if not hasattr(run.model, "generate"):
        raise ModelError(
            f"The model is a `{type(run.model).__name__}`", expected="a causal language model of transformers"
        )
    prompts = system_prompts_of(resolve(run.folder)) if run.folder is not None else None
    trained = prompts.text if prompts else None
    loaded = LLM.of(run.model, run.tokenizer, system=trained if system is None else system)
    return replace(loaded, trained_system=trained, name=str(run.folder or loaded.name))


def _require_system(system: Any) -> None:
    if system is not None and not isinstance(system, str):
        raise InputError(
            f"{kind_of(system)} was given", where="system", expected="the system prompt as a text, or None"
        )


def _require_count(max_new_tokens: Any) -> None:
    if not isinstance(max_new_tokens, int) or isinstance(max_new_tokens, bool) or max_new_tokens < 1:
        raise ConfigError(
            f"{shown(max_new_tokens)} was given", where="max_new_tokens", expected="a whole number from 1 on"
        )


def shortened(text: str, most: int = 160) -> str:
    """The beginning of a text on one line, safe for a terminal."""
    line = " ".join(text.split())
    return printable(line if len(line) <= most else f"{line[: most - 2].rstrip()} …")
