"""The system prompt that an adapter was trained with."""

from __future__ import annotations

from pathlib import Path

from phlora.data.dataset import load_rows
from phlora.data.system_prompt import SystemPrompts, find_system_prompts
from phlora.errors import DataError, ModelError, RunError
from phlora.files import ADAPTER_FACTS, read_json
from phlora.runs.folder import HELD_OUT_FILE, RUN_FILE

# In the adapter's facts, and in run.json.
SYSTEM_PROMPTS = "system_prompts"


def system_prompts_of(adapter: Path) -> SystemPrompts | None:
    """What the adapter, or the run around it, says about its system prompts; None where nothing does.

    Runs that were made before this was written down are asked by their held-out rows.

    Raises:
        ModelError, RunError: a file that should say it is no JSON object.
    """
    if (adapter / ADAPTER_FACTS).is_file():
        said = SystemPrompts.from_json(read_json(adapter / ADAPTER_FACTS, ModelError).get(SYSTEM_PROMPTS))
        if said:
            return said
    run = adapter.resolve().parent.parent
    if adapter.resolve().parent.name != "adapter" or not (run / RUN_FILE).is_file():
        return None
    said = SystemPrompts.from_json(read_json(run / RUN_FILE, RunError).get(SYSTEM_PROMPTS))
    return said or _of_held_out_rows(run / HELD_OUT_FILE)


def _of_held_out_rows(file: Path) -> SystemPrompts | None:
    try:
        return find_system_prompts(load_rows(file).rows) if file.is_file() else None
    except DataError:
        # A chat needs no held-out rows.
        return None
