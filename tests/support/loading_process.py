"""One of two processes that load a checkpoint together: `loading_process.py N PORT PATH OUT`.

Process N has four of eight CPU devices. It writes JSON to OUT: which devices are its own, the
slices that it read, and, for each array, whether each of its shards and the whole gathered array
equal the checkpoint's tensors.
"""

import json
import sys

import jax
import numpy as np
import safetensors.torch
from jax.experimental import multihost_utils

from llama_jax.checkpoint.load import load_params
from sharding.mesh import make_mesh
from tests.checkpoint.test_load import Spy, expected_params


def main(number: str, port: str, path: str, out: str) -> None:
    address = f"127.0.0.1:{port}"
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    bind = {"coordinator_bind_address": address} if number == "0" else {}
    jax.distributed.initialize(address, 2, int(number), **bind)
    mesh = make_mesh("4x2", jax.devices())
    spy = Spy(path)
    params = load_params(spy, mesh, np.dtype("float32"))
    expected = expected_params(safetensors.torch.load_file(f"{path}/model.safetensors"), 4, 2)
    right = {}
    for key, array in jax.tree_util.tree_leaves_with_path(params):
        wanted = expected[jax.tree_util.keystr(key)]
        shards = [np.array_equal(s.data, wanted[s.index]) for s in array.addressable_shards]
        whole = multihost_utils.process_allgather(array, tiled=True)
        right[jax.tree_util.keystr(key)] = [*shards, np.array_equal(whole, wanted)]
    local = [device in jax.local_devices() for device in mesh.devices.flat]
    found = {"local": local, "asked": list(spy.asked.items()), "right": right}
    with open(out, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
