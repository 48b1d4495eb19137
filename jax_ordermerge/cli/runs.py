"""Commands about experiments and their runs."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from jax_ordermerge import console
from jax_ordermerge.cli.app import (
    AllowBin,
    AsJson,
    IgnoreKeys,
    Overrides,
    Quiet,
    RunArgument,
    Runs,
    app,
    check_outputs,
    json_option,
    read_config,
    refuse_options,
    run_through,
    split_keys,
)
from jax_ordermerge.errors import UserError


@app.command()
def run(
    config: RunArgument,
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run everything: train, merge, analyze, evaluate, report. Resume; skip what is complete.

    Start with: ordermerge run quickstart
    """
    from jax_ordermerge.commands import outcome

    outcome.print_outcome(*run_through("report", config, overrides), as_json=as_json)


@app.command()
def data(
    context: typer.Context,
    config: RunArgument,
    *,
    rows: Annotated[int, Option(min=0, help="Examples of each source to show.")] = 2,
    row: Annotated[int | None, Option(metavar="ID", help="Show the example of this id.")] = None,
    split: Annotated[str | None, Option(help="Show train, validation or test only.")] = None,
    order: Annotated[
        int | None, Option(metavar="MEMBER", help="Show what this member sees first.")
    ] = None,
    as_json: AsJson = False,
    overrides: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Show what would be trained on, with what is learned marked.

    Counts, lengths, what is dropped and why, and examples. No device is used. What is learned is
    in colour on a terminal, else in [[brackets]].

    ordermerge data configs/quickstart.yaml --rows 5
    """
    from jax_ordermerge.commands import data as command
    from jax_ordermerge.data import preview, tokenizers

    # With --order the command itself refuses --row.
    if row is not None and order is None:
        refuse_options(context, "--row shows one example", ignored=["rows"])
    selection = command.Selection(rows, row, split, order)
    # this command runs no model, and importing torch alone takes two seconds
    with tokenizers.without_torch():
        loaded = command.load(read_config(config, overrides))
    if as_json:
        text = command.describe_json(loaded, selection)
    else:
        text = command.describe(loaded, selection, preview.choose_marks(sys.stdout))
    console.print_result(text, end="")
    # last: what a run refuses can be looked at
    command.check(loaded)


@app.command()
def plan(
    context: typer.Context,
    config: RunArgument,
    *,
    topology: Annotated[
        str | None,
        Option(
            help="v5p:4x4x2, v5e:8x8, h100:8, h200:8x4 (GPUs per node x nodes), cpu:8;"
            " by default the devices of this machine."
        ),
    ] = None,
    slices: Annotated[int, Option(help="Number of TPU slices.")] = 1,
    architecture: Annotated[
        str | None,
        Option(help="config.json, directory or a name: llama-2-7b; by default that of model.base."),
    ] = None,
    examples: Annotated[
        int | None, Option(min=1, help="Number of training examples; those of the data by default.")
    ] = None,
    test_examples: Annotated[
        int | None, Option(min=1, help="Number of test examples; those of the data by default.")
    ] = None,
    analytic: Annotated[
        bool, Option("--analytic", help="Do not compile: estimate by formulas alone.")
    ] = False,
    search: Annotated[bool, Option(help="Search for better settings.")] = True,
    as_json: AsJson = False,
    overrides: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Estimate memory and time on hardware that need not be here.

    ordermerge plan configs/llama2_7b_gsm8k.yaml --topology v5p:4x4x2 --examples 7473
    """
    from jax_ordermerge.commands import plan as command

    # the devices of this machine have their slices: the option would change nothing
    if topology is None:
        mode = "it goes with --topology of TPUs, as in v5p:4x4x2"
        refuse_options(context, mode, ignored=["slices"])
    text = command.plan_experiment(
        read_config(config, overrides),
        topology=topology,
        slices=slices,
        architecture=architecture,
        examples=examples,
        tests=test_examples,
        analytic_only=analytic,
        find_better=search,
        as_json=as_json,
        log=console.print_note,
    )
    console.print_result(text, end="")


@app.command()
def train(
    context: typer.Context,
    config: RunArgument,
    overrides: Overrides = None,
    *,
    steps: Annotated[
        int | None, Option(help="Time so many first steps in place of the training; keep nothing.")
    ] = None,
    profile: Annotated[Path | None, Option(help="With --steps: directory of a trace.")] = None,
    as_json: Annotated[bool, json_option("With --steps: print the timing as JSON.")] = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune the members, each in its own order. Resume from the last checkpoint."""
    if steps is None:
        # `--profile` alone would train without a trace.
        refuse_options(context, "it goes with --steps, as in --steps 20", ["overrides"])
        run_through("train", config, overrides)
        return
    from jax_ordermerge.experiment import pipeline

    check_outputs(profile)
    settings = read_config(config, overrides)
    timing = pipeline.benchmark(settings, steps=steps, profile=profile, log=console.print_message)
    if as_json:
        console.print_json(timing.to_json())
    else:
        console.print_result(str(timing))


@app.command()
def analyze(config: RunArgument, overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Measure how the final loss depends on when a sample was seen."""
    run_through("analyze", config, overrides)


@app.command()
def evaluate(
    target: Annotated[
        str,
        Argument(
            metavar="CONFIG|RUN|MODEL",
            help="A config or run; or a model: HF or Orbax directory, hub name, embedded:NAME,"
            " RUN/member_0, RUN/average (a merge) or MODEL+ADAPTER.",
        ),
    ],
    overrides: Overrides = None,
    *,
    config: Annotated[Path | None, Option(help="With MODEL: YAML with evaluation.tasks.")] = None,
    harness: Annotated[
        str | None, Option(metavar="TASK,...", help="With MODEL: tasks of lm-evaluation-harness.")
    ] = None,
    harness_include: Annotated[
        Path | None, Option(help="With --harness: directory of further tasks in YAML.")
    ] = None,
    shots: Annotated[
        int | None,
        Option(
            min=0, help="With --harness: solved examples per item; those of the task by default."
        ),
    ] = None,
    limit: Annotated[
        int | None,
        Option(min=1, help="With MODEL: use the first so many items of each task; all by default."),
    ] = None,
    chat: Annotated[bool, Option("--chat", help="With --harness: use the chat template.")] = False,
    out: Annotated[Path | None, Option(help="With MODEL: directory of results and items.")] = None,
    ignore_config_keys: IgnoreKeys = None,
    allow_bin: AllowBin = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Evaluate a run on held-out data and tasks, or one model.

    Of a run the base, all members and all merges.

    ordermerge evaluate runs/quickstart

    ordermerge evaluate MODEL --config configs/benchmarks/gsm8k_5shot.yaml --out results

    ordermerge evaluate MODEL --harness arc_easy,hellaswag --set mesh.fsdp=8
    """
    from jax_ordermerge.commands import evaluate as command

    harness_options = command.HarnessOptions(harness_include, shots, limit, chat)
    ignore = split_keys(ignore_config_keys)
    path = Path(target)
    # Not by `refuse_options`: which options there are depends on two of them, MODEL and --harness.
    command.check_options(
        path, config, harness, harness_options, out, ignore=ignore, allow_bin=allow_bin
    )
    check_outputs(out)
    if not command.is_model(path):
        run = run_through("evaluate", path, overrides)
        if as_json:
            from jax_ordermerge.commands import outcome

            outcome.print_outcome(*run, as_json=True)
        return
    settings = command.model_config(target, config, overrides or (), ignore)
    log, show = console.print_message, None if as_json else console.print_result
    if harness is None:
        results = command.evaluate_tasks(
            settings, out, log, limit, allow_bin=allow_bin, on_result=show
        )
    else:
        results = command.evaluate_harness(
            settings, harness, out, log, harness_options, allow_bin=allow_bin, on_result=show
        )
    if as_json:
        console.print_json(results)


@app.command()
def report(config: RunArgument, overrides: Overrides = None, quiet: Quiet = False) -> None:
    """Write report.html and report.md from complete stages."""
    from jax_ordermerge.experiment import pipeline

    console.print_message(f"wrote {pipeline.write_report(read_config(config, overrides))}")


@app.command()
def compare(
    runs: Runs,
    *,
    out: Annotated[Path, Option(help="Directory of the pages.")] = Path("comparison"),
    quiet: Quiet = False,
) -> None:
    """Compare runs: settings, imbalance, members and merges."""
    from jax_ordermerge.checkpoint import remote
    from jax_ordermerge.report import comparison

    # `check_outputs` refuses buckets, and this command can write to one
    if remote.address(out) is None:
        check_outputs(out)
    # pages and pictures, which appear together
    with remote.new_directory(out) as directory:
        page = comparison.write([remote.fetch(path) for path in runs], directory)
    console.print_message(f"wrote {remote.address(out) or out}/{page.name}")


@app.command()
def results(
    runs: Runs,
    *,
    out: Annotated[Path, Option(help="Markdown file to write.")] = Path("results.md"),
    hypotheses: Annotated[
        Path | None,
        Option(help="YAML of hypotheses about these runs, written down before them."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Write one page about several runs, and test hypotheses.

    Their tables, and what they show and do not show. With --hypotheses it begins with what became
    of them; their estimates are in a CSV beside it.

    ordermerge results runs/alpaca runs/dolly --hypotheses hypotheses.yaml --out results.md
    """
    from jax_ordermerge.report import results

    check_outputs(out, are_files=True)
    console.print_message(f"wrote {results.write(runs, out, hypotheses)}")


@app.command()
def search(
    config: RunArgument,
    *,
    space: Annotated[
        Path | None, Option(help="YAML of what is tried; by default merge.auto.")
    ] = None,
    budget: Annotated[
        int | None,
        Option(
            help="Largest number of candidates besides base, members and average; by default that"
            " of the space."
        ),
    ] = None,
    sampler: Annotated[
        str | None, Option(help="grid, random, tpe or cma-es; by default that of the space.")
    ] = None,
    measure: Annotated[
        list[str] | None, Option(help="What is minimized: loss, or a task. May be repeated.")
    ] = None,
    validation: Annotated[
        Path | None, Option(help="Examples to choose on; by default data.validation_examples.")
    ] = None,
    seed: Annotated[int | None, Option(help="Seed of draws; that of the run by default.")] = None,
    out: Annotated[Path | None, Option(help="Directory of results; RUN/search by default.")] = None,
    export: Annotated[bool, Option(help="Write the winner as an HF directory.")] = True,
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Choose the merge to ship among many, on validation examples.

    Candidates are built in device memory; only the winner is written. The members compete at every
    lambda. A winner that makes the loss or a task worse than the best member is not shipped.

    ordermerge search runs/quickstart --budget 200 --sampler random
    """
    from jax_ordermerge.commands import serving
    from jax_ordermerge.config import read_search
    from jax_ordermerge.experiment import pipeline
    from jax_ordermerge.layout import SearchLayout, read_json

    check_outputs(out)
    resolved = read_config(config, overrides)
    options = {"budget": budget, "sampler": sampler, "measure": measure or None, "seed": seed}
    # Options that are not given leave what the file says.
    changes = {key: value for key, value in options.items() if value is not None}
    page = pipeline.search(
        resolved,
        read_search(space, resolved.merge.auto, changes),
        out=out,
        validation=validation,
        export=export,
        log=console.print_message,
    )
    layout = SearchLayout(page.parent)
    if as_json:
        console.print_json(read_json(layout.results))
    console.print_message(f"wrote {page}")
    if export:
        serving.print_commands(layout.winner)


@app.command()
def doctor(
    context: typer.Context,
    config: Annotated[
        Path | None,
        Argument(metavar="[CONFIG|RUN]", help="Check what this experiment needs, too."),
    ] = None,
    *,
    only_versions: Annotated[bool, Option("--versions", help="Check versions only.")] = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Check whether this machine is fit for a run. Exit code 1 where the run would fail.

    Versions, drivers, devices and their links, base, data, memory, disk and its speed.
    """
    from jax_ordermerge.commands import doctor

    if config is None or only_versions:
        mode = (
            "with --versions only versions are checked" if only_versions else "no config is given"
        )
        refuse_options(context, mode, ["only_versions", "as_json"])
    if config and only_versions:
        raise UserError(f"{config} would be ignored: with --versions only versions are checked")
    settings = read_config(config, overrides) if config else None
    if not doctor.diagnose(settings, only_versions=only_versions, as_json=as_json):
        # what would fail is printed already
        raise typer.Exit(1)


@app.command()
def launch(
    context: typer.Context,
    config: RunArgument,
    options: Annotated[
        list[str] | None,
        Argument(metavar="[OPTION=VALUE]...", help="Options of the target; see --options."),
    ] = None,
    *,
    target: Annotated[str, Option(help="tpu-vm, gke, slurm, ssh or skypilot.")],
    out: Annotated[Path | None, Option(help="File to write; printed by default.")] = None,
    submit: Annotated[bool, Option("--submit", help="Run it, by sbatch, kubectl or bash.")] = False,
    list_options: Annotated[
        bool, Option("--options", help="List the options of the target.")
    ] = False,
    overrides: Overrides = None,
    as_json: Annotated[bool, json_option("With --options: print them as JSON.")] = False,
    quiet: Quiet = False,
) -> None:
    """Write the script that runs an experiment on TPUs or GPUs.

    Targets are TPU VMs, GKE, SLURM, ssh hosts, and whatever SkyPilot finds.

    ordermerge launch CONFIG --target slurm nodes=4 gpus=8 partition=h100 time=12:00:00
    """
    from jax_ordermerge.launch import render

    if list_options:
        refuse_options(context, "--options only lists", ["list_options", "target", "as_json"])
        # OPTION=VALUE are arguments, and `refuse_options` looks at options alone
        if options:
            raise UserError(f"{options[0]} would be ignored: --options only lists; leave it out")
        listed = render.describe(target)
        if as_json:
            console.print_json([option._asdict() for option in listed])
            return
        for name, default, meaning in listed:
            console.print_result(f"{name:16} {default:12} {meaning}".rstrip())
        return
    refuse_options(context, "a script is no JSON; it goes with --options", ignored=["as_json"])
    from jax_ordermerge.commands import launch as command

    text = command.render_script(read_config(config, overrides), target, options or ())
    if not (out or submit):
        console.print_result(text, end="")
    # The exit code of sbatch or kubectl, so that a script around this command can stop.
    elif code := command.deliver(text, target, out, submit=submit, log=console.print_message):
        raise typer.Exit(code)
