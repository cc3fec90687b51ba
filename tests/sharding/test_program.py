"""Programs of a mesh."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.engine.compile_counter import CompileCounter
from sharding.mesh import make_mesh
from sharding.program import MeshProgram


def test_a_program_is_the_same_whatever_the_session_has_set():
    """However it is made: lowered, compiled for shapes, or called."""
    mesh = make_mesh("1x1")
    program = MeshProgram(lambda x: x + jnp.arange(4.0), mesh, P(), P(), name="sum")
    shape = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=NamedSharding(mesh, P()))
    x = jax.device_put(jnp.zeros(4, jnp.float32), shape.sharding)
    with jax.enable_x64(True):  # in which the sum would have 64 bits
        assert "f64" not in program.lower(shape).as_text()
        assert program.compile(shape).dtype == jnp.float32
        counter = CompileCounter()
        assert program(x).dtype == jnp.float32
        assert counter.count == 0
