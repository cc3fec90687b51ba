"""Every part of a tick, against the same arithmetic written out for one deployment."""

import json
from dataclasses import replace
from importlib.resources import files

import pytest

from llama_jax.config import LlamaConfig, Quantization
from llama_jax.costs.attention import RankAttention
from llama_jax.costs.collectives import collectives
from llama_jax.costs.deployment import Deployment, Layout
from llama_jax.costs.figure import Evidence
from llama_jax.costs.gpus import find_gpu
from llama_jax.costs.kernels import LINK, DecodeAttention, all_gather, all_reduce, prefill_attention
from llama_jax.costs.memory import ring_bytes, state_bytes, temporary_bytes
from llama_jax.costs.products import head_shape
from llama_jax.costs.tick_time import TickModel
from llama_jax.costs.work import Work
from llama_jax.ring.sizes import RingSizes

CONFIG = LlamaConfig.llama3_70b()
H100, A100 = find_gpu("h100-sxm"), find_gpu("a100-80")
TABLE = json.loads(
    (files("llama_jax.costs") / "data" / "measured_kernels_llama70b.json").read_text()
)
SETS = ("vllm", "trtllm", "sglang")


def test_a_roofline_tick_of_llama_3_70b():
    """4x2 A100 80 GB: 64 rows of 1,000 tokens, and a chunk of 256 tokens after 512.

    20 layers of 32 query and 4 KV heads of 128, and 14,336 columns of the MLP. As expected: 82 % of
    2.039 TB/s, 70 % of 312 TFLOP/s and of 300 GB/s, 2 µs a kernel, 4 µs for each step of a
    collective.
    """
    model = TickModel(Deployment(CONFIG, A100, Layout(4, 2)))
    found = {n: p.expected for n, p in model.parts(Work.of(64, 1000, 256, 512)).items()}
    bandwidth, flops, link, tokens, segments = 0.82 * 2.039e12, 0.7 * 312e12, 210e9, 320, 64 + 4

    def product(m: int, n: int, k: int) -> float:
        return 2e-6 + max((n * k + m * (k + n)) * 2 / bandwidth, 2 * m * n * k / flops)

    layer = [(5120, 8192), (8192, 4096), (28672, 8192), (8192, 14336)]
    assert found["products"] == pytest.approx(20 * sum(product(tokens, n, k) for n, k in layer))
    assert found["head"] == pytest.approx(product(segments, 128256 // 8, 8192) + 30e-6)
    key = 2 * 4 * 128 * 2  # bytes in a layer
    pairs = 256 * 512 + 256 * 257 / 2
    rows = 10e-6 + 64_000 * key / bandwidth
    assert 4 * 32 * 128 * pairs / flops > (4 * 512 + 64 * 10) * key / bandwidth
    chunk = 10e-6 + 4 * 32 * 128 * pairs / flops
    assert found["attention"] == pytest.approx(20 * (rows + chunk))
    moved = tokens * (8 * 8192 + 2 * 5120 + 3 * 14336) * 2
    assert found["small"] == pytest.approx(20 * (5 * 2e-6 + moved / bandwidth))
    assert found["launch"] == 0.5e-3
    hidden = tokens * 8192 * 2
    assert found["communication"] == pytest.approx(
        40 * (4e-6 + hidden / link)  # in a ring of n, 2 (n - 1) / n of the bytes
        + (3 * 4e-6 + 1.75 * hidden / link)
        + (2 * 4e-6 + hidden / link)
        + (2 * 4e-6 + 1.5 * segments * 8192 * 2 / link)
        + (3 * 4e-6 + 7 * 8 * segments / link)
    )


@pytest.mark.parametrize(
    ("weights", "width", "shares"),
    [("int8", 1, (0.9, 0.7, 0.4)), ("int4", 4.25 / 8, (0.7, 0.35, 0.25))],
)
def test_converted_weights_are_read_at_their_own_shares(weights, width, shares):
    """On an A100, at one row."""
    config = replace(CONFIG, quantization=Quantization(format=weights))
    model = TickModel(Deployment(config, A100, Layout(4, 2)))
    elements = 5120 * 8192 + 8192 * 4096 + 28672 * 8192 + 8192 * 14336
    activations = 2 * (5120 + 3 * 8192 + 4096 + 28672 + 8192 + 14336)
    assert model.products.width == pytest.approx(width, abs=0.001)
    found = model.products.time(1)
    times, kernels = (found.low, found.expected, found.high), (1e-6, 2e-6, 4e-6)
    for seconds, share, kernel in zip(times, shares, kernels, strict=True):
        read = (model.products.width * elements + activations) / (share * 2.039e12)
        assert seconds == pytest.approx(20 * (4 * kernel + read), rel=1e-3)


def test_converted_weights_on_measured_gpus_are_read_in_8_bits_and_multiplied_in_bfloat16():
    """fp8 weights without fp8 activations on 4x2 H100, at 40 % of the bandwidth at worst."""
    config = replace(CONFIG, quantization=Quantization(format="fp8"))
    products = TickModel(Deployment(config, H100, Layout(4, 2))).products
    elements = 5120 * 8192 + 8192 * 4096 + 28672 * 8192 + 8192 * 14336
    read = 20 * elements / 3.35e12
    assert products.time(1).high == pytest.approx(read / 0.4, rel=1e-3)
    assert products.time(1).expected == pytest.approx(read / 0.7, rel=1e-3)
    sums = dict.fromkeys(SETS, 0.0)
    for key, times in TABLE["gemm_us"].items():
        on, by, dtype, ranks, _ = key.split("|")
        if (on, dtype, ranks) == ("h100_sxm", "bfloat16", "TP2"):
            sums[by.split()[0]] += 20e-6 * times["512"]
    assert products.time(448).expected == pytest.approx(sorted(sums.values())[1] * 448 / 512)


def test_converted_weights_take_the_bandwidth_that_is_known_for_their_device():
    """A TPU converts at the bandwidth of all its products; 4 bits are read as half of 8."""
    eight, four = (replace(CONFIG, quantization=Quantization(format=w)) for w in ("int8", "int4"))
    tpu = TickModel(Deployment(eight, find_gpu("tpu-v5e"), Layout(4, 2))).products.time(1)
    elements = 5120 * 8192 + 8192 * 4096 + 28672 * 8192 + 8192 * 14336
    least = 20 * (4 * 0.5e-6 + elements / (0.92 * 0.819e12))
    assert tpu.expected == pytest.approx(least, rel=2e-3)
    wide, narrow = (
        TickModel(Deployment(config, H100, Layout(4, 2))).products.time(1).low
        for config in (eight, four)
    )
    assert narrow < 0.7 * wide


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_attention_and_all_reduces_are_those_of_the_table(ranks):
    attention = RankAttention(Deployment(CONFIG, H100, Layout(4, ranks)))
    heads = f"TP{ranks} {64 // ranks}q/{8 // ranks}kv"
    for rows, context in ((16, 8192), (64, 2048), (64, 4096)):
        times = sorted(
            TABLE["decode_attention_us"][f"h100_sxm|{name}|kv bfloat16|{heads}"][
                f"b{rows}@{context}"
            ]
            for name in SETS
        )
        found = attention.decode(rows, rows * context)
        for bound, time in zip((found.low, found.expected, found.high), times, strict=True):
            assert bound == pytest.approx(20 * 1e-6 * time, rel=0.03)
    for prompt in (512, 2048, 8192):
        whole = [
            TABLE["prefill_attention_us"][f"h100_sxm|{name}|kv bfloat16|TP{ranks}"][str(prompt)]
            for name in SETS
        ]
        found = attention.prefill(prompt * (prompt + 1) / 2, 0)
        assert found.expected == pytest.approx(20 * 1e-6 * sorted(whole)[1], rel=0.01)
    if ranks > 1:
        elements = 64 * 8192
        sums = [
            TABLE["all_reduce_us"][name][str(elements)]
            for name in (
                *(f"h100_sxm|{s} custom (CUDA graph)|{ranks} GPUs|elements of bf16" for s in SETS),
                f"h100_sxm|NCCL 2.29.2 all_reduce|{ranks} GPUs|elements",
            )
        ]
        layers = collectives(Deployment(CONFIG, H100, Layout(4, ranks)), 64, 64)[0]
        assert layers.seconds.low == pytest.approx(40 * 1e-6 * min(sums))
        assert layers.seconds.expected == pytest.approx(40 * 1e-6 * sorted(sums)[2])
        assert layers.seconds.high == pytest.approx(40 * 1e-6 * max(sums))


def test_heads_that_were_not_measured_are_rows_more_or_fewer():
    for name in SETS:
        eight = DecodeAttention("h100_sxm", name, "bfloat16", 8)
        sixteen = DecodeAttention("h100_sxm", name, "bfloat16", 16)  # twice the work
        three = DecodeAttention("h100_sxm", name, "bfloat16", 3)
        four = DecodeAttention("h100_sxm", name, "bfloat16", 4)
        assert sixteen.curve(8).at(2048) == eight.curve(16).at(2048)
        assert three.curve(64).at(4096) == pytest.approx(four.curve(48).at(4096))
        whole, half = (prefill_attention("h100_sxm", name, "bfloat16", n) for n in (64, 48))
        assert half.at(4e6) == pytest.approx(whole.at(3e6))


def test_attention_is_scaled_to_other_heads_another_gpu_and_a_cache_in_8_bits():
    """Llama-3.2-1B on one H100 PCIe: 16 layers of 32 query and 8 KV heads of 64, half of 128.

    A cache in int8 has a scale of 4 bytes beside 64 numbers.
    """
    pcie = find_gpu("h100-pcie")
    attention = RankAttention(Deployment(LlamaConfig.llama3_2_1b(), pcie, Layout(1, 1), "int8"))
    assert attention.token_bytes == 2 * 16 * 8 * (64 + 4)
    times = sorted(
        TABLE["decode_attention_us"][f"h100_sxm|{name}|kv fp8|TP2 32q/4kv"]["b64@4096"]
        for name in SETS
    )
    found = attention.decode(64, 64 * 4096)
    for bound, time in zip((found.low, found.expected, found.high), times, strict=True):
        assert bound == pytest.approx(16e-6 * time * 68 / 64 * 3.35 / 2.04, rel=0.03)
    whole = sorted(
        TABLE["prefill_attention_us"][f"h100_sxm|{name}|kv fp8|TP4"]["8192"] for name in SETS
    )
    found = attention.prefill(8192 * 8193 / 2, 0)
    assert found.expected == pytest.approx(16e-6 * whole[1] * 989 / 756, rel=0.01)


def test_a_chunk_takes_no_less_than_reading_its_keys():
    """Measured kernels read at up to the full bandwidth, those of a roofline at 82 % of it."""
    for gpu, fixed, share in ((H100, 0.0, 1.0), (A100, 20 * 10e-6, 0.82)):
        attention = RankAttention(Deployment(CONFIG, gpu, Layout(4, 2)))
        read = 1e7 * 40_960 / (share * gpu.bandwidth)
        assert attention.prefill(1, 1e7).expected == pytest.approx(fixed + read)


@pytest.mark.parametrize(
    ("config", "gpu", "kv", "evidence", "source"),
    [
        (CONFIG, "h100-sxm", "bf16", Evidence.MEASURED_ELSEWHERE, "measured kernels"),
        (CONFIG, "h100-sxm", "fp8", Evidence.ARITHMETIC, "measured kernels"),
        (CONFIG, "h100-pcie", "bf16", Evidence.ARITHMETIC, "measured kernels"),
        (LlamaConfig.llama3_2_1b(), "h100-sxm", "bf16", Evidence.ARITHMETIC, "measured kernels"),
        (replace(CONFIG, dtype="float32"), "h100-sxm", "auto", Evidence.ARITHMETIC, "roofline"),
    ],
)
def test_attention_is_measured_for_these_heads_on_this_gpu_alone(config, gpu, kv, evidence, source):
    known = RankAttention(Deployment(config, find_gpu(gpu), Layout(1, 1), kv)).known
    assert known.evidence is evidence and known.source.startswith(source)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_no_collective_moves_faster_than_the_links(ranks):
    size = 2.0**27
    for curve, sent in (
        (all_reduce("h100_sxm", "nccl", ranks), 2 * (ranks - 1) / ranks * size),
        (all_gather(ranks), (ranks - 1) * size),
    ):
        assert 0.3 * LINK < sent / curve.at(size) < LINK


@pytest.mark.parametrize("tokens", [1, 256])
def test_collectives_over_pcie_are_not_those_that_were_measured_over_nvlink(tokens):
    near, far = (
        collectives(Deployment(CONFIG, find_gpu(name), Layout(1, 8)), tokens, 64)[0]
        for name in ("h100-sxm", "h100-pcie")
    )
    # Three steps, and 7/8 of the activations twice, at 70 % of 64 GB/s.
    each = 3 * 10e-6 + 2 * 7 / 8 * tokens * CONFIG.embed_dim * 2 / (0.7 * 64e9)
    assert far.seconds.expected == pytest.approx(far.count * each)
    assert far.seconds.expected > 2 * near.seconds.expected
    assert (near.evidence, far.evidence) == (Evidence.MEASURED_ELSEWHERE, Evidence.ASSUMED)


def test_floors_of_llama_3_70b_are_bytes_and_arithmetic():
    """A row of 2,048 tokens, and a prompt of 2,048, in a stage of 4x2 H100 SXM.

    Both read the rank's share of the head in bfloat16, also beside weights in fp8.
    """
    layer = 5120 * 8192 + 8192 * 4096 + 28672 * 8192 + 8192 * 14336
    head = 16032 * 8192 * 2
    for weights, width in ((None, 2), ("fp8", 1)):
        config = replace(CONFIG, quantization=weights and Quantization(format=weights))
        model = TickModel(Deployment(config, H100, Layout(4, 2)))
        read = 20 * layer * width + 2048 * 40_960 + head
        assert model.floor(Work.of(1, 2048)) == pytest.approx(read / 3.35e12, rel=1e-3)
        flop = 20 * (2 * 2048 * layer + 4 * 32 * 128 * 2048 * 2049 / 2)
        least = flop / 989e12 + head / 3.35e12
        assert model.floor(Work.of(0, 0, 2048)) == pytest.approx(least, rel=1e-3)


def test_float32_takes_4_bytes_wherever_bfloat16_takes_2():
    model = TickModel(Deployment(replace(CONFIG, dtype="float32"), H100, Layout(4, 2), "auto"))
    assert model.collectives(Work.of(64))[0].bytes == 64 * 8192 * 4
    moved = 64 * (8 * 8192 + 2 * 5120 + 3 * 14336) * 4
    small = model.parts(Work.of(64))["small"].expected
    assert small == pytest.approx(20 * (5 * 2e-6 + moved / (0.82 * 3.35e12)))
    assert "roofline" in model.figures(Work.of(64))["products"].source


def test_the_head_is_split_over_all_ranks_and_padded_to_divide():
    assert head_shape(Deployment(CONFIG, H100, Layout(7, 1))) == (18_323, 8192)  # 128,256 / 7


def test_temporaries_are_the_widest_point_of_a_layer_or_the_logits():
    planned = Deployment(CONFIG, H100, Layout(4, 2))
    layer = 512 * (3 * 14336 + 2 * 8192) * 2
    logits = 512 * 16032 * 4
    assert temporary_bytes(planned, 512, 8) == layer
    assert temporary_bytes(planned, 8, 512) == logits
    odd = Deployment(CONFIG, H100, Layout(7, 1))
    assert temporary_bytes(odd, 8, 512) == 512 * 18_323 * 4
    sizes = RingSizes(2048, 10, 64, 128, (512,), (0, 64), 64)
    whole = Deployment(CONFIG, H100, Layout(1, 1))
    assert ring_bytes(whole, sizes) == state_bytes(whole, sizes) + 513 * 128_256 * 4
