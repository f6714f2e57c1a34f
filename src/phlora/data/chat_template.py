"""Where the text of each message stands in what a chat template renders, for any template.

The idea: render the chat once with a placeholder in the place of every content. What stands between the
placeholders is the template's own text; it depends on the roles only, so it is kept and reused. The real
rendering is then those literals with the contents between them, checked character by character. Nothing is
searched for, so contents that repeat, or that look like parts of the template, cannot be mistaken.

A template that looks into the contents (strips reasoning, drops empty turns) breaks that check. There the
chat is rendered once more per message, with only that message replaced; its span is what the two renderings
do not share.

A template whose syntax shows that it only writes contents out, and never looks into them, is not rendered for
every chat: literals and contents are joined. That is compared with the real rendering once for every order of
roles, and given up for good where they differ.

The end-of-turn text is what follows an assistant turn both in the middle and at the end of a chat.
"""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

from phlora.data.reasoning import with_reasoning_as_text
from phlora.data.rendering import TEMPLATE_ERRORS, Frame, Rendering, Skeleton, Span, TemplateRefusal
from phlora.data.rows import Message
from phlora.data.template_analysis import writes_contents_only
from phlora.data.template_messages import fold_system, is_marked, shape_of, trimmed, without_loss_keys
from phlora.data.tool_probes import speaks_of_tools, tool_probes
from phlora.data.tools_text import tools_as_text
from phlora.errors import ModelError

Tokenizer: TypeAlias = Any

_MARK = re.compile("\ue0f0(\\d+)\ue0f1")
_MAX_SKELETONS = 4096


