"""Options of the compiler for the training step: presets, and what the user gives."""

from typing import Final, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_ordermerge import config
from jax_ordermerge import mesh as meshes
from jax_ordermerge.errors import UserError

Options = dict[str, str | bool]  # as jax takes them
# By default XLA may compute in float32 where the program says bfloat16. Where it does so depends on
# the mesh, and a member would no longer be the same alone and in a population.
EXACT: Final[Options] = {"xla_allow_excess_precision": False}


class Preset(NamedTuple):
    """Options that belong together.

    Attributes:
        platforms: of jax, on which they mean something.
        options: as XLA names them.
        source: where they are from.
    """

    platforms: tuple[str, ...]
    options: Options
    source: str


# MaxText's shipped recipes are no presets: libtpu 0.0.48 refuses some of their options.
PRESETS: Final = {
    # XLA counts state that is donated twice, takes the memory for full and makes collectives
    # synchronous. Compiled for h100:8 with members in one group: 24 of 25 were, one with the
    # option, with the same temporaries.
    "async_collectives": Preset(
        ("gpu", "cuda"),
        {"xla_gpu_memory_limit_slop_factor": "200"},
        "compiled for h100:8 (jax 0.11.2)",
    ),
    # By the compiler's estimate the step of 7B takes 56 % of the cycles on v5p:4x4x2: a windowed
    # product over 16 to 32 devices has 128 to 256 columns. No device has measured it.
    "no_windowed_einsum": Preset(
        ("tpu",),
        {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"},
        "DISABLE_COLLECTIVE_MATMUL of MaxText (benchmarks/xla_flags_library.py), compiled for"
        " v5p:4x4x2 and v6e:4x4 (jax 0.11.2, libtpu 0.0.48.1)",
    ),
}


def resolve(model: config.Model, mesh: Mesh) -> Options:
    """Return the options that the training step is compiled with.

    Args:
        model: `compiler_preset`, and `compiler_options`, which win over it.
        mesh: its devices may be described only.

    Raises:
        UserError: the preset is for other devices, or an option would change what members learn.

    Example:
        >>> from jax_ordermerge.mesh import make_mesh
        >>> resolve(
        ...     config.Model(compiler_options={"xla_llvm_disable_expensive_passes": True}),
        ...     make_mesh(),
        ... )
        {'xla_llvm_disable_expensive_passes': True, 'xla_allow_excess_precision': False}
    """
    check_preset(model, meshes.platform(mesh))
    options: Options = {}
    if model.compiler_preset is not None:
        options |= PRESETS[model.compiler_preset].options
    fixed = sorted(model.compiler_options.keys() & EXACT)
    if fixed:
        raise UserError(
            f"model.compiler_options: {fixed[0]} is set by the training, since a member alone would"
            " differ from itself in a population; leave it out"
        )
    # jax hands on text and flags; XLA reads numbers from text
    texts = {
        name: value if isinstance(value, bool) else str(value)
        for name, value in model.compiler_options.items()
    }
    return options | texts | EXACT


def check_preset(model: config.Model, platform: str) -> None:
    """Refuse a preset that is for devices of another platform of jax.

    Example:
        >>> check_preset(config.Model(compiler_preset="async_collectives"), "gpu")
    """
    if model.compiler_preset is None:
        return
    preset = PRESETS[model.compiler_preset]
    if platform not in preset.platforms:
        raise UserError(
            f"model.compiler_preset = {model.compiler_preset} is for {preset.platforms[0]}, the"
            f" devices are {platform}; leave it out"
        )


def check(model: config.Model, mesh: Mesh) -> None:
    """Refuse options that the installed compiler does not accept, before anything is written.

    Raises:
        UserError: the option is named.
    """
    options = resolve(model, mesh)
    if options == EXACT:
        return
    # the compiler reads its options before the program, so any program asks it
    scalar = jax.ShapeDtypeStruct((), "float32", sharding=NamedSharding(mesh, P()))
    try:
        jax.jit(lambda x: x).lower(scalar).compile(options)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
        raise UserError(
            f"model.compiler_options: the compiler of {meshes.platform(mesh)} (jax"
            f" {jax.__version__}) does not accept them: {reason}; leave the option out"
        ) from error
