"""The files of a checkpoint in this project's Orbax layout (`llama_jax.checkpoint.orbax`)."""

import json
from collections.abc import Sequence
from pathlib import Path

from convert.task import Piece, Task
from convert.transform import Transform, row_bytes
from llama_jax.checkpoint.orbax import ARRAY, STATE, WEIGHTS, array_metadata, chunk_file
from llama_jax.weights.table import StoredTensor

# Of a matrix whose columns are split over the tensor-parallel ranks. On so many ranks each finds
# its part as a run of bytes, to be mapped or read at once; on others columns are picked out, as
# they would be from whole rows. The reference deployment, 4 x 2, has two.
COLUMN_PIECES = 2
# Large enough for a fast disk and few files (2,300 for 70B), small enough that little is written
# again after a crash and that many workers share one matrix.
CHUNK_BYTES = 64 << 20


def plan(transforms: Sequence[Transform]) -> list[Task]:
    """A task for each run of rows that makes a chunk; scales are cut where their matrix is."""
    return [task for transform in transforms for task in _tasks(transform)]


def finish(directory: Path, transforms: Sequence[Transform]) -> None:
    """Writes what describes the arrays, once they are whole: to Zarr, and to Orbax."""
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
        tasks.append(Task(files, (Piece(transform, rows, names),)))
    return tasks


def _chunk_files(tensor: StoredTensor, number: int) -> tuple[str, ...]:
    """The files that hold the same rows, from the first column to the last."""
    if len(tensor.shape) == 1:
        return (chunk_file(tensor.hf_name, number),)
    return tuple(
        chunk_file(tensor.hf_name, number, piece) for piece in range(_column_pieces(tensor))
    )


def _column_pieces(tensor: StoredTensor) -> int:
    """Into how many pieces the columns of a matrix are cut; all are equally wide."""
    # "embed" is the one axis that no mesh splits: see sharding.partition, which would load JAX.
    split = tensor.axes[1] != "embed" and tensor.shape[1] % COLUMN_PIECES == 0
    return COLUMN_PIECES if split else 1


def _chunk_rows(transform: Transform) -> int:
    """Rows of a chunk; all chunks have as many, so that little of the last one is padding."""
    most = max(1, CHUNK_BYTES // row_bytes(transform.targets[0]))
    num_chunks = -(-transform.num_rows // most)
    return -(-transform.num_rows // num_chunks)
