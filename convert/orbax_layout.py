"""Writes this project's Orbax layout (`llama_jax.checkpoint.orbax`)."""

import json
from collections.abc import Sequence
from pathlib import Path

from convert.task import RowBlock, Task
from convert.transform import Transform, row_bytes
from llama_jax.checkpoint.orbax import ARRAY, STATE, WEIGHTS, array_metadata, chunk_file
from llama_jax.weights.axes import MESH_AXES
from llama_jax.weights.table import StoredTensor

# Number of pieces into which the columns of a matrix are cut if they are split over the
# tensor-parallel ranks. With that many ranks, each rank's part is a run of bytes; with another
# number, columns are picked out of rows. The reference deployment, 4 x 2, has two ranks.
COLUMN_PIECES = 2
# Large enough for fast disks and few files (2,300 for 70B); small enough that a crash loses little
# work and that several workers can share one matrix.
CHUNK_BYTES = 64 << 20


def plan(transforms: Sequence[Transform]) -> list[Task]:
    """Returns one task per chunk of rows; scales are cut at the same rows as their matrix."""
    return [task for transform in transforms for task in _tasks(transform)]


def finish(directory: Path, transforms: Sequence[Transform]) -> None:
    """Writes the metadata that Zarr and Orbax need."""
    names = []
    for transform in transforms:
        for tensor in transform.targets:
            columns = [size // _column_pieces(tensor) for size in tensor.shape[1:]]
            chunk_shape = (_chunk_rows(transform), *columns)
            metadata = array_metadata(tensor.shape, chunk_shape, str(tensor.dtype))
            file = directory / WEIGHTS / STATE / tensor.hf_name / ARRAY
            file.write_text(json.dumps(metadata), encoding="utf-8")
            names.append(tensor.hf_name)
    tree = {
        f"('{name}',)": {
            "key_metadata": [{"key": name, "key_type": 2}],  # a key of a dictionary
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
        for name in names
    }
    (directory / WEIGHTS / STATE / "_METADATA").write_text(
        json.dumps(
            {
                "tree_metadata": tree,
                "use_ocdbt": False,
                "use_zarr3": True,
                "store_array_data_equal_to_fill_value": True,
                "custom_metadata": None,
            }
        ),
        encoding="utf-8",
    )
    handler = "orbax.checkpoint.experimental.v1._src.handlers.pytree_handler.PyTreeHandler"
    (directory / WEIGHTS / "_CHECKPOINT_METADATA").write_text(
        json.dumps({"item_handlers": {STATE: handler}, "custom_metadata": {}}), encoding="utf-8"
    )
    (directory / WEIGHTS / "orbax.checkpoint").touch()


def _tasks(transform: Transform) -> list[Task]:
    height = _chunk_rows(transform)
    tasks = []
    for number, first in enumerate(range(0, transform.num_rows, height)):
        rows = slice(first, min(first + height, transform.num_rows))
        names = tuple(_chunk_files(tensor, number) for tensor in transform.targets)
        files = {
            name: height * row_bytes(tensor) // len(of_tensor)
            for tensor, of_tensor in zip(transform.targets, names, strict=True)
            for name in of_tensor
        }
        tasks.append(Task(files, (RowBlock(transform, rows, names),)))
    return tasks


def _chunk_files(tensor: StoredTensor, number: int) -> tuple[str, ...]:
    """Returns the files of one chunk of rows, from the first columns to the last."""
    if len(tensor.shape) == 1:
        return (chunk_file(tensor.hf_name, number),)
    return tuple(
        chunk_file(tensor.hf_name, number, piece) for piece in range(_column_pieces(tensor))
    )


def _column_pieces(tensor: StoredTensor) -> int:
    """Returns the number of equally wide pieces into which a matrix's columns are cut."""
    split = MESH_AXES[tensor.axes[1]] is not None and tensor.shape[1] % COLUMN_PIECES == 0
    return COLUMN_PIECES if split else 1


def _chunk_rows(transform: Transform) -> int:
    """Returns the rows per chunk, equal for all chunks so that the last has little padding."""
    max_rows = max(1, CHUNK_BYTES // row_bytes(transform.targets[0]))
    num_chunks = -(-transform.num_rows // max_rows)
    return -(-transform.num_rows // num_chunks)
