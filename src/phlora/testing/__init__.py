"""What tests of Phlora, and of tools that stand on it, need: tiny models, chats, and commands run in the process.

    from phlora import finetune
    from phlora.testing import chat_rows, invoke, tiny_folder

    def test_my_tool(tmp_path):
        base = tiny_folder(tmp_path / "base")                     # a random Phi-3, made in milliseconds
        run = tmp_path / "run"
        finetune(model=str(base), data=chat_rows(20), training_config={"max_steps": 2}, output=run)
        outcome = invoke("evaluate", run, "--max-answers", 1, "--json")
        assert outcome.code == 0 and outcome.json["tuned"]["loss"] > 0

Nothing here reads a network, needs a GPU or imports pytest; Phlora itself never imports it.
"""

from phlora.testing.command_line import Outcome, invoke
from phlora.testing.models import (
    tiny_adapter,
    tiny_folder,
    tiny_gemma2,
    tiny_llama,
    tiny_phi3,
    tiny_tokenizer,
)
from phlora.testing.rows import LANGUAGES, chat_rows, write_rows
from phlora.testing.tokenizers import chatml_tokenizer, llama2_tokenizer, phi3_tokenizer
from phlora.testing.training import quiet_config

__all__ = [
    "LANGUAGES",
    "Outcome",
    "chat_rows",
    "chatml_tokenizer",
    "invoke",
    "llama2_tokenizer",
    "phi3_tokenizer",
    "quiet_config",
    "tiny_adapter",
    "tiny_folder",
    "tiny_gemma2",
    "tiny_llama",
    "tiny_phi3",
    "tiny_tokenizer",
    "write_rows",
]
