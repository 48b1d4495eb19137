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
from jax_ordermerge.search.candidates import Stock
from jax_ordermerge.train import batches, trackers
from jax_ordermerge.train import members as trained

Say = Callable[[str], None]
GREEDY_SOUP = "greedy_soup"  # the one method that needs to see how good its candidates are


@dataclasses.dataclass(frozen=True)
class Workshop:
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
    say: Say
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


def prepare(config: Config, say: Say) -> Workshop:
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
    return Workshop(config, mesh, base, model, tokenizer, splits, say)


def with_validation(w: Workshop, file: Path) -> Workshop:
    """Return the workshop with validation examples from a file of their own, by the rules of the config's data."""
    data = w.config.data.model_copy(update={"test": str(file), "test_limit": None})
    examples = source.load_examples(data, w.tokenizer, "test", seed=w.config.seed)
    assert examples is not None
    return dataclasses.replace(w, splits=w.splits | {"validation": examples})


def refer(w: Workshop) -> Workshop:
    """Give preference pairs the log-probabilities of their responses under the base: measured once, kept in the run directory.

    Raises:
        UserError: what is kept there is of other pairs or of another base.
    """
    if w.config.objective.kind != "dpo":
        return w
    of = f"{dpo_reference.base_digest(w.config, w.base)} {w.config.base_dtype} {w.config.model.compute_dtype}"
    base = functools.cache(
        lambda: base_params(w, w.config.base_dtype)
    )  # as training holds it, so that its first margins are 0

    def measured(name: str) -> np.ndarray:
        examples = w.splits[name]
        w.say(f"reference: the base on {len(examples)} pairs of {name}")
        sums, _ = _sums(w, base(), examples, dpo_reference.Progress(w.say, name, 2 * len(examples)))
        return -sums.astype(np.float32)

    return dataclasses.replace(
        w,
        splits={
            name: dpo_reference.with_reference(
                examples,
                w.directory / "reference" / f"{name}.npz",
                of,
                functools.partial(measured, name),
            )
            for name, examples in w.splits.items()
        },
    )


# ------------------------------------------------------------------------------------------------------------------------ training


def train(w: Workshop) -> None:
    """Fine-tune the members; see `waves.py` and `train/loop.py`."""
    described = {name: _described(examples) for name, examples in w.splits.items()}
    if w.config.data.packing != "none":
        described["train"]["packing"] = batches.make_plan(w.config, w.splits["train"]).packing
    write_json(w.directory / "data.json", described)
    for name, one in described.items():
        w.say(
            f"  {name}: {one['source']}, "
            + ", ".join(f"{count} {what}" for what, count in one["counts"].items())
        )
        if "packing" in one:
            w.say(
                "  {kind}: up to {examples} examples in a row of {length} tokens, {filled:.1%} no padding".format(
                    **one["packing"]
                )
            )
    if w.config.lora is not None:
        low, full = (
            sum(math.prod(spec.shape) for spec in table)
            for table in (lora.table(w.model, w.config.lora), tensor_table(w.model))
        )
        w.say(
            f"  lora: {low:,} parameters a member are trained, {full:,} of the base are held once in {w.config.base_dtype}"
        )
    base = functools.partial(base_params, w, w.config.base_dtype)
    sample = sample_generations.sampler(w.config, w.model, w.tokenizer, w.mesh, w.splits)
    held_out = w.splits.get("validation")
    waves.train(
        w.config,
        w.model,
        base,
        w.splits["train"],
        w.mesh,
        w.say,
        held_out=held_out,
        sample=sample,
        saved=w.saved,
    )


def look(w: Workshop, count: int, profile: Path | None) -> None:
    """Take the first steps of the training, say how fast they are, and leave nothing but the profile asked for."""
    base = functools.partial(base_params, w, w.config.base_dtype)
    w.say(str(waves.look(w.config, w.model, base, w.splits["train"], w.mesh, count, profile)))


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


