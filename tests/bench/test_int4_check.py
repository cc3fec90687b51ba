"""Whether the check of int4 products would notice a wrong kernel."""

from itertools import chain

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from bench import int4_check
from bench.products import layer_config
from llama_jax.model.hopper_int4 import hopper_int4
from llama_jax.quantization import Int4

SLOW = pytest.mark.slow
PRODUCT, NUMBER, CHANGED, MOVED = range(4)  # the targets
CONFIG = layer_config("int4", toy=True)


def right(x, matrix):
    return Int4(*matrix).linear(x)


def one_wrong_number(x, matrix):
    return right(x, matrix).at[-1, :].multiply(1.5)


def zero_points_one_off(x, matrix):
    return right(x, matrix._replace(zero=jnp.roll(matrix.zero, 1, axis=0)))


def spreads_nan(x, matrix):
    return right(x, matrix) + 0 * x[-1, 0] + 0 * x.sum().astype(x.dtype)


class Noise:
    runs = 0

    def __call__(self, x, matrix):
        out = right(x, matrix)
        noise = jax.pure_callback(self.draw, jax.ShapeDtypeStruct((), out.dtype))
        return out.at[0, 0].add(noise)

    def draw(self):
        self.runs += 1
        return np.asarray(self.runs, jnp.bfloat16)


@pytest.mark.parametrize(
    ("multiply", "missed"),
    [
        pytest.param(right, set(), marks=SLOW),
        pytest.param(one_wrong_number, {PRODUCT, NUMBER}, marks=SLOW),
        pytest.param(zero_points_one_off, {PRODUCT, NUMBER}, marks=SLOW),
        (spreads_nan, {MOVED}),
        pytest.param(Noise(), {CHANGED}, marks=SLOW),
    ],
)
def test_the_check_notices(multiply, missed, monkeypatch):
    monkeypatch.setattr(int4_check, "RUNS", 2)

    def each(xs, matrices):
        matrices = [Int4(*(array[0] for array in matrix)) for matrix in matrices]
        return tuple(map(multiply, xs, matrices))

    rows = list(chain.from_iterable(int4_check.check(each, CONFIG, small=True)))
    found = {n for n, target in enumerate(int4_check.targets(rows)) if not target.met}
    assert found >= missed and (missed or not found)


@pytest.mark.slow
@pytest.mark.timeout(300, method="thread")
def test_the_kernel_passes_when_it_is_interpreted(monkeypatch):
    monkeypatch.setattr(int4_check, "RUNS", 2)

    def each(xs, matrices):
        params = InterpretGPUParams()
        return tuple(
            hopper_int4(x, *(array[0] for array in matrix), interpret=params)
            for x, matrix in zip(xs, matrices, strict=True)
        )

    [row] = int4_check.check_matrix(each, CONFIG, (128, 512), (9,))
    assert row["error"] <= 0.006 and row["number error"] <= int4_check.MAX_NUMBER_ERROR / 2
    assert row["changed"] == row["moved"] == 0
