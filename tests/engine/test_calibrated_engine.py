"""A calibration gives an engine the times of its ticks; one for something else is refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from llama_jax import LLM
from llama_jax.config import LlamaConfig
from llama_jax.costs.calibration import BadCalibration, Calibration, MeasuredTick, model_sizes
from llama_jax.costs.work import Work
from llama_jax.engine.core import Engine
from llama_jax.engine.errors import EngineStartError
from llama_jax.engine.latency_targets import choose_chunks, find_tick_model, largest_chunk
from llama_jax.engine.options import EngineOptions, OptionError
from llama_jax.engine.sizing import TILE, choose_sizes
from llama_jax.ring.sizes import Bucket
from tests.support.paths import DEMO_CHECKPOINT
from tests.support.reference import make_model, save_model

CONFIG = LlamaConfig.llama3_70b()
H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
# Three times as slow as the table of GPUs has it.
TICKS = tuple(
    MeasuredTick(rows, context, chunk, 0, 0.018 + 5e-5 * (rows + chunk))
    for rows in (1, 8, 64)
    for chunk in (0, 64, 256)
    for context in (128, 2048)
)
MEASURED = Calibration(
    device=H100,
    mesh="4x2",
    model=model_sizes(CONFIG),
    weights="bfloat16",
    kv_cache_dtype="bf16",
    ticks=TICKS,
)


def options(path: Path, **more) -> EngineOptions:
    return EngineOptions(path="", mesh="4x2", calibration=str(path), tpot_slo=0.12, **more)


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "calibration.json"
    MEASURED.write(path)
    return path


def test_the_engine_counts_on_the_measured_ticks(file):
    given = options(file)
    tick_model = find_tick_model(given, CONFIG, H100, (4, 2), "bfloat16")
    for tick in TICKS:
        assert tick_model.expected(tick.work) == pytest.approx(tick.seconds, rel=1e-6)
    table = find_tick_model(replace(given, calibration=None), CONFIG, H100, (4, 2), "bfloat16")
    assert table.expected(Work.of(8, 128)) < 0.5 * tick_model.expected(Work.of(8, 128))
    sizes, _ = choose_sizes(given, CONFIG, 4, 1 << 20, 20 << 30, "gpu", tick_model)
    assert sizes.max_chunk == largest_chunk(tick_model, 4, 0.12, TILE)
    assert sizes.max_chunk < largest_chunk(table, 4, 0.12, TILE)
    times = choose_chunks(given, sizes, "gpu", tick_model).times
    assert times.seconds(Bucket(8, 64), 128) == pytest.approx(0.018 + 5e-5 * 72, rel=0.01)


@pytest.mark.parametrize(
    "asked",
    [
        {"device_kind": H200},
        {"device_kind": "Some GPU 3000"},
        {"mesh": (2, 4)},
        {"dtype": "float32"},
        {"config": LlamaConfig.llama3_8b()},
        {"options": {"kv_cache_dtype": "fp8"}},
    ],
)
def test_a_calibration_for_something_else_is_refused(file, asked):
    right = {"config": CONFIG, "device_kind": H100, "mesh": (4, 2), "dtype": "bfloat16"}
    find_tick_model(options(file), **right)
    more = asked.pop("options", {})
    with pytest.raises(BadCalibration):
        find_tick_model(options(file, **more), **(right | asked))


@pytest.mark.parametrize("changed", [{"ticks": ()}, {"device": "Some GPU 3000"}])
def test_a_calibration_that_says_nothing_of_this_device_is_refused(file, changed):
    replace(MEASURED, **changed).write(file)
    with pytest.raises(BadCalibration):
        find_tick_model(options(file), CONFIG, H100, (4, 2), "bfloat16")


def test_a_file_that_is_no_calibration_is_refused(tmp_path):
    for name, text in (("missing.json", None), ("broken.json", "{}")):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(BadCalibration):
            find_tick_model(options(tmp_path / name), CONFIG, H100, (4, 2), "bfloat16")


def test_without_a_target_it_would_do_nothing(file):
    with pytest.raises(OptionError):
        EngineOptions(path="", calibration=str(file)).check()
    EngineOptions(path="", calibration=str(file), ttft_slo=0.5).check()


@pytest.mark.slow
def test_a_real_engine_starts_from_its_calibration(tmp_path):
    model = make_model(num_layers=2, embed_dim=32, mlp_dim=32, head_dim=4)
    path = save_model(model, tmp_path / "model")
    file = tmp_path / "calibration.json"
    # So long that nothing but the file can have said it.
    ticks = tuple(
        MeasuredTick(rows, 64, chunk, 0, 1.0 + rows + chunk)
        for rows in (1, 2)
        for chunk in (0, 64, 128)
    )
    measured = replace(
        MEASURED, device="cpu", mesh="1x1", model=model_sizes(LlamaConfig.from_pretrained(path)),
        weights="float32", kv_cache_dtype="fp32", ticks=ticks,
    )  # fmt: skip
    measured.write(file)
    sizes = dict(max_num_seqs=2, max_chunk=128, max_model_len=256)
    engine = Engine(EngineOptions(path=str(path), tpot_slo=9.0, calibration=str(file), **sizes))
    modeled = {(t.rows, t.chunk): t.modeled for t in engine.stats().latency.ticks}
    assert modeled == pytest.approx({(t.rows, t.chunk): t.seconds for t in ticks}, rel=0.1)
    replace(measured, mesh="2x1").write(file)
    with pytest.raises(EngineStartError):
        LLM(DEMO_CHECKPOINT, tpot_slo=9.0, calibration=file, **sizes)
