import pytest
from transformers import GenerationConfig, LlamaConfig, Phi3Config
from trl.chat_template_utils import phi3_chat_template, phi3_training_chat_template

from phlora.errors import ModelError
from phlora.models import families
from phlora.testing import tiny_phi3

MINI = Phi3Config()
MEDIUM = Phi3Config(hidden_size=5120, intermediate_size=17920, num_attention_heads=40, num_key_value_heads=10)
PHI4_MINI = Phi3Config(
    vocab_size=200064, num_attention_heads=24, num_key_value_heads=8, eos_token_id=199999, pad_token_id=199999
)


def ids_of(tokenizer, *tokens):
    return tuple(tokenizer.convert_tokens_to_ids(list(tokens)))


@pytest.mark.parametrize(
    ("config", "rows", "feed_forward"),
    [
        (MINI, (3072, 3072, 3072), 8192),
        (MEDIUM, (5120, 1280, 1280), 17920),
        (PHI4_MINI, (3072, 1024, 1024), 8192),
    ],
)
def test_fused_rows_of_the_real_sizes(config, rows, feed_forward):
    blocks = families.fused_row_blocks(config)
    assert tuple(blocks["qkv_proj"].items()) == tuple(zip(("q_proj", "k_proj", "v_proj"), rows, strict=True))
    assert blocks["gate_up_proj"] == {"gate_proj": feed_forward, "up_proj": feed_forward}


def test_fused_rows_add_up_to_the_weights(tiny):
    model, _ = tiny
    blocks, layer = families.fused_row_blocks(model.config), model.model.layers[0]
    assert sum(blocks["qkv_proj"].values()) == layer.self_attn.qkv_proj.out_features
    assert sum(blocks["gate_up_proj"].values()) == layer.mlp.gate_up_proj.out_features


def test_llama_has_no_fused_rows():
    assert families.fused_row_blocks(LlamaConfig()) == {}


def test_phi3_turns_end_with_end_and_not_with_eos(tiny_tokenizer):
    assert tiny_tokenizer.eos_token == "<|endoftext|>"
    assert families.turn_end_token(tiny_tokenizer) == "<|end|>"


def test_turn_end_follows_the_template_or_falls_back_to_eos(tiny_tokenizer):
    tiny_tokenizer.chat_template = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    assert families.turn_end_token(tiny_tokenizer) == "<|endoftext|>"
    tiny_tokenizer.chat_template = "{% for m in messages %}{{ m.content + '\n' }}{% endfor %}"
    assert families.turn_end_token(tiny_tokenizer) == "<|endoftext|>"
    loop = "{% for number in range(10**9) %}x{% endfor %}"
    for refused in (
        "{{ raise_exception('no') }}",
        loop,
        "{% include 'a' %}",
        "{{ 1/0 }}",
        "{{ 'a' * 10**13 }}",
    ):
        tiny_tokenizer.chat_template = refused
        assert families.turn_end_token(tiny_tokenizer) == "<|endoftext|>"
    tiny_tokenizer.chat_template = None
    assert families.turn_end_token(tiny_tokenizer) == "<|endoftext|>"
    tiny_tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no token that ends a turn"):
        families.turn_end_token(tiny_tokenizer)


def test_stop_tokens_join_template_family_eos_and_generation_config(tiny):
    model, tokenizer = tiny
    family = families.family_of(model.config, tokenizer)
    assert family.name == "phi-3"
    end, text, assistant = ids_of(tokenizer, "<|end|>", "<|endoftext|>", "<|assistant|>")
    assert families.stop_token_ids(tokenizer, model.generation_config, family=family) == (
        end,
        text,
        assistant,
    )
    assert families.stop_token_ids(tokenizer, GenerationConfig(eos_token_id=text)) == (end, text)
    # A tuned copy whose eos is <|end|> still stops at <|endoftext|>, which its base was trained with.
    tokenizer.eos_token = "<|end|>"
    assert families.stop_token_ids(tokenizer, family=family) == (end, text)


def test_phi4_mini_and_chatml_are_told_by_their_markers(tiny_tokenizer):
    tiny_tokenizer.add_tokens(["<|tool|>"], special_tokens=True)
    assert families.family_of(PHI4_MINI, tiny_tokenizer).name == "phi-4-mini"
    assert families.family_of(LlamaConfig()).name == "llama"
    assert families.fused_row_blocks(LlamaConfig()) == {}


def test_embedded_model_is_chatml_in_phi3_layout(smollm2):
    model, tokenizer = smollm2
    family = families.family_of(model.config, tokenizer)
    assert (family.name, family.model_type) == ("chatml", "phi3")
    assert families.turn_end_token(tokenizer) == "<|im_end|>"
    assert families.stop_token_ids(tokenizer, model.generation_config, family=family) == (2,)


def test_pad_token_is_never_a_stop_token(tiny):
    model, tokenizer = tiny
    before = len(tokenizer)
    stops = set(families.stop_token_ids(tokenizer, model.generation_config))
    assert tokenizer.pad_token_id in stops
    assert families.choose_pad_token(tokenizer, stops) == "<unk>"
    unknown = tokenizer.convert_tokens_to_ids("<unk>")
    assert families.choose_pad_token(tokenizer, stops | {unknown}) == "<|placeholder1|>"
    assert len(tokenizer) == before


def test_own_pad_token_stays_when_it_stops_nothing(tiny_tokenizer):
    tiny_tokenizer.pad_token = "<|placeholder6|>"
    stops = families.stop_token_ids(tiny_tokenizer)
    assert families.choose_pad_token(tiny_tokenizer, stops) == "<|placeholder6|>"


def test_vocabulary_without_any_pad_is_an_error(tiny_tokenizer):
    with pytest.raises(ModelError, match="none is left for padding"):
        families.choose_pad_token(tiny_tokenizer, range(len(tiny_tokenizer)))


def test_context_lengths_know_longrope_and_windows():
    assert families.context_lengths(tiny_phi3()[0].config).original_max_tokens is None
    long = families.context_lengths(tiny_phi3(longrope=True)[0].config)
    assert (long.max_tokens, long.original_max_tokens, long.sliding_window_tokens) == (256, 64, None)
    assert families.context_lengths(tiny_phi3(sliding_window=7)[0].config).sliding_window_tokens == 7


def test_training_template_is_trls_where_it_knows_the_template(tiny_tokenizer):
    assert families.training_template(tiny_tokenizer) is None
    tiny_tokenizer.chat_template = phi3_chat_template
    assert families.training_template(tiny_tokenizer) == phi3_training_chat_template
    tiny_tokenizer.chat_template = phi3_training_chat_template
    assert families.training_template(tiny_tokenizer) == phi3_training_chat_template
    tiny_tokenizer.chat_template = None
    assert families.training_template(tiny_tokenizer) is None
