"""Records that hold a chat in another shape than a list of messages, and exports that leave a choice to the user."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from phlora.data.blocks import TEXT_ONLY
from phlora.data.json_text import inner_json
from phlora.data.messages import messages_of, with_system
from phlora.data.rows import BadRow, Message, kind_of

# Longer chats are not exported; a circle of parents would never end.
_MAX_TURNS = 100_000


def from_gemini(record: Mapping[str, Any]) -> list[Message]:
    """Gemini's `contents`, with its system instruction."""
    found = messages_of(record["contents"], "contents")
    for name in ("systemInstruction", "system_instruction"):
        found = with_system(found, record.get(name), name)
    return found


def from_xlam(record: Mapping[str, Any]) -> list[Message]:
    """A query and the calls that answer it, as in Salesforce's xLAM sets; `answers` is a list, or one as JSON."""
    calls = record["answers"]
    if isinstance(calls, str):
        calls = inner_json(calls, "`answers` is no JSON", "a list of calls")
    if not isinstance(record["query"], str) or not isinstance(calls, list) or not calls:
        raise BadRow("wrong_type", f"`answers` is {kind_of(calls)}", "a list of calls")
    turns = [
        {"role": "user", "content": record["query"]},
        {"role": "function_call", "content": calls},
    ]
    return messages_of(turns, "answers")


def from_chatgpt(record: Mapping[str, Any]) -> list[Message]:
    """The branch of an exported ChatGPT chat that was shown last; what is no text of a side is left out."""
    nodes = record["mapping"]
    if not isinstance(nodes, Mapping):
        raise BadRow("wrong_type", f"`mapping` is {kind_of(nodes)}", "the nodes of a chat")
    turns = []
    for node in reversed(_branch(nodes, record.get("current_node"))):
        message = node.get("message")
        if isinstance(message, Mapping) and (turn := _chatgpt_turn(message)):
            turns.append(turn)
    if not turns:
        raise BadRow("empty_chat", "`mapping` holds no message", "a chat")
    return _joined_sides(turns)


def _branch(nodes: Mapping[str, Any], last: Any) -> list[Mapping[str, Any]]:
    """The nodes from the last one shown up to the root."""
    if not isinstance(last, str) or last not in nodes:
        last = next(
            (name for name, node in nodes.items() if isinstance(node, Mapping) and not node.get("children")),
            None,
        )
    branch: list[Mapping[str, Any]] = []
    while isinstance(last, str) and isinstance(nodes.get(last), Mapping):
        branch.append(nodes[last])
        if len(branch) > min(len(nodes), _MAX_TURNS):
            raise BadRow("broken_tree", "the parents of the messages in `mapping` form a circle", "a tree")
        last = nodes[last].get("parent")
    return branch


def _chatgpt_turn(message: Mapping[str, Any]) -> Message | None:
    author, content, metadata = (_mapping(message.get(key)) for key in ("author", "content", "metadata"))
    role = author.get("role")
    if role not in ("user", "assistant", "system") or metadata.get("is_visually_hidden_from_conversation"):
        return None
    if (
        content.get("content_type") not in ("text", "multimodal_text")
        or message.get("recipient", "all") != "all"
    ):
        return None
    if message.get("weight") == 0:  # no longer a part of the chat
        return None
    parts = content.get("parts")
    if not isinstance(parts, list):
        return None
    if any(isinstance(part, Mapping) and "image" in str(part.get("content_type")) for part in parts):
        raise BadRow("wrong_type", "the chat holds images", TEXT_ONLY)
    text = "".join(part for part in parts if isinstance(part, str))
    return {"role": role, "content": text} if text.strip() else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def from_claude(record: Mapping[str, Any]) -> list[Message]:
    """An exported Claude chat; a message's own `text` counts, which leaves tools out."""
    turns: list[Message] = []
    for turn, message in enumerate(record["chat_messages"], 1):
        role = {"human": "user", "assistant": "assistant"}.get(str(message.get("sender")))
        if role is None:
            raise BadRow("unknown_role", f"turn {turn} has no known sender", "human or assistant")
        text = message.get("text")
        if not isinstance(text, str) or not text.strip():
            text = _claude_text(message.get("content"))
        if message.get("files"):
            raise BadRow("wrong_type", f"turn {turn} holds files", TEXT_ONLY)
        attached = [
            str(item["extracted_content"])
            for item in map(_mapping, message.get("attachments") or [])
            if item.get("extracted_content")
        ]
        text = "\n\n".join([*attached, *([text] if text.strip() else [])])
        if text.strip():
            turns.append({"role": role, "content": text})
    if not turns:
        raise BadRow("empty_chat", "`chat_messages` holds no text", "a chat")
    return _joined_sides(turns)


def _claude_text(content: Any) -> str:
    blocks = content if isinstance(content, list) else []
    return "".join(
        str(block.get("text", "")) for block in map(_mapping, blocks) if block.get("type") == "text"
    )


def _joined_sides(turns: list[Message]) -> list[Message]:
    """Turns of one side after another, as they are left when tools are taken out, become one."""
    joined: list[Message] = []
    for turn in turns:
        if joined and joined[-1]["role"] == turn["role"]:
            joined[-1] = {**turn, "content": f"{joined[-1]['content']}\n\n{turn['content']}"}
        else:
            joined.append(turn)
    return joined


# ------------------------------------------------------------------------------------------------ exports


@dataclass(frozen=True)
class Export:
    """An export from which chats can be made once something is known that it does not say."""

    kind: str
    needs_assistant: bool

    def advice(self, file: str) -> str:
        """The command that makes chats of it."""
        who = " --assistant NAME" if self.needs_assistant else ""
        told = "; NAME is whose messages are to be learned" if self.needs_assistant else ""
        return f"phlora data convert {shlex.quote(file)} chats.jsonl{who}{told}"


def foreign_export(record: Any) -> Export | None:
    """What export a record comes from, if it is none that can be read as it is."""
    if not isinstance(record, Mapping):
        return None
    return next((export for export, is_one in _EXPORTS if is_one(record)), None)


def _is_telegram(record: Mapping[str, Any]) -> bool:
    chats = _mapping(record.get("chats")).get("list")
    first = chats[0] if isinstance(chats, list) and chats else record
    messages = _mapping(first).get("messages")
    if not isinstance(messages, list):
        return {"date", "from_id", "text", "type"} <= record.keys()
    return any(isinstance(item, Mapping) and "date_unixtime" in item for item in messages[:8])


def _is_slack(record: Mapping[str, Any]) -> bool:
    return "ts" in record and "text" in record and ("user" in record or "bot_id" in record)


OASST_TREE = Export("a tree of OpenAssistant, which holds many chats", needs_assistant=False)
OASST_ROWS = Export("OpenAssistant's messages, a row each, not chats", needs_assistant=False)
TELEGRAM = Export(
    "a Telegram export, which does not say whose messages are the assistant's", needs_assistant=True
)
SLACK = Export("a Slack export, which does not say whose messages are the assistant's", needs_assistant=True)
WHATSAPP = Export(
    "a WhatsApp chat, which does not say whose messages are the assistant's", needs_assistant=True
)
_EXPORTS: tuple[tuple[Export, Callable[[Mapping[str, Any]], bool]], ...] = (
    (OASST_TREE, lambda record: isinstance(record.get("prompt"), Mapping) and "message_tree_id" in record),
    (OASST_ROWS, lambda record: {"message_id", "parent_id", "text", "role"} <= record.keys()),
    (TELEGRAM, _is_telegram),
    (SLACK, _is_slack),
)
