"""Names of an earlier layout, which the model cards of saved adapters tell their readers to import."""

from phlora.files import cache_root as cache_root
from phlora.models.builtin import EMBEDDED as EMBEDDED
from phlora.models.builtin import embedded_folder as embedded_folder
from phlora.models.builtin import silent_gguf as silent_gguf
from phlora.models.tiny import tiny_phi3 as tiny_phi3
from phlora.models.tiny import tiny_tokenizer as tiny_tokenizer
