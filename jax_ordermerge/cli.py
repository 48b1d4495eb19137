"""The command line: each command has its options here and its work in `commands` or `experiment`.

Nothing heavy is imported before a command runs, so `--help` takes milliseconds.
"""

import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from typer import Argument, Option

from jax_ordermerge.errors import PeerLost, Stopped, UserError

if TYPE_CHECKING:
    from jax_ordermerge.config import Config

_PATIENCE = 5.0  # seconds that a failing process waits for its peers

app = typer.Typer(
    name="ordermerge",
    help="Fine-tune one base model in k data orders, measure what the order did, and merge the k"
    " models into one.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunArgument = Annotated[
    Path, Argument(metavar="CONFIG|RUN", help="YAML config, or the run directory that it made.")
]
Overrides = Annotated[
    list[str] | None,
    Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key, e.g. --set training.learning_rate=1e-5. May be repeated.",
    ),
]
AsJson = Annotated[bool, Option("--json", help="Print JSON.")]
Runs = Annotated[list[Path], Argument(metavar="RUN...", help="Run directories.")]
Model = Annotated[str, Argument(metavar="MODEL", help="HF directory, hub name or embedded:NAME.")]


# Commands import what they need when they run. Typer calls one of them per process, so imports at
# the top would only make all others, and --help, as slow as the slowest.
def _read_config(target: Path, overrides: list[str] | None) -> "Config":
    from jax_ordermerge.experiment.run_config import read_config

    return read_config(target, overrides or ())


def _run_through(stage: str, target: Path, overrides: list[str] | None) -> None:
    from jax_ordermerge.experiment import pipeline

    pipeline.run(_read_config(target, overrides), through=stage, log=typer.echo)


@app.command()
def run(config: RunArgument, overrides: Overrides = None) -> None:
    """Run everything: train, merge, analyze, evaluate, report. Resume; skip what is complete.

    Start with: ordermerge run configs/quickstart.yaml
    """
    _run_through("report", config, overrides)


@app.command()
def plan(
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
    examples: Annotated[int | None, Option(min=1, help="Number of training examples.")] = None,
    test_examples: Annotated[int | None, Option(min=1, help="Number of test examples.")] = None,
    analytic: Annotated[bool, Option("--analytic", help="Do not compile; use formulas.")] = False,
    search: Annotated[bool, Option(help="Search for better settings.")] = True,
    as_json: AsJson = False,
    overrides: Overrides = None,
) -> None:
    """Estimate memory and time of an experiment on hardware that need not be present.

    ordermerge plan configs/llama2_7b_gsm8k.yaml --topology v5p:4x4x2 --examples 7473
    """
    from jax_ordermerge.commands import plan as command

    text = command.plan_experiment(
        _read_config(config, overrides),
        topology=topology,
        slices=slices,
        architecture=architecture,
        examples=examples,
        tests=test_examples,
        analytic_only=analytic,
        find_better=search,
        as_json=as_json,
        log=lambda message: typer.echo(message, err=True),
    )
    typer.echo(text, nl=False)


@app.command()
def train(
    config: RunArgument,
    overrides: Overrides = None,
    *,
    steps: Annotated[int | None, Option(help="Only measure so many first steps.")] = None,
    profile: Annotated[Path | None, Option(help="Trace directory, with --steps.")] = None,
) -> None:
    """Fine-tune the members, each in its own order. Resume from the last checkpoint."""
    if steps is None:
        if profile is not None:
            raise UserError("--profile needs --steps, as in --steps 20 --profile DIR")
        _run_through("train", config, overrides)
        return
    from jax_ordermerge.experiment import pipeline

    pipeline.benchmark(
        _read_config(config, overrides), steps=steps, profile=profile, log=typer.echo
    )


@app.command()
def analyze(config: RunArgument, overrides: Overrides = None) -> None:
    """Measure how the final loss of every training sample depends on when it was seen."""
    _run_through("analyze", config, overrides)


