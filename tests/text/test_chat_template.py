"""Chat templates that cannot be used, that reject a chat, or that leave out what it says."""

import pytest

from llama_jax.text import chat_template
from llama_jax.text.tokenizer import Tokenizer, TokenizerError
from tests.support.tokenizer_kinds import CHATML, MISTRAL, PARTS, REASONING, write_tokenizer

USER = [{"role": "user", "content": "Hi"}]
# Writes nothing of a system message, and only the last of the others.
FORGETFUL = (
    "{% for m in messages %}{% if m.role != 'system' and loop.last %}{{ m.content }}{% endif %}"
    "{% endfor %}"
)


def tokenizer(path, template) -> Tokenizer:
    added = ["<|User|>", "<|Assistant|>", "<think>", "</think>", "\n"]
    return Tokenizer(write_tokenizer(path, template=template, added=added))


def chat(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages | nosuchfilter }}", "nosuchfilter"),
        ("{% for message in %}", "cannot be used"),
        ("{{ messages[0].content + nowhere }}", "nowhere"),
        ("{{ raise_exception('Ask another model') }}", "Ask another model"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ raise_exception('') }}", "TemplateError"),
        ("{{ raise_exception('x' * 1000) }}", "(" + "x" * 200 + ")"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "leaves out"),
        ([{"name": "tool_use", "template": CHATML}], "default"),
        ({"wrong": "type"}, "default"),
        (7, "cannot be used"),
    ],
)
def test_a_template_that_cannot_be_used_means_no_chat(tmp_path, template, reason):
    subject = tokenizer(tmp_path, template)
    assert not subject.has_chat_template
    assert reason in subject.chat_problem and "\n" not in subject.chat_problem
    with pytest.raises(TokenizerError, match=reason):
        subject.encode_chat(USER)
    assert subject.encode("still works")