def base_params(w: Workshop, dtype: str) -> tree.Tree:
    """Return the base model, from its files or drawn at random as the config says."""
    if w.config.model.init == "random":
        params = llama.init_params(w.model, w.config.seed, w.mesh)
        return jax.jit(lambda p: jax.tree.map(lambda x: x.astype(dtype), p))(params)
    return convert.load_params(
        w.base, w.mesh, dtype=dtype, ignore=w.config.model.ignore_config_keys
    )[1]


def models(w: Workshop, names: list[str]) -> Iterator[tuple[str, tree.Tree]]:
    """Yield `(name, parameters)` of the models asked for, in the dtype that is merged and served, merges as they were exported."""
    kinds, dtype = model_names(w.config), w.config.merge.dtype
    for name in names:
        if kinds[name] == "base":
            yield name, base_params(w, dtype)
        elif kinds[name] == "member":
            number = int(name.removeprefix("member_"))
            home = waves.home(w.config, number)
            yield (
                name,
                trained.restore_member(
                    w.config, w.model, w.mesh, number, dtype=dtype, directory=home
                ),
            )
        else:
            yield name, convert.load_params(w.directory / "merged" / name, w.mesh, dtype=dtype)[1]


# ------------------------------------------------------------------------------------------------------------------------- merging


def merge(w: Workshop) -> None:
    """Merge the population in device memory by every method of the config, export each, and say what it did."""
    dtype, stock = w.config.merge.dtype, stock_of(w)
    members, base = stock.members, stock.base
    done = {
        one["name"]: one
        for one in (read_json(w.directory / "merge.json") or {"merges": []})["merges"]
    }
    for spec in w.config.merge.methods:
        name = merge_name(spec, w.config.seed)
        target = w.directory / "merged" / name
        if name in done and (target / "config.json").is_file():
            continue
        seed = w.config.seed if spec.seed is None else spec.seed
        settings: dict[str, Any] = {
            "method": spec.method,
            "seed": seed,
            "weights": spec.weights,
            "parameters": spec.parameters,
        }
        if spec.method == GREEDY_SOUP:
            merged, settings["parameters"] = data_dependent.merge_greedily(
                w,
                members,
                lambda params: _token_mean(*_losses(w, params, w.splits["validation"]))[0],
            )
        elif spec.method == "fisher":
            merged = data_dependent.fisher(w, settings)
        else:
            merged = population.merge(members, base, w.model, dtype=dtype, **settings)
        given = {
            "weights": None if spec.weights is None else list(spec.weights),
            "parameters": dict(spec.parameters),
        }
        export.export(w, name, merged, {"merge_method": spec.method, **given, "seed": seed})
        done[name] = {
            "name": name,
            **settings,
            "diagnostics": _diagnostics(w, name, stock, merged, settings),
        }
        write_json(w.directory / "merge.json", {"dtype": dtype, "merges": list(done.values())})
        del merged  # a search has the memory for one
    if w.config.merge.auto is not None and not (
        AUTO in done and (w.directory / "merged" / AUTO / "config.json").is_file()
    ):
        settings, merged = search_merge(
            w, w.config.merge.auto, w.directory / "search", stock, w.directory / "merged" / AUTO
        )
        done[AUTO] = {
            "name": AUTO,
            **settings,
            "diagnostics": _diagnostics(w, AUTO, stock, merged, settings),
        }
        write_json(w.directory / "merge.json", {"dtype": dtype, "merges": list(done.values())})


