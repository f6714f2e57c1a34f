import dataclasses
import random

import pytest
import torch
from peft import LoraConfig, get_peft_model

from phlora.errors import ConfigError
from phlora.models.generate import _text_pieces, generate, stream
from phlora.models.sampling import Sampling
from phlora.testing import tiny_phi3

STOPS = (5, 9, 17, 33, 40)


def prompts_with(shared, *, rows=9, seed=0):
    rng = random.Random(seed)
    prefix = [rng.randrange(50, 250) for _ in range(shared)]
    return [prefix + [rng.randrange(50, 250) for _ in range(rng.randrange(1, 30))] for _ in range(rows)]


def one_by_one(model, prompts, max_new_tokens):
    """What transformers generates for each prompt alone, without the stop token."""
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        new = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            use_cache=True,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(STOPS),
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        answers.append(new[:-1] if new and new[-1] in STOPS else new)
    return answers


@pytest.mark.parametrize("variant", [{}, {"sliding_window": 24}, {"longrope": True}], ids=str)
@pytest.mark.parametrize("shared", [0, 20])
@pytest.mark.parametrize("batch_size", ["auto", 4])
def test_batch_equals_one_by_one(variant, shared, batch_size):
    model, _ = tiny_phi3(**variant)
    prompts = prompts_with(shared)
    ours = generate(
        model, prompts, max_new_tokens=20, stop_token_ids=STOPS, pad_token_id=0, batch_size=batch_size
    )
    assert ours == one_by_one(model, prompts, 20)
    assert len({len(answer) for answer in ours}) > 1


def test_identical_and_single_prompts_work(tiny):
    model, _ = tiny
    prompt = prompts_with(20, rows=1)[0]
    single = generate(model, [prompt], max_new_tokens=6, stop_token_ids=STOPS, pad_token_id=0)
    twice = generate(model, [prompt, prompt], max_new_tokens=6, stop_token_ids=STOPS, pad_token_id=0)
    assert twice == single * 2 == one_by_one(model, [prompt], 6) * 2


def test_model_under_an_adapter_in_training_keeps_its_state(tiny):
    model, _ = tiny
    model.config.use_cache = False
    config = LoraConfig(r=4, target_modules=["qkv_proj"], init_lora_weights=False, lora_dropout=0.5)
    adapted = get_peft_model(model, config).train()
    prompts = prompts_with(12, rows=4)
    ours = generate(adapted, prompts, max_new_tokens=8, stop_token_ids=STOPS, pad_token_id=0)
    assert adapted.training and adapted.base_model.model.model.layers[0].training
    assert model.config.use_cache is False
    assert ours == one_by_one(adapted.eval(), prompts, 8)


def test_pad_id_does_not_matter(tiny):
    model, _ = tiny
    prompts = prompts_with(10)
    first, second = (
        generate(model, prompts, max_new_tokens=8, stop_token_ids=STOPS, pad_token_id=pad) for pad in (0, 77)
    )
    assert first == second


def test_progress_counts_rows_to_the_end(tiny):
    model, _ = tiny
    seen = []
    generate(
        model,
        prompts_with(10, rows=7),
        max_new_tokens=2,
        stop_token_ids=STOPS,
        pad_token_id=0,
        batch_size=3,
        progress=seen.append,
    )
    assert seen == [2, 2, 3]


def test_nothing_to_do_is_no_error(tiny):
    model, _ = tiny
    assert generate(model, [], max_new_tokens=4, stop_token_ids=STOPS, pad_token_id=0) == []
    assert generate(model, [[60]], max_new_tokens=0, stop_token_ids=STOPS, pad_token_id=0) == [[]]


