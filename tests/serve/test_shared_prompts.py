"""A prompt is computed once: what requests share over HTTP, with a real engine on a mesh."""

import httpx
import openai
import pytest

from tests.support.processes import wait_until
from tests.support.served_checkpoint import write_served_checkpoint
from tests.support.server_process import REAL_SERVER, ServerProcess

pytestmark = pytest.mark.slow

SYSTEM = "".join(f"Rule {number}: a packet is never drained. " for number in range(60))
FLAGS = ("--mesh=2x2", "--max-num-seqs=8", "--max-chunk=128", "--max-model-len=4096")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    path = write_served_checkpoint(
        tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=4096
    )
    with ServerProcess(REAL_SERVER, str(path), *FLAGS) as server:
        yield server.wait_ready()


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any") as client:
        yield client


def ask(client: openai.OpenAI, question: str, **body) -> openai.types.chat.ChatCompletion:
    extra = {"ignore_eos": True, "cache_salt": body.pop("cache_salt", "shared")}
    return client.chat.completions.create(
        model="tiny",
        messages=[{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}],
        max_tokens=8,
        logprobs=True,
        extra_body=extra,
        **body,
    )


def computed(server: ServerProcess) -> int:
    """The prompt tokens that the engine has computed so far."""
    return httpx.get(f"{server.url}/status").json()["stats"]["prompt_tokens"]


def increase(server: ServerProcess, before: int, at_least: int) -> int:
    wait_until(lambda: computed(server) >= before + at_least)  # of the next report
    return computed(server) - before


def logprobs_of(answer: openai.types.chat.ChatCompletion) -> list[float]:
    return [entry.logprob for entry in answer.choices[0].logprobs.content]


def test_a_shared_system_prompt_is_computed_once(server, client):
    start = computed(server)
    first = ask(client, "Who drains a packet?", temperature=0)
    assert first.usage.prompt_tokens >= 1000
    work = increase(server, start, first.usage.prompt_tokens)

    middle = computed(server)
    second = ask(client, "Is it one?", temperature=0)
    cached = second.usage.prompt_tokens_details.cached_tokens
    again = increase(server, middle, second.usage.prompt_tokens - cached)
    assert again <= 0.1 * work

    alone = ask(client, "Is it one?", temperature=0, cache_salt="another")
    assert alone.usage.prompt_tokens_details.cached_tokens == 0
    assert second.choices[0].message.content == alone.choices[0].message.content
    assert logprobs_of(second) == pytest.approx(logprobs_of(alone), abs=1e-4)


def test_choices_share_their_prompt_and_repeat_with_a_seed(server, client):
    start = computed(server)
    asked = dict(n=4, temperature=1, seed=11, cache_salt="choices")
    first = ask(client, "Name a rule.", **asked)
    work = increase(server, start, first.usage.prompt_tokens)
    assert work < first.usage.prompt_tokens + 4 * 32  # less than a page and the last token each
    texts = [choice.message.content for choice in first.choices]
    assert len(set(texts)) > 1
    second = ask(client, "Name a rule.", **asked)
    assert [choice.message.content for choice in second.choices] == texts
