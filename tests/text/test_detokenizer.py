"""Streamed text against the decoded whole."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.text.detokenizer import Detokenizer
from llama_jax.text.tokenizer import Tokenizer
from tests.support.paths import DEMO_CHECKPOINT
from tests.support.tiny_tokenizer import make_tokenizer
from tests.support.tokenizer_kinds import write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def cut(text: str, stop: list[str]) -> str:
    """The specification, one character at a time."""
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return text


def run(tokenizer, ids, stop=()):
    detokenizer = Detokenizer(tokenizer, stop)
    pieces = [detokenizer.push(token) for token in ids]
    return [*pieces, detokenizer.finish()], detokenizer.stopped


# Few letters, so that texts often contain stop strings and starts of them.
LETTERS = st.text("abé😀 ", max_size=30)
STOPS = st.lists(st.text("abé😀 ", min_size=1, max_size=5), max_size=4)


@given(text=LETTERS, stop=STOPS)
def test_the_stream_is_the_text_up_to_the_first_stop_string(tokenizer, text, stop):
    pieces, stopped = run(tokenizer, tokenizer.encode(text), stop)
    assert "".join(pieces) == cut(text, stop)
    assert stopped == any(s in text for s in stop)


@given(data=st.data())
def test_any_tokens_stream_as_they_decode(tokenizer, data):
    """Broken UTF-8, special tokens, and ids past the vocabulary."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=30))
    stop = data.draw(STOPS)
    pieces, _ = run(tokenizer, ids, stop)
    assert "".join(pieces) == cut(tokenizer.decode(ids), stop)


@given(text=st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=40), stop=STOPS)
def test_streamed_text_is_final(tokenizer, text, stop):
    shown = ""
    detokenizer = Detokenizer(tokenizer, stop)
    for token in tokenizer.encode(text):
        shown += detokenizer.push(token)
        assert cut(text, stop).startswith(shown)
        assert "\ufffd" not in shown or "\ufffd" in text


def test_a_character_split_over_tokens_is_streamed_whole(tokenizer):
    ids = tokenizer.encode("😀", add_bos=False)
    assert len(ids) == 4
    assert run(tokenizer, ids)[0] == ["", "", "", "😀", ""]


def test_an_unfinished_character_at_the_end(tokenizer):
    ids = tokenizer.encode("😀", add_bos=False)[:2]
    assert run(tokenizer, ids)[0] == ["", "", "\ufffd"]


def test_the_start_of_a_stop_string_is_held_back(tokenizer):
    ids = [tokenizer.encode(letter, add_bos=False)[0] for letter in "abc"]
    assert run(tokenizer, ids, ["abd"]) == (["", "", "abc", ""], False)
    assert run(tokenizer, ids, ["abc"]) == (["", "", "", ""], True)
    assert run(tokenizer, ids[:2], ["abc"]) == (["", "", "ab"], False)
    not_yet = Detokenizer(tokenizer, ["ab"], min_tokens=2)
    assert [*map(not_yet.push, ids[:2])] == ["", "ab"]
    passed = Detokenizer(tokenizer, ["ab", "abd"], min_tokens=2)
    assert [*map(passed.push, ids)] == ["", "", "abc"]


def test_the_stop_string_that_is_completed_first_counts(tokenizer):
    ids = [tokenizer.encode(letter, add_bos=False)[0] for letter in "abcd"]
    assert "".join(run(tokenizer, ids, ["abcd", "bc"])[0]) == "a"


def test_of_two_stop_strings_that_are_completed_together_the_longer_counts(tokenizer):
    ids = [tokenizer.encode(letter, add_bos=False)[0] for letter in "abcd"]
    for stop in (["bcd", "cd"], ["cd", "bcd"]):
        assert "".join(run(tokenizer, ids, stop)[0]) == "a"


def test_of_two_stop_strings_in_one_token_the_earlier_counts():
    tokenizer = Tokenizer(DEMO_CHECKPOINT)
    (token,) = tokenizer.encode(" pipeline", add_bos=False)
    for stop in (["pel", "in"], ["in", "pel"]):
        assert "".join(run(tokenizer, [token], stop)[0]) == " pi"


def test_no_text_follows_a_stop_string(tokenizer):
    detokenizer = Detokenizer(tokenizer, ["b"])
    ids = tokenizer.encode("xbyz", add_bos=False)
    assert "".join(map(detokenizer.push, ids)) == "x"
    assert detokenizer.push(ids[0]) == detokenizer.finish() == ""


EOM, HEADER = "<|eom_id|>", "<|start_header_id|>"


def symbols(string: str) -> list[str]:
    """The characters of a stop string, with each special token that it spells as one symbol."""
    return re.findall(f"{re.escape(EOM)}|{re.escape(HEADER)}|.", string)


def cut_symbols(text: list[str], stop: list[str]) -> str:
    """The specification of stop strings that may spell special tokens, one symbol at a time."""
    wanted = [form for string in stop for form in (list(string), symbols(string))]
    for end in range(1, len(text) + 1):
        starts = [end - len(form) for form in wanted if text[:end][-len(form) :] == form]
        if starts:
            text = text[: min(starts)]
            break
    return "".join(symbol for symbol in text if symbol not in (EOM, HEADER))