@app.command()
def evaluate(
    target: Annotated[
        Path,
        Argument(
            metavar="CONFIG|RUN|MODEL",
            help="A config or run; or a model: HF directory, hub name or embedded:NAME.",
        ),
    ],
    overrides: Overrides = None,
    *,
    config: Annotated[Path | None, Option(help="With MODEL: YAML with evaluation.tasks.")] = None,
    harness: Annotated[
        str | None, Option(metavar="TASK,...", help="With MODEL: tasks of lm-evaluation-harness.")
    ] = None,
    harness_include: Annotated[Path | None, Option(help="With --harness: YAML tasks.")] = None,
    shots: Annotated[int | None, Option(min=0, help="With --harness: shots per item.")] = None,
    limit: Annotated[int | None, Option(min=1, help="With --harness: items per task.")] = None,
    chat: Annotated[bool, Option("--chat", help="With --harness: use the chat template.")] = False,
    out: Annotated[Path | None, Option(help="With MODEL: directory of results and items.")] = None,
) -> None:
    """Evaluate base, members and merges of a run on held-out data and tasks; or one model on tasks.

    ordermerge evaluate runs/quickstart

    ordermerge evaluate MODEL --config configs/benchmarks/gsm8k_5shot.yaml --out results

    ordermerge evaluate MODEL --harness arc_easy,hellaswag --set mesh.fsdp=8
    """
    from jax_ordermerge.commands import evaluate as command

    harness_options = command.HarnessOptions(harness_include, shots, limit, chat)
    command.check_options(target, config, harness, harness_options, out)
    if not command.is_model(target):
        _run_through("evaluate", target, overrides)
        return
    settings = command.model_config(str(target), config, overrides or ())
    if harness is None:
        command.evaluate_tasks(settings, out, typer.echo)
    else:
        command.evaluate_harness(settings, harness, out, typer.echo, harness_options)


@app.command()
def report(config: RunArgument, overrides: Overrides = None) -> None:
    """Write report.html and report.md of a run from the stages that are complete."""
    from jax_ordermerge.experiment import pipeline

    typer.echo(f"wrote {pipeline.write_report(_read_config(config, overrides))}")


@app.command()
def compare(
    runs: Runs,
    *,
    out: Annotated[Path, Option(help="Directory of the pages.")] = Path("comparison"),
) -> None:
    """Compare runs: the differences of their configs, imbalance, members and merges."""
    from jax_ordermerge.checkpoint import remote
    from jax_ordermerge.report import comparison

    with remote.new_directory(out) as directory:
        page = comparison.write([remote.fetch(path) for path in runs], directory)
    typer.echo(f"wrote {remote.address(out) or out}/{page.name}")


@app.command()
def results(
    runs: Runs,
    *,
    out: Annotated[Path, Option(help="Markdown file to write.")] = Path("results.md"),
) -> None:
    """Write one page about several runs: their tables, and what they show and do not show."""
    from jax_ordermerge.report import results

    typer.echo(f"wrote {results.write(runs, out)}")


@app.command()
def merge(
    sources: Annotated[
        list[Path],
        Argument(
            metavar="CONFIG|RUN|RECIPE|MODEL...",
            help="A config or run; a recipe and the directory to write; or models.",
        ),
    ],
    *,
    out: Annotated[Path | None, Option(help="Directory to write. It must not exist.")] = None,
    base: Annotated[str | None, Option(help="With MODEL...: their base model.")] = None,
    method: Annotated[str, Option(help="Merge method, e.g. average.")] = "selection",
    parameters: Annotated[
        list[str] | None,
        Option(
            "--param",
            metavar="KEY=VALUE",
            help="A parameter of the method, e.g. --param resample=exhaustive. May be repeated.",
        ),
    ] = None,
    weights: Annotated[str | None, Option(help="One per model, separated by commas.")] = None,
    seed: Annotated[int, Option(help="Seed of the random methods.")] = 0,
    dtype: Annotated[
        str | None, Option(help="float32, bfloat16 or float16; that of the models by default.")
    ] = None,
    to: Annotated[str, Option(help="Format to write: hf or orbax.")] = "hf",
    dry_run: Annotated[bool, Option("--dry-run", help="Print the plan; write nothing.")] = False,
    workers: Annotated[int | None, Option(help="Threads; one per core by default.")] = None,
    shard_gb: Annotated[float, Option(help="Largest output file, in 10^9 bytes.")] = 5.0,
    overrides: Overrides = None,
) -> None:
    """Merge the members of a run as its config says, or any checkpoints of one architecture.

    ordermerge merge runs/quickstart

    ordermerge merge recipe.yml MERGED

    ordermerge merge --method selection --base BASE --out MERGED MODEL_A MODEL_B MODEL_C

    A recipe is YAML of ours or of mergekit. A MODEL is an HF directory, a hub name, MODEL+ADAPTER
    (a LoRA), or RUN/member_0.
    """
    from jax_ordermerge.checkpoint import remote
    from jax_ordermerge.commands import merge as command

    if len(sources) == 1 and not command.is_recipe(sources[0]):
        _run_through("merge", sources[0], overrides)
        return
    merge_plan, target = command.plan_sources(
        sources,
        out,
        dry_run=dry_run,
        base=base,
        method=method,
        parameters=parameters or (),
        weights=weights,
        seed=seed,
        dtype=dtype,
    )
    for note in merge_plan.notes:
        typer.echo(f"note: {note}", err=True)
    if target is None:
        typer.echo(command.describe_plan(merge_plan), nl=False)
        return
    shard_bytes = int(shard_gb * 1e9)
    command.merge_models(merge_plan, target, to=to, workers=workers, shard_bytes=shard_bytes)
    typer.echo(f"wrote {remote.address(target) or target}")


