"""The user's own samplers, in the engine."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from llama_jax import LLM, Llama, SamplingParams, ShardedLlama
from llama_jax.engine.errors import EngineStartError
from llama_jax.interpret import capture, greedy_answer
from llama_jax.model import Sampler
from llama_jax.model.sampling import chosen_by, greedy, sample
from llama_jax.ring.steps import LOGITS_SPEC
from sharding.axes import AXES
from sharding.collectives import rank
from sharding.errors import UserError
from sharding.mesh import make_mesh
from sharding.program import MeshProgram
from tests.support.programs import compile_few
from tests.support.reference import make_model, save_model
from tests.support.tiny_tokenizer import make_tokenizer

VOCAB = 322  # no multiple of 4: on four devices, the logits end with padding
TOKENS = np.random.default_rng(0).integers(3, VOCAB, (1, 70))
SMALL = {"max_num_seqs": 2, "max_chunk": 64, "kv_cache_memory": 1 << 22}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    compile_few(monkeypatch)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    theirs = make_model(num_layers=2, num_heads=8, num_kv_heads=2, vocab_size=VOCAB)
    return make_tokenizer(save_model(theirs, tmp_path_factory.mktemp("model")))


class Ban(Sampler):
    """Never chooses one token."""

    def __init__(self, banned):
        self.banned = banned

    def greedy(self, logits):
        return greedy(self._without(logits))

    def sample(self, logits, likeliest, packed_controls):
        return sample(self._without(logits), likeliest, packed_controls)

    def _without(self, logits):
        token = rank(AXES) * logits.shape[1] + jnp.arange(logits.shape[1])
        return jnp.where(token == self.banned, -jnp.inf, logits)


@pytest.mark.parametrize("mesh", [pytest.param("1x1", marks=pytest.mark.slow), "2x2"])
def test_a_sampler(path, mesh):
    usual, prompt = Llama.from_pretrained(path), TOKENS[0].tolist()
    banned = int(capture(usual, TOKENS)[0][0, -1].argmax())

    class BanLlama(Llama):
        sampler = Ban(banned)

    always = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    drawn = SamplingParams(temperature=1.0, top_k=1, seed=1, max_tokens=16, ignore_eos=True)
    hot = [SamplingParams(temperature=2.0, seed=n, max_tokens=1) for n in range(60)]
    with LLM(path, mesh, in_process=True, model_class=BanLlama, **SMALL) as llm:
        found = llm.generate([prompt] * 62, [always, drawn, *hot])
    answers = [answer.token_ids for answer in found]
    whole = np.array([prompt + answers[0]])
    scores = np.array(capture(usual, whole)[0][0, len(prompt) - 1 : -1])
    scores[:, banned] = -np.inf
    assert answers[0] == answers[1] == scores.argmax(axis=-1).tolist()
    # The banned token would be the likeliest first token; sixty draws never give it.
    first = {answer[0] for answer in answers[2:]}
    assert banned not in first and len(first) > 20


class Floats(Sampler):
    """Chooses no integers."""

    def greedy(self, logits):
        return super().greedy(logits).astype(jnp.float32)


def test_an_engine_says_what_is_wrong_with_its_sampler(path):
    class FloatsLlama(Llama):
        sampler = Floats()

    with pytest.raises(EngineStartError, match=r"Floats\.greedy must return int32 tokens"):
        LLM(path, in_process=True, model_class=FloatsLlama, **SMALL)


class Odd(Sampler):
    """Draws always the same, which is no token."""

    def __init__(self, token):
        self.token = token

    def sample(self, logits, likeliest, packed_controls):
        return jnp.full_like(likeliest, self.token)


@pytest.mark.parametrize("token", [VOCAB, 1_000_000, -7])
def test_what_is_no_token_ends_only_its_request(path, token):
    class OddLlama(Llama):
        sampler = Odd(token)

    always, drawn = SamplingParams(temperature=0, max_tokens=4), SamplingParams(temperature=1.0)
    with LLM(path, "2x2", in_process=True, model_class=OddLlama, **SMALL) as llm:
        good, bad = llm.generate([TOKENS[0].tolist()] * 2, [always, drawn])
        assert llm.generate(TOKENS[0].tolist(), always).token_ids == good.token_ids
    assert good.error is None and len(good.token_ids) == 4
    assert bad.finish_reason == "error" and bad.token_ids == []
    assert bad.error.startswith(f"The sampler chose {token}, which is no token id in [0, {VOCAB})")


class Alone(Sampler):
    """Chooses the most likely token of its rank's share."""

    def greedy(self, logits):
        return jnp.argmax(logits, axis=-1)


@pytest.mark.parametrize("mesh", [pytest.param("1x1", marks=pytest.mark.slow), "1x2"])
def test_ranks_that_choose_different_tokens_end_the_request(path, mesh):
    class AloneLlama(Llama):
        sampler = Alone()

    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    with LLM(path, mesh, in_process=True, model_class=AloneLlama, **SMALL) as llm:
        answer = llm.generate(TOKENS[0].tolist(), params)
    if mesh == "1x1":
        assert answer.token_ids == greedy_answer(Llama.from_pretrained(path), TOKENS[0], 4)
    else:
        assert answer.token_ids == []
        assert answer.error.startswith("The sampler chose different tokens on the ranks")


def test_a_sampler_must_be_an_instance(path):
    class SamplerClass(Llama):
        sampler = Sampler  # without parentheses

    with pytest.raises(UserError, match=r"SamplerClass\.sampler"):
        ShardedLlama.from_pretrained(path, model_class=SamplerClass)


class Returns(Sampler):
    """Chooses whatever it is given, in place of the most likely tokens."""

    def __init__(self, change):
        self.change = change

    def greedy(self, logits):
        return self.change(super().greedy(logits))


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda tokens: tokens.astype(jnp.float32), r"float32 of shape \[3\]"),
        (lambda tokens: tokens[:, None], r"int32 of shape \[3, 1\]"),
        (lambda tokens: None, "NoneType"),
    ],
    ids=["floats", "columns", "nothing"],
)
def test_a_sampler_must_return_a_token_for_each_row(change, got):
    with pytest.raises(UserError, match=rf"^Returns\.greedy must return .*got {got}\."):
        make_program(Returns(change))


def test_a_sampler_may_return_other_integers():
    make_program(Returns(lambda tokens: tokens.astype(jnp.int8)))


def make_program(sampler):
    """Traces the choice of three tokens."""

    def choose(logits):
        return chosen_by(sampler, "greedy", logits)

    mesh = make_mesh("1x1")
    program = MeshProgram(choose, mesh, (LOGITS_SPEC,), P(), name="choose")
    chosen = program.compile(jax.ShapeDtypeStruct((3, 8), jnp.float32))
    assert chosen.shape == (3,) and chosen.dtype == jnp.int32
