"""Pictures of attention, next tokens, the logit lens, heat maps and curves."""

from itertools import pairwise

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.colors import to_hex

from llama_jax import pictures
from llama_jax.pictures.line_plot import LINES
from llama_jax.text.tokenizer import Tokenizer
from tests.support.picture_inputs import WORDS, Words, attention_weights, heads, losses, softmax
from tests.support.picture_parts import DARK, cells, contrast, labels, ticks, title, words


def test_attention_shows_the_weights():
    weights = attention_weights(3, 4, 6)
    weights[1, 0, 1] = 0.0  # a zero, but not of the future
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
    """Such as in a bidirectional model, or in a causal one with a bug."""
    weights = np.array([[0.5, 0.25, 0.25], [0, 1, 0], [0, 0, 1]])
    shown = pictures.attention(weights, "abc").axes[0].images[0].get_array()
    assert shown.mask.tolist() == [[False] * 3, [False, False, True], [False] * 3]
    assert shown[0, 2] == 0.25


def test_tick_labels_of_many_tokens_do_not_overlap():
    picture = pictures.attention(attention_weights(1, 4, 90), WORDS * 11 + ["a", "b"])
    picture.draw_without_rendering()
    boxes = [label.get_window_extent() for label in picture.axes[0].get_xticklabels()]
    assert 20 < len(boxes) < 90
    assert not any(left.overlaps(right) for left, right in pairwise(boxes))


def test_many_heads_share_a_scale():
    weights = attention_weights(6, 5, 5)
    picture = pictures.attention(weights, WORDS[:5], head=[5, 0, 2])
    maps = [axes for axes in picture.axes if axes.images]
    assert [axes.get_title() for axes in maps] == ["head 5", "head 0", "head 2"]
    top = np.float32(weights[[5, 0, 2]].max())
    assert {axes.images[0].get_clim() for axes in maps} == {(0.0, top)}
    assert np.allclose(maps[1].images[0].get_array().filled(0), weights[0])
    assert len(picture.axes) == 4  # one color bar
    maps = [axes for axes in pictures.attention(weights, WORDS[:5]).axes if axes.images]
    # Of 4 + 2 maps, the last of each column has the keys, and the first of each row the queries.
    assert [bool(ticks(axes.xaxis)) for axes in maps] == [False] * 2 + [True] * 4
    assert [bool(ticks(axes.yaxis)) for axes in maps] == [n in (0, 4) for n in range(6)]


def test_a_head_may_be_the_result_of_argmax():
    for head in (np.int64(2), jnp.array(2), np.array([2]), [jnp.array(2)]):
        picture = pictures.attention(attention_weights(3, 4, 6), WORDS[:6], head=head)
        assert title(picture) == "Attention of head 2: 4 queries, 6 keys"


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
    assert [text.get_text() for text in axes.texts] == [f"{w:.1f}%" for w in widths]
    assert labels(axes) == ("probability (%)", "next token")
    assert title(picture) == f"{sum(widths):.1f}% on the top 4 of 9 tokens"


def test_next_token_with_a_real_tokenizer():
    tokenizer = Tokenizer("demo/checkpoint")
    (token,) = tokenizer.encode(" stage", add_bos=False)
    part = tokenizer.encode("😀", add_bos=False)[0]  # of its bytes
    scores = np.full(1816, -np.inf)
    scores[[token, tokenizer.bos_token_id, 1815, part]] = [3.0, 2.0, 1.0, 0.0]
    shown = ticks(pictures.next_token(scores, tokenizer, top=4).axes[0].yaxis)
    assert shown == ["␣stage", "<|begin_of_text|>", "token 1815", f"token {part}"]


def test_logit_lens_writes_each_token_into_its_cell():
    probabilities = np.linspace(0, 1.00005, 12).reshape(3, 4)  # as rounding leaves them
    texts = [["a", " b", "c", "\n"], ["d", "e", "f", "g"], ["$h", "i", "j", "a very long token"]]
    picture = pictures.logit_lens(probabilities, texts, WORDS[:4])
    axes, bar = picture.axes
    assert np.allclose(axes.images[0].get_array(), probabilities)
    shown = {text.get_position(): text.get_text() for text in axes.texts}
    assert len(shown) == 12 and shown[1, 0] == "␣b" and shown[0, 2] == "$h" and shown[3, 0] == "\\n"
    assert shown[3, 2].startswith("a␣very") and shown[3, 2].endswith("…")
    assert ticks(axes.yaxis) == ["embedding", "0", "1"] and axes.get_ylim()[0] < axes.get_ylim()[1]
    assert labels(axes) == ("input token", "after layer")
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
    assert left.get_xticklabels()[0].get_rotation() == 0  # short labels are not rotated
    same = pictures.heat_map(np.ones((2, 2)), "t", label="l", xlabel="x", ylabel="y")
    assert [text.get_text() for text in same.axes[0].texts] == ["1.00"] * 4


def test_curves_can_be_told_apart_without_color():
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
    levels = {f"level {n}": n for n in range(1, 5)}
    steep = pictures.curves(
        [1, 2], {"a": [1e-3, 10]}, "t", xlabel="x", ylabel="y", log="y", levels=levels
    )
    assert {"0.001", "0.1", "10", *levels} <= set(words(steep))


def test_small_probabilities_are_not_zero():
    picture = pictures.next_token(np.log([0.9, 0.0993, 0.0006, 0.0001]), Words())
    shown = [text.get_text() for text in picture.axes[0].texts]
    assert shown == ["90.0%", "9.9%", "0.1%", "<0.1%"]


@pytest.mark.parametrize(
    ("highest", "expected"),
    [
        (0.003, ["0.0000", "0.0030"]),
        (0.05, ["0.000", "0.050"]),
        (1.0, ["0.00", "1.00"]),
        (5.0, ["0.0", "5.0"]),
        (50.0, ["0", "50"]),
    ],
)
def test_heat_map_numbers_have_as_many_digits_as_the_spread_needs(highest, expected):
    values = [[-1e-9, highest]]  # no number is "-0"
    picture = pictures.heat_map(values, "t", label="l", xlabel="x", ylabel="y")
    assert [text.get_text() for text in picture.axes[0].texts] == expected
