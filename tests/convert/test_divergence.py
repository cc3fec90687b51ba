"""`--check`: the divergence computed layer by layer, against whole models and float64 softmax."""

import contextlib
import itertools
from dataclasses import replace

import jax
import numpy as np
import pytest

from convert import divergence as module
from convert import sample
from convert.divergence import divergence
from convert.source import open_source
from llama_jax import Llama
from llama_jax.checkpoint import open_checkpoint
from llama_jax.interpret import capture
from tests.support.conversions import FORMATS, convert_to, refusal
from tests.support.reference import ROPE_LLAMA3, make_model, reference_logits, save_model
from tests.support.tiny_tokenizer import make_tokenizer

VOCAB = 263  # not a multiple of anything
WINDOWS = [
    np.random.default_rng(seed).integers(0, VOCAB, length).tolist()
    for seed, length in enumerate((24, 24, 7))
]


@pytest.fixture(scope="module", params=["untied", "tied"])
def source(request, tmp_path_factory):
    model = make_model(
        vocab_size=VOCAB, num_layers=3, rope=ROPE_LLAMA3, tied=request.param == "tied"
    )
    return save_model(model, tmp_path_factory.mktemp("source"))


@pytest.fixture(autouse=True)
def many_blocks(monkeypatch):
    """The vocabulary is split into blocks, of which the last is smaller."""
    monkeypatch.setattr(module, "_BLOCK_BYTES", 40_000)


def measure(one, other, windows=WINDOWS, progress=lambda done, total: None):
    with (
        contextlib.closing(open_checkpoint(one)) as source,
        contextlib.closing(open_checkpoint(other)) as quantized,
    ):
        return divergence(source, quantized, windows, progress)


def log_softmax(logits):
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def kl_and_agreement(p, q):
    """By the definition, from whole rows of logits."""
    log_p, log_q = log_softmax(p), log_softmax(q)
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=1), p.argmax(axis=1) == q.argmax(axis=1)


def logits_of_windows(path) -> np.ndarray:
    """The logits after each token, window after window, by one program: padding changes nothing."""
    longest = max(map(len, WINDOWS))
    tokens = np.array([window + [0] * (longest - len(window)) for window in WINDOWS])
    logits, _ = capture(Llama.from_pretrained(path), tokens)
    return np.concatenate(
        [np.asarray(rows)[: len(window)] for rows, window in zip(logits, WINDOWS, strict=True)]
    )


@pytest.mark.parametrize(
    ("source", "format"),
    [
        pytest.param(kind, name, marks=[] if i % 2 == j else [pytest.mark.slow])
        for j, kind in enumerate(("untied", "tied"))
        for i, name in enumerate(FORMATS)
    ],
    indirect=["source"],
)
def test_against_whole_models(source, tmp_path, format):
    convert_to(tmp_path / "q", source, quantize=format)
    found = measure(source, tmp_path / "q")
    kl, same = kl_and_agreement(*(logits_of_windows(path) for path in (source, tmp_path / "q")))
    assert found.tokens == sum(map(len, WINDOWS)) == len(kl)
    assert kl.mean() > 1e-6, "nothing to measure"
    np.testing.assert_allclose([found.mean, found.largest], [kl.mean(), kl.max()], rtol=1e-3)
    assert found.agreement == same.mean()
    assert 0 < found.agreement <= 1


def test_against_transformers(tmp_path):
    """Two models so different that the order of the arguments matters."""
    models = [make_model(vocab_size=VOCAB, num_layers=2, seed=seed) for seed in (1, 2)]
    paths = [save_model(model, tmp_path / str(i)) for i, model in enumerate(models)]
    logits = [np.concatenate([reference_logits(m, w) for w in WINDOWS]) for m in models]
    kl, same = kl_and_agreement(*logits)
    backwards, _ = kl_and_agreement(*reversed(logits))
    assert abs(kl.mean() / backwards.mean() - 1) > 0.005
    found = measure(*paths)
    np.testing.assert_allclose([found.mean, found.largest], [kl.mean(), kl.max()], rtol=1e-4)
    assert found.agreement == same.mean() < 0.5


def test_the_divergence_of_a_model_from_itself_is_zero(source, tmp_path):
    convert_to(tmp_path / "same", source)
    found = measure(source, tmp_path / "same")
    assert (found.mean, found.largest, found.agreement) == (0, 0, 1)


def test_logits_of_any_size_and_blocks_of_any_order():
    """The largest is in the first, a middle or the last block, so that sums are rescaled."""
    rng = np.random.default_rng(0)
    p, q = (rng.normal(0, 200, (6, 100)).astype(np.float32) for _ in range(2))
    p[:3, [0, 50, 99]] += 1000 * np.eye(3, dtype=np.float32)
    p[3, 1], q[3, 34] = 5000, 5000  # in two blocks, at the same place of each
    p[4, 70], q[4, 70] = 5000, 5000
    p[5, [10, 80]], q[5, 10] = 5000, 5000  # the first of equals is the likeliest
    tally = module._Tally(6)
    for start in range(0, 100, 33):
        tally.add(p[:, start : start + 33], q[:, start : start + 33])
    found = tally.result()
    kl, same = kl_and_agreement(p, q)
    np.testing.assert_allclose([found.mean, found.largest], [kl.mean(), kl.max()], rtol=1e-12)
    assert same.any() and found.agreement == same.mean()


