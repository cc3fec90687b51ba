"""Pictures of the mesh, the ring and the model, for notebooks and as files.

    from llama_jax import pictures
    pictures.mesh(llm)
    pictures.next_token(logits, tokenizer, save="next.png")

Each function returns a matplotlib figure, which a notebook displays and which is readable on light
and dark pages. With `save`, it also writes the figure to a file, in the format of its extension.
In IPython, importing this package also makes `jax.sharding.Mesh` display as a table.

A wrong argument is the caller's bug, so these functions raise a plain ValueError, not a
`sharding.errors.UserError`.
"""

try:
    import matplotlib  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'llama_jax.pictures needs matplotlib: pip install "llama-jax[notebook]".',
        name="matplotlib",
    ) from error

from llama_jax.pictures.attention_map import attention
from llama_jax.pictures.device_memory import memory
from llama_jax.pictures.device_mesh import mesh
from llama_jax.pictures.heat_map import heat_map
from llama_jax.pictures.lens import logit_lens
from llama_jax.pictures.line_plot import curves
from llama_jax.pictures.mesh_html import mesh_html as mesh_html
from llama_jax.pictures.mesh_html import show_meshes_as_html as _show_meshes_as_html
from llama_jax.pictures.next_tokens import next_token
from llama_jax.pictures.page_map import page_occupancy
from llama_jax.pictures.ring_timeline import timeline
from llama_jax.pictures.shards import sharding

__all__ = [
    "attention",
    "curves",
    "heat_map",
    "logit_lens",
    "memory",
    "mesh",
    "next_token",
    "page_occupancy",
    "sharding",
    "timeline",
]

_show_meshes_as_html()
