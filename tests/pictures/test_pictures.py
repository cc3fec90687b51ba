"""What the pictures show: texts, numbers, cells and colours, and that they can be read."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from matplotlib import colormaps, image
from matplotlib.colors import to_hex, to_rgb

from llama_jax import pictures
from llama_jax.config import LlamaConfig
from llama_jax.engine.interface import DeviceInfo, EngineInfo
from llama_jax.engine.recording import Recording
from llama_jax.pictures.cells import show_text
from llama_jax.pictures.line_plot import LINES
from llama_jax.pictures.style import GRAY, PALETTE, ink, wrapped
from llama_jax.terminal.units import bytes_text
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.weights.placement import param_shapes
from sharding.mesh import make_mesh
from tests.support.picture_parts import (
    cells,
    contrast,
    labels,
    recorded_run,
    ticks,
    title,
    visible_texts,
    words,
)

DARK = "#111111"
WORDS = ["<|begin_of_text|>", "The", " ring", " never", " $drains", "\n", "你", "_{x}^2"]


def make_info(stages=4, ranks=2) -> EngineInfo:
    devices = [
        DeviceInfo(
            name=f"cuda:{stage * ranks + rank}",
            stage=stage,
            rank=rank,
            layers=list(range(20 * stage, 20 * stage + 20)),
            weight_bytes=17_639_000_000 + 100_000_000 * stage,
            kv_bytes=20_000_000_000,
        )
        for stage in range(stages)
        for rank in range(ranks)
    ]
    return EngineInfo(
        model="Meta-Llama-3-70B-Instruct",
        mesh=f"{stages}x{ranks}",
        platform="gpu",
        dtype="bfloat16",
        vocab_size=128256,
        max_model_len=4096,
        max_num_seqs=256,
        page_size=16,
        num_pages=30517,
        devices=devices,
        num_programs=16,
        load_seconds=1.0,
        compile_seconds=1.0,
    )


@pytest.fixture(scope="module")
def mesh():
    return make_mesh("4x2")


@pytest.fixture(scope="module")
def recording() -> Recording:
    return recorded_run()


class Words:
    """A tokenizer whose token ids are places in WORDS; past them there is no text."""

    def decode(self, ids):
        return "".join(WORDS[i] for i in ids if i < len(WORDS))


def softmax(values: np.ndarray) -> np.ndarray:
    e = np.exp(values - values.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attention_weights(num_heads: int, queries: int, keys: int) -> np.ndarray:
    scores = np.random.default_rng(0).normal(size=(num_heads, queries, keys)) * 2
    future = np.arange(keys) > np.arange(keys - queries, keys)[:, None]
    return softmax(np.where(future, -np.inf, scores))


AXES = {"xlabel": "head", "ylabel": "layer"}
HEADS = {**AXES, "label": "nats"}
ROWS, COLUMNS = P("stage", "model", None), P("stage", None, "model")


def stacked(mesh, spec: P) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((4, 28672, 8192), jnp.bfloat16, sharding=NamedSharding(mesh, spec))


EXAMPLES = {
    "mesh": lambda mesh, recording, **more: pictures.mesh(make_info(), **more),
    "mesh_1x1": lambda mesh, recording, **more: pictures.mesh(make_info(1, 1), **more),
    "mesh_2x8": lambda mesh, recording, **more: pictures.mesh(make_info(2, 8), **more),
    "memory": lambda mesh, recording, **more: pictures.memory(make_info(), limit=80e9, **more),
    "sharding": lambda mesh, recording, **more: pictures.sharding(
        stacked(mesh, ROWS), name="mlp.w_gate of the layers 0, 20, 40 and 60", **more
    ),
    "timeline": lambda mesh, recording, **more: pictures.timeline(recording, **more),
    "timeline_of_3": lambda mesh, recording, **more: pictures.timeline(
        recording, slice(5, 8), by="request", **more
    ),
    "timeline_of_45": lambda mesh, recording, **more: pictures.timeline(
        recording, slice(45), by="request", **more
    ),
    "page_occupancy": lambda mesh, recording, **more: pictures.page_occupancy(recording, **more),
    "attention": lambda mesh, recording, **more: pictures.attention(
        attention_weights(8, 40, 40), WORDS * 5, head=2, **more
    ),
    "attention_of_8": lambda mesh, recording, **more: pictures.attention(
        attention_weights(8, 16, 16), WORDS * 2, **more
    ),
    "attention_of_1": lambda mesh, recording, **more: pictures.attention(
        np.ones((1, 1)), ["a"], **more
    ),
    "next_token": lambda mesh, recording, **more: pictures.next_token(
        np.arange(12.0), Words(), **more
    ),
    "logit_lens": lambda mesh, recording, **more: pictures.logit_lens(
        np.linspace(0, 1, 9 * 8).reshape(9, 8), [WORDS] * 9, WORDS, **more
    ),
    "heat_map": lambda mesh, recording, **more: heads(2, **more),
    "heat_map_of_tokens": lambda mesh, recording, **more: pictures.heat_map(
        np.linspace(0, 1, 9 * 32).reshape(9, 32),
        "What each token does",
        x=WORDS * 4,
        label="share",
        xlabel="token",
        ylabel="after layer",
        **more,
    ),
    "curves": lambda mesh, recording, **more: losses(levels={"target": 3.0}, **more),
}


def heads(count: int, **more):
    values = np.arange(count * 40).reshape(count, 5, 8) / 79 * 9 - 9
    names = [f"token {i}" for i in range(count)]
    return pictures.heat_map(
        values, "What ablating a head changes", names=names,
        label="change (nats)", xlabel="head", ylabel="layer", **more,
    )  # fmt: skip


def losses(**more):
    values = {"with sink": [1.0, 2.0, 4.0], "without": [np.nan, 3.0, 6.0]}
    return pictures.curves(
        [8, 16, 64], values, "Loss by window", xlabel="window (tokens)", ylabel="loss (nats)",
        log="x", **more,
    )  # fmt: skip


@pytest.fixture(scope="module", params=EXAMPLES)
def example(request, mesh, recording, tmp_path_factory):
    """A picture, and the file that it wrote."""
    path = tmp_path_factory.mktemp("pictures") / f"{request.param}.png"
    return EXAMPLES[request.param](mesh, recording, save=path), path


def on(pixels: np.ndarray, color: str) -> np.ndarray:
    return pixels[..., :3] * pixels[..., 3:] + np.array(to_rgb(color)) * (1 - pixels[..., 3:])


def test_the_file_is_a_png_as_large_as_the_picture_and_not_heavy(example):
    picture, path = example
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    # Antialiased text is what weighs; only this one has 400 of them.
    assert len(data) < (150_000 if path.stem == "timeline_of_45" else 80_000)
    pixels = image.imread(path)
    width, height = picture.get_size_inches()
    assert width <= 9 and picture.dpi == 100
    assert pixels.shape[2] == 4
    assert np.allclose(pixels.shape[:2], (100 * height, 100 * width), atol=1)
    assert all(pixels[y, x, 3] == 0 for y in (0, -1) for x in (0, -1))  # transparent
    assert np.ptp(on(pixels, "#ffffff")) > 0.5 and np.ptp(on(pixels, DARK)) > 0.4
    assert picture._repr_png_() == data  # what a notebook shows


def test_every_text_is_inside_large_enough_and_readable(example):
    picture, _ = example
    found = visible_texts(picture)
    picture.draw_without_rendering()
    box = picture.bbox
    in_cells = {id(text) for axes in picture.axes for text in axes.texts}
    assert len(found) > 4
    for text in found:
        extent = text.get_window_extent()
        where = f"{text.get_text()!r} at {extent}"
        assert extent.x0 >= -1 and extent.x1 <= box.width + 1, where
        assert extent.y0 >= -1 and extent.y1 <= box.height + 1, where
        assert text.get_fontsize() >= 5.99, where
        assert not text.get_parse_math()  # "$" is a dollar
        if id(text) not in in_cells:
            assert to_hex(text.get_color()) == GRAY, where


def test_every_axis_says_what_it_shows(example):
    picture, _ = example
    whole = {picture.get_supxlabel(), picture.get_supylabel()}
    for axes in picture.axes:
        assert axes.get_xlabel() or axes.get_ylabel() or len(whole - {""}) == 2
    assert len(title(picture)) > 10


def test_cells_do_not_touch_their_neighbours(example):
    """A text in a cell stays inside it: no two of them overlap."""
    picture, _ = example
    picture.draw_without_rendering()
    for axes in picture.axes:
        boxes = [text.get_window_extent() for text in axes.texts]
        for i, one in enumerate(boxes):
            assert not any(one.overlaps(other) for other in boxes[i + 1 :]), axes.texts[i]


def test_greys_and_inks_have_contrast_on_white_and_black():
    assert contrast(GRAY, "#ffffff") >= 4 and contrast(GRAY, DARK) >= 4
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    shades = [*PALETTE, *(to_hex(colormaps["viridis"](i)) for i in range(256))]
    for color in shades:
        best = max("#000000", "#ffffff", key=lambda other: contrast(color, other))
        assert to_hex(ink(color)) == best and contrast(color, best) >= 4.5
    assert len(set(PALETTE)) == len(PALETTE)


def test_users_settings_neither_change_a_picture_nor_are_changed(tmp_path):
    plain = pictures.next_token(np.arange(5.0), Words())._repr_png_()
    wild = {"font.size": 20, "axes.facecolor": "red", "text.color": "red", "savefig.dpi": 30}
    with matplotlib.rc_context(wild):
        before = dict(matplotlib.rcParams)
        picture = pictures.next_token(np.arange(5.0), Words())
        assert picture._repr_png_() == plain
        assert dict(matplotlib.rcParams) == before


def test_the_mesh_shows_what_lies_where():
    picture = pictures.mesh(SimpleNamespace(info=make_info()))  # an LLM has .info
    (axes,) = picture.axes
    assert len(cells(axes)) == 8 and labels(axes) == ("rank", "stage")
    shown = [text.get_text() for text in axes.texts]
    assert shown[0] == "cuda:0\nlayers 0-19\nweights 17.6 GB\nKV cache 20.0 GB"
    assert shown[7] == "cuda:7\nlayers 60-79\nweights 17.9 GB\nKV cache 20.0 GB"
    assert [text.get_position() for text in axes.texts[:3]] == [(0, 0), (1, 0), (0, 1)]
    assert "Meta-Llama-3-70B-Instruct in bfloat16 on 4x2" in title(picture)


def test_a_jax_mesh_counts_the_bytes_of_shapes_and_of_arrays(mesh):
    config = LlamaConfig.from_pretrained("demo/checkpoint")
    shapes = param_shapes(config, mesh, jnp.dtype(jnp.float32))
    total = 0
    for leaf in jax.tree.leaves(shapes):  # equal parts everywhere, and replicas
        parts = NamedSharding(mesh, leaf.sharding.spec).devices_indices_map(leaf.shape)
        slices = parts[mesh.devices[2, 1]]
        sizes = [len(range(*s.indices(n))) for s, n in zip(slices, leaf.shape, strict=True)]
        total += 4 * int(np.prod(sizes))
    array = jax.device_put(jnp.zeros((6, 1000), jnp.int8), mesh.devices[2, 1])
    picture = pictures.mesh(mesh, shapes, {"one": array})
    shown = [text.get_text() for text in picture.axes[0].texts]
    assert labels(picture.axes[0]) == ("model", "stage")
    assert shown[5] == f"cpu:5\nweights {bytes_text(total)}\nKV cache 6.00 kB"
    assert shown[4] == f"cpu:4\nweights {bytes_text(total)}\nKV cache 0 B"
    line = jax.sharding.Mesh(mesh.devices[:3, 0], ("data",))
    assert len(cells(pictures.mesh(line).axes[0])) == 3


def test_memory_adds_up_and_says_how_even_it_is():
    picture = pictures.memory(make_info(), limit=80e9)
    (axes,) = picture.axes
    bars = cells(axes)
    assert len(bars) == 3 * 8 and axes.get_xlabel() == "memory (GB)"
    per_device = np.array([bar.get_width() for bar in bars]).reshape(8, 3)
    assert np.allclose(per_device.sum(1), 80)
    assert np.allclose(per_device[:, 0], np.repeat([17.639, 17.739, 17.839, 17.939], 2))
    assert ticks(axes.yaxis)[:3] == ["cuda:0  (0, 0)", "cuda:1  (0, 1)", "cuda:2  (1, 0)"]
    assert "spread 0.8 % across devices" in title(picture) and "37.8 GB a device" in title(picture)
    assert {"17.6 GB", "20.0 GB", "free 42.4 GB"} <= {*words(picture)}
    assert {"weights", "KV cache", "free"} <= {*words(picture)}
    without = pictures.memory(make_info())
    assert len(cells(without.axes[0])) == 16 and "free" not in words(without)


def test_sharding_draws_each_shard_where_it_lies(mesh):
    picture = pictures.sharding(stacked(mesh, ROWS), name="w_gate")
    assert [axes.get_title() for axes in picture.axes] == [f"stage {i}" for i in range(4)]
    for stage, axes in enumerate(picture.axes):
        boxes = [(b.get_x(), b.get_y(), b.get_width(), b.get_height()) for b in cells(axes)]
        assert boxes == [(0, 0, 8192, 14336), (0, 14336, 8192, 14336)]
        assert [text.get_text() for text in axes.texts] == [
            f"cpu:{2 * stage + rank}\nstage {stage}, model {rank}" for rank in (0, 1)
        ]
    colors = [to_hex(b.get_facecolor()) for axes in picture.axes for b in cells(axes)]
    assert colors == list(PALETTE[:8])
    assert title(picture) == "w_gate [4 × 28,672 × 8,192] bfloat16: 8 shards, one a device"
    assert picture.get_supylabel() == "row (of 28,672)"


def test_sharding_of_columns_of_the_vocabulary_and_of_replicas(mesh):
    columns = pictures.sharding(stacked(mesh, COLUMNS)).axes[0]
    assert [(b.get_x(), b.get_width()) for b in cells(columns)] == [(0, 4096), (4096, 4096)]

    embedding = jax.device_put(jnp.zeros((64, 8)), NamedSharding(mesh, P(("stage", "model"))))
    picture = pictures.sharding(embedding)
    assert [b.get_y() for b in cells(picture.axes[0])] == list(range(0, 64, 8))
    assert words(picture).count("cpu:3 (stage 1, model 1)") == 1

    norm = jax.device_put(jnp.zeros(16), NamedSharding(mesh, P()))
    picture = pictures.sharding(norm)
    assert len(cells(picture.axes[0])) == 1 and "whole on each of 8 devices" in title(picture)
    assert "8 replicas: cpu:0, cpu:1, cpu:2, cpu:3 cpu:4, cpu:5, cpu:6, cpu:7" in words(picture)

    half = jax.device_put(jnp.zeros((16, 4)), NamedSharding(mesh, P("model")))
    assert "2 shards, each on 4 devices" in title(pictures.sharding(half))

    alone = jax.ShapeDtypeStruct((4, 4), jnp.int8, sharding=SingleDeviceSharding(jax.devices()[3]))
    assert "whole on one device" in title(pictures.sharding(alone))
    assert "cpu:3 stage 1, model 1" in words(pictures.sharding(alone, mesh))


def test_attention_shows_the_weights_themselves():
    weights = attention_weights(3, 4, 6)
    weights[1, 0, 1] = 0.0  # a zero that is not the future's
    picture = pictures.attention(jnp.asarray(weights, jnp.bfloat16), WORDS[:6], head=1)
    axes, bar = picture.axes
    shown = axes.images[0].get_array()
    assert np.allclose(shown.filled(0), weights[1], atol=0.01)
    assert shown.mask.tolist() == [[k > q + 2 for k in range(6)] for q in range(4)]
    assert ticks(axes.xaxis) == ["<|begin_of_te…", "The", "␣ring", "␣never", "␣$drains", "\\n"]
    assert ticks(axes.yaxis) == ["␣ring", "␣never", "␣$drains", "\\n"]  # the last four
    assert bar.get_ylabel() == "attention weight"
    assert (picture.get_supxlabel(), picture.get_supylabel()) == ("key", "query")
    assert title(picture) == "Attention of head 1: 4 queries, 6 keys"


def test_a_weight_on_a_later_key_is_shown():
    """As in a model that looks both ways, or one that is wrong."""
    weights = np.array([[0.5, 0.25, 0.25], [0, 1, 0], [0, 0, 1]])
    shown = pictures.attention(weights, "abc").axes[0].images[0].get_array()
    assert shown.mask.tolist() == [[False] * 3, [False, False, True], [False] * 3]
    assert shown[0, 2] == 0.25


def test_many_heads_share_a_scale():
    weights = attention_weights(6, 5, 5)
    picture = pictures.attention(weights, WORDS[:5], head=[5, 0, 2])
    maps = [axes for axes in picture.axes if axes.images]
    assert [axes.get_title() for axes in maps] == ["head 5", "head 0", "head 2"]
    top = np.float32(weights[[5, 0, 2]].max())
    assert {axes.images[0].get_clim() for axes in maps} == {(0.0, top)}
    assert np.allclose(maps[1].images[0].get_array().filled(0), weights[0])
    assert len(picture.axes) == 4  # one colour bar
    assert len([a for a in pictures.attention(weights, WORDS[:5]).axes if a.images]) == 6


@pytest.mark.parametrize("scores", ["logits", "log probabilities"])
def test_next_token_shows_probabilities_in_order(scores):
    logits = np.array([0.0, 2.0, -1.0, 5.0, 4.0, 1.0, 3.0, 0.5, 4.5])
    expected = 100 * softmax(logits)
    given = np.log(expected / 100) if scores == "log probabilities" else logits
    picture = pictures.next_token(jnp.asarray(given, jnp.float32), Words(), top=4)
    (axes,) = picture.axes
    widths = [bar.get_width() for bar in cells(axes)]
    assert np.allclose(widths, expected[[3, 8, 4, 6]], atol=1e-3)
    assert ticks(axes.yaxis) == ["␣never", "token 8", "␣$drains", "\\u4f60"]
    assert [text.get_text() for text in axes.texts] == [f"{w:.1f} %" for w in widths]
    assert labels(axes) == ("probability (%)", "next token")
    assert title(picture) == f"{sum(widths):.1f} % on 4 of 9 tokens"


def test_next_token_with_a_real_tokenizer():
    tokenizer = Tokenizer("demo/checkpoint")
    (token,) = tokenizer.encode(" stage", add_bos=False)
    scores = np.full(1816, -np.inf)
    scores[[token, tokenizer.bos_token_id, 1815]] = [3.0, 2.0, 1.0]
    shown = ticks(pictures.next_token(scores, tokenizer, top=3).axes[0].yaxis)
    assert shown == ["␣stage", "<|begin_of_text|>", "token 1815"]


def test_logit_lens_writes_each_token_into_its_cell():
    probabilities = np.linspace(0, 1, 12).reshape(3, 4)
    texts = [["a", " b", "c", "\n"], ["d", "e", "f", "g"], ["$h", "i", "j", "a very long token"]]
    picture = pictures.logit_lens(probabilities, texts, WORDS[:4])
    axes, bar = picture.axes
    assert np.allclose(axes.images[0].get_array(), probabilities)
    shown = {text.get_position(): text.get_text() for text in axes.texts}
    assert len(shown) == 12 and shown[1, 0] == "␣b" and shown[0, 2] == "$h" and shown[3, 0] == "\\n"
    assert shown[3, 2].startswith("a␣very") and shown[3, 2].endswith("…")
    assert ticks(axes.yaxis) == ["embedding", "0", "1"] and axes.get_ylim()[0] < axes.get_ylim()[1]
    assert labels(axes) == ("token at this position", "after layer")
    assert bar.get_ylabel() == "probability"
    for text in axes.texts:
        x, y = text.get_position()
        cell = to_hex(colormaps["viridis"](probabilities[y, x]))
        assert contrast(cell, to_hex(text.get_color())) >= 4.5


def test_heat_maps_share_a_scale_and_write_their_numbers():
    picture = heads(2)
    left, right, bar = picture.axes
    assert left.images[0].get_clim() == right.images[0].get_clim() == (-9, 0)
    assert np.allclose(right.images[0].get_array()[4, 7], 0)
    assert left.get_ylim()[0] < left.get_ylim()[1]  # the first row is at the bottom
    assert {text.get_position(): text.get_text() for text in left.texts}[0, 0] == "-9.0"
    assert {text.get_position(): text.get_text() for text in right.texts}[7, 4] == "0.0"
    assert [axes.get_title() for axes in (left, right)] == ["token 0", "token 1"]
    assert (labels(left), labels(right)) == (("head", "layer"), ("head", ""))
    assert bar.get_ylabel() == "change (nats)"
    assert left.get_xticklabels()[0].get_rotation() == 0  # short texts lie flat
    same = pictures.heat_map(np.ones((2, 2)), "t", label="l", xlabel="x", ylabel="y")
    assert [text.get_text() for text in same.axes[0].texts] == ["1.00"] * 4


def test_curves_are_told_apart_without_their_colours():
    picture = losses(levels={"target": 3.0})
    (axes,) = picture.axes
    first, second, target = axes.lines
    assert first.get_xdata().tolist() == [8, 16, 64] and first.get_ydata().tolist() == [1, 2, 4]
    assert np.isnan(second.get_ydata()[0]) and first.get_marker() != second.get_marker()
    assert axes.get_xscale() == "log" and ticks(axes.xaxis) == ["8", "16", "64"]
    assert target.get_ydata() == [3.0, 3.0] and "target" in words(picture)
    assert {"with sink", "without"} <= set(words(picture))
    for color in LINES:
        assert contrast(color, "#ffffff") >= 2.8 and contrast(color, DARK) >= 2.8
    named = pictures.curves(["bf16", "int8"], {"a": [1, 2]}, "t", xlabel="x", ylabel="y")
    assert ticks(named.axes[0].xaxis) == ["bf16", "int8"]
    steep = pictures.curves([1, 2], {"a": [1e-3, 10]}, "t", xlabel="x", ylabel="y", log="y")
    assert {"0.001", "0.1", "10"} <= set(words(steep))


def of_four_axes(mesh) -> jax.ShapeDtypeStruct:
    last = NamedSharding(mesh, P(None, None, None, "model"))
    return jax.ShapeDtypeStruct((2, 2, 2, 4), jnp.int8, sharding=last)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda mesh: pictures.mesh("4x2"), "not an object of type str"),
        (lambda mesh: pictures.mesh(make_info(), weights=[]), "leave them out"),
        (lambda mesh: pictures.mesh(mesh, [np.ones(3)]), r"shape \(3,\) has no sharding"),
        (lambda mesh: pictures.memory(None), "type NoneType"),
        (lambda mesh: pictures.sharding(np.ones(3)), "ndarray has no sharding"),
        (lambda mesh: pictures.sharding(jnp.float32(1)), "without axes"),
        (lambda mesh: pictures.sharding(of_four_axes(mesh)), "after the third"),
        (lambda mesh: pictures.timeline(Recording(2)), "0 were recorded"),
        (lambda mesh: pictures.timeline(Recording(2), slice(0, 9, 2)), "without steps"),
        (lambda mesh: pictures.page_occupancy(Recording(2)), "No ticks to draw"),
        (lambda mesh: pictures.attention(np.ones(3), "abc"), r"\[T, S\], not \(3,\)"),
        (lambda mesh: pictures.attention(np.ones((2, 3)), "ab"), "3 key positions"),
        (lambda mesh: pictures.attention(np.ones((3, 2)), "ab"), "more than the 2"),
        (lambda mesh: pictures.attention(np.ones((4, 2, 2)), "ab", 4), "heads 0 to 3, not 4"),
        (lambda mesh: pictures.attention(np.ones((4, 2, 2)), "ab", []), "at least one"),
        (lambda mesh: pictures.next_token(np.ones((2, 2)), Words()), r"not \(2, 2\)"),
        (lambda mesh: pictures.next_token(np.array([1, np.nan]), Words()), "NaN"),
        (lambda mesh: pictures.next_token(np.full(3, -np.inf), Words()), "no token is possible"),
        (lambda mesh: pictures.next_token(np.ones(3), Words(), top=0), "at least 1, got 0"),
        (lambda mesh: pictures.logit_lens(np.ones(3), [], []), r"\[L \+ 1, T\]"),
        (lambda mesh: pictures.logit_lens(np.ones((1, 2)), [["a"]], "ab"), "1 rows of 2"),
        (lambda mesh: pictures.logit_lens(np.ones((1, 2)), ["ab"], "a"), "got 1"),
        (lambda mesh: pictures.logit_lens(np.ones((1, 2)), ["ab"], "ab", []), "got 0"),
        (lambda mesh: pictures.logit_lens(-np.ones((1, 2)), ["ab"], "ab"), "not logits"),
        (lambda mesh: pictures.heat_map(np.ones(3), "t", **HEADS), r"not \(3,\)"),
        (lambda mesh: pictures.heat_map(np.full((2, 2), np.nan), "t", **HEADS), "not finite"),
        (lambda mesh: pictures.heat_map(np.ones((2, 3)), "t", x="ab", **HEADS), "x needs 3"),
        (lambda mesh: pictures.heat_map(np.ones((2, 3)), "t", names="ab", **HEADS), "needs 1"),
        (lambda mesh: pictures.curves([1], {}, "t", **AXES), "1 to 5 curves, got 0"),
        (lambda mesh: pictures.curves([1], {"a": [1, 2]}, "t", **AXES), "'a' needs 1 numbers"),
        (lambda mesh: pictures.curves([1], {"a": [1]}, "t", log="z", **AXES), "got 'z'"),
        (lambda mesh: pictures.next_token(np.ones(3), Words(), save="a.xyz"), "a.xyz must end"),
    ],
)
def test_wrong_inputs_get_one_sentence(mesh, call, says):
    with pytest.raises(ValueError, match=says) as caught:
        call(mesh)
    assert str(caught.value).count("\n") == 0 and str(caught.value).endswith(".")


def test_small_texts():
    assert show_text(" a\tb\x00é→😀") == "␣a\\tb\\x00é→😀".replace("😀", show_text("😀"))
    assert max(map(len, wrapped("word " * 60, 5.0).split("\n"))) <= 57
