"""The converted model against transformers' own reading of the same file as a Llama."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from phlora.models import builtin

TEXTS = (
    "The capital of France is Paris.",
    "سلام دنیا، امروز 23 درجه است",
    "नमस्ते दुनिया",
    "Ћао свете, Türkçe ığş, Tiếng Việt",
)


def test_logits_and_ids_equal_the_llama_reading(smollm2):
    model, tokenizer = smollm2
    source = builtin._find_gguf("smollm2-135m")
    with builtin.silent_gguf():
        llama = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32
        ).eval()
        reference = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    assert llama.config.model_type == "llama"
    assert model.config.model_type == "phi3"
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt").input_ids
        assert ids.tolist() == [reference(text).input_ids]
        assert tokenizer.decode(ids[0]) == text
        with torch.no_grad():
            ours, theirs = model(ids).logits, llama(ids).logits
        # The same products in another order of rows; 0.0 was seen, a BLAS may block them differently.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
        assert torch.equal(ours.argmax(-1), theirs.argmax(-1))
