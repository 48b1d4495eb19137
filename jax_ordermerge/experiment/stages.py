"""The stages of a run. `prepare` reads and checks every input before anything is written; each stage then fills its part."""

import dataclasses
import functools
import io
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from jax_ordermerge import config as schema
from jax_ordermerge import mesh as meshes
from jax_ordermerge import processes, tree
from jax_ordermerge.analysis import imbalance
from jax_ordermerge.arch import ModelConfig, tensor_table
from jax_ordermerge.checkpoint import convert
from jax_ordermerge.checkpoint.safetensors import Reader
from jax_ordermerge.commands import evaluating
from jax_ordermerge.config import PREFERENCES, Config
from jax_ordermerge.config.evaluation import LIKELIHOODS, OUTPUTS
from jax_ordermerge.config.merge import AUTO, Search, merge_name
from jax_ordermerge.data import order, pack, source
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import harness, scoring
from jax_ordermerge.experiment import (
    data_dependent,
    dpo_reference,
    export,
    sample_generations,
    search,
    stack_models,
    waves,
)
from jax_ordermerge.experiment.layout import model_names, read_json, write_bytes, write_json
from jax_ordermerge.merge import population
from jax_ordermerge.merge.methods import registry
from jax_ordermerge.model import kernels, llama, lora
from jax_ordermerge.report import formatting
from jax_ordermerge.report import run_report as reports
from jax_ordermerge.search.candidates import Population
from jax_ordermerge.train import batches, trackers
from jax_ordermerge.train import members as trained

Log = Callable[[str], None]
GREEDY_SOUP = "greedy_soup"  # the one method that needs to see how good its candidates are


@dataclasses.dataclass(frozen=True)
class RunContext:
    """What the stages share: the config, the hardware, the base model and the data.

    Attributes:
        base: directory of the base model.
        model: its architecture.
        splits: tokenized examples under `train` and, where the config asks for them, `validation` and `test`.
        say: where one-line messages go.
        saved: is called when something in the run directory is whole that would be missed.
    """

    config: Config
    mesh: Mesh
    base: Path
    model: ModelConfig
    tokenizer: Any
    splits: dict[str, Examples]
    log: Log
    saved: Callable[[], None] | None = None

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self.config.directory


def start(config: Config) -> None:
    """Start the processes and what must be set before any program is compiled; called again it changes nothing."""
    if config.compilation_cache:
        meshes.keep_programs(config.compilation_cache)
    if config.distributed.coordinator is None:
        meshes.provide_cpu_devices(config.mesh.sizes.values())
    processes.start_distributed(**config.distributed.model_dump())


def prepare(config: Config, log: Log) -> RunContext:
    """Start the processes, make the mesh, read model and data, and check all of it against each other.

    Raises:
        UserError: the first thing that does not fit. Nothing has been written.
    """
    for spec in config.merge.methods:
        if spec.method == GREEDY_SOUP:
            if not config.data.validation_examples:
                raise UserError(
                    "merge method greedy_soup chooses on validation data: set data.validation_examples"
                )
            if spec.weights or spec.parameters:
                raise UserError("merge method greedy_soup takes neither weights nor parameters")
            continue
        registry.check(spec.method, spec.parameters)
    trackers.check(config.tracking)
    start(config)
    processes.check_alike(
        {
            name: value
            for name, value in schema.to_dict(config).items()
            if name not in ("distributed", "compilation_cache")
        }
    )
    mesh = meshes.make_mesh(**config.mesh.model_dump())
    members, groups = config.population.members, mesh.shape["order"]
    if members % groups:
        raise UserError(
            f"population.members = {members} is not a multiple of the order axis ({groups} device groups); change one"
        )
    if config.population.wave and config.population.wave % groups:
        raise UserError(
            f"population.wave = {config.population.wave} is not a multiple of the order axis ({groups} device groups); change one"
        )
    base = convert.resolve(config.model.base)
    model = convert.load_config(base, config.model.ignore_config_keys)
    if config.lora is not None:
        lora.targets(model, config.lora)
    if config.model.init == "pretrained":
        convert.check_tensors(Reader(base), model)
    if config.data.max_length > model.max_position_embeddings:
        raise UserError(
            f"data.max_length = {config.data.max_length} is above the {model.max_position_embeddings} positions of {config.model.base}"
        )
    tokenizer = source.load_tokenizer(base)
    pairs = config.objective.kind == "dpo"
    data = config.data.model_copy(update={"format": "preference"}) if pairs else config.data
    splits = source.load_splits(data, tokenizer, seed=config.seed)
    if splits["train"].rejected is not None and not pairs:
        raise UserError(
            f"data.train = {config.data.train} holds preference pairs, objective.kind = sft learns responses; set it to dpo"
        )
    processes.check_alike({f"data.{name}": examples.digest for name, examples in splits.items()})
    if len(tokenizer) > model.vocab_size:
        raise UserError(
            f"{base}: the tokenizer has {len(tokenizer)} tokens, the model {model.vocab_size}"
        )
    if config.merge.auto is not None:
        search.check(config, splits, config.merge.auto, model)
    return RunContext(config, mesh, base, model, tokenizer, splits, log)


