"""Every picture as a file: readable, in its frame, in its own style; and rejected arguments."""

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib import colormaps, image
from matplotlib.colors import to_hex, to_rgb

from llama_jax import pictures
from llama_jax.engine.recording import Recording
from llama_jax.pictures.cells import show_text
from llama_jax.pictures.style import GRAY, PALETTE, ink, wrapped
from tests.support.picture_inputs import (
    ROWS,
    WORDS,
    Words,
    attention_weights,
    heads,
    losses,
    make_info,
    stacked,
)
from tests.support.picture_parts import DARK, contrast, title, visible_texts

AXES = {"xlabel": "head", "ylabel": "layer"}
HEADS = {**AXES, "label": "nats"}

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


# Other sizes of a picture that the quick tests have, too.
SLOW = ("mesh_1x1", "timeline_of_3", "timeline_of_45", "attention_of_1", "heat_map_of_tokens")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in EXAMPLES
    ],
)
def example(request, mesh, recording, tmp_path_factory):
    """A picture, and the file that it wrote."""
    path = tmp_path_factory.mktemp("pictures") / f"{request.param}.png"
    return EXAMPLES[request.param](mesh, recording, save=path), path


def on(pixels: np.ndarray, color: str) -> np.ndarray:
    return pixels[..., :3] * pixels[..., 3:] + np.array(to_rgb(color)) * (1 - pixels[..., 3:])


def test_the_file_is_a_small_png_of_the_size_of_the_picture(example):
    picture, path = example
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    # Antialiased text makes a file large; only this one has 400 texts.
    assert len(data) < (150_000 if path.stem == "timeline_of_45" else 80_000)
    pixels = image.imread(path)
    width, height = picture.get_size_inches()
    assert width <= 9 and picture.dpi == 100
    assert pixels.shape[2] == 4
    assert np.allclose(pixels.shape[:2], (100 * height, 100 * width), atol=1)
    assert all(pixels[y, x, 3] == 0 for y in (0, -1) for x in (0, -1))  # transparent
    assert np.ptp(on(pixels, "#ffffff")) > 0.5 and np.ptp(on(pixels, DARK)) > 0.4
    assert picture._repr_png_() == data  # what a notebook shows


def test_every_text_is_inside_the_picture_and_readable(example):
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


def test_every_axis_has_a_label(example):
    picture, _ = example
    whole = {picture.get_supxlabel(), picture.get_supylabel()}
    for axes in picture.axes:
        assert axes.get_xlabel() or axes.get_ylabel() or len(whole - {""}) == 2
    assert len(title(picture)) > 10


def test_texts_in_cells_do_not_overlap(example):
    picture, _ = example
    picture.draw_without_rendering()
    for axes in picture.axes:
        boxes = [text.get_window_extent() for text in axes.texts]
        for i, one in enumerate(boxes):
            assert not any(one.overlaps(other) for other in boxes[i + 1 :]), axes.texts[i]


def test_colors_have_contrast():
    assert contrast(GRAY, "#ffffff") >= 4 and contrast(GRAY, DARK) >= 4
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    shades = [*PALETTE, *(to_hex(colormaps["viridis"](i)) for i in range(256))]
    for color in shades:
        best = max("#000000", "#ffffff", key=lambda other: contrast(color, other))
        assert to_hex(ink(color)) == best and contrast(color, best) >= 4.5
    assert len(set(PALETTE)) == len(PALETTE)


def test_rcparams_of_the_user_do_not_matter_and_are_kept():
    plain = pictures.next_token(np.arange(5.0), Words())._repr_png_()
    wild = {"font.size": 20, "axes.facecolor": "red", "text.color": "red", "savefig.dpi": 30}
    with matplotlib.rc_context(wild):
        before = dict(matplotlib.rcParams)
        picture = pictures.next_token(np.arange(5.0), Words())
        assert picture._repr_png_() == plain
        assert dict(matplotlib.rcParams) == before


def of_four_axes(mesh) -> jax.ShapeDtypeStruct:
    last = NamedSharding(mesh, P(None, None, None, "model"))
    return jax.ShapeDtypeStruct((2, 2, 2, 4), jnp.int8, sharding=last)


