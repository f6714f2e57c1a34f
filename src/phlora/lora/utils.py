"""`loralib.utils`, for programs that import from there; the same functions are in `phlora.lora`."""

from phlora.lora.base import LoRALayer
from phlora.lora.state import lora_state_dict, mark_only_lora_as_trainable

__all__ = ["LoRALayer", "lora_state_dict", "mark_only_lora_as_trainable"]