def with_validation(ctx: RunContext, file: Path) -> RunContext:
    """Return the workshop with validation examples from a file of their own, by the rules of the config's data."""
    data = ctx.config.data.model_copy(update={"test": str(file), "test_limit": None})
    examples = source.load_examples(data, ctx.tokenizer, "test", seed=ctx.config.seed)
    assert examples is not None
    return dataclasses.replace(ctx, splits=ctx.splits | {"validation": examples})


def add_reference_logprobs(ctx: RunContext) -> RunContext:
    """Give preference pairs the log-probabilities of their responses under the base: measured once, kept in the run directory.

    Raises:
        UserError: what is kept there is of other pairs or of another base.
    """
    if ctx.config.objective.kind != "dpo":
        return ctx
    of = f"{dpo_reference.base_digest(ctx.config, ctx.base)} {ctx.config.base_dtype} {ctx.config.model.compute_dtype}"
    base = functools.cache(
        lambda: base_params(ctx, ctx.config.base_dtype)
    )  # as training holds it, so that its first margins are 0

    def measured(name: str) -> np.ndarray:
        examples = ctx.splits[name]
        ctx.log(f"reference: the base on {len(examples)} pairs of {name}")
        sums, _ = _sums(
            ctx, base(), examples, dpo_reference.Progress(ctx.log, name, 2 * len(examples))
        )
        return -sums.astype(np.float32)

    return dataclasses.replace(
        ctx,
        splits={
            name: dpo_reference.with_reference(
                examples,
                ctx.directory / "reference" / f"{name}.npz",
                of,
                functools.partial(measured, name),
            )
            for name, examples in ctx.splits.items()
        },
    )


# ------------------------------------------------------------------------------------------------------------------------ training


def train(ctx: RunContext) -> None:
    """Fine-tune the members; see `waves.py` and `train/loop.py`."""
    described = {name: _described(examples) for name, examples in ctx.splits.items()}
    if ctx.config.data.packing != "none":
        described["train"]["packing"] = batches.make_plan(ctx.config, ctx.splits["train"]).packing
    write_json(ctx.directory / "data.json", described)
    for name, one in described.items():
        ctx.log(
            f"  {name}: {one['source']}, "
            + ", ".join(f"{count} {what}" for what, count in one["counts"].items())
        )
        if "packing" in one:
            ctx.log(
                "  {kind}: up to {examples} examples in a row of {length} tokens, {filled:.1%} no padding".format(
                    **one["packing"]
                )
            )
    if ctx.config.lora is not None:
        low, full = (
            sum(math.prod(spec.shape) for spec in table)
            for table in (lora.table(ctx.model, ctx.config.lora), tensor_table(ctx.model))
        )
        ctx.log(
            f"  lora: {low:,} parameters a member are trained, {full:,} of the base are held once in {ctx.config.base_dtype}"
        )
    base = functools.partial(base_params, ctx, ctx.config.base_dtype)
    sample = sample_generations.sampler(ctx.config, ctx.model, ctx.tokenizer, ctx.mesh, ctx.splits)
    held_out = ctx.splits.get("validation")
    waves.train(
        ctx.config,
        ctx.model,
        base,
        ctx.splits["train"],
        ctx.mesh,
        ctx.log,
        held_out=held_out,
        sample=sample,
        saved=ctx.saved,
    )


