"""The system prompt that an adapter, or a merged model, was trained with."""

from __future__ import annotations

from pathlib import Path

from phlora.adapters.saved_facts import read_adapter_facts
from phlora.data.dataset import load_rows
from phlora.data.system_prompt import SystemPrompts, find_system_prompts
from phlora.errors import DataError
from phlora.runs.resolve import Resolved

# In the adapter's facts, and in run.json.
SYSTEM_PROMPTS = "system_prompts"


def system_prompts_of(found: Resolved) -> SystemPrompts | None:
    """What the adapter or merged model, or the run around it, says about its system prompts; None where nothing does.

    Runs that were made before this was written down are asked by their held-out rows.

    Raises:
        ModelError: a file that should say it is no JSON object.
    """
    # A merged model says it where an adapter does.
    facts = read_adapter_facts(found.adapter or found.source)
    if said := SystemPrompts.from_json(facts.get(SYSTEM_PROMPTS)):
        return said
    if found.rows is None:
        return None
    return SystemPrompts.from_json(found.facts.get(SYSTEM_PROMPTS)) or _of_held_out_rows(found.rows)


def _of_held_out_rows(file: Path) -> SystemPrompts | None:
    try:
        return find_system_prompts(load_rows(file).rows) if file.is_file() else None
    except DataError:
        # A chat needs no held-out rows.
        return None
