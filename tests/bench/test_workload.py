"""The load that is sent: arrivals, lengths and prompts."""

from dataclasses import replace

import numpy as np
import pytest
from pytest import approx

from bench.load.workload import Workload
from llama_jax.plan.simulation.lengths import Lengths
from sharding.errors import UserError

LOAD = Workload(
    rate=4.0, num_requests=2000, prompt=Lengths.parse("5-9"), answer=Lengths.parse("3"), seed=1
)


def arrivals(load: Workload) -> np.ndarray:
    return np.array([request.at for request in load.to_send()])


def words(load: Workload) -> list[list[str]]:
    return [request.prompt.split() for request in load.to_send()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7", {7}),
        ("3-5", {3, 4, 5}),
        ("normal:40,0", {40}),
        ("lognormal:40,0", {40}),
        (" 1-1 ", {1}),
    ],
)
def test_lengths(text, expected):
    assert set(Lengths.parse(text).draw(np.random.default_rng(0), 100)) == expected


def test_distributions_of_lengths():
    rng = np.random.default_rng(0)
    normal = Lengths.parse("normal:400,50").draw(rng, 20000)
    assert normal.mean() == approx(400, abs=2) and normal.std() == approx(50, abs=2)
    lognormal = Lengths.parse("lognormal:400,0.5").draw(rng, 20000)
    assert np.median(lognormal) == approx(400, abs=10)
    assert np.log(lognormal).std() == approx(0.5, abs=0.02)
    assert Lengths.parse("normal:2,50").draw(rng, 1000).min() == 1


@pytest.mark.parametrize(
    "text",
    ["", "0", "-3", "5-2", "0-4", "1.5", "normal:8", "normal:0,1", "lognormal:8,-1", "gauss:1,2",
     "9999999", "1e3", "８"],
)  # fmt: skip
def test_other_lengths_are_refused(text):
    with pytest.raises(UserError):
        Lengths.parse(text)


def test_observed_lengths(tmp_path):
    file = tmp_path / "lengths"
    file.write_text("\ufeff5\n\n 7 \n1000000\n", encoding="utf-8")
    found = Lengths.parse(f"empirical:{file}")
    assert found.mean == (5 + 7 + 1_000_000) / 3
    assert set(found.draw(np.random.default_rng(0), 100)) == {5, 7, 1_000_000}
    broken = {"5\n0\n": "line 2", "1000001\n": "line 1", "five": "line 1", "": "no length"}
    for text, where in broken.items():
        file.write_text(text)
        with pytest.raises(UserError, match=where):
            Lengths.parse(f"empirical:{file}")
    with pytest.raises(UserError):
        Lengths.parse(f"empirical:{tmp_path / 'none'}")


def test_no_length_is_beyond_the_largest():
    wide = Lengths.parse("lognormal:1000000,1000")  # exp(1000) overflows
    with np.errstate(over="raise"):
        assert wide.draw(np.random.default_rng(0), 100).max() == 1_000_000 == wide.mean


def test_poisson_arrivals():
    gaps = np.diff(arrivals(LOAD))
    assert arrivals(LOAD)[0] == 0
    assert gaps.mean() == approx(0.25, rel=0.05)
    assert gaps.std() == approx(0.25, rel=0.1)  # of an exponential distribution: its mean
    assert np.mean(gaps > 0.25) == approx(np.exp(-1), abs=0.04)


def test_constant_arrivals():
    load = replace(LOAD, arrivals="constant", num_requests=5)
    assert arrivals(load) == approx([0, 0.25, 0.5, 0.75, 1])


@pytest.mark.parametrize("kind", ["poisson", "constant"])
def test_a_duration_bounds_the_arrivals(kind):
    load = replace(LOAD, arrivals=kind, num_requests=None, duration=100.0)
    at = arrivals(load)
    assert at[-1] < 100 and len(at) == approx(400, abs=1 if kind == "constant" else 60)
    assert np.all(np.diff(at) >= 0)


def test_the_seed_decides_everything():
    assert LOAD.to_send() == LOAD.to_send() != replace(LOAD, seed=2).to_send()


def test_arrivals_do_not_depend_on_lengths_nor_prompts():
    other = replace(
        LOAD, prompt=Lengths.parse("1-99"), answer=Lengths.parse("1-9"), prefix_tokens=4
    )
    assert np.array_equal(arrivals(LOAD), arrivals(other))


def test_prompts_are_long_as_asked_and_different():
    assert {len(prompt) for prompt in words(LOAD)} == {5, 6, 7, 8, 9}
    assert len({tuple(prompt) for prompt in words(LOAD)}) == len(LOAD.to_send())
    assert {request.max_tokens for request in LOAD.to_send()} == {3}


@pytest.mark.parametrize("prefix_tokens", [0, 40])
def test_tests_of_a_series_have_lengths_in_common_but_no_prompt(prefix_tokens):
    """Else a server would find the prompts of the last test in its prefix cache."""
    load = replace(LOAD, prefix_tokens=prefix_tokens, prefixes=3)
    first, second = words(load), words(replace(load, rate=9.0, test=1))
    assert [*map(len, first)] == [*map(len, second)]
    assert not {tuple(prompt[:5]) for prompt in first} & {tuple(prompt[:5]) for prompt in second}


def test_prefixes_are_shared():
    prompts = words(replace(LOAD, prefix_tokens=40, prefixes=3))
    assert {len(prompt) for prompt in prompts} == {45, 46, 47, 48, 49}
    shared = {tuple(prompt[:40]) for prompt in prompts}
    assert len(shared) == 3
    assert len({tuple(prompt[40:]) for prompt in prompts}) == len(prompts)


def test_token_ids():
    prompts = [request.prompt for request in replace(LOAD, vocab_size=10).to_send()]
    assert {token for prompt in prompts for token in prompt} == set(range(10))


@pytest.mark.parametrize(
    "change",
    [
        {"num_requests": None, "duration": 1e6},
        {"prompt": Lengths.parse("1000000")},
        {"prefix_tokens": 10**6, "prefixes": 10**6},
    ],
)
def test_a_load_beyond_memory_is_refused(change):
    with pytest.raises(UserError):
        replace(LOAD, **change).to_send()
