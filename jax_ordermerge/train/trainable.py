"""Which tensors of a model are trained, and which all members share unchanged."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from jax.sharding import Mesh

from jax_ordermerge.arch import ModelConfig, TensorSpec, tensor_table
from jax_ordermerge.model import kernels, layers, lora
from jax_ordermerge.train import objective
from jax_ordermerge.train.objective import Objective
from jax_ordermerge.train.spec import TrainingSpec
from jax_ordermerge.tree import Tree


class Trainable(NamedTuple):
    """A model, cut into what is trained and what is frozen.

    Attributes:
        trained: tensors that each member has for itself, with moments and checkpoints.
        frozen: tensors that are in memory once for all members; empty in full fine-tuning.
        objective: of both.
        starts: `(load, members) -> [params]`, what members of these numbers start from, float32:
            one for all of them, or one for each. `load` loads the base.
    """

    trained: tuple[TensorSpec, ...]
    frozen: tuple[TensorSpec, ...]
    objective: Objective
    starts: Callable[[Callable[[], Tree], Sequence[int]], list[Tree]]


def make_trainable(spec: TrainingSpec, model: ModelConfig, mesh: Mesh) -> Trainable:
    """Cut a model: all of it is trained, or adapters on a frozen base.

    Example:
        >>> from jax_ordermerge import config
        >>> from jax_ordermerge.mesh import make_mesh
        >>> model = ModelConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2
        ... )
        >>> full = make_trainable(TrainingSpec(), model, make_mesh())
        >>> len(full.trained), len(full.frozen)
        (12, 0)
        >>> spec = TrainingSpec(lora=config.Lora(targets="q"))
        >>> adapters = make_trainable(spec, model, make_mesh())
        >>> [tensor.path for tensor in adapters.trained], len(adapters.frozen)
        (['layers/attention/q/lora_a', 'layers/attention/q/lora_b'], 12)
    """
    # chosen here and not in the model: which kernel is right depends on mesh, dtype and packing
    kernel = kernels.choose(
        spec.model.attention,
        model,
        mesh,
        dtype=spec.model.compute_dtype,
        packed=spec.data.packing != "none",
    )
    dense = objective.build(spec, model, kernel, layers.choose_form(mesh))
    table = tensor_table(model)
    settings = spec.lora
    if settings is None:
        return Trainable(table, (), dense, lambda load, members: [load()])

    # An adapter starts at B = 0, so the member starts as the base, which is not loaded here: it is
    # loaded once, as the frozen tree. All members draw the same A, by the seed of the experiment,
    # unless it is what differs between them.
    def starts(load: Callable[[], Tree], members: Sequence[int]) -> list[Tree]:
        seeds = [spec.seed]
        if spec.population.vary != "order":
            seeds = [lora.member_seed(spec.seed, member) for member in members]
        return [lora.init_params(model, settings, seed) for seed in seeds]

    return Trainable(
        trained=lora.table(model, settings),
        frozen=table,
        objective=objective.adapted(dense, lora.scale(settings)),
        starts=starts,
    )
