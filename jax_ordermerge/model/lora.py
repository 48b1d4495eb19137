"""Low-rank adapters: which matrices get one, the table of their tensors, and how they join the base.

y = x W^T + s (x A^T) B^T with W `[out, in]` frozen, A `[rank, in]` and B `[out, rank]` trained, and s = alpha / rank, or
alpha / sqrt(rank) with `rslora`. A starts uniform in ±1/sqrt(in), B at zero, so that a member starts as the base.

Adapters live in the parameter dict beside their weight, as `lora_a` and `lora_b`, stacked on `L` as it is. They are named as the
adapters of PEFT are: `base_model.model.` + Hugging Face module + `.lora_A.weight`.

Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685; Kalajdzievski 2023 (rslora), https://arxiv.org/abs/2312.03732.
"""

import math

import jax

from jax_ordermerge import tree
from jax_ordermerge.arch import ModelConfig, TensorSpec, tensor_table
from jax_ordermerge.config import Lora
from jax_ordermerge.errors import UserError, did_you_mean
from jax_ordermerge.model import initial

PREFIX, A, B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
ALL = "all-linear"


def scale(settings: Lora) -> float:
    """Return s.

    Example:
        >>> scale(Lora(rank=4, alpha=8)), scale(Lora(rank=4, alpha=8, rslora=True))
        (2.0, 4.0)
    """
    return settings.alpha / (math.sqrt(settings.rank) if settings.rslora else settings.rank)


def targets(config: ModelConfig, settings: Lora) -> tuple[TensorSpec, ...]:
    """Return the weights that get an adapter, in the order of the tensor table.

    Raises:
        UserError: a name that is no matrix of the layers.

    Example:
        >>> config = ModelConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2
        ... )
        >>> [spec.path for spec in targets(config, Lora(targets=("v", "q_proj")))]
        ['layers/attention/q/weight', 'layers/attention/v/weight']
        >>> targets(config, Lora(targets=("q_prj",)))
        Traceback (most recent call last):
        ...
        jax_ordermerge.errors.UserError: lora.targets: q_prj is no matrix of this model (did you mean 'q_proj'?); it has q, k, v, ...
    """
    matrices = [
        spec
        for spec in tensor_table(config)
        if spec.kind in ("attention", "mlp") and len(spec.hf_shape) == 2
    ]
    names = {spec: (spec.path.split("/")[-2], spec.hf_name.split(".")[-2]) for spec in matrices}
    known = [name for both in names.values() for name in both] + [ALL]
    for name in settings.targets:
        if name not in known:
            short = ", ".join(own for own, _ in names.values())
            raise UserError(
                f"lora.targets: {name} is no matrix of this model{did_you_mean(name, known)}; it has {short}, or give {ALL}"
            )
    if not settings.targets:
        raise UserError(f"lora.targets is empty; name matrices of the layers, or give {ALL}")
    wanted = set(settings.targets)
    return tuple(spec for spec in matrices if ALL in wanted or wanted & set(names[spec]))


def table(config: ModelConfig, settings: Lora) -> tuple[TensorSpec, ...]:
    """Declare the tensors of an adapter: A and B of each target, as `tensor_table` declares those of a model.

    Raises:
        UserError: see `targets`.

    Example:
        >>> config = ModelConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2
        ... )
        >>> for spec in table(config, Lora(rank=4, targets=("up",))):
        ...     print(spec.path, spec.shape, spec.hf_names()[1])
        layers/mlp/up/lora_a (2, 4, 8) base_model.model.model.layers.1.mlp.up_proj.lora_A.weight
        layers/mlp/up/lora_b (2, 16, 4) base_model.model.model.layers.1.mlp.up_proj.lora_B.weight
    """
    specs = []
    for spec in targets(config, settings):
        (L, O, I), (_, out, inp) = spec.shape, spec.axes  # noqa: E741
        path, name = spec.path.removesuffix("weight"), PREFIX + spec.hf_name.removesuffix(".weight")
        a = TensorSpec(
            f"{path}lora_a",
            (L, settings.rank, I),
            ("layer", "rank", inp),
            "uniform",
            name + A,
            spec.kind,
        )
        b = TensorSpec(
            f"{path}lora_b",
            (L, O, settings.rank),
            ("layer", out, "rank"),
            "zeros",
            name + B,
            spec.kind,
        )
        specs += [a, b]
    return tuple(specs)


def init_params(
    config: ModelConfig, settings: Lora, seed: int, mesh: jax.sharding.Mesh | None = None
) -> tree.Tree:
    """Return the adapter that every member starts from, float32.

    Each tensor is drawn whole from `rng.stream(seed, "lora", its name)`, so the values are the same on every mesh.

    Args:
        config: the model.
        settings: rank and targets.
        seed: of the run.
        mesh: where the arrays live, sharded by their logical axes; None is the default device.

    Example:
        >>> config = ModelConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2
        ... )
        >>> q = init_params(config, Lora(rank=4), 0)["layers"]["attention"]["q"]
        >>> (
        ...     q["lora_a"].shape,
        ...     float(abs(q["lora_a"]).max()) < 8**-0.5,
        ...     float(abs(q["lora_b"]).max()),
        ... )
        ((2, 4, 8), True, 0.0)
    """
    return initial.draw(table(config, settings), seed, "lora", mesh)


def join(base: tree.Tree, adapter: tree.Tree, scale: float) -> tree.Tree:
    """Return the parameter dict of the base with an adapter in it, which `llama.forward` takes. No dense matrix is made.

    Args:
        base: the dict of `tensor_table`, any dtype.
        adapter: the dict of `table`.
        scale: s, which goes into B.

    Example:
        >>> config = ModelConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2
        ... )
        >>> base = {"layers": {"mlp": {"up": {"weight": jax.numpy.zeros((2, 16, 8))}}}}
        >>> joined = join(base, init_params(config, Lora(targets=("up",)), 0), 2.0)
        >>> sorted(joined["layers"]["mlp"]["up"])
        ['lora_a', 'lora_b', 'weight']
    """
    scaled = {
        path: scale * x if path.endswith("lora_b") else x
        for path, x in tree.flatten(adapter).items()
    }
    return tree.unflatten({**tree.flatten(base), **scaled})


def dense(base: tree.Tree, adapter: tree.Tree, scale: float) -> tree.Tree:
    """Return the parameters of the base with s B A added to the matrices that an adapter has, in float32.

    For looking at a model while it is trained; what is exported is added by `merge/lora.py`, on the host and in the order it documents.

    Args:
        base: the dict of `tensor_table`, any dtype.
        adapter: the dict of `table`.
        scale: s.

    Example:
        >>> base = {"layers": {"mlp": {"up": {"weight": jax.numpy.zeros((1, 2, 2))}}}}
        >>> low = {"lora_a": jax.numpy.ones((1, 1, 2)), "lora_b": jax.numpy.ones((1, 2, 1))}
        >>> dense(base, {"layers": {"mlp": {"up": low}}}, 3.0)["layers"]["mlp"]["up"][
        ...     "weight"
        ... ].tolist()
        [[[3.0, 3.0], [3.0, 3.0]]]
    """
    whole, low = tree.flatten(base), tree.flatten(adapter)
    for path in [path for path in low if path.endswith("lora_a")]:
        target = path.removesuffix("lora_a") + "weight"
        change = jax.numpy.matmul(low[path.removesuffix("a") + "b"], low[path])
        whole[target] = whole[target].astype("float32") + scale * change
    return tree.unflatten(whole)
