"""Pictures of the mesh, of memory by device, and of shards."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from matplotlib.colors import to_hex

from llama_jax import ShardedLlama, pictures
from llama_jax.config import LlamaConfig
from llama_jax.pictures.style import PALETTE
from llama_jax.terminal.units import bytes_text
from llama_jax.weights.placement import param_shapes
from tests.support.paths import DEMO_CHECKPOINT
from tests.support.picture_inputs import COLUMNS, ROWS, make_info, stacked
from tests.support.picture_parts import cells, labels, ticks, title, words


def test_mesh_shows_layers_and_bytes_of_each_device():
    picture = pictures.mesh(SimpleNamespace(info=make_info()))  # an LLM has .info
    (axes,) = picture.axes
    assert len(cells(axes)) == 8 and labels(axes) == ("rank", "stage")
    shown = [text.get_text() for text in axes.texts]
    assert shown[0] == "cuda:0\nlayers 0-19\nweights 17.6 GB\nKV cache 20.0 GB"
    assert shown[7] == "cuda:7\nlayers 60-79\nweights 17.9 GB\nKV cache 20.0 GB"
    assert [text.get_position() for text in axes.texts[:3]] == [(0, 0), (1, 0), (0, 1)]
    assert "Meta-Llama-3-70B-Instruct in bfloat16 on 4x2" in title(picture)


def test_mesh_counts_bytes_of_shapes_and_of_arrays(mesh):
    config = LlamaConfig.from_pretrained("demo/checkpoint")
    shapes = param_shapes(config, mesh, jnp.dtype(jnp.float32))
    total = 0
    for leaf in jax.tree.leaves(shapes):  # some are sharded, some replicated
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
    elsewhere = pictures.mesh(line, {"one": array}).axes[0]  # on none of its devices
    assert [text.get_text() for text in elsewhere.texts] == [
        f"cpu:{n}\nweights 0 B\nKV cache 0 B" for n in (0, 2, 4)
    ]
    empty = pictures.memory(line)
    assert ticks(empty.axes[0].yaxis) == ["cpu:0  (0)", "cpu:2  (1)", "cpu:4  (2)"]
    assert "0.0%" in title(empty)


def test_a_model_on_a_mesh_is_drawn_with_its_weights_and_cache():
    model = ShardedLlama.from_pretrained(str(DEMO_CHECKPOINT), "3x2")  # 3, 3 and 2 of 8 layers
    assert repr(model) == "<ShardedLlama of 8 layers of width 192 on the mesh 3x2 (cpu, float32)>"

    def shown():
        return [text.get_text() for text in pictures.mesh(model).axes[0].texts]

    arrays = [shard.data for a in jax.tree.leaves(model.params) for shard in a.addressable_shards]
    placed = [sum(a.nbytes for a in arrays if a.device == d) for d in model.mesh.devices.flat]
    layers = [f"layers {text}" for text in ("0-2", "0-2", "3-5", "3-5", "6-7", "6-7")]
    expected = [
        f"cpu:{n}\n{layers[n]}\nweights {bytes_text(placed[n])}\nKV cache " for n in range(6)
    ]
    assert shown() == [text + "0 B" for text in expected]
    model(np.zeros((1, 16), np.int32))
    # Keys and values of 16 tokens: 3 layers and 2 KV heads of 32 floats for each device.
    assert shown() == [text + bytes_text(2 * 16 * 3 * 2 * 32 * 4) for text in expected]
    assert "3x2" in title(pictures.memory(model))


def test_memory_adds_up_to_the_limit_and_names_the_spread():
    picture = pictures.memory(make_info(), limit=80e9)
    (axes,) = picture.axes
    bars = cells(axes)
    assert len(bars) == 3 * 8 and axes.get_xlabel() == "memory (GB)"
    per_device = np.array([bar.get_width() for bar in bars]).reshape(8, 3)
    assert np.allclose(per_device.sum(1), 80) and axes.get_xlim()[1] > 80
    assert np.allclose(per_device[:, 0], np.repeat([17.639, 17.739, 17.839, 17.939], 2))
    assert ticks(axes.yaxis)[:3] == ["cuda:0  (0, 0)", "cuda:1  (0, 1)", "cuda:2  (1, 0)"]
    assert "0.8%" in title(picture) and "37.8 GB" in title(picture)
    assert {"17.6 GB", "20.0 GB", "free 42.4 GB"} <= {*words(picture)}
    assert {"weights", "KV cache", "free"} <= {*words(picture)}
    without = pictures.memory(make_info())
    assert len(cells(without.axes[0])) == 16 and "free" not in words(without)
    beyond = pictures.memory(make_info(), limit=30e9)
    assert len(cells(beyond.axes[0])) == 16 and "free" not in words(beyond)


def test_sharding_draws_each_shard_in_its_place(mesh):
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
    assert title(picture) == "w_gate [4 × 28,672 × 8,192] bfloat16: 8 shards, one per device"
    assert picture.get_supylabel() == "row (of 28,672)"


def test_sharding_of_columns_of_rows_over_both_axes_and_of_replicas(mesh):
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

    blocks = NamedSharding(mesh, P("model"))  # of four axes, two layers on each rank
    picture = pictures.sharding(jax.ShapeDtypeStruct((4, 8, 6, 3), jnp.int8, sharding=blocks))
    assert [axes.get_title() for axes in picture.axes] == ["model 0 to 1", "model 2 to 3"]
    whole = (picture.get_supylabel(), picture.get_supxlabel())
    assert whole == ("axis 1 (of 8)", "axis 2 (of 6)")

    alone = jax.ShapeDtypeStruct((4, 4), jnp.int8, sharding=SingleDeviceSharding(jax.devices()[3]))
    assert "whole on one device" in title(pictures.sharding(alone))
    assert "cpu:3 stage 1, model 1" in words(pictures.sharding(alone, mesh))


def test_memory_spread_is_a_share_of_the_mean():
    info = make_info(1, 2)
    large = replace(info.devices[0], weight_bytes=30_000_000_000, kv_bytes=0)
    small = replace(info.devices[1], weight_bytes=10_000_000_000, kv_bytes=0)
    assert "100.0%" in title(pictures.memory(replace(info, devices=[large, small])))


def test_memory_asks_the_devices_of_an_engine_in_this_process_for_their_limit():
    devices = [
        SimpleNamespace(memory_stats=lambda: {"bytes_limit": 80_000_000_000}),
        SimpleNamespace(memory_stats=lambda: None),  # as on CPU
    ]
    executor = SimpleNamespace(mesh=SimpleNamespace(devices=np.array(devices)))
    engine = SimpleNamespace(info=make_info(1, 2), loop=SimpleNamespace(executor=executor))
    picture = pictures.memory(engine)
    assert [word for word in words(picture) if word.startswith("free ")] == ["free 42.4 GB"]
    assert len(cells(picture.axes[0])) == 2 + 2 + 1
