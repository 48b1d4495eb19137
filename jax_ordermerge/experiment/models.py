"""The models of a run as parameters on its mesh: base, members, merges, the population."""

import functools
from collections.abc import Iterable, Iterator, Sequence

import jax
from jax.sharding import Mesh

from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.checkpoint import convert
from jax_ordermerge.config import Config
from jax_ordermerge.config.merge import CheckpointWeights, Trajectory
from jax_ordermerge.data.tokenizers import Tokenizer
from jax_ordermerge.evaluate import generation, scoring
from jax_ordermerge.evaluate.eval_model import EvalModel, Pair, TextGenerator
from jax_ordermerge.experiment import build_merges, waves
from jax_ordermerge.experiment.context import RunContext
from jax_ordermerge.layout import member_number
from jax_ordermerge.model import kernels, llama
from jax_ordermerge.search.candidates import Population
from jax_ordermerge.train import frozen, members
from jax_ordermerge.train.frozen import Storage
from jax_ordermerge.tree import Tree


def base_params(ctx: RunContext, dtype: str) -> Tree:
    """Return the base model, read from its files or drawn at random as `model.init` says."""
    if ctx.config.model.init == "random":
        # drawn in float32 and rounded: the same model in every dtype, up to rounding
        params = llama.init_params(ctx.model, ctx.config.seed, ctx.mesh)
        return jax.jit(lambda p: jax.tree.map(lambda x: x.astype(dtype), p))(params)
    # Read anew for each use, and not held: the base is as large as a member, and mostly not needed.
    ignore = ctx.config.model.ignore_config_keys
    return convert.load_params(ctx.base_dir, ctx.mesh, dtype=dtype, ignore=ignore)[1]


def training_base(ctx: RunContext) -> Tree:
    """Return the base as the training has it: what members start from, or their frozen base."""
    storage = Storage.of(ctx.training)
    if storage.format is None:
        return base_params(ctx, storage.dtype)
    ignore = ctx.config.model.ignore_config_keys
    return frozen.load(ctx.base_dir, storage, ctx.mesh, ignore)


def load_models(ctx: RunContext, names: Iterable[str]) -> Iterator[tuple[str, Tree]]:
    """Yield `(name, parameters)` in the dtype that is merged and served.

    The models are loaded one at a time, when the caller asks for the next.
    """
    dtype = ctx.export_dtype
    population = functools.cache(lambda: load_population(ctx))
    for name in names:
        number = member_number(name)
        if name == "base":
            params = base_params(ctx, dtype)
        elif number is not None:
            member = ctx.members[number]
            # Where the population was trained in waves, each wave has checkpoints of its own.
            layout = waves.member_layout(ctx.training_layout, member)
            params = members.restore_member(
                ctx.training, ctx.model, ctx.mesh, layout, member, dtype=dtype
            )
        elif not build_merges.exports(ctx.config, ctx.population):
            params = build_merges.rebuild(ctx, population(), name)
        else:
            # from the exported files, so that every later number is about what users load
            params = convert.load_params(ctx.layout.merged(name), ctx.mesh, dtype=dtype)[1]
        yield name, params


def load_population(ctx: RunContext) -> Population:
    """Return the trained members and their base in the dtype that is merged and served."""
    dtype = ctx.export_dtype
    trained, base = waves.restore(ctx, dtype=dtype), base_params(ctx, dtype)

    # the last one asked for stays in memory: merges of the same checkpoints follow each other
    @functools.lru_cache(maxsize=1)
    def averaged(last: int, weights: CheckpointWeights) -> Population:
        # before the new one is made: two beside the trained members may not fit
        averaged.cache_clear()
        settings = Trajectory(last=last, weights=weights)
        members = waves.restore_average(ctx, settings, dtype=dtype)
        return Population(ctx.model, members, base, dtype)

    return Population(ctx.model, trained, base, dtype, averaged)


def make_eval_model(
    config: Config,
    model: ModelConfig,
    params: Tree,
    tokenizer: Tokenizer,
    mesh: Mesh,
    *,
    name: str,
    generate: TextGenerator | None = None,
) -> EvalModel:
    """Return a model as evaluation tasks see it.

    Args:
        config: its `evaluation.batch` and section `model` say how the model is computed.
        model: its architecture.
        params: its parameters, on the mesh.
        tokenizer: of the model.
        mesh: where the parameters are.
        name: of the model, for messages.
        generate: writes answers; by default `generation.make_generator` makes it from `params`.
    """
    batch, dtype = config.evaluation.batch, config.model.compute_dtype
    kernel = kernels.choose(config.model.attention, model, mesh, dtype=dtype)

    def score(pairs: Sequence[Pair]) -> tuple[list[float], list[bool]]:
        scores = scoring.score(
            model, params, pairs, batch=batch, dtype=dtype, mesh=mesh, kernel=kernel
        )
        return scores.logps[0].tolist(), scores.greedy[0].tolist()

    # A generator compiled for this model alone; of several models on the devices, the caller brings
    # one.
    generate = generate or generation.make_generator(
        model, params, tokenizer, batch=batch, dtype=dtype
    )
    return EvalModel(tokenizer, generate, score, model.context_length, name)
