"""The parameters of a request that concern its text: of the prompt, and of the answer."""

import pytest
from transformers import PreTrainedTokenizerFast

from llama_jax.text.tokenizer import Tokenizer
from tests.support.fake_client import EOT, FakeServer, error_of, ok, user
from tests.support.tokenizer_kinds import LLAMA_3_1, write_tokenizer

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BOTH = pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
BOS = "<|begin_of_text|>"


def text_of(entry: dict) -> str:
    """The text of a choice of any of the four kinds."""
    if "text" in entry:
        return entry["text"]
    return entry.get("message", entry.get("delta"))["content"]


def texts(server: FakeServer, path: str, **body) -> set[str]:
    """The texts of the whole and of the streamed answer."""
    whole = server.complete if path == COMPLETIONS else server.chat
    [choice] = whole(**{"max_tokens": 100, **body})["choices"]
    chunks = server.stream(path, **{"max_tokens": 100, **body})
    streamed = "".join(text_of(entry) for chunk in chunks for entry in chunk["choices"])
    return {text_of(choice), streamed}


# The answer


@BOTH
def test_the_text_includes_the_stop_string_on_request(path):
    server = FakeServer("Hello, world!")
    assert texts(server, path, stop=", w") == {"Hello"}
    assert texts(server, path, stop=", w", include_stop_str_in_output=True) == {"Hello, w"}
    token = server.engine.script[1]
    two = server.tokenizer.decode(server.engine.script[:2])
    assert texts(server, path, stop_token_ids=[token], include_stop_str_in_output=True) == {two}


@BOTH
def test_special_tokens_are_shown_on_request(path):
    server = FakeServer("Hello!")
    asked = {"skip_special_tokens": False}
    assert texts(server, path, **asked) == {"Hello!"}
    assert texts(server, path, **asked, include_stop_str_in_output=True) == {f"Hello!{EOT}"}
    twice = 2 * len(server.engine.script)
    again = texts(server, path, **asked, ignore_eos=True, max_tokens=twice)
    assert again == {f"Hello!{EOT}Hello!{EOT}"}
    hidden = texts(server, path, ignore_eos=True, max_tokens=twice)
    assert hidden == {"Hello!Hello!"}
    assert texts(server, path, **asked, ignore_eos=True, stop="|>H") == {"Hello!<|eot_id"}


@BOTH
def test_a_byte_level_tokenizer_adds_no_spaces_between_special_tokens(path):
    server = FakeServer(f"{EOT}{EOT}a")
    asked = {"skip_special_tokens": False, "ignore_eos": True, "max_tokens": 3}
    for spaces in (True, False):
        found = texts(server, path, **asked, spaces_between_special_tokens=spaces)
        assert found == {f"{EOT}{EOT}a"}


@BOTH
def test_stop_strings_count_only_after_min_tokens(path):
    server = FakeServer("abcabcabc")
    assert texts(server, path, stop="b") == {"a"}
    assert texts(server, path, stop="b", min_tokens=2) == {"abca"}
    assert texts(server, path, stop="b", min_tokens=5, ignore_eos=True) == {"abcabca"}


@BOTH
@pytest.mark.parametrize(
    ("stop", "shown", "text"),
    [
        (f"{EOT}{EOT}", False, "a"),
        (f"{EOT}{EOT}", True, f"a{EOT}{EOT}"),
        ("id|><|eot", True, "a<|eot_id|><|eot"),
    ],
)
def test_a_stop_string_across_two_special_tokens(path, stop, shown, text):
    server = FakeServer(f"a{EOT}{EOT}b")
    asked = {"skip_special_tokens": not shown, "include_stop_str_in_output": shown}
    assert texts(server, path, stop=stop, ignore_eos=True, max_tokens=9, **asked) == {text}


@BOTH
def test_bad_words_reach_the_engine_as_tokens(path):
    server = FakeServer()
    given = {"prompt": "Hi"} if path == COMPLETIONS else {"messages": user("Hi")}
    ok(server.post(path, {**given, "bad_words": ["fox", EOT], "n": 2}))
    (_, params), (_, other) = server.engine.requests
    spelled = {server.tokenizer.decode(list(tokens), False) for tokens in params.bad_words}
    assert {"fox", EOT} <= spelled <= {"fox", " fox", EOT, f" {EOT}"}
    assert params.bad_words == other.bad_words
    for words in (["x"] * 257, ["x" * 20_000], [" "], [""], ["x", 5], "x"):
        response = server.post(path, {**given, "bad_words": words})
        assert (response.status_code, error_of(response)["param"]) == (400, "bad_words")


# Token ids


