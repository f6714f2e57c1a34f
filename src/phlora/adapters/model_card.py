"""The model card (README.md) of a saved adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import LoraConfig

_CARD = """\
---
{named_base}library_name: peft
pipeline_tag: text-generation
tags: [lora, phlora]
---

# LoRA adapter for {base_model}

Rank {r}, alpha {alpha}, on {targets}. Trained with Phlora; {quality}.

```python
from peft import PeftModel
{imports}from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(model, "path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

Token ids that end a reply: {stop_token_ids}. The tokenizer in this folder, with its chat template, is the
one that the adapter was trained with.
"""


def model_card(lora: LoraConfig, facts: Mapping[str, Any], *, kind: str = "hub") -> str:
    """The card's text.

    Args:
        facts: `base_model`, `stop_token_ids`, `step` and, where something was held out, `held_out_loss`.
        kind: of the base model's source: `hub`, `folder`, `gguf` or `embedded`.
    """
    targets = lora.target_modules
    quality = f"step {facts['step']}"
    if "held_out_loss" in facts:
        quality += f", loss {facts['held_out_loss']:.4f} on held-out rows"
    is_embedded = kind == "embedded"
    return _CARD.format(
        base_model=facts["base_model"],
        # A hub takes no card whose base it cannot find by its name.
        named_base=f"base_model: {facts['base_model']}\n" if kind == "hub" else "",
        base=f'embedded_folder("{facts["base_model"]}")' if is_embedded else f'"{facts["base_model"]}"',
        imports="from phlora import embedded_folder\n" if is_embedded else "",
        r=lora.r,
        alpha=f"{lora.lora_alpha:g}",
        targets=targets if isinstance(targets, str) else ", ".join(sorted(targets or [])),
        quality=quality,
        stop_token_ids=", ".join(map(str, facts["stop_token_ids"])),
    )
