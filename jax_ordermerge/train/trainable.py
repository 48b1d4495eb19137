"""What of a model is trained, and what all members share as it is."""

from collections.abc import Callable
from typing import NamedTuple

from jax.sharding import Mesh

from jax_ordermerge.arch import ModelConfig, TensorSpec, tensor_table
from jax_ordermerge.config import Config
from jax_ordermerge.model import kernels, lora
from jax_ordermerge.train import objective
from jax_ordermerge.train.objective import Objective
from jax_ordermerge.tree import Tree


class Split(NamedTuple):
    """A model cut in two.

    Attributes:
        trained: the tensors that each member has for itself, with moments and checkpoints.
        frozen: those held once; empty in full fine-tuning.
        objective: of both.
        start: makes what a member starts from, float32, out of a function that loads the base.
    """

    trained: tuple[TensorSpec, ...]
    frozen: tuple[TensorSpec, ...]
    objective: Objective
    start: Callable[[Callable[[], Tree]], Tree]


def split(config: Config, model: ModelConfig, mesh: Mesh) -> Split:
    """Cut a model as the config says: all of it is trained, or adapters on a frozen base.

    Example:
        >>> from jax_ordermerge.mesh import make_mesh
        >>> model = ModelConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2
        ... )
        >>> full, low = (
        ...     split(Config(lora=one), model, make_mesh()) for one in (None, {"targets": ["q"]})
        ... )
        >>> (
        ...     len(full.trained),
        ...     len(full.frozen),
        ...     [spec.path for spec in low.trained],
        ...     len(low.frozen),
        ... )
        (12, 0, ['layers/attention/q/lora_a', 'layers/attention/q/lora_b'], 12)
    """
    computed = config.model
    packed = config.data.packing != "none"
    kernel = kernels.choose(
        computed.attention, model, mesh, dtype=computed.compute_dtype, packed=packed
    )
    whole = objective.build(config, model, kernel)
    table, settings = tensor_table(model), config.lora
    if settings is None:
        return Split(table, (), whole, lambda load: load())
    adapters = objective.adapted(whole, lora.scale(settings))
    return Split(
        lora.table(model, settings),
        table,
        adapters,
        lambda load: lora.init_params(model, settings, config.seed),
    )
