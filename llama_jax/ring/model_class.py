"""Whether the ring can run a model class of the user's."""

from flax import nnx

from llama_jax.config import LlamaConfig
from llama_jax.model import Llama, RMSNorm, Sampler
from llama_jax.model.llama import check_attributes
from llama_jax.weights.table import LAYER_PARAMETERS
from sharding.errors import UserError


def check_model_class(model_class: type[Llama], config: LlamaConfig) -> None:
    """Checks that the ring can run a subclass of `Llama` as a model of this architecture.

    The ring uses its layers and its sampler, and would silently ignore other changes.

    Raises:
      UserError: it is no such subclass, it overrides a method that the ring does not call, its
        sampler is none, its layers have parameters that no checkpoint has or arrays as plain
        attributes, or its constructor makes some layers, or the final norm, otherwise than the ring
        does.
    """
    if not (isinstance(model_class, type) and issubclass(model_class, Llama)):
        got = getattr(model_class, "__name__", f"an instance of {type(model_class).__name__}")
        raise UserError(f"model_class must be Llama or a subclass of it, got {got}.")
    for name in ("__call__", "unembed"):
        if getattr(model_class, name) is not getattr(Llama, name):
            raise UserError(
                f"{model_class.__name__} overrides {name}, which a model on a mesh does not call: "
                "change the layers (layer_class) or the sampler instead."
            )
    if not isinstance(model_class.sampler, Sampler):
        got = getattr(model_class.sampler, "__name__", type(model_class.sampler).__name__)
        raise UserError(
            f"{model_class.__name__}.sampler must be an instance of a Sampler, got {got}: write "
            "sampler = MySampler(), with parentheses."
        )
    layer = nnx.eval_shape(lambda: model_class.layer_class(config, rngs=nnx.Rngs(0)))
    check_attributes(layer)
    for path, _ in nnx.to_flat_state(nnx.state(layer, nnx.Not(nnx.RngState))):
        name = ".".join(map(str, path))
        if name not in LAYER_PARAMETERS:
            raise UserError(
                f"The layers of {model_class.__name__} have a parameter {name}, for which a model "
                "on a mesh has no place: use Llama on one device, or merge it into the weights."
            )
    if model_class.__init__ is not Llama.__init__:
        _check_constructor(model_class, config, layer)


def _check_constructor(model_class: type[Llama], config: LlamaConfig, layer: nnx.Module) -> None:
    """Checks that a model's own constructor makes what the ring makes without calling it.

    Raises:
      UserError: a layer is not like `layer`, or the final norm is no `RMSNorm`.
    """
    model, norm = nnx.eval_shape(
        lambda: (
            model_class(config, rngs=nnx.Rngs(0)),
            RMSNorm(config.embed_dim, config.norm_eps),
        )
    )
    pairs: dict[str, tuple[nnx.Module, nnx.Module]] = {
        f"layers.{number}": (each, layer) for number, each in enumerate(model.layers)
    }
    pairs["final_norm"] = (model.final_norm, norm)
    for name, (found, expected) in pairs.items():
        if nnx.graphdef(found) != nnx.graphdef(expected):
            raise UserError(
                f"The constructor of {model_class.__name__} changes {name}, but a model on a mesh "
                "makes all layers by layer_class and has a plain final norm: use Llama on one "
                "device, or a layer_class that computes the same in every layer."
            )