@dataclass
class ChatTemplate:
    """The chat template of a tokenizer, and what is known about it.

    Args:
        tokenizer: a transformers tokenizer; only its methods are called.
        template: rendered instead of the tokenizer's own template.
    """

    tokenizer: Tokenizer
    template: str | None = None
    _skeletons: dict[Any, Skeleton] = field(default_factory=dict, repr=False)
    _frames: dict[Any, Frame | None] = field(default_factory=dict, repr=False)
    _folds_system: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        if not (self.template or self.tokenizer.chat_template):
            raise ModelError(
                "The tokenizer has no chat template",
                expected="a chat model, or data as `prompt` and `completion` or `text`",
                fix="use the instruct version of the model",
            )

    # ---------------------------------------------------------------------------------------- rendering

    def render(
        self, messages: Sequence[Message], tools: list[Any] | None = None, *, generation: bool = False
    ) -> Rendering:
        """Render a chat and find every message in it.

        Args:
            generation: end with the header of an assistant turn, as for generating an answer.

        Tools, calls and results of tools for which the template has no place are written as text.

        Raises:
            TemplateRefusal: the template raises, or leaves out a message other than the system prompt.
        """
        if not speaks_of_tools(messages, tools):
            return self._render_chat(messages, None, generation)
        if not self.writes_tools_as_text(messages, tools):
            try:
                return replace(self._render_chat(messages, tools, generation), tools=tools)
            except TemplateRefusal as refusal:
                try:
                    return self._render_tools_as_text(messages, tools, generation)
                except TemplateRefusal:
                    raise refusal from None
        return self._render_tools_as_text(messages, tools, generation)

    def writes_tools_as_text(self, messages: Sequence[Message], tools: list[Any] | None) -> bool:
        """Whether the template has no place for some of what a chat has of tools."""
        needed = speaks_of_tools(messages, tools)
        return bool(needed) and not needed <= self._tool_places

    def _render_tools_as_text(
        self, messages: Sequence[Message], tools: list[Any] | None, generation: bool
    ) -> Rendering:
        rendering = self._render_chat(tools_as_text(messages, tools), None, generation)
        return replace(rendering, notes=rendering.notes | {"tools_as_text"})

    def _render_chat(
        self, messages: Sequence[Message], tools: list[Any] | None, generation: bool
    ) -> Rendering:
        if self._folds_system and messages[0]["role"] == "system":
            return self._render_folded(messages, tools, generation)
        try:
            rendering = self._render(messages, tools, generation)
        except TemplateRefusal as refusal:
            if messages[0]["role"] != "system":
                raise
            try:
                rendering = self._render_folded(messages, tools, generation)
            except TemplateRefusal:
                raise refusal from None
            self._folds_system = True
        return rendering

    def _render_folded(
        self, messages: Sequence[Message], tools: list[Any] | None, generation: bool
    ) -> Rendering:
        """Render with the system prompt at the head of the first user turn."""
        rendering = self._render(fold_system(messages), tools, generation)
        return replace(rendering, notes=rendering.notes | {"system_folded"})

    def _render(self, messages: Sequence[Message], tools: list[Any] | None, generation: bool) -> Rendering:
        if not self._writes_contents_only or tools:
            return self._render_really(messages, tools, generation)
        key = shape_of(messages, generation)
        if key is None:
            return self._render_really(messages, tools, generation)
        if key not in self._frames:
            rendering = self._render_really(messages, tools, generation)
            frame = self._frame(messages, generation)
            if frame is not None and frame.fill(messages) != rendering:
                frame = None
                # An empty content may have chosen another branch than the placeholder in its place.
                if all(message["content"] for message in messages):
                    self.__dict__["_writes_contents_only"] = False
            if len(self._frames) >= _MAX_SKELETONS:
                self._frames.clear()
            self._frames[key] = frame
            return rendering
        known = self._frames[key]
        return known.fill(messages) if known else self._render_really(messages, tools, generation)

    def _frame(self, messages: Sequence[Message], generation: bool) -> Frame | None:
        """The frame of chats of this shape; None where a content has no place or more than one."""
        skeleton = self._skeleton(messages, None, generation)
        order = skeleton.order
        placed = [index for index, message in enumerate(messages) if message["content"] or index in order]
        if not placed or placed != list(order):
            return None
        tails = []
        for literal in skeleton.literals[1:]:
            if self.turn_end.startswith(literal) and literal != self.turn_end:
                return None  # what ends the turn would depend on the next content
            tails.append(len(self.turn_end) if literal.startswith(self.turn_end) else 0)
        final = skeleton.literals[-1]
        is_last_placed = order[-1] == len(messages) - 1
        if is_last_placed and not generation and final[tails[-1] :].strip() == self.tokenizer.eos_token:
            tails[-1] = len(final)
        shape = tuple((message["role"], bool(message["content"])) for message in messages)
        notes = set()
        if any(shape[index][0] == "assistant" and not tail for index, tail in zip(order, tails, strict=True)):
            notes.add("missing_end_token")
        if messages[0]["role"] != "system" and self.default_system:
            notes.add("default_system")
        return Frame(shape, skeleton.literals, order, tuple(tails), frozenset(notes))

    def _render_really(
        self, messages: Sequence[Message], tools: list[Any] | None, generation: bool
    ) -> Rendering:
        text = self._apply(messages, tools, generation)
        spans = self._align(text, messages, tools, generation) or self._differ(
            text, messages, tools, generation
        )
        notes = set()
        for turn, (message, span) in enumerate(zip(messages, spans, strict=True), 1):
            if span is None and message["content"].strip():
                raise TemplateRefusal(f"the chat template leaves out turn {turn} ({message['role']})")
            if span is not None and text[span[0] : span[1]].strip() != message["content"].strip():
                notes.add("content_altered")
        spans = [
            self._with_tool_calls(text, messages, tools, turn, span) if "tool_calls" in message else span
            for turn, (message, span) in enumerate(zip(messages, spans, strict=True))
        ]
        ends = self._turn_ends(text, messages, spans, generation)
        for message, span, end in zip(messages, spans, ends, strict=True):
            if message["role"] == "assistant" and span is not None and end == span[1]:
                notes.add("missing_end_token")
        if messages[0]["role"] != "system" and self.default_system:
            notes.add("default_system")
        return Rendering(text, messages, spans, ends, frozenset(notes))

    def _apply(self, messages: Sequence[Message], tools: list[Any] | None, generation: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                without_loss_keys(messages),
                tools=tools,
                chat_template=self.template,
                add_generation_prompt=generation,
                tokenize=False,
            )
        except TEMPLATE_ERRORS as error:
            why = f"{error}" or type(error).__name__
            raise TemplateRefusal(f"the chat template refuses the chat: {why}") from None
        return str(text)

    def generation_mask(
        self, messages: Sequence[Message], tools: list[Any] | None = None
    ) -> tuple[list[int], list[int]]:
        """The tokens of a chat, and the template's own mask of those that its generation markers enclose."""
        encoded = self.tokenizer.apply_chat_template(
            without_loss_keys(messages),
            tools=tools,
            chat_template=self.template,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        return encoded["input_ids"], encoded["assistant_masks"]

    # ---------------------------------------------------------------------------------------- spans

    def _align(
        self, text: str, messages: Sequence[Message], tools: list[Any] | None, generation: bool
    ) -> list[Span | None] | None:
        """Lay the template's literals over the rendering; None when they do not fit."""
        skeleton = self._skeleton(messages, tools, generation)
        spans: list[Span | None] = [None] * len(messages)
        if not text.startswith(skeleton.literals[0]):
            return None
        position = len(skeleton.literals[0])
        for index, literal in zip(skeleton.order, skeleton.literals[1:], strict=True):
            for content in trimmed(messages[index]["content"]):
                end = position + len(content)
                if text.startswith(content, position) and text.startswith(literal, end):
                    spans[index] = (position, end)
                    position = end + len(literal)
                    break
            else:
                return None
        return spans if position == len(text) and len(set(skeleton.order)) == len(skeleton.order) else None

    def _skeleton(self, messages: Sequence[Message], tools: list[Any] | None, generation: bool) -> Skeleton:
        key = None if tools else shape_of(messages, generation)
        if key is not None and key in self._skeletons:
            return self._skeletons[key]
        marked = [
            {**message, "content": f"\ue0f0{index}\ue0f1"} if is_marked(message) else message
            for index, message in enumerate(messages)
        ]
        parts = _MARK.split(self._apply(marked, tools, generation))
        skeleton = Skeleton(tuple(parts[::2]), tuple(int(index) for index in parts[1::2]))
        if key is not None:
            if len(self._skeletons) >= _MAX_SKELETONS:
                self._skeletons.clear()
            self._skeletons[key] = skeleton
        return skeleton

    def _differ(
        self, text: str, messages: Sequence[Message], tools: list[Any] | None, generation: bool
    ) -> list[Span | None]:
        """The part of the rendering that depends on each message's content."""
        spans: list[Span | None] = []
        mark = next(char for char in map(chr, range(0xE000, 0xF8FF)) if char not in text)
        for index, message in enumerate(messages):
            marked = [*messages[:index], {**message, "content": mark}, *messages[index + 1 :]]
            probe = self._apply(marked, tools, generation)
            start = len(os.path.commonprefix([text, probe]))
            shared = len(os.path.commonprefix([text[start:][::-1], probe[start:][::-1]]))
            # An empty turn that the template leaves out has no place; the probe shows a whole turn there.
            is_left_out = mark not in probe or (not message["content"] and message["role"] == "system")
            spans.append(None if is_left_out else (start, len(text) - shared))
        return spans

    def _with_tool_calls(
        self, text: str, messages: Sequence[Message], tools: list[Any] | None, index: int, span: Span | None
    ) -> Span:
        """Widen the span of an assistant turn to its tool calls, which the template writes in its own way."""
        turn = f"turn {index + 1} ({messages[index]['role']})"
        if span is None or span[0] == span[1]:
            prompt = self._apply(messages[:index], tools, True) if index else ""
            if not text.startswith(prompt):
                raise TemplateRefusal(f"the tool call of {turn} cannot be found in the rendered chat")
            span = (len(prompt), len(prompt))
        end = text.find(self.turn_end, span[1]) if self.turn_end else len(text)
        end = len(text) if end < 0 else end
        for call in messages[index]["tool_calls"]:
            name = (call.get("function") or call).get("name")
            if not name or name not in text[span[0] : end]:
                raise TemplateRefusal(f"the chat template leaves out the tool call of {turn}")
        return span[0], end

    def _turn_ends(
        self, text: str, messages: Sequence[Message], spans: Sequence[Span | None], generation: bool
    ) -> list[int]:
        turn_end = self.turn_end
        ends = [0] * len(spans)
        last = len(messages) - 1
        for index, span in enumerate(spans):
            if span is None:
                continue
            end = span[1]
            if turn_end and text.startswith(turn_end, end):
                end += len(turn_end)
            if index == last and not generation and text[end:].strip() == self.tokenizer.eos_token:
                end = len(text)
            ends[index] = end
        return ends

    # ---------------------------------------------------------------------------------------- facts

    @cached_property
    def _writes_contents_only(self) -> bool:
        """Whether the template's syntax rules out that the rendering depends on what a content says."""
        return writes_contents_only(self.template or str(self.tokenizer.chat_template))

    @cached_property
    def turn_end(self) -> str:
        """The text that ends an assistant turn, or nothing when the template has none."""
        chat = [{"role": role, "content": "x"} for role in ("user", "assistant") * 2]
        try:
            literals = self._skeleton(chat, None, False).literals
        except TemplateRefusal:
            return self.tokenizer.eos_token or ""
        if len(literals) != 5:
            return self.tokenizer.eos_token or ""
        middle, final = (self._control_split.split(literals[index]) for index in (2, 4))
        text = ""
        for one, other in zip(middle, final, strict=False):
            if one != other:
                return (text + os.path.commonprefix([one, other])).rstrip()
            text += one
            if self._control_split.fullmatch(one):
                return text
        return text.rstrip()

    @cached_property
    def control_tokens(self) -> frozenset[str]:
        """The strings that the tokenizer turns into control tokens: what contents must not smuggle in."""
        template = self.template or str(self.tokenizer.chat_template)
        return frozenset(
            token.content
            for token in self.tokenizer.added_tokens_decoder.values()
            if token.content.strip() and (token.special or token.content in template)
        )

    @cached_property
    def markers(self) -> frozenset[str]:
        """Strings that show that a text was rendered with this template already."""
        template = self.template or str(self.tokenizer.chat_template)
        ordinary = {self.tokenizer.bos_token, self.tokenizer.eos_token}
        markers = {token for token in self.control_tokens - ordinary if token in template}
        chat = [{"role": role, "content": "x"} for role in ("user", "assistant")]
        try:
            header = self._skeleton(chat, None, False).literals[1].strip()
        except TemplateRefusal:
            header = ""
        return frozenset(markers | ({header} if len(header) > 1 else set()))

    @cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """Matches any control token; the longest one where several begin."""
        tokens = sorted(self.control_tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, tokens)) or "(?!)")

    def has_control(self, content: str) -> bool:
        """Whether a content spells out a control token."""
        # Control tokens mostly begin alike, and most contents hold no such character at all.
        return self._control_start in content and self.control_pattern.search(content) is not None

    @cached_property
    def _control_start(self) -> str:
        return os.path.commonprefix(sorted(self.control_tokens))

    @cached_property
    def _control_split(self) -> re.Pattern[str]:
        return re.compile(f"({self.control_pattern.pattern})")

    @cached_property
    def default_system(self) -> str:
        """The system prompt that the template writes of itself into a chat without one."""
        user = {"role": "user", "content": "x"}
        try:
            without = self._skeleton([user], None, False).literals
            given = self._skeleton([{"role": "system", "content": "x"}, user], None, False).literals
        except TemplateRefusal:
            return ""
        if len(without) != 2 or len(given) != 3:
            return ""
        before, after = given[:2]
        head = without[0]
        injected = head[len(before) : len(head) - len(after)]
        return injected if before + injected + after == head else ""

    @cached_property
    def writes_reasoning(self) -> bool:
        """Whether the template writes what was thought as it writes the same in an answer's content."""
        chat: list[Message] = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "y", "reasoning_content": "probed thought"},
        ]
        try:
            text = self._apply(chat, None, False)
            return "probed thought" in text and text == self._apply(with_reasoning_as_text(chat), None, False)
        except TemplateRefusal:
            return False

    @cached_property
    def _tool_places(self) -> frozenset[str]:
        """What the template writes of tools: `tools`, `calls` with their arguments, `results`."""
        places = set()
        for name, (messages, tools, written) in tool_probes().items():
            try:
                text = self._apply(messages, tools, False)
            except TemplateRefusal:
                continue
            if all(part in text for part in written):
                places.add(name)
        return frozenset(places)


_templates: weakref.WeakKeyDictionary[Tokenizer, dict[Any, ChatTemplate]] = weakref.WeakKeyDictionary()


def chat_template(tokenizer: Tokenizer, template: str | None = None) -> ChatTemplate:
    """The `ChatTemplate` of a tokenizer, made once for each text of its template."""
    known = _templates.setdefault(tokenizer, {})
    key = template or str(tokenizer.chat_template)
    if key not in known:
        # The cache must not keep its own key alive.
        known[key] = ChatTemplate(weakref.proxy(tokenizer), template)
    return known[key]
