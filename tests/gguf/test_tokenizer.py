"""The translation of a GGUF tokenizer to the files of a Hugging Face tokenizer."""

import json

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from llama_jax.gguf import GgufError
from llama_jax.gguf.header import GgufHeader
from llama_jax.gguf.tokenizer import write_tokenizer
from llama_jax.text.tokenizer import Tokenizer, TokenizerError
from tests.support.gguf_file import gpt2_metadata, tiny_backend, tiny_model, write_gguf
from tests.support.tiny_tokenizer import TEXT

BOS, EOT = "<|begin_of_text|>", "<|eot_id|>"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
SAMPLES = [*TEXT, "  two  spaces\n\n\ttab", "1234567 89", "I'LL we've", "naïve 日本語 🙂", "", " "]
# llama.cpp's rules (src/llama-vocab.cpp), applied one after the other.
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
RULES = {"gpt-2": [GPT_2], "smollm": [r"\p{N}", GPT_2]}


def translated(folder, metadata) -> Backend:
    write_tokenizer(GgufHeader(folder / "model.gguf", metadata, {}), folder)
    return Backend.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def llama_3(tmp_path_factory):
    backend = tiny_backend()
    metadata = gpt2_metadata(
        backend, "llama-bpe", bos=BOS, eos="<|end_of_text|>", chat_template=TEMPLATE
    )
    return backend, translated(tmp_path_factory.mktemp("llama"), metadata)


@given(st.text(max_size=40))
def test_ids_are_those_of_the_original(llama_3, text):
    original, found = llama_3
    wanted = original.encode(text, add_special_tokens=False).ids
    assert found.encode(text, add_special_tokens=False).ids == wanted
    assert found.encode(text).ids == [found.token_to_id(BOS), *wanted]


def test_the_translated_tokenizer_is_the_original(llama_3):
    original, found = (json.loads(backend.to_str()) for backend in llama_3)
    for key in ("added_tokens", "pre_tokenizer", "decoder"):
        assert found[key] == original[key]
    assert found["model"]["vocab"] == original["model"]["vocab"]
    assert found["model"]["merges"] == original["model"]["merges"]
    assert found["model"]["ignore_merges"]


@pytest.mark.parametrize("pre", RULES)
def test_words_are_those_of_llama_cpp(tmp_path, pre):
    found = translated(tmp_path, gpt2_metadata(tiny_backend(), pre))
    for text in SAMPLES:
        words = [text] if text else []
        for rule in RULES[pre]:
            words = [part for word in words for part in split(rule, word)]
        cut = found.pre_tokenizer.pre_tokenize_str(text)
        assert [text[start:end] for _, (start, end) in cut] == words


def split(rule, text):
    """The matches of a rule, and the text between them."""
    return [part for part in regex.split(f"({rule})", text) if part]


def test_special_tokens_may_come_first_as_in_smollm(tmp_path):
    """Their ids are then inside those of the model."""
    backend, first = tiny_backend(), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    metadata = gpt2_metadata(backend, "smollm")
    added = len(backend.get_added_tokens_decoder())
    tokens = metadata["tokenizer.ggml.tokens"][:-added]
    metadata["tokenizer.ggml.tokens"] = [*first, *tokens]
    metadata["tokenizer.ggml.token_type"] = [3] * len(first) + [1] * len(tokens)
    found = translated(tmp_path, metadata | {"tokenizer.ggml.bos_token_id": 1})
    assert [found.token_to_id(token) for token in first] == [0, 1, 2]
    plain = found.encode("hello", add_special_tokens=False).ids
    assert found.encode("<|im_start|>hello<|im_end|>").ids == [1, *plain, 2]  # no BOS
    assert found.decode([1, *plain, 2]) == "hello"


def test_user_defined_tokens_are_text_and_unused_ones_are_left_out(tmp_path):
    backend = tiny_backend()
    backend.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    metadata = gpt2_metadata(backend, "llama-bpe")
    count = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.tokens"] += ["[PAD1]", "[PAD2]"]
    metadata["tokenizer.ggml.token_type"] += [5, 5]
    found = translated(tmp_path, metadata)
    assert found.get_vocab_size() == count
    think = found.token_to_id("<think>")
    assert found.encode("a<think>b").ids[1] == think and found.decode([think]) == "<think>"