SPELLED = st.lists(st.sampled_from([EOM, HEADER, "a", "é", "<", "|>"]), max_size=4).map("".join)


@given(
    text=st.lists(st.sampled_from([EOM, HEADER, "a", "é", "<", "|>", "<|", "eom_id"]), max_size=12),
    stop=st.lists(SPELLED.filter(bool), max_size=3),
)
def test_a_stop_string_may_spell_special_tokens(tokenizer, text, stop):
    """`text` is the answer; its special tokens are tokens, also where its text spells one."""
    special = {tokenizer.decode([i], False): i for i in tokenizer.special_token_ids}
    ids, seen = [], []
    for part in text:
        ids += [special[part]] if part in special else tokenizer.encode(part, add_bos=False)
        if part not in special:
            seen += list(part)
        elif any(part in string for string in stop):  # the others are not there at all
            seen.append(part)
    pieces, _ = run(tokenizer, ids, stop)
    assert "".join(pieces) == cut_symbols(seen, stop)


@pytest.mark.parametrize(
    ("stop", "text", "stopped"),
    [
        ([EOM], "ab", True),
        ([f"b{EOM}"], "a", True),
        ([f"{EOM}{HEADER}c"], "ab", True),
        (["|>"], "abcd", False),
        (["eom"], "abcd", False),
        (["<|eot_id|>"], "abcd", False),
        ([EOM, "b"], "a", True),
    ],
)
def test_a_special_token_in_the_answer(tokenizer, stop, text, stopped):
    ids = tokenizer.encode(f"ab{EOM}{HEADER}cd", add_bos=False)
    pieces, ended = run(tokenizer, ids, stop)
    assert ("".join(pieces), ended) == (text, stopped)


def test_of_two_special_tokens_a_stop_string_spells_the_longer(tmp_path):
    tokenizer = Tokenizer(write_tokenizer(tmp_path, special=["<x", "<x>"]))
    ids = tokenizer.encode("a<x>b", add_bos=False)
    assert "".join(run(tokenizer, ids, ["<x>"])[0]) == "a"


def test_the_token_that_ends_the_answer_is_not_shown_but_counts(tokenizer):
    a, b, eom = tokenizer.encode(f"ab{EOM}", add_bos=False)
    for last, stop, shown in ((b, "zz", "a"), (eom, f"a{EOM}", ""), (eom, EOM, "a")):
        detokenizer = Detokenizer(tokenizer, [stop])
        text = detokenizer.push(a) + detokenizer.push(last, ends=True) + detokenizer.finish()
        assert text == shown


def test_special_tokens_have_no_text(tokenizer):
    ids = sorted(tokenizer.special_token_ids)
    assert "".join(run(tokenizer, ids)[0]) == ""


def cut_tokens(pieces: list[str], stop: list[str], include: bool, min_tokens: int) -> str:
    """The specification for tokens that are whole characters, one token at a time."""
    before = ""
    for index, piece in enumerate(pieces, 1):
        text = before + piece
        for end in range(len(before) + 1, len(text) + 1):
            starts = [end - len(s) for s in stop if text[:end].endswith(s)]
            if starts and index > min_tokens:
                return text[: end if include else min(starts)]
        before = text
    return before


@given(
    parts=st.lists(st.sampled_from([EOM, HEADER, *"ab<"]), min_size=4, max_size=12),
    stop=st.lists(
        st.text("ab<", min_size=1, max_size=2) | st.sampled_from([EOM, "|>", "d|>a", "<|s"]),
        min_size=1,
        max_size=3,
    ),
    include=st.booleans(),
    min_tokens=st.integers(0, 4),
    skip=st.booleans(),
)
def test_how_the_end_and_special_tokens_are_shown(
    tokenizer, parts, stop, include, min_tokens, skip
):
    if skip:  # then a special token is a symbol, as above
        stop = [s for s in stop if s != EOM]
    ids = [tokenizer.encode(part, add_bos=False)[0] for part in parts]
    detokenizer = Detokenizer(
        tokenizer,
        stop,
        include_stop=include,
        min_tokens=min_tokens,
        skip_special_tokens=skip,
    )
    text = "".join(map(detokenizer.push, ids)) + detokenizer.finish()
    shown = [tokenizer.decode([token], skip) for token in ids]
    assert text == cut_tokens(shown, stop, include, min_tokens)


@pytest.mark.parametrize(
    ("include", "skip", "text"),
    [(False, True, "a"), (True, True, "a"), (False, False, "a"), (True, False, f"a{EOM}")],
)
def test_the_eos_token_is_shown_only_if_the_end_is_included(tokenizer, include, skip, text):
    a, eom = tokenizer.encode(f"a{EOM}", add_bos=False)
    detokenizer = Detokenizer(tokenizer, include_stop=include, skip_special_tokens=skip)
    assert detokenizer.push(a) + detokenizer.push(eom, ends=True) + detokenizer.finish() == text
