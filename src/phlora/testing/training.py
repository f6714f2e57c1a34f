"""The configuration of a training that a test can afford."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl.trainer.sft_config import SFTConfig


def quiet_config(output_dir: str | Path, **settings: Any) -> SFTConfig:
    """TRL's `SFTConfig` for a few steps on the CPU in float32: nothing shown, reported or saved, every step logged.

    Args:
        output_dir: of the trainer.
        **settings: other fields of `SFTConfig`, and other values than these.
    """
    # TRL takes seconds to import, which not every test needs.
    from trl.trainer.sft_config import SFTConfig

    quiet = {
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return SFTConfig(output_dir=str(output_dir), **{**quiet, **settings})
