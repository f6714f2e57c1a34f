"""A chat that can switch between the base and the tuned model.

Both are one model in memory: the base answers with the adapter disabled. Each has a chat of its own: it sees the
questions that it was asked and what it said itself, never a word of the other. Where both answer, an exchange counts
once both have spoken. A reply that Ctrl-C stops stays as far as it got, because the person has read it. Nothing is
written anywhere.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from phlora.adapters.base_view import as_base
from phlora.data.prompts import answer_of
from phlora.display import Display
from phlora.errors import InputError
from phlora.models.families import context_lengths
from phlora.models.generate import stream
from phlora.models.sampling import Sampling
from phlora.models.tokenizer import LoadedTokenizer
from phlora.serve.llm import load, piecewise
from phlora.serve.prompts import chat_as_ids, require_room, require_template
from phlora.serve.tool_calls import calls_in

Speaker = Literal["base", "tuned"]


@dataclass(frozen=True)
class Exchange:
    """A question, or the results of tools in its place, and what each model that was asked has said."""

    question: str
    replies: Mapping[Speaker, str]
    results: tuple[str, ...] = ()

    @property
    def asked(self) -> list[dict[str, Any]]:
        """The messages that were answered."""
        if self.results:
            return [{"role": "tool", "content": result} for result in self.results]
        return [{"role": "user", "content": self.question}]


@dataclass(kw_only=True)
class ChatSession:
    """One chat with a model, bare or with an adapter on it.

    Attributes:
        model: a transformers model, or a `peft.PeftModel` when `has_adapter`.
        tokenizer: with the chat template that the adapter was trained with.
        has_adapter: whether `tuned` differs from `base`.
        system: the system prompt, None for none.
        trained_system: the one that the adapter's rows shared, None for none.
        max_new_tokens: longest reply, in tokens.
        temperature: 0 always takes the likeliest token.
        top_p: above temperature 0, draw among the fewest tokens whose probabilities reach this sum.
        top_k: above temperature 0, draw among so many of the likeliest tokens; 0: among all.
        seed: of the first reply; each further one counts on, so that a whole chat can be repeated.
        speakers: who answers, in order.
        tools: descriptions of tools that the model may call, as in a training row; None for none.
        exchanges: all questions, in order, whoever was asked.
        results: of tools, while the last reply has calls that wait for theirs.
    """

    model: Any
    tokenizer: LoadedTokenizer
    has_adapter: bool
    system: str | None = None
    trained_system: str | None = None
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    speakers: tuple[Speaker, ...] = ()
    tools: list[Any] | None = None
    exchanges: list[Exchange] = field(default_factory=list)
    results: list[str] = field(default_factory=list)
    _num_asked: int = 0

    def __post_init__(self) -> None:
        require_template(self.tokenizer)
        self._sampling()
        self.speakers = self.speakers or (("tuned",) if self.has_adapter else ("base",))

    def ask(self, text: str) -> Generator[tuple[Speaker, str], None, None]:
        """Add a user turn and yield the reply piece by piece, with who is speaking.

        When the generator is closed or interrupted early, what was yielded is kept if every speaker has said
        something; else the question is forgotten. A speaker that ends its reply without a word was not asked.

        Raises:
            InputError: a chat does not fit into the model's context, or its template refuses it.
        """
        yield from self._answers(Exchange(text, {}), self.speakers)

    def give_results(self, *results: str) -> Generator[tuple[Speaker, str], None, None]:
        """Answer the tool calls of the last replies, one text for each call, and yield what follows as `ask` does.

        Only the models that called tools are asked on.

        Raises:
            InputError: no tool was called, or there are more or fewer calls than results; and as `ask`.
        """
        counts = self.num_calls()
        if not counts:
            raise InputError("The last reply calls no tool", fix="ask something, with tools offered: --tools")
        if {len(results)} != set(counts.values()):
            called = ", ".join(f"{count} by the {speaker} model" for speaker, count in counts.items())
            raise InputError(
                f"There are {len(results)} results for the calls ({called})", fix="give each its own"
            )
        yield from self._answers(Exchange("", {}, results), tuple(counts))

    def num_calls(self) -> dict[Speaker, int]:
        """How many tools each model that answers has called in its last reply; none where it called none."""
        replies = self.exchanges[-1].replies if self.exchanges else {}
        counts = {s: len(self.calls_of(replies[s])) for s in self.speakers if s in replies}
        return {speaker: count for speaker, count in counts.items() if count}

    def calls_of(self, reply: str) -> list[dict[str, Any]]:
        """The tools that a reply calls, in OpenAI's form."""
        return calls_in(reply, tools=self.tools)[1]

    def _answers(
        self, asking: Exchange, speakers: Sequence[Speaker]
    ) -> Generator[tuple[Speaker, str], None, None]:
        prompts = {speaker: self._prompt_ids(speaker, asking) for speaker in speakers}
        replies: dict[Speaker, str] = {}
        is_complete = False
        try:
            for speaker, prompt_ids in prompts.items():
                for piece in self._stream(speaker, prompt_ids):
                    replies[speaker] = replies.get(speaker, "") + piece
                    yield speaker, piece
            is_complete = True
        finally:
            if replies and (is_complete or len(replies) == len(prompts)):
                self.exchanges.append(replace(asking, replies=replies))
                self._num_asked += 1

    def messages(self, speaker: Speaker) -> list[dict[str, Any]]:
        """The chat as one model knows it: its system prompt, the questions it was asked, and its own replies."""
        messages: list[dict[str, Any]] = [{"role": "system", "content": self.system}] if self.system else []
        for exchange in self.exchanges:
            if speaker in exchange.replies:
                messages += [*exchange.asked, self._answer_of(exchange.replies[speaker])]
        return messages

    def num_unseen(self, speaker: Speaker) -> int:
        """How many questions of the chat this model was not asked."""
        return sum(speaker not in exchange.replies for exchange in self.exchanges)

    def let_answer(self, *speakers: Speaker) -> None:
        """Choose who answers from now on.

        Raises:
            InputError: the tuned model, where there is no adapter.
        """
        if "tuned" in speakers and not self.has_adapter:
            raise InputError(
                "There is no tuned model here, only a base model", fix="start the chat with a run folder"
            )
        self.speakers = speakers

    def undo(self) -> bool:
        """Forget the last question and its replies, whoever gave them; False when there is none."""
        if not self.exchanges:
            return False
        self.exchanges.pop()
        return True

    def reset(self) -> None:
        """Forget all turns of both models, but not the system prompt."""
        self.exchanges.clear()

    def _answer_of(self, reply: str) -> dict[str, Any]:
        """A reply as a message, its calls as calls."""
        message = answer_of(reply, self.tools, self.tokenizer.tokenizer)
        content, calls = calls_in(reply, tools=self.tools)
        if calls and "tool_calls" not in message:
            return {**message, "content": content, "tool_calls": calls}
        return message

    def _prompt_ids(self, speaker: Speaker, asking: Exchange) -> list[int]:
        messages = [*self.messages(speaker), *asking.asked]
        ids = chat_as_ids(messages, self.tokenizer, tools=self.tools)
        whose = f"The chat with the {speaker} model" if len(self.speakers) > 1 else "The chat"
        require_room(ids, self._max_tokens(), whose=whose, fix="/undo, /reset or a shorter text")
        return ids

    def _max_tokens(self) -> int | None:
        return context_lengths(self.model.config).max_tokens

    def _stream(self, speaker: Speaker, prompt_ids: list[int]) -> Iterator[str]:
        is_bare = speaker == "base" and self.has_adapter
        most = self._max_tokens()
        room = self.max_new_tokens if most is None else min(self.max_new_tokens, most - len(prompt_ids))
        pieces = stream(
            self.model,
            prompt_ids,
            self.tokenizer.tokenizer,
            max_new_tokens=room,
            stop_token_ids=self.tokenizer.stop_token_ids,
            sampling=self._sampling(),
            reply=self._num_asked,
        )
        return piecewise(pieces, lambda: as_base(self.model)) if is_bare else pieces

    def _sampling(self) -> Sampling:
        return Sampling(temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, seed=self.seed)


# ------------------------------------------------------------------------------------------------- opening


def open_chat(
    source: str,
    *,
    system: str | None = None,
    tools: list[Any] | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    display: Display | None = None,
) -> ChatSession:
    """Load a run folder, an adapter folder or a model, and begin a chat with it.

    Args:
        source: what to open.
        system: the system prompt; None takes the one that the adapter's training rows share, "" none.
        tools, max_new_tokens, temperature, top_p, top_k, seed: as in `ChatSession`.
        display: where progress and notes go.

    Raises:
        RunError: a run without an adapter.
        ModelError: no such model, or an adapter that does not fit it.
        ConfigError: a setting out of range.
    """
    # Refused before a weight is read.
    Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    display = display or Display()
    loaded = load(source, system=system, display=display)
    if loaded.trained_system and system is None:
        display.note('/system shows it whole and changes it; --system "" begins without one')
    return ChatSession(
        model=loaded.model,
        tokenizer=loaded.words,
        has_adapter=loaded.has_adapter,
        system=loaded.system,
        trained_system=loaded.trained_system,
        tools=tools,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
    )
