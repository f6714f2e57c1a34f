"""What the tests of merging and converting share: rows, and adapters as other tools would have written them."""

from __future__ import annotations

from phlora.display import Display
from phlora.testing import chat_rows, tiny_adapter

TEXTS = ["salam دنیا", "namaste नमस्ते", "zdravo свете", "merhaba dünya", "xin chào"]
ROWS = chat_rows(20)
QUIET = Display(quiet=True)
save_adapter = tiny_adapter