@pytest.mark.parametrize("prompts", [["Hi"], ["Hi", "Ho ho"]])
def test_token_ids_of_a_completion(prompts):
    server = FakeServer("Hello!")
    asked = {"prompt": prompts, "return_token_ids": True, "n": 2, "max_tokens": 100}
    wanted = [server.tokenizer.encode(prompt) for prompt in prompts for _ in range(2)]
    choices = server.complete(**asked)["choices"]
    assert [choice["prompt_token_ids"] for choice in choices] == wanted
    assert {tuple(choice["token_ids"]) for choice in choices} == {tuple(server.engine.script)}
    entries = [chunk["choices"][0] for chunk in server.stream(COMPLETIONS, **asked)]
    for index, prompt in enumerate(wanted):
        mine = [entry for entry in entries if entry["index"] == index]
        assert [entry.get("prompt_token_ids") for entry in mine] == [
            prompt, *[None] * (len(mine) - 1)
        ]  # fmt: skip
        assert [token for entry in mine for token in entry["token_ids"]] == server.engine.script


def test_token_ids_of_a_chat():
    server = FakeServer("Hello!")
    body = server.chat(return_token_ids=True)
    [(prompt, _)] = server.engine.requests
    assert body["prompt_token_ids"] == prompt
    assert body["choices"][0]["token_ids"] == server.engine.script
    first, *others = server.stream(CHAT, return_token_ids=True)
    assert first["prompt_token_ids"] == prompt
    assert not any("prompt_token_ids" in chunk for chunk in others)
    found = [token for c in (first, *others) for token in c["choices"][0]["token_ids"]]
    assert found == server.engine.script
    for chunk in (server.chat(), *server.stream(CHAT, return_token_ids=False)):
        assert "prompt_token_ids" not in chunk and "token_ids" not in chunk["choices"][0]


@BOTH
def test_log_probabilities_name_tokens_by_id_on_request(path):
    server = FakeServer("Hé!")
    asked = {"logprobs": True, "top_logprobs": 2} if path == CHAT else {"logprobs": 2}
    asked |= {"return_tokens_as_token_ids": True, "max_tokens": 100}
    whole = (server.chat if path == CHAT else server.complete)(**asked)["choices"][0]["logprobs"]
    names = [f"token_id:{token}" for token in server.engine.script]
    if path == COMPLETIONS:
        plain = server.complete(logprobs=2, max_tokens=100)["choices"][0]["logprobs"]
        assert whole == {
            **plain,
            "tokens": names,
            "top_logprobs": [{name: -0.5, "token_id:7": -1.5} for name in names],
        }
    else:
        assert [entry["token"] for entry in whole["content"]] == names
        tops = [[top["token"] for top in entry["top_logprobs"]] for entry in whole["content"]]
        assert tops == [[name, "token_id:7"] for name in names]
        said = b"".join(bytes(entry["bytes"]) for entry in whole["content"])
        assert said.decode() == f"Hé!{EOT}"
    parts = [chunk["choices"][0]["logprobs"] for chunk in server.stream(path, **asked)]
    key = "content" if path == CHAT else "tokens"
    assert [item for part in parts for item in part[key]] == whole[key]


# The prompt


def prompt_of(server: FakeServer, path: str, **body) -> list[int]:
    """The prompt that the engine gets."""
    given = {"prompt": "Hi there"} if path == COMPLETIONS else {"messages": user("Hi there")}
    ok(server.post(path, {**given, "max_tokens": 1, **body}))
    return server.engine.requests[-1][0]


@BOTH
def test_special_tokens_of_the_tokenizer_in_front_of_the_prompt(path):
    server = FakeServer()
    bos = server.tokenizer.bos_token_id
    with_, without = (prompt_of(server, path, add_special_tokens=v) for v in (True, False))
    assert with_ == [bos, *without]
    assert prompt_of(server, path) == (with_ if path == COMPLETIONS else without)
    assert without.count(bos) == (path == CHAT), "the template writes it"


