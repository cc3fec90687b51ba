"""Meta's tokenizer.model, converted, against tiktoken with the expression of Meta's program.

The vocabulary is small: byte-level BPE trained here, written in tiktoken's form.
"""

import base64
import json
import re

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from convert.meta.reader import MetaReader
from convert.meta.tiktoken_file import eos_token_ids, read_tokens, special_tokens
from convert.meta.tokenizer import write_tokenizer
from llama_jax.checkpoint.reader import CheckpointError
from llama_jax.config.huggingface_generation import parse_generation_config
from llama_jax.text.tokenizer import Tokenizer
from tests.support.meta_checkpoint import PARAMS, meta_weights, shard, tiktoken_form, write_meta

# From the tokenizer of Meta's program.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "It's the tokenizer that they'll use, isn't it? We've seen 123456789 of them, I'm sure.",
    "def f(x):\n    if x > 0:\n        return [y ** 2 for y in range(x)]\n\n\n    pass\t\t# !!",
    "Grüße aus Köln, naïve café; Привет, мир! こんにちは世界。你好，世界！ مرحبا بالعالم नमस्ते",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa --------------------------------  ================  ....",
    "🙂🙃👩‍👩‍👧‍👦 e\u0301 \u200b \ufeff \u00a0\u00a0 \u3000 \r\n\r\n \u2028 Ⅷ ½ ² ٣٤٥ १२३",
]
VOCABULARY = 700
UNMERGED = b" qxqxq"  # a token that no merge of two others makes


@pytest.fixture(scope="module")
def tokens():
    """Tokens in the order of ranks: the bytes in tiktoken's order, then the merges."""
    trained = Backend(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        CORPUS * 3,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False, min_frequency=2
        ),
    )
    code = {}  # character → byte of the byte-level alphabet, from the library
    for byte in range(256):
        if chr(byte) in alphabet:
            code[chr(byte)] = byte
    rest = iter(byte for byte in range(256) if byte not in code.values())
    code |= {letter: next(rest) for letter in sorted(alphabet) if letter not in code}
    by_id = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    merged = [bytes(code[letter] for letter in token) for token, _ in by_id]
    return [
        *sorted(token for token in merged if len(token) == 1),
        *(token for token in merged if len(token) > 1),
        UNMERGED,
    ]


@pytest.fixture(scope="module", params=[True, False], ids=["3.1", "3.0"])
def converted(request, tokens, tmp_path_factory):
    """A converted release, its special tokens, and tiktoken's encoding."""
    extended = request.param
    source = tmp_path_factory.mktemp("meta")
    vocabulary = {"vocab_size": len(tokens) + 256}
    params = PARAMS | vocabulary | {"use_scaled_rope": extended}
    write_meta(source, shard(meta_weights(**vocabulary), 1), params)
    (source / "tokenizer.model").write_bytes(tiktoken_form(tokens))
    destination = tmp_path_factory.mktemp("converted")
    reader = MetaReader(source)
    write_tokenizer(source, destination, reader.config)
    special = {name: len(tokens) + i for i, name in enumerate(special_tokens(extended))}
    encoding = tiktoken.Encoding(
        "meta",
        pat_str=PATTERN,
        mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
        special_tokens=special,
    )
    return destination, reader.config, special, encoding


@pytest.fixture(scope="module")
def ours(converted):
    return Tokenizer(converted[0])


def test_the_vocabulary_has_real_merges(tokens):
    assert len(tokens) > 500 and max(map(len, tokens)) > 10


PIECES = st.sampled_from(
    [
        *("It's", "'S", "'ſ", "'LL", " ", "  ", "    ", "\n", "\r\n", "\t", "\u00a0", "\u3000"),
        *("1", "12", "123", "1234", "٣", "½", "Ⅷ", "²", "é", "e\u0301", "世界", "Привет", "🙂"),
        *(
            "aaa",
            "a",
            "--",
            "-----",
            "...",
            "\u200b",
            "\ufeff",
            "\u0085",
            "\u2028",
            "\u180e",
            " qxqxq",
        ),
        *("<|eot_id|>", "<|begin_of_text|>", "<|", "|>", "<|reserved_special_token_0|>", "_"),
    ]
)


@given(text=st.text(max_size=60) | st.lists(PIECES, max_size=20).map("".join))
def test_text_is_encoded_as_by_tiktoken(converted, ours, text):
    encoding = converted[3]
    expected = encoding.encode(text, allowed_special="all")
    assert ours.encode(text, add_bos=False) == expected
    assert ours.decode(expected, skip_special_tokens=False) == text
    for token in expected:
        if token not in ours.special_token_ids:
            assert ours.token_bytes(token) == encoding.decode_single_token_bytes(token)


def test_whole_documents_are_encoded_as_by_tiktoken(converted, ours):
    for text in [
        *CORPUS,
        "a qxqxq qxqxqx",
        "\n".join(CORPUS),
        *(letter * 999 for letter in "a- \n.世"),
    ]:
        expected = converted[3].encode(text, disallowed_special=())
        assert ours.encode(text, add_bos=False) == expected


