"""Llama 3.1's own tokenizer: the ids of texts and chats are those of transformers.

The same holds for the tokenizer after it went through a GGUF file.
"""

import json
import random
import shutil

import pytest
import transformers
from tokenizers import Tokenizer as Backend

from llama_jax.gguf.header import GgufHeader
from llama_jax.gguf.tokenizer import write_tokenizer
from llama_jax.text.conversation import Call
from llama_jax.text.tokenizer import Tokenizer
from tests.support.gguf_file import gpt2_metadata
from tests.support.real_models import llama_3_1_template, llama_3_1_tokenizer

pytestmark = pytest.mark.slow

BOS, EOT = "<|begin_of_text|>", "<|eot_id|>"
PIECES = [
    *"Hello world the QUICK brown fox I'll we've don't THEY'RE naïve café Straße ÇA".split(),
    *"日本語 中文字符 한국어 русский العربية עברית हिन्दी ไทย Ελληνικά İstanbul ǅ".split(),
    *"0 12 123 1234 12345678 3.14159 1,000,000 ½ ٣٤٥ ⅷ 0x7f 2026-11-26".split(),
    *"🙂 👩‍👩‍👧‍👦 🇩🇪 e\u0301 \u200b \ufeff \u00a0 \x00 \x7f ﬁ \ud7ff \U0010ffff".split(" "),
    *"def f(x): return x**2 # {}[]()<>;:'\"\\/|`~!@#$%^&*-_=+ //// ---- !!!? ...".split(),
    *("\n", "\n\n", "\r\n", "\t", "  ", "    ", " \n ", "\u3000", "\u2028"),
    *"https://example.org/a?b=c&d=e#f user@example.com C:\\dir\\file.txt <b>bold</b>".split(),
    *"antidisestablishmentarianism aaaaaaaaaaaaaaaaaaaaaaaa xyzzyxyzzyxyzzy".split(),
]
SPECIAL = [
    BOS,
    EOT,
    "<|start_header_id|>",
    "<|python_tag|>",
    "<|eot_id",
    "<|reserved_special_token_5|>",
]


def texts(count, seed=0, pieces=PIECES):
    """Random texts of up to 30 pieces, with and without spaces between them."""
    rng = random.Random(seed)
    for _ in range(count):
        separator = rng.choice(["", " ", " ", " ", "\n"])
        yield separator.join(rng.choices(pieces, k=rng.randrange(31)))


def chats(count):
    rng, contents = random.Random(1), texts(10 * count, seed=2)
    for _ in range(count):
        chat = [{"role": "system", "content": next(contents)}] if rng.random() < 0.5 else []
        for turn in range(rng.choice([1, 3, 5])):
            role = "assistant" if turn % 2 else "user"
            chat.append({"role": role, "content": next(contents).strip() or "."})
        yield chat


@pytest.fixture(scope="module")
def reference():
    return transformers.AutoTokenizer.from_pretrained(llama_3_1_tokenizer(), local_files_only=True)


@pytest.fixture(scope="module", params=["as published", "through GGUF"])
def tokenizer(request, tmp_path_factory):
    path = llama_3_1_tokenizer()
    if request.param == "as published":
        return Tokenizer(path)
    settings = transformers.PreTrainedTokenizerFast.from_pretrained(path)
    metadata = gpt2_metadata(
        Backend.from_file(str(path / "tokenizer.json")),
        "llama-bpe",
        bos=BOS,
        eos=EOT,
        chat_template=settings.chat_template,
    )
    folder = tmp_path_factory.mktemp("llama_3_1")
    write_tokenizer(GgufHeader(folder / "model.gguf", metadata, {}), folder)
    return Tokenizer(folder)


def test_ids_of_texts(tokenizer, reference):
    seen = set()
    for text in texts(2000):
        ids = tokenizer.encode(text)
        assert ids == reference(text).input_ids, repr(text)
        assert ids[0] == 128000
        seen.update(ids)
    assert len(seen) > 300, "the texts are not varied"


def test_ids_of_texts_with_special_tokens(tokenizer, reference):
    for text in texts(200, seed=3, pieces=PIECES + 3 * SPECIAL):
        if not text.startswith(BOS):
            assert tokenizer.encode(text) == reference(text).input_ids, repr(text)


def test_ids_of_chats(tokenizer, reference):
    for chat in chats(50):
        wanted = reference.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert tokenizer.encode_chat(chat) == wanted, chat


def test_texts_come_back(tokenizer):
    for text in texts(200, seed=4):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def tool_chats(count):
    """Random chats with tools, calls and results, as this project and as transformers take them."""
    rng, words = random.Random(5), texts(20 * count, seed=6)

    def value(depth=2):
        if depth and rng.random() < 0.5:
            return {next(words): value(depth - 1) for _ in range(rng.randrange(3))}
        return rng.choice([next(words), 1, -2.5, True, None, [next(words)]])

    for _ in range(count):
        tools = [
            {
                "type": "function",
                "function": {
                    "name": f"f{index}",
                    "description": next(words),
                    "parameters": {"type": "object", "properties": {"a": {"default": value()}}},
                },
            }
            for index in range(rng.randrange(1, 4))
        ]
        own = [{"role": "system", "content": next(words)}] if rng.random() < 0.5 else []
        own.append({"role": "user", "content": next(words).strip() or "."})
        theirs = [*own]
        for index in range(rng.randrange(3)):
            arguments = {next(words): value() for _ in range(rng.randrange(3))}
            call = Call(f"c{index}", f"f{index}", arguments)
            result = {"role": "tool", "tool_call_id": call.id, "content": next(words)}
            function = {"name": call.name, "arguments": arguments}
            made = [{"id": call.id, "type": "function", "function": function}]
            own += [{"role": "assistant", "content": "", "tool_calls": [call]}, result]
            theirs += [{"role": "assistant", "tool_calls": made}, result]
        yield own, theirs, tools


@pytest.mark.parametrize("kind", ["hf", "vllm"])
def test_ids_of_chats_with_tools(tmp_path, kind):
    shutil.copy(llama_3_1_tokenizer() / "tokenizer.json", tmp_path)
    settings = json.loads((llama_3_1_tokenizer() / "tokenizer_config.json").read_text())
    settings["chat_template"] = llama_3_1_template(kind)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    own = Tokenizer(tmp_path)
    assert own.tools_problem is None
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for chat, messages, tools in tool_chats(40):
        for offered in (tools, None):
            wanted = reference.apply_chat_template(
                messages, tools=offered, add_generation_prompt=True, return_dict=False
            )
            assert own.encode_chat(chat, tools=offered) == wanted, chat