@app.command()
def search(
    config: RunArgument,
    *,
    space: Annotated[Path | None, Option(help="YAML, in place of merge.auto.")] = None,
    budget: Annotated[
        int | None, Option(help="Largest number of candidates besides base, members and average.")
    ] = None,
    sampler: Annotated[str | None, Option(help="grid, random, tpe or cma-es.")] = None,
    validation: Annotated[
        Path | None, Option(help="Examples to choose on; by default data.validation_examples.")
    ] = None,
    seed: Annotated[int | None, Option(help="Seed of draws; that of the run by default.")] = None,
    out: Annotated[Path | None, Option(help="Directory of results; RUN/search by default.")] = None,
    export: Annotated[bool, Option(help="Write the winner as an HF directory.")] = True,
    overrides: Overrides = None,
) -> None:
    """Choose the merge to ship among many, on validation examples.

    Candidates are built in device memory; only the winner is written.

    ordermerge search runs/quickstart --budget 200 --sampler random
    """
    from jax_ordermerge.config import read_search
    from jax_ordermerge.experiment import pipeline

    resolved = _read_config(config, overrides)
    options = {"budget": budget, "sampler": sampler, "seed": seed}
    changes = {key: value for key, value in options.items() if value is not None}
    page = pipeline.search(
        resolved,
        read_search(space, resolved.merge.auto, changes),
        out=out,
        validation=validation,
        export=export,
        log=typer.echo,
    )
    typer.echo(f"wrote {page}")