def look(ctx: RunContext, count: int, profile: Path | None) -> None:
    """Take the first steps of the training, say how fast they are, and leave nothing but the profile asked for."""
    base = functools.partial(base_params, ctx, ctx.config.base_dtype)
    ctx.log(
        str(waves.look(ctx.config, ctx.model, base, ctx.splits["train"], ctx.mesh, count, profile))
    )


def _described(examples: Examples) -> dict[str, Any]:
    return {
        "source": examples.sources.get("data", ""),
        "sources": dict(examples.sources),
        "digest": examples.digest,
        "examples": len(examples),
        "tokens": sum(int(part.lengths.sum()) for part in examples.parts),
        "counts": dict(examples.counts),
    }


# -------------------------------------------------------------------------------------------------------------------------- models


def base_params(ctx: RunContext, dtype: str) -> tree.Tree:
    """Return the base model, from its files or drawn at random as the config says."""
    if ctx.config.model.init == "random":
        params = llama.init_params(ctx.model, ctx.config.seed, ctx.mesh)
        return jax.jit(lambda p: jax.tree.map(lambda x: x.astype(dtype), p))(params)
    return convert.load_params(
        ctx.base, ctx.mesh, dtype=dtype, ignore=ctx.config.model.ignore_config_keys
    )[1]


def models(ctx: RunContext, names: list[str]) -> Iterator[tuple[str, tree.Tree]]:
    """Yield `(name, parameters)` of the models asked for, in the dtype that is merged and served, merges as they were exported."""
    kinds, dtype = model_names(ctx.config), ctx.config.merge.dtype
    for name in names:
        if kinds[name] == "base":
            yield name, base_params(ctx, dtype)
        elif kinds[name] == "member":
            number = int(name.removeprefix("member_"))
            home = waves.home(ctx.config, number)
            yield (
                name,
                trained.restore_member(
                    ctx.config, ctx.model, ctx.mesh, number, dtype=dtype, directory=home
                ),
            )
        else:
            yield (
                name,
                convert.load_params(ctx.directory / "merged" / name, ctx.mesh, dtype=dtype)[1],
            )


# ------------------------------------------------------------------------------------------------------------------------- merging


def merge(ctx: RunContext) -> None:
    """Merge the population in device memory by every method of the config, export each, and say what it did."""
    dtype, stock = ctx.config.merge.dtype, load_population(ctx)
    members, base = stock.members, stock.base
    done = {
        one["name"]: one
        for one in (read_json(ctx.directory / "merge.json") or {"merges": []})["merges"]
    }
    for spec in ctx.config.merge.methods:
        name = merge_name(spec, ctx.config.seed)
        target = ctx.directory / "merged" / name
        if name in done and (target / "config.json").is_file():
            continue
        seed = ctx.config.seed if spec.seed is None else spec.seed
        settings: dict[str, Any] = {
            "method": spec.method,
            "seed": seed,
            "weights": spec.weights,
            "parameters": spec.parameters,
        }
        if spec.method == GREEDY_SOUP:
            merged, settings["parameters"] = data_dependent.merge_greedily(
                ctx,
                members,
                lambda params: _token_mean(*_losses(ctx, params, ctx.splits["validation"]))[0],
            )
        elif spec.method == "fisher":
            merged = data_dependent.fisher(ctx, settings)
        else:
            merged = population.merge(members, base, ctx.model, dtype=dtype, **settings)
        given = {
            "weights": None if spec.weights is None else list(spec.weights),
            "parameters": dict(spec.parameters),
        }
        export.export(ctx, name, merged, {"merge_method": spec.method, **given, "seed": seed})
        done[name] = {
            "name": name,
            **settings,
            "diagnostics": _diagnostics(ctx, name, stock, merged, settings),
        }
        write_json(ctx.directory / "merge.json", {"dtype": dtype, "merges": list(done.values())})
        del merged  # a search has the memory for one
    if ctx.config.merge.auto is not None and not (
        AUTO in done and (ctx.directory / "merged" / AUTO / "config.json").is_file()
    ):
        settings, merged = search_merge(
            ctx,
            ctx.config.merge.auto,
            ctx.directory / "search",
            stock,
            ctx.directory / "merged" / AUTO,
        )
        done[AUTO] = {
            "name": AUTO,
            **settings,
            "diagnostics": _diagnostics(ctx, AUTO, stock, merged, settings),
        }
        write_json(ctx.directory / "merge.json", {"dtype": dtype, "merges": list(done.values())})


