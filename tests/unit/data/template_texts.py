"""Chat templates that do something else than the common ones."""

from __future__ import annotations

from phlora.testing.tokenizers import CHATML

DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nI am Bot<|im_end|>\n' }}{% endif %}"
    + CHATML
)
GENERATION = CHATML.replace("{{ '<|im_start|>'", "{%- generation -%}{{ '<|im_start|>'").replace(
    "{% endfor %}", "{%- endgeneration -%}{% endfor %}"
)
# Leaves out the turns that say nothing, as newer templates do with the system prompt.
SKIPS_EMPTY = CHATML.replace("{{ '<|im_start|>'", "{% if message['content'] %}{{ '<|im_start|>'").replace(
    "{% endfor %}", "{% endif %}{% endfor %}"
)
ASKS_FOR_TOOLS = CHATML.replace(
    "message['content']",
    "message['content'] + ('<tools>' + message['tools'] if 'tools' in message and message['tools'] is not none "
    "else '')",
)
# Ends without the text that ends a turn elsewhere, or with only a part of it.
OPEN_END = CHATML.replace("+ '<|im_end|>\n' }}", "}}{% if not loop.last %}{{ '<|im_end|>\n' }}{% endif %}")