@app.command()
def inspect(
    model: Model,
    stats: Annotated[bool, Option("--stats", help="Add range, mean, zeros and NaN.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the table of a checkpoint's tensors."""
    from jax_ordermerge.commands import inspect as command

    typer.echo(command.inspect_model(model, stats=stats, as_json=as_json), nl=False)


@app.command()
def diff(
    a: Annotated[str, Argument(metavar="A", help="HF directory, hub name or embedded:NAME.")],
    b: Annotated[str, Argument(metavar="B", help="Likewise.")],
    base: Annotated[str | None, Option(help="Compare task vectors from it, too.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare two checkpoints tensor by tensor. Exit code 0 if all bytes are equal, else 1."""
    from jax_ordermerge.commands import inspect as command

    text, equal = command.compare_models(a, b, base=base, as_json=as_json)
    typer.echo(text, nl=False)
    raise typer.Exit(0 if equal else 1)  # as diff(1) does, for scripts


@app.command()
def convert(
    source: Annotated[
        Path, Argument(help="HF directory, run directory, or Orbax directory of this command.")
    ],
    out: Annotated[Path, Argument(help="Directory to write. It must not exist.")],
    to: Annotated[str, Option(help="hf, orbax, or peft (adapter of a member).")] = "hf",
    member: Annotated[int | None, Option(help="Number of a member of a run, from 0.")] = None,
    dtype: Annotated[str | None, Option(help="That of the source by default.")] = None,
) -> None:
    """Convert between Hugging Face directories and Orbax checkpoints, or export one member."""
    from jax_ordermerge.checkpoint import remote
    from jax_ordermerge.commands import convert as command

    command.convert_checkpoint(source, out, to=to, member=member, dtype=dtype)
    typer.echo(f"wrote {remote.address(out) or out}")


@app.command()
def generate(
    model: Model,
    *,
    prompt: Annotated[list[str], Option(help="A prompt. May be repeated.")],
    max_new_tokens: Annotated[int, Option(help="Largest number of tokens to write.")] = 128,
    dtype: Annotated[str, Option(help="Compute dtype, float32 or bfloat16.")] = "float32",
    temperature: Annotated[float, Option(help="0 takes the most likely token.")] = 0.0,
    top_k: Annotated[int | None, Option(help="Draw among so many likely tokens.")] = None,
    top_p: Annotated[float | None, Option(help="Draw within this probability.")] = None,
    seed: Annotated[int, Option(help="Seed of the draws.")] = 0,
) -> None:
    """Complete prompts with a model: greedily, or drawn by seed and number of the prompt."""
    from jax_ordermerge.commands import generate as command
    from jax_ordermerge.evaluate.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p, seed)
    for text in command.complete(
        model, prompt, max_new_tokens=max_new_tokens, dtype=dtype, sampling=sampling
    ):
        typer.echo(text)


@app.command()
def judge(
    ours: Annotated[Path, Argument(help="JSON of AlpacaEval: instruction and output.")],
    theirs: Annotated[Path, Argument(help="The same of the other model.")],
    *,
    endpoint: Annotated[str, Option(help="OpenAI-compatible address: http://HOST/v1.")],
    model: Annotated[str, Option(help="Name of the judge there.")],
    key_variable: Annotated[str, Option(help="Variable of its API key.")] = "OPENAI_API_KEY",
    out: Annotated[Path | None, Option(help="JSON file for the verdicts.")] = None,
) -> None:
    """Let a judge choose between the outputs of two models, each pair in both orders."""
    from jax_ordermerge.commands.judge import judge_files

    typer.echo(judge_files(ours, theirs, endpoint, model, key_variable, out))


@app.command()
def doctor(
    config: Annotated[
        Path | None,
        Argument(metavar="[CONFIG|RUN]", help="Check its processes, mesh and output, too."),
    ] = None,
    *,
    only_versions: Annotated[bool, Option("--versions", help="Check versions only.")] = False,
    overrides: Overrides = None,
) -> None:
    """Check versions, devices, processes, disk and output. Exit code 1 where a run would fail."""
    from jax_ordermerge.commands import doctor

    settings = _read_config(config, overrides) if config and not only_versions else None
    if not doctor.diagnose(settings, only_versions=only_versions, log=typer.echo):
        raise typer.Exit(1)


@app.command()
def launch(
    config: RunArgument,
    options: Annotated[
        list[str] | None,
        Argument(metavar="[OPTION=VALUE]...", help="Options of the target; see --options."),
    ] = None,
    *,
    target: Annotated[str, Option(help="tpu-vm, gke, slurm or ssh.")],
    out: Annotated[Path | None, Option(help="File to write; printed by default.")] = None,
    submit: Annotated[bool, Option("--submit", help="Run it: sbatch, kubectl, bash.")] = False,
    list_options: Annotated[bool, Option("--options", help="List the options.")] = False,
    overrides: Overrides = None,
) -> None:
    """Write the script or manifest that runs an experiment on TPU VMs, GKE, SLURM or ssh hosts.

    ordermerge launch CONFIG --target slurm nodes=4 gpus=8 partition=h100 time=12:00:00
    """
    from jax_ordermerge.launch import render

    if list_options:
        for name, default, meaning in render.describe(target):
            typer.echo(f"{name:16} {default:12} {meaning}".rstrip())
        return
    from jax_ordermerge.commands import launch as command

    text = command.render_script(_read_config(config, overrides), target, options or ())
    if not (out or submit):
        typer.echo(text, nl=False)
    elif code := command.deliver(text, target, out, submit=submit, log=typer.echo):
        raise typer.Exit(code)


def main() -> NoReturn:
    """Run the command line.

    Exit codes: 0 done, 2 bad input, 130 interrupted by SIGINT and 143 by SIGTERM (a training has
    then saved a checkpoint), 1 a failure.
    """
    # Typer ends with SystemExit for its own errors. Ours are one line without a traceback: they are
    # about the input, not about this program. A process that fails waits some seconds for its
    # peers, which may be failing for the same reason; one that ends as all others do need not.
    code, patience = 0, None
    try:
        app(standalone_mode=True)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code, patience = 2, _PATIENCE
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        # no patience: all processes stopped at the same step, so none is waited for
        code = stopped.code
    except PeerLost as lost:
        print(f"error: {lost}", file=sys.stderr)
        code, patience = 1, 0.0  # there is no peer left to wait for
    except KeyboardInterrupt:
        print("interrupted; the same command continues at the last checkpoint", file=sys.stderr)
        code, patience = 130, _PATIENCE
    except Exception:
        traceback.print_exc()
        code, patience = 1, _PATIENCE
    # jax at work means that there may be peers; importing it here would start it for nothing
    if patience is not None and "jax" in sys.modules:
        from jax_ordermerge import processes

        processes.end(code, patience)
    sys.exit(code)