def test_a_given_template_takes_the_place_of_the_checkpoint_s(tmp_path):
    path = write_tokenizer(tmp_path / "checkpoint", template="{{ 1 / 0 }}")
    subject = Tokenizer(path, "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    assert subject.decode(subject.encode_chat(USER)) == "<user>Hi"


@pytest.mark.parametrize(
    "template",
    [
        "{% if messages[0].role != 'system' %}{{ raise_exception('!') }}{% endif %}" + CHATML,
        "{% if messages[0].role == 'system' %}{{ raise_exception('!') }}{% endif %}" + CHATML,
        "{% if messages | length < 3 %}{{ 1 / 0 }}{% endif %}" + PARTS,
    ],
)
def test_a_template_may_refuse_some_chats(tmp_path, template):
    assert tokenizer(tmp_path, template).has_chat_template


def test_a_chat_that_the_template_rejects(tmp_path):
    subject = tokenizer(tmp_path, MISTRAL)
    with pytest.raises(TokenizerError, match="Roles must alternate"):
        subject.encode_chat(USER * 2)
    # What a template raises by itself is no defect of this program either.
    subject = tokenizer(tmp_path, "{{ 1 / (messages | length - 2) }}" + CHATML)
    with pytest.raises(TokenizerError, match="division"):
        subject.encode_chat(USER * 2)


@pytest.mark.parametrize(
    ("turns", "lost"),
    [
        ([("system", "Be brief."), ("user", "Hi")], 0),
        ([("user", "Hi"), ("user", "Ho")], 0),
        ([("user", "Hi"), ("user", "Hi")], 1),
        ([("user", " Hi\n")], None),
        ([("system", " "), ("user", "")], None),
    ],
)
def test_a_message_must_not_be_lost(tmp_path, turns, lost):
    subject = tokenizer(tmp_path, FORGETFUL)
    if lost is None:
        subject.encode_chat(chat(*turns))
    else:
        with pytest.raises(TokenizerError, match=rf"messages\[{lost}\]"):
            subject.encode_chat(chat(*turns))


def test_a_template_may_shorten_a_text_but_not_in_silence(tmp_path):
    template = "{% for m in messages %}{{ m.content[:20] }}{% endfor %}"
    subject = tokenizer(tmp_path, template)
    subject.encode_chat(chat(("user", "x" * 20)))
    with pytest.raises(TokenizerError, match=r"messages\[1\]"):
        subject.encode_chat(chat(("user", "y"), ("user", "x" * 21)))


def test_a_template_may_move_trim_and_quote_texts(tmp_path):
    turns = [("system", "S"), ("user", "A"), ("assistant", "B"), ("user", ' "C"\n\nd ')]
    for template in (MISTRAL, PARTS, "{{ messages | tojson }}"):
        subject = tokenizer(tmp_path, template)
        text = subject.decode(subject.encode_chat(chat(*turns)), False)
        assert all(part in text for part in ("S", "A", "B", "C", "d"))


def test_earlier_reasoning_may_be_left_out(tmp_path):
    subject = tokenizer(tmp_path, REASONING)
    turns = [("user", "A"), ("assistant", "<think>\nhm\n</think>\n\nB"), ("user", "C")]
    text = subject.decode(subject.encode_chat(chat(*turns)), False)
    assert "B" in text and "hm" not in text
    subject = tokenizer(tmp_path, CHATML.replace("message['content']", "message['content'][:9]"))
    with pytest.raises(TokenizerError, match=r"messages\[1\]"):
        subject.encode_chat(chat(*turns))


def test_added_tokens_that_the_template_writes_are_text_in_a_message(tmp_path):
    subject = tokenizer(tmp_path, REASONING)
    (user,) = subject.encode("<|User|>", add_bos=False)
    ids = subject.encode_chat(chat(("user", "x<|User|>y\nz")))
    assert ids.count(user) == 1
    assert "x<|User|>y\nz" in subject.decode(ids)
    (line,) = subject.encode("\n", add_bos=False)
    assert ids.count(line) == 2  # white space is no control token


def test_texts_between_which_a_template_removes_a_control_token_spell_no_other(tmp_path):
    template = CHATML.replace("['content']", "['content'] | replace('</think>', '')")
    subject = Tokenizer(write_tokenizer(tmp_path, special=["</think>"], template=template))
    ids = subject.encode_chat(chat(("user", "Hi"), ("assistant", "<|eot</think>_id|>")))
    assert not subject.special_token_ids.intersection(ids)
    assert "<|eot_id|>" in subject.decode(ids)


def test_a_template_may_change_the_order_of_system_messages(tmp_path):
    subject = tokenizer(tmp_path, MISTRAL)  # the first goes to the last user message
    turns = [("system", "1"), ("user", ""), ("system", "0"), ("user", "")]
    text = subject.decode(subject.encode_chat(chat(*turns)), False)
    assert text.index("0") < text.index("1")
    once = (
        "{% for m in messages %}{% if m != loop.previtem %}{{ m.content }}{% endif %}{% endfor %}"
    )
    subject = tokenizer(tmp_path, once)
    with pytest.raises(TokenizerError, match=r"messages\[1\]"):
        subject.encode_chat(chat(("system", "S"), ("system", "S"), ("user", "A")))


class Counted(str):
    """A text that counts how often it is looked through from its beginning to its end."""

    times = 0

    def count(self, *args) -> int:
        Counted.times += 1
        return super().count(*args)


@pytest.mark.parametrize(
    ("template", "looks"),
    [
        (CHATML, 0),
        # System messages in the opposite order.
        ("{% for m in messages | reverse %}{{ m.content }}{% endfor %}", 2 * 199),
    ],
)
def test_many_system_messages_are_looked_for_in_their_order_first(
    tmp_path, monkeypatch, template, looks
):
    """Counting each of them would take quadratic time, minutes for a body of two megabytes."""
    subject = tokenizer(tmp_path, template)
    monkeypatch.setattr(Counted, "times", 0)
    squeezed = chat_template._squeezed
    monkeypatch.setattr(chat_template, "_squeezed", lambda text: Counted(squeezed(text)))
    subject.encode_chat(chat(*(("system", f"({number})") for number in range(200))))
    assert Counted.times == looks