def search_merge(
    ctx: RunContext,
    space: Search,
    directory: Path,
    stock: Population | None = None,
    target: Path | None = None,
) -> tuple[dict[str, Any], tree.Tree]:
    """Choose a merge, export it, and return what it is and its parameters.

    Args:
        w: the workshop, with a trained population.
        space: what to choose among.
        directory: for the journal and the results.
        stock: the population, read from the checkpoints by default.
        target: for the model, by default none is written.
    """
    stock = stock or load_population(ctx)
    found = search.search_space(ctx, stock, space, functools.partial(_losses, ctx), directory)
    merged = stock.build(found.winning_candidate)
    if target is not None:
        export.export(ctx, AUTO, merged, search.recipe(found), search.story(found), target)
    return search.settings(found.winning_candidate), merged


def load_population(ctx: RunContext) -> Population:
    """Read the trained population and its base into device memory, in the dtype that is merged and served."""
    dtype = ctx.config.merge.dtype
    return Population(
        ctx.model,
        waves.restore(ctx.config, ctx.model, ctx.mesh, dtype=dtype),
        base_params(ctx, dtype),
        dtype,
    )


def _diagnostics(
    ctx: RunContext, name: str, stock: Population, merged: tree.Tree, settings: dict[str, Any]
) -> dict[str, Any]:
    # of a chosen merge only task vectors are told: its lambda is no parameter of a method
    given = settings if name != AUTO else {"method": AUTO, "seed": settings["seed"]}
    found = population.measure_diagnostics(stock.members, stock.base, merged, ctx.model, **given)
    total = found["total"]
    # both are None where no member left the base
    said = ", ".join(
        f"{key} {total[key]:.3f}" for key in ("norm_ratio", "lambda_eff") if total[key] is not None
    )
    ctx.log(f"  {name}: {said or 'equal to the base'} -> {ctx.directory / 'merged' / name}")
    return found


# ------------------------------------------------------------------------------------------------------------------------ analysis


def analyze(ctx: RunContext) -> None:
    """Measure the final loss of every training sample under base, members and merges; regress it on the positions."""
    file, names = ctx.directory / "losses" / "final.npz", list(model_names(ctx.config))
    known = _known_losses(file, ctx.splits["train"])
    for name, params in models(ctx, [name for name in names if name not in known]):
        sums, tokens = _losses(ctx, params, ctx.splits["train"])
        known[name] = (sums / tokens).astype(np.float32)
        ctx.log(
            f"  {name}: {sums.sum() / tokens.sum():.4f} {formatting.loss_unit(ctx.config.objective.model_dump())} on the training samples"
        )
        _save_losses(file, known, ctx.splits["train"], tokens)
    kinds = model_names(ctx.config)
    members = [known[name] for name in names if kinds[name] == "member"]
    orders = batches.draw_orders(
        ctx.config, ctx.splits["train"].lengths, range(ctx.config.population.members)
    )
    found = imbalance.analyze(
        np.stack(members),
        _positions(ctx, orders),
        {name: known[name] for name in names if kinds[name] == "merge"},
        base_losses=known["base"],
        warmup_fraction=_warmup_fraction(ctx, orders),
        bins=ctx.config.analysis.bins,
        bootstrap=ctx.config.analysis.bootstrap,
        permutations=ctx.config.analysis.permutations,
        seed=ctx.config.seed,
    )
    write_json(ctx.directory / "analysis.json", found)


def _losses(
    ctx: RunContext,
    params: tree.Tree,
    examples: Examples,
    members: Literal["each", "ensemble"] = "each",
) -> tuple[np.ndarray, np.ndarray]:
    """Return summed losses and numbers of response tokens, float64[n] each, of one model; of pairs their losses and ones."""
    return _counted(ctx, examples, *_sums(ctx, params, examples, members=members))