@pytest.mark.parametrize("keep", [1, 2, 5, 9, 10, 11, 10**9])
def test_a_truncated_text_is_that_of_transformers(tmp_path, keep):
    path = write_tokenizer(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(str(path), truncation_side="left")
    server = FakeServer()
    server.served.tokenizer = Tokenizer(path)
    text = "a b c d e f g"
    wanted = theirs(text, truncation=True, max_length=keep)["input_ids"]
    assert prompt_of(server, COMPLETIONS, prompt=text, truncate_prompt_tokens=keep) == wanted


@pytest.mark.parametrize("keep", [1, 5, 1000])
def test_token_ids_and_chats_keep_their_last_tokens(keep):
    server = FakeServer()
    for path, given in ((COMPLETIONS, {"prompt": [*range(5, 30)]}), (CHAT, {})):
        full = prompt_of(server, path, **given)
        assert prompt_of(server, path, **given, truncate_prompt_tokens=keep) == full[-keep:]


@BOTH
def test_a_prompt_can_be_truncated_to_what_fits(path):
    server = FakeServer(max_model_len=50)
    long = {"prompt": "word " * 400} if path == COMPLETIONS else {"messages": user("word " * 400)}
    assert server.post(path, {**long, "max_tokens": 9}).status_code == 400
    assert len(prompt_of(server, path, **long, truncate_prompt_tokens=-1, max_tokens=9)) == 41
    prompt = prompt_of(server, path, **long, truncate_prompt_tokens=-1, max_tokens=None)
    assert len(prompt) == (50 - 16 if path == COMPLETIONS else 49)


@pytest.fixture(scope="module")
def llama_3_1(tmp_path_factory):
    """A server with the template of Llama 3.1, and its tokenizer in transformers."""
    path = write_tokenizer(tmp_path_factory.mktemp("tokenizer"), template=LLAMA_3_1)
    server = FakeServer()
    server.served.tokenizer = Tokenizer(path)
    return server, PreTrainedTokenizerFast.from_pretrained(str(path))


OPEN = [*user("Where to?"), {"role": "assistant", "content": "To the"}]
DATE = {"date_string": "1 May 2026"}


@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
@pytest.mark.parametrize(
    ("asked", "adds", "continues"),
    [
        ({}, True, False),
        ({"add_generation_prompt": True, "continue_final_message": False}, True, False),
        ({"add_generation_prompt": False}, False, False),
        ({"add_generation_prompt": False, "continue_final_message": True}, False, True),
        ({"continue_final_message": True}, False, True),
    ],
)
def test_how_a_chat_ends(llama_3_1, path, asked, adds, continues):
    server, theirs = llama_3_1
    wanted = theirs.apply_chat_template(
        OPEN, add_generation_prompt=adds, continue_final_message=continues, **DATE
    )["input_ids"]
    body = {"messages": OPEN, "chat_template_kwargs": DATE, **asked}
    if path == CHAT:
        assert prompt_of(server, CHAT, **body) == wanted
    else:
        assert ok(server.post(path, body)).json()["tokens"] == wanted


@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"nonsense": "x"}}, "chat_template_kwargs.nonsense"),
        ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs.messages"),
        ({"chat_template_kwargs": {"chat_template": "{{ 7 }}"}},
         "chat_template_kwargs.chat_template"),
        ({"chat_template_kwargs": {"date_string": EOT}}, "chat_template_kwargs.date_string"),
        ({"chat_template_kwargs": {"date_string": 5}}, "chat_template_kwargs.date_string"),
        ({"chat_template_kwargs": {"date_string": "x" * 1001}}, "chat_template_kwargs.date_string"),
        ({"chat_template_kwargs": {str(n): "" for n in range(33)}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": "x"}, "chat_template_kwargs"),
        ({"chat_template": "{{ 7 * 7 }}"}, "chat_template"),
    ],
)  # fmt: skip
def test_what_a_chat_may_not_ask_of_the_template(llama_3_1, path, asked, param):
    server, _ = llama_3_1
    response = server.post(path, {"messages": OPEN, **asked})
    assert (response.status_code, error_of(response)["param"]) == (400, param)


# Other values that clients write


@BOTH
def test_a_seed_of_minus_one_is_random(path):
    server = FakeServer()
    for n in (1, 2):
        given = {"prompt": "Hi"} if path == COMPLETIONS else {"messages": user("Hi")}
        ok(server.post(path, {**given, "seed": -1, "n": n}))
        assert {params.seed for _, params in server.engine.requests[-n:]} == {-1}


@BOTH
def test_null_is_absence(path):
    server = FakeServer("Hello!")
    names = ("stream", "stop", "seed", "n", "max_tokens", "logit_bias", "truncate_prompt_tokens",
             "skip_special_tokens", "add_special_tokens", "return_token_ids")  # fmt: skip
    assert texts(server, path, **dict.fromkeys(set(names) - {"stream"})) == {"Hello!"}
    whole = server.complete if path == COMPLETIONS else server.chat
    assert text_of(whole(stream=None)["choices"][0]) == "Hello!"


def test_both_names_of_the_limit_may_be_sent_if_they_agree():
    server = FakeServer("Hello!")
    body = server.chat(max_tokens=2, max_completion_tokens=2)
    assert body["usage"]["completion_tokens"] == 2
