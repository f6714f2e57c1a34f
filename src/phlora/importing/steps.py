"""How many steps an epoch has, counted on rows that are at hand: some tools bound by it what Phlora says outright."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from phlora.config import DataFile
from phlora.errors import PhloraError
from phlora.importing.settings import Settings, exists

# Larger files take longer to count than anybody waits for a configuration.
_MOST_BYTES = 200_000_000


def most_steps_of_an_epoch(settings: Settings, *, batch_size: int) -> int | None:
    """Optimizer steps of an epoch, at most: packing and rows that cannot be trained make fewer.

    Args:
        settings: with data and batches mapped.
        batch_size: of a pass, where none is mapped.

    Returns:
        None where the rows are not at hand, or too many to be counted.
    """
    rows = _count(settings.mapped["data.files"].value)
    if rows is None:
        return None
    held_out = settings.mapped.get("data.eval_size")
    if held_out is not None:
        rows -= round(rows * held_out.value) if held_out.value < 1 else int(held_out.value)
    passes = math.ceil(max(rows, 1) / _given(settings, "per_device_train_batch_size", batch_size))
    return math.ceil(passes / _given(settings, "gradient_accumulation_steps", 1))


def _given(settings: Settings, name: str, default: int) -> int:
    one = settings.mapped.get(f"training_config.{name}")
    return default if one is None else int(one.value)


def _count(files: list[dict[str, Any]]) -> int | None:
    paths = [Path(entry["path"]) for entry in files]
    if not all(exists(path) and path.is_file() for path in paths):
        return None
    if sum(path.stat().st_size for path in paths) > _MOST_BYTES:
        return None
    from phlora.data.dataset import read_all
    from phlora.data.rows import Row

    try:
        found = read_all([DataFile(**entry) for entry in files], "auto", {})
        return sum(isinstance(item, Row) for item in found)
    except PhloraError:
        return None  # `phlora plan` says what is wrong with them.