def _counted(
    ctx: RunContext, examples: Examples, sums: np.ndarray, tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    if examples.rejected is None:
        return sums, tokens
    return dpo_reference.losses(ctx.config.objective, examples, sums, tokens).astype(
        np.float64
    ), np.ones(len(examples))


def _sums(
    ctx: RunContext,
    params: tree.Tree,
    examples: Examples,
    tell: Callable[[int], None] | None = None,
    members: Literal["each", "ensemble"] = "each",
) -> tuple[np.ndarray, np.ndarray]:
    """Return summed token losses and numbers of response tokens, float64[n] each, of pairs [n, 2]."""
    flat, settings, dtype = examples.sequences, ctx.config, ctx.config.model.compute_dtype
    lengths = pack.bucket_lengths(flat.longest, settings.data.buckets)
    sums, tokens = scoring.losses(
        ctx.model,
        params,
        flat,
        batch=settings.analysis.batch,
        lengths=lengths,
        dtype=dtype,
        mesh=ctx.mesh,
        kernel=kernels.choose(settings.model.attention, ctx.model, ctx.mesh, dtype=dtype),
        members=members,
        tell=tell,
    )
    shape = (-1,) if examples.rejected is None else (-1, 2)
    return sums[0].astype(np.float64).reshape(shape), tokens.astype(np.float64).reshape(shape)


def _known_losses(file: Path, examples: Examples) -> dict[str, np.ndarray]:
    if not file.is_file():
        return {}
    with np.load(file) as saved:
        if not np.array_equal(saved["ids"], examples.ids):
            raise UserError(f"{file} was measured on other samples; remove it to measure again")
        return dict(zip(saved["names"].tolist(), saved["losses"], strict=True))


def _save_losses(
    file: Path, known: dict[str, np.ndarray], examples: Examples, tokens: np.ndarray
) -> None:
    whole = io.BytesIO()
    np.savez(
        whole,
        names=np.array(list(known)),
        ids=examples.ids,
        losses=np.stack(list(known.values())),
        tokens=tokens,
    )
    write_bytes(file, whole.getvalue())


def _positions(ctx: RunContext, orders: np.ndarray) -> np.ndarray:
    """Return float64[M, E, n] in [0, 1]; see `order.positions`."""
    return np.stack(
        [[order.positions(epoch, len(ctx.splits["train"])) for epoch in own] for own in orders]
    )


def _warmup_fraction(ctx: RunContext, orders: np.ndarray) -> float:
    warmup = ctx.config.training.warmup
    return warmup if warmup < 1 else min(1.0, warmup / (orders.shape[1] * orders.shape[2]))


# ---------------------------------------------------------------------------------------------------------------------- evaluation


def evaluate(ctx: RunContext) -> None:
    """Measure every model on held-out data: loss, perplexity and the tasks of the config."""
    kinds, rows = model_names(ctx.config), _evaluated(ctx)
    losses = functools.partial(_losses, ctx)
    more = search.unmerged(ctx, losses, functools.partial(base_params, ctx, ctx.config.base_dtype))
    search.measure_controls(ctx, functools.partial(load_population, ctx), losses, rows, more)
    write_json(
        ctx.directory / "evaluations.json",
        {"split": "test", "models": [rows[name]["summary"] for name in kinds]},
    )


def _evaluated(ctx: RunContext) -> dict[str, Any]:
    """Return evaluations/{name}.json of every model, measured now where it is not there. No model is left in memory."""
    kinds = model_names(ctx.config)
    rows = {name: read_json(ctx.directory / "evaluations" / f"{name}.json") for name in kinds}
    for name, params, generate in _answering(
        ctx, [name for name, row in rows.items() if row is None]
    ):
        rows[name] = _evaluate_one(ctx, name, kinds[name], params, generate)
        write_json(ctx.directory / "evaluations" / f"{name}.json", rows[name])
        shown = rows[name]["summary"]
        said = [
            f"{task} {100 * one['accuracy']:.1f} % +- {100 * one['se']:.1f}"
            for task, one in shown["tasks"].items()
        ]
        loss = [] if shown["loss"] is None else [f"loss {shown['loss']:.4f}"]
        ctx.log(f"  {name}: " + ", ".join([*loss, *said]))
    return rows


def _answering(
    ctx: RunContext, names: list[str]
) -> Iterator[tuple[str, tree.Tree, harness.Generate | None]]:
    """Yield models, each with what lets it write: in one program with the others that fit beside it."""
    dtype, batch, compute = (
        ctx.config.merge.dtype,
        ctx.config.evaluation.batch,
        ctx.config.model.compute_dtype,
    )
    if all(task.kind in LIKELIHOODS for task in ctx.config.evaluation.tasks):  # nobody writes
        yield from ((name, params, None) for name, params in models(ctx, names))
        return
    size = stack_models.fitting(ctx.config.population.members, ctx.model, ctx.mesh, dtype)
    for start in range(0, len(names), size):
        some = names[start : start + size]
        population = stack_models.stack(
            (params for _, params in models(ctx, some)), len(some), ctx.model, ctx.mesh, dtype
        )
        writers = harness.generators(
            ctx.model, population, ctx.tokenizer, batch=batch, dtype=compute, mesh=ctx.mesh
        )
        for at, name in enumerate(some):
            yield name, stack_models.take(population, at, ctx.model, ctx.mesh, dtype), writers[at]


def _evaluate_one(
    ctx: RunContext, name: str, kind: str, params: tree.Tree, generate: harness.Generate | None
) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "name": name,
        "kind": kind,
        "loss": None,
        "loss_se": None,
        "perplexity": None,
        "tokens": 0,
    }
    result: dict[str, Any] = {"ids": [], "losses": []}
    test, held = ctx.splits.get("test"), ctx.splits.get("validation")
    tasks: dict[str, Any] = {}
    items: dict[str, Any] = {}
    texts: dict[str, Any] = {}
    text_items: dict[str, Any] = {}
    if test is not None and ctx.config.evaluation.loss:
        measured = _sums(ctx, params, test)
        sums, tokens = _counted(ctx, test, *measured)
        mean, error = _token_mean(sums, tokens)
        summary |= {"loss": mean, "loss_se": error}
        if test.rejected is None:
            summary |= {"perplexity": math.exp(min(mean, 700.0)), "tokens": int(tokens.sum())}
        elif (
            kind != "base"
        ):  # it is the reference: there is no reward by which it could prefer anything
            tasks[PREFERENCES], items[PREFERENCES] = dpo_reference.choices(test, measured[0])
        result = {
            "ids": test.ids.tolist(),
            "losses": (sums / tokens).tolist(),
            "tokens": tokens.tolist(),
        }
    validation = None if held is None else _token_mean(*_losses(ctx, params, held))[0]
    subject = evaluating.subject(ctx.config, ctx.model, params, ctx.tokenizer, ctx.mesh, generate)
    for task in ctx.config.evaluation.tasks:
        found, rows = harness.run(task, subject, ctx.config.data, test=test, seed=ctx.config.seed)
        if task.kind == OUTPUTS:
            write_json(
                ctx.directory / "outputs" / task.name / f"{name}.json",
                evaluating.signed(rows, f"{ctx.config.name}/{name}"),
            )
        elif task.kind == "perplexity":
            texts[task.name], text_items[task.name] = found, rows
        else:
            tasks[task.name], items[task.name] = found, rows
    summary |= {"validation_loss": validation, "tasks": tasks, "texts": texts}
    return {"summary": summary, **result, "tasks": items, "texts": text_items}


def _token_mean(sums: np.ndarray, tokens: np.ndarray) -> tuple[float, float]:
    """Return the mean loss a token and its standard error, with whole examples as the sampling unit (ratio estimator)."""
    mean, n = sums.sum() / tokens.sum(), len(sums)
    error = math.sqrt(((sums - mean * tokens) ** 2).sum() * n / max(n - 1, 1)) / tokens.sum()
    return float(mean), float(error)


# -------------------------------------------------------------------------------------------------------------------------- report


def report(ctx: RunContext) -> None:
    """Write report.html and report.md from the run directory."""
    if jax.process_index() == 0:
        reports.write(ctx.directory)
