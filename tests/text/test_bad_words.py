"""The token sequences of words that an answer must not contain."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.text.bad_words import bad_word_tokens
from llama_jax.text.tokenizer import Tokenizer, TokenizerError
from tests.support.paths import DEMO_CHECKPOINT
from tests.support.tiny_tokenizer import tiny_tokenizer


def test_a_word_is_banned_with_and_without_a_space_before_it():
    tokenizer = Tokenizer(DEMO_CHECKPOINT)
    with_space = tuple(tokenizer.encode(" pipeline", add_bos=False))
    without = tuple(tokenizer.encode("pipeline", add_bos=False))
    assert len(with_space) == 1 and with_space[-len(without) :] != without
    assert bad_word_tokens(tokenizer, ["pipeline"]) == (without, with_space)
    assert bad_word_tokens(tokenizer, [" pipeline", "pipeline"]) == (without, with_space)


def test_a_special_token_can_be_banned():
    tokenizer = tiny_tokenizer()
    [eot] = tokenizer.encode("<|eot_id|>", add_bos=False)
    assert bad_word_tokens(tokenizer, ["<|eot_id|>"]) == ((eot,),)


@given(words=st.lists(st.text("ab hello", min_size=1).filter(str.strip), max_size=5))
def test_what_is_banned_spells_the_words(words):
    tokenizer = tiny_tokenizer()
    sequences = bad_word_tokens(tokenizer, words)
    assert len(set(sequences)) == len(sequences)
    spelled = {tokenizer.decode(list(sequence)) for sequence in sequences}
    bare = {word.lstrip(" ") for word in words}
    assert bare <= spelled <= bare | {f" {word}" for word in bare}


@pytest.mark.parametrize("word", ["", "  ", "\ud800"])
def test_what_cannot_be_banned(word):
    with pytest.raises(TokenizerError):
        bad_word_tokens(tiny_tokenizer(), [word])
