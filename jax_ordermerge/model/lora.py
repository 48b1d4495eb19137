"""Low-rank adapters: which matrices get one, the table of their tensors, how they join the base.

y = x W^T + s (x A^T) B^T with W `[out, in]` frozen, A `[rank, in]` and B `[out, rank]` trained,
and s = alpha / rank, or alpha / sqrt(rank) with `rslora`. A starts uniform in ±1/sqrt(in) and B at
zero, so a member starts as the base.

Adapters live in the parameter dict beside their weight, as `lora_a` and `lora_b`, stacked on `L` as
the weight is. In files they have the names of PEFT: `base_model.model.`, the Hugging Face module,
`.lora_A.weight`.

Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685; Kalajdzievski 2023 (rslora),
https://arxiv.org/abs/2312.03732.
"""

import math

import jax

from jax_ordermerge import rng, tree
from jax_ordermerge.arch import ModelConfig, TensorSpec, tensor_table
from jax_ordermerge.config import Lora
from jax_ordermerge.errors import UserError, did_you_mean
from jax_ordermerge.model import initial, quantization

PREFIX, A, B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
ALL = "all-linear"


def scale(settings: Lora) -> float:
    """Return s, the factor of B A.

    Example:
        >>> scale(Lora(rank=4, alpha=8)), scale(Lora(rank=4, alpha=8, rslora=True))
        (2.0, 4.0)
    """
    return settings.alpha / (math.sqrt(settings.rank) if settings.rslora else settings.rank)


def targets(config: ModelConfig, settings: Lora) -> tuple[TensorSpec, ...]:
    """Return the weights that get an adapter, in the order of the tensor table.

    Raises:
        UserError: a name of `lora.targets` is not a matrix of the layers.

    Example:
        >>> config = ModelConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2
        ... )
        >>> [spec.path for spec in targets(config, Lora(targets=("v", "q_proj")))]
        ['layers/attention/q/weight', 'layers/attention/v/weight']
        >>> targets(config, Lora(targets=("q_prj",)))
        Traceback (most recent call last):
        ...
        jax_ordermerge.errors.UserError: lora.targets: q_prj is not a matrix of this model
            (did you mean 'q_proj'?); it has q, k, v, ...
    """
    # Embeddings and head get no adapter: PEFT's "all-linear" leaves them out too.
    matrices = [
        spec
        for spec in tensor_table(config)
        if spec.kind in ("attention", "mlp") and len(spec.hf_shape) == 2
    ]
    # our short name and that of Hugging Face: configs of PEFT can be copied
    names = {spec: (spec.path.split("/")[-2], spec.hf_name.split(".")[-2]) for spec in matrices}
    valid = [name for pair in names.values() for name in pair] + [ALL]
    for name in settings.targets:
        if name not in valid:
            short_names = ", ".join(short for short, _ in names.values())
            raise UserError(
                f"lora.targets: {name} is not a matrix of this model{did_you_mean(name, valid)};"
                f" it has {short_names}, or give {ALL}"
            )
    if not settings.targets:
        raise UserError(f"lora.targets is empty; name matrices of the layers, or give {ALL}")
    selected = set(settings.targets)
    return tuple(spec for spec in matrices if ALL in selected or selected & set(names[spec]))