def test_rounding_makes_no_divergence_negative():
    """Logits that differ by a constant give the same distribution."""
    for seed in range(20):
        logits = np.random.default_rng(seed).normal(0, 1, (1, 100))
        tally = module._Tally(1)
        tally.add(logits, logits + 1000.1)
        assert 0 <= tally.result().mean < 1e-10


def test_progress_ends_at_the_bytes_of_both(source, tmp_path):
    convert_to(tmp_path / "q", source, quantize="int8")
    steps = []
    measure(source, tmp_path / "q", progress=lambda done, total: steps.append((done, total)))
    assert steps == sorted(steps) and steps[0][0] == 0
    done, total = steps[-1]
    assert done == total
    assert len({total for _, total in steps}) == 1
    stored = 0
    for path in (source, tmp_path / "q"):
        with contextlib.closing(open_checkpoint(path)) as reader:
            tied = reader.config.tie_embeddings
            for name, info in reader.tensors.items():
                if tied or name != "model.embed_tokens.weight":
                    stored += info.nbytes
    assert total == stored


def test_one_layer_in_memory_at_a_time(source, tmp_path, monkeypatch):
    """No weight of another layer is alive while a layer is read."""
    convert_to(tmp_path / "q", source, quantize="int8")
    load, alive = module.load_array, []

    def spy(reader, place, dtype):
        array = load(reader, place, dtype)
        live = [a for a in jax.live_arrays() if a.shape == (192, 64)]
        alive.append(len(live))
        return array

    before = len([a for a in jax.live_arrays() if a.shape == (192, 64)])
    monkeypatch.setattr(module, "load_array", spy)
    measure(source, tmp_path / "q")
    assert max(alive) - before == 1  # that of gate and up, of this layer


# The text.


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("with_tokenizer")
    save_model(make_model(vocab_size=600, max_position_embeddings=64, num_layers=1), path)
    make_tokenizer(path)
    return path


def windows_of(path, file=None):
    source = open_source(path)
    with contextlib.closing(source.reader):
        return sample.sample_windows(source, file)


def test_the_built_in_text(with_tokenizer):
    windows = windows_of(with_tokenizer)
    assert {len(window) for window in windows[:-1]} == {64} and 1 < len(windows[-1]) <= 64
    bos = windows[0][0]
    assert all(window[0] == bos and bos not in window[1:] for window in windows)
    oracle = sample.Tokenizer(with_tokenizer)
    assert oracle.bos_token_id == bos
    text = oracle.decode([token for window in windows for token in window[1:]])
    assert text == sample.TEXT


def test_windows_are_short_whatever_the_context(with_tokenizer, monkeypatch):
    monkeypatch.setattr(sample, "WINDOW", 16)
    monkeypatch.setattr(sample, "MAX_TOKENS", 40)
    assert [len(window) for window in windows_of(with_tokenizer)] == [16, 16]


def test_a_text_file(with_tokenizer, tmp_path):
    (tmp_path / "text").write_text("Grüße")
    (window,) = windows_of(with_tokenizer, tmp_path / "text")
    assert sample.Tokenizer(with_tokenizer).decode(window) == "Grüße"
    (tmp_path / "long").write_text("0123456789 " * 10_000)
    windows = windows_of(with_tokenizer, tmp_path / "long")
    assert {len(window) for window in windows} == {64}
    assert sum(map(len, windows)) <= sample.MAX_TOKENS


def test_a_sample_that_is_not_text(with_tokenizer, tmp_path):
    file = tmp_path / "text"
    file.write_bytes(b"\xff\xfe")
    assert str(file) in refusal(windows_of, with_tokenizer, file)
    file.write_text(" \n")
    assert str(file) in refusal(windows_of, with_tokenizer, file)


def test_a_missing_tokenizer_and_one_of_another_model(with_tokenizer, source, tmp_path):
    assert str(source) in refusal(windows_of, source)
    save_model(make_model(vocab_size=20, num_layers=1), tmp_path)
    make_tokenizer(tmp_path)
    assert "20" in refusal(windows_of, tmp_path)


def test_the_vocabulary_ends_before_its_size(with_tokenizer):
    source = open_source(with_tokenizer)
    with contextlib.closing(source.reader):
        largest = max(itertools.chain.from_iterable(sample.sample_windows(source, None)))
        for size in (largest + 1, largest):
            source.reader.config = replace(source.reader.config, vocab_size=size, eos_token_ids=())
            if size > largest:
                sample.sample_windows(source, None)
            else:
                assert str(largest) in refusal(sample.sample_windows, source, None)