def test_merges_are_those_of_transformers(converted, tokens, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    file = tmp_path / "tokenizer.model"
    file.write_bytes(tiktoken_form(tokens))
    theirs = json.loads(TikTokenConverter(str(file)).converted().to_str())
    ours = json.loads((converted[0] / "tokenizer.json").read_text())
    for key in ("model", "pre_tokenizer", "decoder"):
        assert ours[key] == theirs[key]


def test_special_tokens_are_at_the_ids_of_each_version():
    new, old = special_tokens(extended=True), special_tokens(extended=False)
    for names in (new, old):
        assert len(names) == len(set(names)) == 256
        assert (names[0], names[1]) == ("<|begin_of_text|>", "<|end_of_text|>")
        assert names[6:8] == ["<|start_header_id|>", "<|end_header_id|>"]
        assert names[9] == "<|eot_id|>"
        assert names[2:4] == ["<|reserved_special_token_0|>", "<|reserved_special_token_1|>"]
    assert new[4:6] == ["<|finetune_right_pad_id|>", "<|reserved_special_token_2|>"]
    assert new[8] == "<|eom_id|>" and new[10] == "<|python_tag|>"
    assert (
        new[11] == "<|reserved_special_token_3|>" and new[255] == "<|reserved_special_token_247|>"
    )
    assert old[4:6] == ["<|reserved_special_token_2|>", "<|reserved_special_token_3|>"]
    assert old[8] == "<|reserved_special_token_4|>" and old[10] == "<|reserved_special_token_5|>"
    assert old[255] == "<|reserved_special_token_250|>"
    assert eos_token_ids(128000, extended=True) == (128001, 128008, 128009)
    assert eos_token_ids(128000, extended=False) == (128001, 128009)


def test_special_tokens_are_recognized(converted, ours):
    _, config, special, _ = converted
    assert ours.special_token_ids == set(special.values())
    for name, index in special.items():
        assert ours.encode(name, add_bos=False) == [index]
    assert ours.bos_token_id == special["<|begin_of_text|>"]
    assert ours.encode("a") == [ours.bos_token_id, *ours.encode("a", add_bos=False)]
    assert ours.vocab_size == config.vocab_size


def test_a_chat_has_metas_form(converted, ours):
    _, _, special, encoding = converted
    messages = [
        {"role": "system", "content": " Be brief.\n"},
        {"role": "user", "content": "Hi <|eot_id|> there"},
    ]
    expected = [special["<|begin_of_text|>"]]
    for message in [*messages, {"role": "assistant", "content": None}]:
        expected.append(special["<|start_header_id|>"])
        expected += encoding.encode(message["role"])
        expected.append(special["<|end_header_id|>"])
        expected += encoding.encode("\n\n")
        if message["content"] is not None:
            expected += encoding.encode(message["content"].strip(), disallowed_special=())
            expected.append(special["<|eot_id|>"])
    assert ours.encode_chat(messages) == expected


def test_transformers_opens_it(converted):
    folder, config, special, encoding = converted
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    text = "Hello, world"
    assert tokenizer(text)["input_ids"] == [special["<|begin_of_text|>"], *encoding.encode(text)]
    assert tokenizer.eos_token == "<|eot_id|>"
    assert tokenizer.model_max_length == config.max_position_embeddings
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert chat == ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nx<|eot_id|>")


def test_generation_defaults_are_those_of_metas_program(converted):
    folder, config, special, _ = converted
    file = folder / "generation_config.json"
    params = parse_generation_config(json.loads(file.read_text()), file)
    assert (params.temperature, params.top_p) == (0.6, 0.9)
    names = ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
    eos = [special[name] for name in names if name in special]
    written = json.loads(file.read_text())
    assert written["eos_token_id"] == eos == list(config.eos_token_ids)
    assert len(eos) == (3 if config.rope_scaling else 2)


def test_a_tokenizer_of_another_size_is_rejected(tmp_path, tokens):
    vocabulary = {"vocab_size": len(tokens) + 256}
    write_meta(tmp_path, shard(meta_weights(**vocabulary), 1), PARAMS | vocabulary)
    (tmp_path / "tokenizer.model").write_bytes(tiktoken_form(tokens[:-1]))
    with pytest.raises(CheckpointError, match=rf"tokenizer\.model has {len(tokens) - 1} "):
        MetaReader(tmp_path)


def test_damaged_tokenizers_are_rejected(tmp_path, tokens):
    file = tmp_path / "tokenizer.model"
    whole = tiktoken_form(tokens)
    lines = whole.splitlines(keepends=True)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        read_tokens(file)
    for content, token in {
        b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n": "SentencePiece",
        b"": "tokenizer.model",
        whole[:-2]: "tokenizer.model",
        whole + b"IQ== 3\n": "tokenizer.model",
        whole + f"IQ== {len(tokens)}\n".encode(): "tokenizer.model",
        b"".join(lines[1:]): "tokenizer.model",
        whole + base64.b64encode(b"new token") + b" 300\n": "tokenizer.model",
        whole + b"IQ==\n": f"line {len(tokens) + 1}",
        whole + b"I! 1000\n": f"line {len(tokens) + 1}",
        whole + b"IQ== x\n": f"line {len(tokens) + 1}",
        whole + b"IQ== -1\n": "tokenizer.model",
        b"{}": "line 1 ",
    }.items():
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=re.escape(token)):
            read_tokens(file)
    with file.open("wb") as sparse:
        sparse.truncate((64 << 20) + 1)
    with pytest.raises(CheckpointError, match="too large"):
        read_tokens(file)
    file.write_bytes(whole)
    assert read_tokens(file) == tokens
