"""What a person should know about rows that were tokenised, by kind."""

from __future__ import annotations

from phlora.data.rows import Severity

NOTES: dict[str, tuple[Severity, str]] = {
    "system_folded": (
        "warning",
        "the chat template has no system message, so it was put at the head of the first user turn",
    ),
    "default_system": ("note", "the chat has no system message and the chat template writes its own"),
    "tools_as_text": (
        "note",
        "the chat template has no place for tools: tools, calls and results are written as text "
        "(`<tool_call>` blocks)",
    ),
    "reasoning_dropped": (
        "warning",
        "the chat template has no place for what was thought before an answer, so it is left out "
        "(`data.reasoning: keep` keeps it as text)",
    ),
    "content_altered": ("warning", "the chat template changes the content of a message"),
    "missing_end_token": ("warning", "the chat template writes no end token after the assistant's turn"),
    "leading_whitespace": (
        "warning",
        "the answer begins with white space that the tokenizer swallows; it is not learned",
    ),
    "control_tokens": (
        "warning",
        "a message contains the text of control tokens; it was taken as plain text",
    ),
    "control_tokens_broken": (
        "warning",
        "a message contains the text of control tokens; a zero-width space was put into each to disarm it",
    ),
    "pre_rendered": (
        "warning",
        "the text is a chat that was rendered already; its control tokens are kept, and all of a `text` or of a "
        "`completion` is trained (give `messages` to train on the answers only)",
    ),
}
