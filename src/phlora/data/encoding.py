"""Text to token ids and character offsets.

A control token such as `<|end|>` written inside a message is data, so it is tokenised as plain text: the
stretch between two real control tokens is encoded alone with `split_special_tokens`. That is done only
where encoding a harmless text of the same shape alone gives the same tokens as in its place; elsewhere an
invisible space breaks the control token up.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from phlora.data.chat_template import ChatTemplate, Tokenizer
from phlora.data.rendering import Rendering, Span
from phlora.errors import ModelError, shown

ZERO_WIDTH_SPACE = "\u200b"

Encoded = tuple[list[int], list[Span]]


def require_tokenizer(tokenizer: Any) -> None:
    """
    Raises:
        ModelError: what was given is no tokenizer, but its name or nothing.
    """
    if not hasattr(tokenizer, "is_fast"):
        raise ModelError(
            f"{shown(tokenizer)} was given",
            where="tokenizer",
            expected="a tokenizer of transformers",
            fix='load it first: phlora.load_tokenizer("...").tokenizer',
        )


class Encoder:
    """Text to ids and character offsets, without special tokens of its own."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        require_tokenizer(tokenizer)
        if not tokenizer.is_fast:
            raise ModelError(
                f"The tokenizer {type(tokenizer).__name__} gives no character offsets",
                expected="a fast tokenizer (tokenizer.json)",
                fix="save the model's tokenizer in the fast format",
            )
        self.tokenizer = tokenizer
        # The Rust tokenizer cannot be given options while it encodes on another thread.
        self.lock = threading.Lock()

    def texts(self, texts: list[str], *, split_special_tokens: bool = False) -> list[Encoded]:
        if not texts:
            return []
        with self.lock:
            encoded = self.tokenizer(
                texts,
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                split_special_tokens=split_special_tokens,
                verbose=False,
            )
        # The encodings give their offsets in one go; as a column of the result they are built token by token.
        return [
            (ids, encoding.offsets)
            for ids, encoding in zip(encoded["input_ids"], encoded.encodings, strict=True)
        ]

    def ids(self, texts: list[str]) -> list[array[int]]:
        """As `texts`, without offsets, which take a fifth of the time of encoding."""
        backend = self.tokenizer.backend_tokenizer
        with self.lock:
            # As the tokenizer itself sets it before it encodes.
            backend.encode_special_tokens = False
            backend.no_truncation()
            backend.no_padding()
            encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [array("i", encoding.ids) for encoding in encodings]

    def plain(self, text: str) -> Encoded:
        """Text that no template rendered: it begins with the one BOS token that the tokenizer would add."""
        return self.with_bos(self.texts([text])[0])

    def with_bos(self, encoded: Encoded) -> Encoded:
        ids, offsets = encoded
        if self._bos and ids[:1] != self._bos:
            return [*self._bos, *ids], [(0, 0), *offsets]
        return ids, offsets

    @cached_property
    def _bos(self) -> list[int]:
        """The BOS token where the tokenizer adds one."""
        with self.lock:
            first: list[int] = self.tokenizer("")["input_ids"][:1]
        return first if first == [self.tokenizer.bos_token_id] else []

    def rendering(
        self,
        rendering: Rendering,
        template: ChatTemplate,
        *,
        generation: bool = False,
    ) -> tuple[Rendering, list[int], list[Span]]:
        """Encode one rendered chat, with control tokens inside the contents as plain text."""
        written = _control_spans(rendering, template)
        if not written:
            return rendering, *self.texts([rendering.text])[0]
        encoded = self._with_plain_text(rendering.text, written, template)
        if encoded:
            return replace(rendering, notes=rendering.notes | {"control_tokens"}), *encoded
        messages = [
            {
                **message,
                "content": template.control_pattern.sub(
                    lambda match: match[0][0] + ZERO_WIDTH_SPACE + match[0][1:], message["content"]
                ),
            }
            for message in rendering.messages
        ]
        broken = template.render(messages, rendering.tools, generation=generation)
        notes = rendering.notes | broken.notes | {"control_tokens_broken"}
        return replace(broken, notes=notes), *self.texts([broken.text])[0]

    def _with_plain_text(self, text: str, written: Sequence[Span], template: ChatTemplate) -> Encoded | None:
        """Encode with the control tokens at `written` as plain text; None when that would not be exact."""
        harmless = _overwrite(text, written)
        ids, offsets = self.texts([harmless])[0]
        control_ids = {self.tokenizer.convert_tokens_to_ids(token) for token in template.control_tokens}
        borders = [
            index
            for index, (token, offset) in enumerate(zip(ids, offsets, strict=True))
            if token in control_ids and harmless[slice(*offset)].strip() in template.control_tokens
        ]
        new_ids: list[int] = []
        new_offsets: list[Span] = []
        for left, right in zip([-1, *borders], [*borders, len(ids)], strict=True):
            if left >= 0:
                new_ids.append(ids[left])
                new_offsets.append(offsets[left])
            start = offsets[left][1] if left >= 0 else 0
            end = offsets[right][0] if right < len(ids) else len(text)
            piece, piece_offsets = ids[left + 1 : right], offsets[left + 1 : right]
            if any(start <= span[0] < end for span in written):
                alone, plain = self.texts([harmless[start:end], text[start:end]], split_special_tokens=True)
                if alone[0] != piece or control_ids.intersection(plain[0]):
                    return None
                piece = plain[0]
                piece_offsets = [(start + one, start + other) for one, other in plain[1]]
            new_ids += piece
            new_offsets += piece_offsets
        return new_ids, new_offsets


def _control_spans(rendering: Rendering, template: ChatTemplate) -> list[Span]:
    """Where the contents of a rendered chat spell out control tokens."""
    spans = []
    for message, span in zip(rendering.messages, rendering.spans, strict=True):
        if span and template.has_control(message["content"]):
            matches = template.control_pattern.finditer(rendering.text, span[0], span[1])
            spans += [match.span() for match in matches]
    return spans


def _overwrite(text: str, spans: Sequence[Span]) -> str:
    """The text with each span overwritten by as many ordinary characters."""
    parts, position = [], 0
    for start, end in spans:
        parts += [text[position:start], "<" + "x" * (end - start - 1)]
        position = end
    return "".join([*parts, text[position:]])