def test_the_end_of_a_turn_is_a_special_token_whatever_its_type(tmp_path):
    metadata = gpt2_metadata(tiny_backend(), "llama-bpe")
    eot = metadata["tokenizer.ggml.tokens"].index(EOT)
    metadata["tokenizer.ggml.token_type"][eot] = 1  # normal
    found = translated(tmp_path, metadata)
    ids = found.encode(f"hello{EOT}").ids
    assert ids[-1] == eot and found.decode(ids) == "hello"


def test_the_settings_of_the_tokenizer_are_those_of_the_file(tmp_path):
    metadata = gpt2_metadata(tiny_backend(), "llama-bpe", bos=BOS, eos=EOT)
    tokens = metadata["tokenizer.ggml.tokens"]
    more = {"tokenizer.ggml.padding_token_id": len(tokens) - 1, "llama.context_length": 4096}
    translated(tmp_path, metadata | more)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["bos_token"] == BOS and settings["eos_token"] == EOT
    assert settings["pad_token"] == tokens[-1] and settings["model_max_length"] == 4096
    with pytest.raises(GgufError, match="as its padding token"):
        translated(tmp_path, metadata | {"tokenizer.ggml.padding_token_id": len(tokens)})


def test_bos_and_eos_are_added_as_the_file_says(tmp_path):
    metadata = gpt2_metadata(tiny_backend(), "llama-bpe", bos=BOS, eos=EOT)
    for bos, eos in ((True, True), (False, False), (None, None)):
        flags = {"tokenizer.ggml.add_bos_token": bos, "tokenizer.ggml.add_eos_token": eos}
        present = {key: value for key, value in flags.items() if value is not None}
        found = translated(tmp_path, metadata | present)
        ids = found.encode("a").ids
        assert (ids[0] == found.token_to_id(BOS)) == (bos is not False)  # Llama 3 adds it
        assert (ids[-1] == found.token_to_id(EOT)) == (eos is True)


def test_a_file_of_before_the_names_is_known_by_its_bos(tmp_path):
    metadata = gpt2_metadata(tiny_backend(), "default", bos=BOS)
    wanted = translated(tmp_path, metadata | {"tokenizer.ggml.pre": "llama-bpe"}).to_str()
    assert translated(tmp_path, metadata).to_str() == wanted
    del metadata["tokenizer.ggml.pre"]
    assert translated(tmp_path, metadata).to_str() == wanted


def test_a_chat_is_encoded_with_the_template_of_the_file(tmp_path):
    metadata = gpt2_metadata(tiny_backend(), "llama-bpe", bos=BOS, chat_template=TEMPLATE)
    path = write_gguf(tmp_path / "model.gguf", tiny_model(), tokenizer=metadata)
    tokenizer = Tokenizer(path)
    ids = tokenizer.encode_chat([{"role": "user", "content": "hello"}])
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert text == f"{BOS}[user]hello{EOT}[assistant]"
    assert tokenizer.encode("hello")[0] == ids[0]
    without = {key: value for key, value in metadata.items() if "template" not in key}
    path = write_gguf(tmp_path / "base.gguf", tiny_model(), tokenizer=without)
    assert not Tokenizer(path).has_chat_template


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tokenizer.ggml.model": "llama"}, "SentencePiece"),
        ({"tokenizer.ggml.model": None}, "no tokenizer"),
        ({"tokenizer.ggml.tokens": []}, "no tokenizer"),
        ({"tokenizer.ggml.pre": "qwen2"}, "qwen2"),
        ({"tokenizer.ggml.bos_token_id": 10**6}, "bos"),
        ({"tokenizer.ggml.merges": ["zz yy"]}, "damaged"),
        ({"tokenizer.ggml.merges": ["a"]}, "damaged"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "damaged"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "damaged"),
    ],
)
def test_other_tokenizers_are_refused(tmp_path, changes, named):
    metadata = gpt2_metadata(tiny_backend(), "llama-bpe") | changes
    present = {key: value for key, value in metadata.items() if value is not None}
    with pytest.raises(GgufError, match=named):
        translated(tmp_path, present)


def test_the_message_names_the_file_and_not_the_folder_of_its_translation(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError  # without a text, as transformers does for some broken files

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.from_pretrained", fail)
    metadata = gpt2_metadata(tiny_backend(), "llama-bpe")
    path = write_gguf(tmp_path / "model.gguf", tiny_model(), tokenizer=metadata)
    with pytest.raises(TokenizerError) as caught:
        Tokenizer(path)
    assert str(caught.value) == f"The tokenizer of {path} cannot be read: AssertionError."
