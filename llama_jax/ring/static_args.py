"""What the program of a tick is compiled for, beside the shapes of its arrays."""

from typing import NamedTuple

from llama_jax.config import LlamaConfig
from llama_jax.model import Llama
from llama_jax.ring.backend import Backend
from llama_jax.ring.sizes import Bucket, RingSizes


class StaticArgs(NamedTuple):
    """The static arguments of a tick.

    Attributes:
      config: the architecture.
      sizes: of the ring.
      bucket: rows and chunk of the program.
      model_class: `Llama` or a subclass, whose layers and sampler run.
      backend: the kernels that run.
      token_multiple: of which layers compute a multiple, from `token_multiple`.
    """

    config: LlamaConfig
    sizes: RingSizes
    bucket: Bucket
    model_class: type[Llama] = Llama
    backend: Backend = Backend()
    token_multiple: int = 1

    @property
    def num_tokens(self) -> int:
        """N, the rows and tokens of a packet."""
        return self.bucket.rows + self.bucket.chunk

    @property
    def num_padding(self) -> int:
        """Tokens after those of a packet, so that the layers compute a multiple."""
        return -self.num_tokens % self.token_multiple


def token_multiple(platform: str, bucket: Bucket) -> int:
    """The number of tokens of which the layers of a program compute a multiple.

    Without it, cuBLAS has XLA copy the inputs and outputs of every product, to multiples of 8.
    """
    return 8 if platform == "gpu" and bucket.chunk else 1