def search_merge(
    w: Workshop,
    space: Search,
    directory: Path,
    stock: Stock | None = None,
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
    stock = stock or stock_of(w)
    found = search.search_space(w, stock, space, functools.partial(_losses, w), directory)
    merged = stock.build(found.winner)
    if target is not None:
        export.export(w, AUTO, merged, search.recipe(found), search.story(found), target)
    return search.settings(found.winner), merged


def stock_of(w: Workshop) -> Stock:
    """Read the trained population and its base into device memory, in the dtype that is merged and served."""
    dtype = w.config.merge.dtype
    return Stock(
        w.model, waves.restore(w.config, w.model, w.mesh, dtype=dtype), base_params(w, dtype), dtype
    )


def _diagnostics(
    w: Workshop, name: str, stock: Stock, merged: tree.Tree, settings: dict[str, Any]
) -> dict[str, Any]:
    # of a chosen merge only task vectors are told: its lambda is no parameter of a method
    given = settings if name != AUTO else {"method": AUTO, "seed": settings["seed"]}
    found = population.measure_diagnostics(stock.members, stock.base, merged, w.model, **given)
    total = found["total"]
    # both are None where no member left the base
    said = ", ".join(
        f"{key} {total[key]:.3f}" for key in ("norm_ratio", "lambda_eff") if total[key] is not None
    )
    w.say(f"  {name}: {said or 'equal to the base'} -> {w.directory / 'merged' / name}")
    return found


# ------------------------------------------------------------------------------------------------------------------------ analysis


def analyze(w: Workshop) -> None:
    """Measure the final loss of every training sample under base, members and merges; regress it on the positions."""
    file, names = w.directory / "losses" / "final.npz", list(model_names(w.config))
    known = _known_losses(file, w.splits["train"])
    for name, params in models(w, [name for name in names if name not in known]):
        sums, tokens = _losses(w, params, w.splits["train"])
        known[name] = (sums / tokens).astype(np.float32)
        w.say(
            f"  {name}: {sums.sum() / tokens.sum():.4f} {formatting.loss_unit(w.config.objective.model_dump())} on the training samples"
        )
        _save_losses(file, known, w.splits["train"], tokens)
    kinds = model_names(w.config)
    members = [known[name] for name in names if kinds[name] == "member"]
    orders = batches.draw_orders(
        w.config, w.splits["train"].lengths, range(w.config.population.members)
    )
    found = imbalance.analyze(
        np.stack(members),
        _positions(w, orders),
        {name: known[name] for name in names if kinds[name] == "merge"},
        base_losses=known["base"],
        warmup_fraction=_warmup_fraction(w, orders),
        bins=w.config.analysis.bins,
        bootstrap=w.config.analysis.bootstrap,
        permutations=w.config.analysis.permutations,
        seed=w.config.seed,
    )
    write_json(w.directory / "analysis.json", found)


def _losses(
    w: Workshop,
    params: tree.Tree,
    examples: Examples,
    members: Literal["each", "ensemble"] = "each",
) -> tuple[np.ndarray, np.ndarray]:
    """Return summed losses and numbers of response tokens, float64[n] each, of one model; of pairs their losses and ones."""
    return _counted(w, examples, *_sums(w, params, examples, members=members))


def _counted(
    w: Workshop, examples: Examples, sums: np.ndarray, tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    if examples.rejected is None:
        return sums, tokens
    return dpo_reference.losses(w.config.objective, examples, sums, tokens).astype(
        np.float64
    ), np.ones(len(examples))


def _sums(
    w: Workshop,
    params: tree.Tree,
    examples: Examples,
    tell: Callable[[int], None] | None = None,
    members: Literal["each", "ensemble"] = "each",
) -> tuple[np.ndarray, np.ndarray]:
    """Return summed token losses and numbers of response tokens, float64[n] each, of pairs [n, 2]."""
    flat, settings, dtype = examples.sequences, w.config, w.config.model.compute_dtype
    lengths = pack.bucket_lengths(flat.longest, settings.data.buckets)
    sums, tokens = scoring.losses(
        w.model,
        params,
        flat,
        batch=settings.analysis.batch,
        lengths=lengths,
        dtype=dtype,
        mesh=w.mesh,
        kernel=kernels.choose(settings.model.attention, w.model, w.mesh, dtype=dtype),
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


def _positions(w: Workshop, orders: np.ndarray) -> np.ndarray:
    """Return float64[M, E, n] in [0, 1]; see `order.positions`."""
    return np.stack(
        [[order.positions(epoch, len(w.splits["train"])) for epoch in own] for own in orders]
    )


def _warmup_fraction(w: Workshop, orders: np.ndarray) -> float:
    warmup = w.config.training.warmup
    return warmup if warmup < 1 else min(1.0, warmup / (orders.shape[1] * orders.shape[2]))


# ---------------------------------------------------------------------------------------------------------------------- evaluation


def evaluate(w: Workshop) -> None:
    """Measure every model on held-out data: loss, perplexity and the tasks of the config."""
    kinds, rows = model_names(w.config), _evaluated(w)
    losses = functools.partial(_losses, w)
    more = search.unmerged(w, losses, functools.partial(base_params, w, w.config.base_dtype))
    search.measure_controls(w, functools.partial(stock_of, w), losses, rows, more)
    write_json(
        w.directory / "evaluations.json",
        {"split": "test", "models": [rows[name]["summary"] for name in kinds]},
    )


def _evaluated(w: Workshop) -> dict[str, Any]:
    """Return evaluations/{name}.json of every model, measured now where it is not there. No model is left in memory."""
    kinds = model_names(w.config)
    rows = {name: read_json(w.directory / "evaluations" / f"{name}.json") for name in kinds}
    for name, params, generate in _answering(
        w, [name for name, row in rows.items() if row is None]
    ):
        rows[name] = _evaluate_one(w, name, kinds[name], params, generate)
        write_json(w.directory / "evaluations" / f"{name}.json", rows[name])
        shown = rows[name]["summary"]
        said = [
            f"{task} {100 * one['accuracy']:.1f} % +- {100 * one['se']:.1f}"
            for task, one in shown["tasks"].items()
        ]
        loss = [] if shown["loss"] is None else [f"loss {shown['loss']:.4f}"]
        w.say(f"  {name}: " + ", ".join([*loss, *said]))
    return rows


def _answering(
    w: Workshop, names: list[str]
) -> Iterator[tuple[str, tree.Tree, harness.Generate | None]]:
    """Yield models, each with what lets it write: in one program with the others that fit beside it."""
    dtype, batch, compute = (
        w.config.merge.dtype,
        w.config.evaluation.batch,
        w.config.model.compute_dtype,
    )
    if all(task.kind in LIKELIHOODS for task in w.config.evaluation.tasks):  # nobody writes
        yield from ((name, params, None) for name, params in models(w, names))
        return
    size = stack_models.fitting(w.config.population.members, w.model, w.mesh, dtype)
    for start in range(0, len(names), size):
        some = names[start : start + size]
        population = stack_models.stack(
            (params for _, params in models(w, some)), len(some), w.model, w.mesh, dtype
        )
        writers = harness.generators(
            w.model, population, w.tokenizer, batch=batch, dtype=compute, mesh=w.mesh
        )
        for at, name in enumerate(some):
            yield name, stack_models.take(population, at, w.model, w.mesh, dtype), writers[at]


def _evaluate_one(
    w: Workshop, name: str, kind: str, params: tree.Tree, generate: harness.Generate | None
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
    test, held = w.splits.get("test"), w.splits.get("validation")
    tasks: dict[str, Any] = {}
    items: dict[str, Any] = {}
    texts: dict[str, Any] = {}
    text_items: dict[str, Any] = {}
    if test is not None and w.config.evaluation.loss:
        measured = _sums(w, params, test)
        sums, tokens = _counted(w, test, *measured)
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
    validation = None if held is None else _token_mean(*_losses(w, params, held))[0]
    subject = evaluating.subject(w.config, w.model, params, w.tokenizer, w.mesh, generate)
    for task in w.config.evaluation.tasks:
        found, rows = harness.run(task, subject, w.config.data, test=test, seed=w.config.seed)
        if task.kind == OUTPUTS:
            write_json(
                w.directory / "outputs" / task.name / f"{name}.json",
                evaluating.signed(rows, f"{w.config.name}/{name}"),
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


def report(w: Workshop) -> None:
    """Write report.html and report.md from the run directory."""
    if jax.process_index() == 0:
        reports.write(w.directory)