def test_bad_arguments_are_told(tiny):
    model, tokenizer = tiny
    with pytest.raises(ConfigError, match="Prompt 1 has no token"):
        generate(model, [[3], []], max_new_tokens=4, stop_token_ids=STOPS, pad_token_id=0)
    with pytest.raises(ConfigError, match="batch has 0 rows"):
        generate(model, [[3]], max_new_tokens=4, stop_token_ids=STOPS, pad_token_id=0, batch_size=0)
    with pytest.raises(ConfigError, match="has no token"):
        stream(model, [], tokenizer, max_new_tokens=4, stop_token_ids=STOPS)


@pytest.mark.parametrize("variant", [{}, {"longrope": True}], ids=str)
def test_stream_says_what_generate_says(variant):
    model, tokenizer = tiny_phi3(**variant)
    for prompt in prompts_with(45, rows=4):
        [ids] = generate(model, [prompt], max_new_tokens=20, stop_token_ids=STOPS, pad_token_id=0)
        text = "".join(stream(model, prompt, tokenizer, max_new_tokens=20, stop_token_ids=STOPS))
        assert text == tokenizer.decode(ids, skip_special_tokens=True)


def test_seed_repeats_a_draw_and_small_nuclei_are_greedy(tiny):
    model, tokenizer = tiny

    def say(**settings):
        sampling = Sampling(**settings)
        pieces = stream(
            model, [60, 61, 62], tokenizer, max_new_tokens=25, stop_token_ids=(), sampling=sampling
        )
        return "".join(pieces)

    assert say(temperature=1.0, seed=3) == say(temperature=1.0, seed=3)
    assert say(temperature=1.0, seed=3) != say(temperature=1.0, seed=4)
    assert say(temperature=1.0, top_p=1e-6) == say() == say(temperature=1.0, top_k=1)


@pytest.mark.parametrize("variant", [{}, {"sliding_window": 24}, {"longrope": True}], ids=str)
def test_draws_of_a_row_do_not_depend_on_the_rows_beside_it(variant):
    model, _ = tiny_phi3(**variant)
    prompts = prompts_with(20, rows=5)
    options = {"max_new_tokens": 12, "stop_token_ids": STOPS, "pad_token_id": 0}
    drawn = Sampling(temperature=0.9, top_k=40, top_p=0.95, seed=11)
    together = generate(model, prompts, **options, sampling=drawn)
    assert generate(model, prompts, **options, sampling=drawn, batch_size=2) == together
    for number, prompt in enumerate(prompts):
        own = dataclasses.replace(drawn, seed=11 + number)
        assert generate(model, [prompt], **options, sampling=own) == [together[number]]
    assert generate(model, prompts, **options) != together


def test_no_answer_goes_past_the_models_context():
    model, _ = tiny_phi3()
    most = model.config.max_position_embeddings
    prompts = [[60] * (most - 3), [61] * 5, [62] * most]
    answers = generate(model, prompts, max_new_tokens=8, stop_token_ids=(), pad_token_id=0)
    assert [len(answer) for answer in answers] == [3, 8, 0]


@pytest.mark.parametrize(
    "text", ["سلام دنیا", "नमस्ते दुनिया", "Здраво свете", "Işığı aç", "Bật đèn lên", "a 🌍 b"]
)
def test_pieces_are_whole_characters(tiny_tokenizer, text):
    ids = tiny_tokenizer(text).input_ids
    pieces = list(_text_pieces(iter(ids), tiny_tokenizer))
    assert "".join(pieces) == text
    assert len(pieces) > 2
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("cut", [0, 1, 2, 3])
def test_a_character_that_the_end_cuts_is_the_one_that_decoding_the_whole_reply_gives(tiny_tokenizer, cut):
    """And one of which the model has made a replacement character itself."""
    for text in ("ok 🌍", "नमस्ते", "so \ufffd"):
        ids = tiny_tokenizer(text).input_ids
        ids = ids[: len(ids) - cut]
        whole = tiny_tokenizer.decode(ids, skip_special_tokens=True)
        assert "".join(_text_pieces(iter(ids), tiny_tokenizer)) == whole
        assert cut or whole == text