def table(config: ModelConfig, settings: Lora) -> tuple[TensorSpec, ...]:
    """Declare A and B of each target, as `tensor_table` declares the tensors of a model.

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
    specs, rank = [], settings.rank
    for spec in targets(config, settings):
        # A has the input axis of the weight and B its output axis, so both are sharded as the
        # weight is, and the axis of the rank is on every device.
        (layers, rows, columns), (_, row_axis, column_axis) = spec.shape, spec.axes
        path, name = spec.path.removesuffix("weight"), PREFIX + spec.hf_name.removesuffix(".weight")
        a, a_axes = (layers, rank, columns), ("layer", "rank", column_axis)
        b, b_axes = (layers, rows, rank), ("layer", row_axis, "rank")
        specs.append(TensorSpec(f"{path}lora_a", a, a_axes, "uniform", name + A, spec.kind))
        specs.append(TensorSpec(f"{path}lora_b", b, b_axes, "zeros", name + B, spec.kind))
    return tuple(specs)


def init_params(
    config: ModelConfig, settings: Lora, seed: int, mesh: jax.sharding.Mesh | None = None
) -> tree.Tree:
    """Return the adapter that every member starts from, float32.

    Each tensor is drawn whole from `rng.stream(seed, "lora", hf_name)`, so the values do not depend
    on the mesh.

    Args:
        config: the model.
        settings: rank and targets.
        seed: seed of the run.
        mesh: where the arrays live, sharded by their logical axes; None is the default device.

    Example:
        >>> config = ModelConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2
        ... )
        >>> q = init_params(config, Lora(rank=4), 0)["layers"]["attention"]["q"]
        >>> q["lora_a"].shape, bool((abs(q["lora_a"]) < 8**-0.5).all()), float(q["lora_b"].sum())
        ((2, 4, 8), True, 0.0)
    """
    return initial.draw(table(config, settings), seed, "lora", mesh)


def member_seed(seed: int, member: int) -> int:
    """Return the seed of a member that has an initialization of its own: of member 0 that of all.

    Example:
        >>> member_seed(3, 0), member_seed(3, 1) != member_seed(3, 2)
        (3, True)
    """
    return int(rng.stream_key_bits(seed, "lora", "member", member)[0]) if member else seed


def join(base: tree.Tree, adapter: tree.Tree, scale: float) -> tree.Tree:
    """Return the parameter dict of the base with an adapter in it, for `llama.forward`.

    The product B A is not formed.

    Args:
        base: the dict of `tensor_table`, any dtype.
        adapter: the dict of `table`.
        scale: s; B is multiplied by it.

    Example:
        >>> config = ModelConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2
        ... )
        >>> base = {"layers": {"mlp": {"up": {"weight": jax.numpy.zeros((2, 16, 8))}}}}
        >>> joined = join(base, init_params(config, Lora(targets=("up",)), 0), 2.0)
        >>> sorted(joined["layers"]["mlp"]["up"])
        ['lora_a', 'lora_b', 'weight']
    """
    # s goes into B, so that the model needs no setting of the adapter
    scaled = {
        path: scale * x if path.endswith("lora_b") else x
        for path, x in tree.flatten(adapter).items()
    }
    return tree.unflatten({**tree.flatten(base), **scaled})


def dense(base: tree.Tree, adapter: tree.Tree, scale: float) -> tree.Tree:
    """Return the base with s B A added to the adapted matrices, in float32.

    A quantized base is dense in the result: a member is what it is in training.

    For generation while training. Exports go through `merge/sources/lora.py`, which adds on the
    host in an order that it documents, so that files and memory give the same bits.

    Args:
        base: the dict of `tensor_table`, any dtype, or quantized.
        adapter: the dict of `table`.
        scale: s.

    Example:
        >>> base = {"layers": {"mlp": {"up": {"weight": jax.numpy.zeros((1, 2, 2))}}}}
        >>> low = {"lora_a": jax.numpy.ones((1, 1, 2)), "lora_b": jax.numpy.ones((1, 2, 1))}
        >>> params = dense(base, {"layers": {"mlp": {"up": low}}}, 3.0)
        >>> params["layers"]["mlp"]["up"]["weight"].tolist()
        [[[3.0, 3.0], [3.0, 3.0]]]
    """
    params, factors = tree.flatten(quantization.dense(base)), tree.flatten(adapter)
    for path in [path for path in factors if path.endswith("lora_a")]:
        target = path.removesuffix("lora_a") + "weight"
        # [L, out, rank] @ [L, rank, in]: all layers at once
        change = jax.numpy.matmul(factors[path.removesuffix("a") + "b"], factors[path])
        # float32 before the addition: in bfloat16 a small change would be lost to rounding.
        params[target] = params[target].astype("float32") + scale * change
    return tree.unflatten(params)
