"""The text, tokenizer and training loop of the demo checkpoint."""

import re

import pytest
import torch
import transformers

from demo import batches, corpus, facts, train
from demo.tokenizer import SPECIAL_TOKENS, save_tokenizer
from tests.support.paths import DEMO_CHECKPOINT

CHECKPOINT = DEMO_CHECKPOINT
SUM = re.compile(r"(?<!\d)(\d+)\s*(?:\+|plus|and)\s*(\d+)(?!\d)")


@pytest.fixture(scope="module")
def tokenizer():
    return train.demo_tokenizer(dialogues=1000)


@pytest.fixture(scope="module")
def chat_tokenizer(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(tokenizer, folder, max_length=1024)
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_the_training_text_contains_no_held_out_sum():
    source = corpus.Corpus(1)
    pairs = set()
    for _ in range(20_000):
        text = "\n".join(message["content"] for message in source.dialogue(max_turns=6))
        pairs |= {(int(a), int(b)) for a, b in SUM.findall(text)}
    small = {(a, b) for a, b in pairs if max(a, b) < corpus.LIMIT}
    assert len(small) > 8500  # the pattern finds sums
    assert not any(corpus.is_held_out(a, b) for a, b in small)


def test_a_tenth_of_the_pairs_is_held_out_in_both_orders():
    pairs = set(corpus.held_out_pairs())
    assert 900 < len(pairs) < 1100
    assert all((b, a) in pairs for a, b in pairs)


def test_the_sums_in_the_training_text_are_right():
    source = corpus.Corpus(2)
    for _ in range(2000):
        for message in source.dialogue():
            for a, b, total in re.findall(r"(\d+) \+ (\d+) = (\d+)", message["content"]):
                assert int(a) + int(b) == int(total)


def test_facts_are_well_formed():
    assert all(topic.answers and (topic.questions or topic.names) for topic in facts.TOPICS)
    for topic in facts.TOPICS:
        for text in [*topic.questions, *topic.names, *topic.answers]:
            assert text == text.strip() and "  " not in text
    assert all(subject and subject == subject.strip() for subject in facts.FOREIGN)


def test_the_same_seed_gives_the_same_dialogues():
    first, second = corpus.Corpus("x"), corpus.Corpus("x")
    assert [first.dialogue() for _ in range(50)] == [second.dialogue() for _ in range(50)]


def test_every_digit_is_a_token(tokenizer):
    text = "12345 + 678 = 9"
    tokens = tokenizer.encode(text, add_special_tokens=False).tokens
    assert [t for t in tokens if any(c.isdigit() for c in t)] == list("123456789")


@pytest.mark.parametrize(
    "text",
    [
        "plain text",
        "  spaces   and\ttabs\n\n\nlines \r\n",
        "naïve Ünïcode — “quotes”",
        "日本語のテキスト",
        "🎉👩‍👩‍👧‍👦 é e\u0301",
        "\x00\x01\x7f",
        "мир 123 ٣٤",
        "don't WE'LL i'm",
    ],
)
def test_any_utf8_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=True) == text


def test_special_tokens_follow_the_vocabulary(tokenizer):
    ids = [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS]
    size = tokenizer.get_vocab_size()
    assert ids == list(range(size - len(SPECIAL_TOKENS), size))
    for token, number in zip(SPECIAL_TOKENS, ids, strict=True):
        assert tokenizer.encode(token, add_special_tokens=False).ids == [number]


def test_chat_template_is_the_llama_3_form_with_one_bos(chat_tokenizer):
    messages = [
        {"role": "system", "content": " Be short. "},
        {"role": "user", "content": "Hi\n"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "1+1"},
    ]
    text = chat_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe short.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n1+1<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    ids = chat_tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids.count(chat_tokenizer.bos_token_id) == 1 and ids[0] == chat_tokenizer.bos_token_id
    assert chat_tokenizer("Hi")["input_ids"][0] == chat_tokenizer.bos_token_id


def test_training_uses_the_ids_of_the_chat_template(tokenizer, chat_tokenizer):
    source = corpus.Corpus(3)
    for _ in range(200):
        messages = source.dialogue()
        ids, spoken = batches.encode(tokenizer, messages)
        assert ids == chat_tokenizer.apply_chat_template(messages)["input_ids"]
        said = tokenizer.decode(
            [i for i, s in zip(ids, spoken, strict=True) if s], skip_special_tokens=False
        )
        replies = [m["content"] for m in messages if m["role"] == "assistant"]
        assert said == "".join(f"{reply}<|eot_id|>" for reply in replies)


def tiny_trainer(tokenizer, **plan):
    config = train.demo_config(tokenizer)
    config.update(
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "layer_types": None,
        }
    )
    torch.manual_seed(0)
    settings = train.Plan(
        steps=40, peak_rate=1e-2, warmup_steps=5, short_rows=(4, 128), long_rows=(2, 256), **plan
    )
    return train.Trainer(transformers.LlamaForCausalLM(config), tokenizer, settings)


def test_packed_dialogues_do_not_see_each_other(tokenizer):
    model = tiny_trainer(tokenizer).model.eval()
    source = corpus.Corpus(4)
    encoded = [batches.encode(tokenizer, source.dialogue(max_turns=1)) for _ in range(3)]
    data, placed = batches.pack(encoded, rows=1, length=256, pad=0)
    assert placed == 3
    with torch.no_grad():
        packed = model(
            input_ids=data.tokens, attention_mask=data.visible, position_ids=data.positions
        ).logits[0]
        start = 0
        for ids, _ in encoded:
            alone = model(input_ids=torch.tensor([ids])).logits[0]
            torch.testing.assert_close(
                packed[start : start + len(ids)], alone, atol=1e-4, rtol=1e-4
            )
            start += len(ids)


def test_loss_falls_and_a_resumed_run_continues_from_the_saved_step(tokenizer, tmp_path):
    trainer = tiny_trainer(tokenizer)
    losses = [trainer.train_step() for _ in range(20)]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    trainer.save(tmp_path / "state.pt")
    ahead = [trainer.train_step() for _ in range(3)]

    resumed = tiny_trainer(tokenizer)
    resumed.resume(tmp_path / "state.pt")
    assert resumed.step == 20 and resumed.tokens == 20 * 512
    torch.testing.assert_close([resumed.train_step() for _ in range(3)], ahead)


def test_learning_rate_warms_up_and_falls():
    plan = train.Plan(steps=1000, warmup_steps=10)
    rates = [plan.rate(step, 0.0) for step in range(1001)]
    assert rates[0] < rates[5] < rates[10] and max(rates) <= plan.peak_rate
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[1000] == pytest.approx(0.02 * plan.peak_rate)


def test_the_bundled_checkpoint_is_small_and_has_its_files():
    files = {path.name: path.stat().st_size for path in CHECKPOINT.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    } <= files.keys()
    assert sum(files.values()) <= 12 * 2**20
    config = transformers.AutoConfig.from_pretrained(CHECKPOINT)
    assert config.num_hidden_layers == 8 and config.num_key_value_heads == 4
    stops = transformers.GenerationConfig.from_pretrained(CHECKPOINT).eos_token_id
    bundled = transformers.AutoTokenizer.from_pretrained(CHECKPOINT)
    assert bundled.convert_ids_to_tokens(stops) == ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
    assert len(bundled) == config.vocab_size