@pytest.mark.parametrize(
    ("call", "token"),
    [
        (lambda mesh: pictures.mesh("4x2"), "str"),
        (lambda mesh: pictures.mesh(make_info(), weights=[]), "weights"),
        (lambda mesh: pictures.mesh(mesh, [np.ones(3)]), r"\(3,\)"),
        (lambda mesh: pictures.memory(None), "NoneType"),
        (lambda mesh: pictures.sharding(np.ones(3)), "ndarray"),
        (lambda mesh: pictures.sharding(jnp.float32(1)), "scalar"),
        (lambda mesh: pictures.sharding(of_four_axes(mesh)), r"\(2, 2, 2, 4\)"),
        (lambda mesh: pictures.timeline(Recording(2)), r"slice\(0, 40"),
        (lambda mesh: pictures.timeline(Recording(2), slice(0, 9, 2)), "step"),
        (lambda mesh: pictures.page_occupancy(Recording(2)), r"slice\(None"),
        (lambda mesh: pictures.attention(np.ones(3), "abc"), r"weights.*\(3,\)"),
        (lambda mesh: pictures.attention(np.ones((2, 3)), "ab"), "tokens.*3, got 2"),
        (lambda mesh: pictures.attention(np.ones((3, 2)), "ab"), "queries"),
        (lambda mesh: pictures.attention(np.ones((4, 2, 2)), "ab", 4), r"head.*\[0, 4\)"),
        (lambda mesh: pictures.attention(np.ones((4, 2, 2)), "ab", -1), r"head.*\[0, 4\)"),
        (lambda mesh: pictures.attention(np.ones((4, 2, 2)), "ab", []), "head"),
        (lambda mesh: pictures.next_token(np.ones((2, 2)), Words()), r"scores.*\(2, 2\)"),
        (lambda mesh: pictures.next_token(np.array([1, np.nan]), Words()), "scores"),
        (lambda mesh: pictures.next_token(np.full(3, -np.inf), Words()), "scores"),
        (lambda mesh: pictures.next_token(np.array([1, np.inf]), Words()), "scores"),
        (lambda mesh: pictures.next_token(np.ones(3), Words(), top=0), "top.*0"),
        (lambda mesh: pictures.logit_lens(np.ones(3), [], []), r"probabilities.*\(3,\)"),
        (lambda mesh: pictures.logit_lens(np.ones((1, 2)), [["a"]], "ab"), "texts"),
        (lambda mesh: pictures.logit_lens(np.ones((1, 2)), ["ab"], "a"), "tokens.*got 1"),
        (lambda mesh: pictures.logit_lens(np.ones((1, 2)), ["ab"], "ab", []), "layers.*got 0"),
        (lambda mesh: pictures.logit_lens(-np.ones((1, 2)), ["ab"], "ab"), "probabilities"),
        (lambda mesh: pictures.heat_map(np.ones(3), "t", **HEADS), r"values.*\(3,\)"),
        (lambda mesh: pictures.heat_map(np.full((2, 2), np.nan), "t", **HEADS), "values"),
        (lambda mesh: pictures.heat_map(np.ones((2, 3)), "t", x="ab", **HEADS), "^x .*3"),
        (lambda mesh: pictures.heat_map(np.ones((2, 3)), "t", names="ab", **HEADS), "names.*1"),
        (lambda mesh: pictures.curves([1], {}, "t", **AXES), "values.*got 0"),
        (lambda mesh: pictures.curves([1], {name: [1] for name in "abcdef"}, "t", **AXES), "got 6"),
        (lambda mesh: pictures.curves([1], {"a": [1, 2]}, "t", **AXES), r"'a'.*\(2,\)"),
        (lambda mesh: pictures.curves([1], {"a": [1]}, "t", log="z", **AXES), "log.*'z'"),
        (lambda mesh: pictures.next_token(np.ones(3), Words(), save="a.xyz"), "a.xyz"),
    ],
)
def test_wrong_arguments_are_rejected(mesh, call, token):
    with pytest.raises(ValueError, match=token):
        call(mesh)


def test_tokens_and_titles_as_text():
    assert show_text(" a\tb\x00é→😀") == "␣a\\tb\\x00é→😀".replace("😀", show_text("😀"))
    assert max(map(len, wrapped("word " * 60, 5.0).split("\n"))) <= 57
