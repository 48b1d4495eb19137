"""The stage that merges the members by every method of the config and by the search."""

from collections.abc import Collection

from jax_ordermerge import console
from jax_ordermerge.config import Config
from jax_ordermerge.config.merge import AUTO, merge_name
from jax_ordermerge.experiment import build_merges, export, models, search
from jax_ordermerge.experiment.context import RunContext, Stage
from jax_ordermerge.experiment.run_config import result_layouts
from jax_ordermerge.json_types import Json
from jax_ordermerge.layout import RunLayout, read_json, read_search, write_json
from jax_ordermerge.search.candidates import Population
from jax_ordermerge.tree import Tree


def run(ctx: RunContext) -> None:
    """Merge the population in device memory, export each merge, and record its diagnostics."""
    config, run = ctx.config, ctx.layout
    exports = build_merges.exports(config, ctx.population)
    population = models.load_population(ctx)
    # what an earlier, interrupted call has recorded; rewritten after each merge
    rows = _read_rows(run)

    def record(
        name: str,
        settings: Json,
        merged: Tree,
        parameters: Json,
        ingredients: Population,
        checkpoints: Json,
    ) -> None:
        diagnostics = _measure_diagnostics(ctx, name, ingredients, merged, settings)
        rows[name] = {
            "name": name,
            **settings,
            **checkpoints,
            "parameters": parameters,
            "diagnostics": diagnostics,
        }
        write()

    def write() -> None:
        write_json(run.merges, {"dtype": ctx.export_dtype, "merges": list(rows.values())})

    write()  # a run without merges is complete, too
    methods = config.merge.methods
    for spec in console.track(methods, len(methods), "merge", "merges"):
        name = merge_name(spec)
        if _is_done(name, rows, run, exports):
            continue
        settings = build_merges.settings(ctx, spec)
        merged, recorded = build_merges.build(ctx, population, spec)
        recipe = {
            "merge_method": spec.method,
            "weights": None if spec.weights is None else list(spec.weights),
            "parameters": dict(spec.parameters),
            "seed": settings["seed"],
        }
        checkpoints = build_merges.averaged_checkpoints(ctx, spec.checkpoints)
        if exports:
            export.export(ctx, name, merged, recipe | checkpoints)
        ingredients = build_merges.of_checkpoints(population, spec)
        record(name, settings, merged, recorded, ingredients, checkpoints)
        del merged, ingredients  # the next merge needs their memory
    if config.merge.auto is not None and not _is_done(AUTO, rows, run, exports):
        target = run.merged(AUTO) if exports else None
        chosen = search.choose_merge(ctx, config.merge.auto, run.search, population, target=target)
        parameters = chosen.settings["parameters"]
        record(
            AUTO,
            chosen.settings,
            chosen.params,
            parameters,
            chosen.ingredients,
            chosen.checkpoints,
        )


def is_complete(config: Config) -> bool:
    """Whether every merge of the config is exported and recorded."""
    for number, run in enumerate(result_layouts(config)):
        if config.merge.auto is not None:
            read_search(run.search)  # refuses what another version has chosen
        rows, exports = _read_rows(run), build_merges.exports(config, number)
        if not run.merges.is_file() or not all(
            _is_done(name, rows, run, exports) for name in config.merge_names
        ):
            return False
    return True


def _read_rows(run: RunLayout) -> dict[str, Json]:
    """Return what is recorded of each merge, by name."""
    return {row["name"]: row for row in (read_json(run.merges) or {"merges": []})["merges"]}


def _is_done(name: str, rows: Collection[str], run: RunLayout, exports: bool) -> bool:
    # a merge is exported before its diagnostics are measured: an export alone is not complete
    return name in rows and (run.is_merged(name) or not exports)


def _measure_diagnostics(
    ctx: RunContext, name: str, population: Population, merged: Tree, settings: Json
) -> Json:
    if name == AUTO:
        # the lambdas of a chosen merge are not parameters of its method, so the diagnostics that
        # depend on the method do not apply; those of task vectors do
        settings = {"method": AUTO, "seed": settings["seed"]}
    diagnostics = population.measure_diagnostics(merged, **settings)
    total = diagnostics["total"]
    assert total is not None  # all tensors are of the same members
    written = (
        f" -> {ctx.layout.merged(name)}" if build_merges.exports(ctx.config, ctx.population) else ""
    )
    length = total["norm_ratio"]  # None where no member has left the base
    text = (
        "equal to the base"
        if length is None
        else f"{length:.2f} times as far from the base as a member"
    )
    ctx.log(f"  {name}: {text}{written}")
    return dict(diagnostics)


STAGE = Stage("merge", run, is_complete, by_population=True)
