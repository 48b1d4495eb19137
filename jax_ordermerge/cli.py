"""The command line: parse, build a config, call one function, print. Nothing heavy is imported before a command runs."""

import sys
import tempfile
import traceback
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from jax_ordermerge.errors import PeerLost, Stopped, UserError

_PATIENCE = 5.0  # seconds

app = typer.Typer(
    name="ordermerge",
    help="Fine-tune one base model in k data orders, measure what the order did, and merge the k models into one.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunArgument = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG|RUN", help="YAML config of an experiment, or the run directory it made."
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key, e.g. --set training.learning_rate=1e-5. May be repeated.",
    ),
]


def _through(last: str, target: Path, overrides: list[str] | None) -> None:
    from jax_ordermerge.experiment import pipeline, run_config

    pipeline.run(run_config.read_config(target, overrides or ()), through=last, log=typer.echo)


@app.command()
def run(config: RunArgument, overrides: SetOption = None) -> None:
    """Do everything: train, merge, analyze, evaluate, report. Continues where it stopped; skips what is complete.

    Start with: ordermerge run configs/quickstart.yaml
    """
    _through("report", config, overrides)


@app.command()
def plan(
    config: RunArgument,
    *,
    topology: Annotated[
        str | None,
        typer.Option(
            help="v5p:4x4x2, v5e:8x8, h100:8, h200:8x4 (GPUs a node x nodes), cpu:8; by default the devices here."
        ),
    ] = None,
    slices: Annotated[int, typer.Option(help="TPU slices of this topology.")] = 1,
    architecture: Annotated[
        str | None,
        typer.Option(
            help="config.json, directory or a name such as llama-2-7b; by default that of model.base."
        ),
    ] = None,
    examples: Annotated[
        int | None,
        typer.Option(min=1, help="Training examples, where the data are not to be read."),
    ] = None,
    test_examples: Annotated[
        int | None, typer.Option(min=1, help="Test examples, likewise.")
    ] = None,
    analytic: Annotated[
        bool, typer.Option("--analytic", help="Estimate on paper; compile nothing.")
    ] = False,
    search: Annotated[bool, typer.Option(help="Look for settings that serve better.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    overrides: SetOption = None,
) -> None:
    """Say what an experiment needs on hardware that need not be here: memory, time, and better settings.

    ordermerge plan configs/llama2_7b_gsm8k.yaml --topology v5p:4x4x2 --examples 7473 --test-examples 1319
    """
    from jax_ordermerge.experiment import run_config
    from jax_ordermerge.plan import formatting, planner

    made = planner.make(
        run_config.read_config(config, overrides or ()),
        topology,
        slices=slices,
        architecture=architecture,
        examples=examples,
        tests=test_examples,
        analytic_only=analytic,
        look_further=search,
        log=lambda message: typer.echo(message, err=True),
    )
    typer.echo(formatting.as_json(made) if as_json else formatting.as_text(made), nl=False)


@app.command()
def train(
    config: RunArgument,
    overrides: SetOption = None,
    *,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Only look at so many first steps: how fast they are. Leaves the run alone."
        ),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(help="With --steps: directory for a profiler trace of the last of them."),
    ] = None,
) -> None:
    """Fine-tune the members, each in its own order. Resumes from the last checkpoint."""
    if steps is None:
        if profile is not None:
            raise UserError(
                "--profile traces the last steps of a look: give --steps too, as in --steps 20 --profile DIR"
            )
        _through("train", config, overrides)
        return

    from jax_ordermerge.experiment import pipeline, run_config

    pipeline.benchmark(
        run_config.read_config(config, overrides or ()),
        steps=steps,
        profile=profile,
        log=typer.echo,
    )


@app.command()
def analyze(config: RunArgument, overrides: SetOption = None) -> None:
    """Measure the final loss of every training sample and how it depends on when the sample was seen."""
    _through("analyze", config, overrides)


@app.command()
def evaluate(
    target: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG|RUN|MODEL",
            help="A config or run; or a model: HF directory, hub name or embedded:NAME.",
        ),
    ],
    overrides: SetOption = None,
    *,
    config: Annotated[
        Path | None,
        typer.Option(help="With MODEL: YAML with evaluation.tasks, and how the model is computed."),
    ] = None,
    harness: Annotated[
        str | None,
        typer.Option(
            metavar="TASK,...", help="With MODEL: tasks of lm-evaluation-harness (extra: eval)."
        ),
    ] = None,
    harness_include: Annotated[
        Path | None, typer.Option(help="Directory with more of its tasks, as YAML.")
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option(
            min=0, help="With --harness: shots before each item; by default the task's own."
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="With --harness: only the first so many items of each task."),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="With --harness: ask in the model's chat template.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="With MODEL: directory for the results and every item.")
    ] = None,
) -> None:
    """Measure base, members and merges of a run on held-out data and the tasks of its config; or one model on tasks.

    ordermerge evaluate runs/quickstart

    ordermerge evaluate MODEL --config configs/benchmarks/gsm8k_5shot.yaml --out results

    ordermerge evaluate MODEL --harness arc_easy,hellaswag --set mesh.fsdp=8
    """
    from jax_ordermerge.commands import evaluate as evaluating

    own = {
        "--config": config,
        "--harness": harness,
        "--harness-include": harness_include,
        "--out": out,
    }
    of_harness = {
        "--harness-include": harness_include,
        "--shots": shots,
        "--limit": limit,
        "--chat": chat or None,
    }
    if not evaluating.is_model(target):
        given = [name for name, value in {**own, **of_harness}.items() if value is not None]
        if given:
            raise UserError(
                f"{given[0]} goes with a model, {target} is a config or run; its tasks are those of evaluation.tasks"
            )
        _through("evaluate", target, overrides)
        return
    settings = evaluating.model_config(str(target), config, overrides or ())
    if harness is None:
        given = [name for name, value in of_harness.items() if value is not None]
        if given:
            raise UserError(
                f"{given[0]} goes with --harness TASK,...; tasks of a config have their own settings"
            )
        evaluating.evaluate_tasks(settings, out, typer.echo)
        return
    names = [name.strip() for name in harness.split(",") if name.strip()]
    evaluating.evaluate_harness(
        settings,
        names,
        out,
        typer.echo,
        include=harness_include,
        shots=shots,
        limit=limit,
        chat=chat,
    )


@app.command()
def report(config: RunArgument, overrides: SetOption = None) -> None:
    """Write report.html and report.md of a run, with whatever stages are complete."""
    from jax_ordermerge.experiment import pipeline, run_config

    typer.echo(f"wrote {pipeline.write_report(run_config.read_config(config, overrides or ()))}")


@app.command()
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="Run directories; the first is what others are compared with."
        ),
    ],
    *,
    out: Annotated[
        Path, typer.Option(help="Directory for comparison.html and comparison.md.")
    ] = Path("comparison"),
) -> None:
    """Compare runs: what differs in their configs, the imbalance, members and merges."""
    from jax_ordermerge.checkpoint import remote
    from jax_ordermerge.report import comparison

    with remote.new_directory(out) as directory:
        page = comparison.write([remote.fetch(one) for one in runs], directory)
    typer.echo(f"wrote {remote.address(out) or out}/{page.name}")


@app.command()
def results(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Run directories, analyzed and evaluated."),
    ],
    *,
    out: Annotated[Path, typer.Option(help="The page, Markdown.")] = Path("results.md"),
) -> None:
    """Write one page about runs: their tables, what they show together, and what they do not."""
    from jax_ordermerge.report import results

    typer.echo(f"wrote {results.write(runs, out)}")


@app.command()
def merge(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="CONFIG|RUN|RECIPE|MODEL...",
            help="A config or run; a recipe and the directory to write; or models.",
        ),
    ],
    *,
    out: Annotated[
        Path | None, typer.Option(help="HF directory to write (with MODEL...). It must not exist.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Base model (with MODEL...): HF directory or hub name.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="A name of the table of methods, e.g. average, selection, ties.")
    ] = "selection",
    parameters: Annotated[
        list[str] | None,
        typer.Option(
            "--param",
            metavar="KEY=VALUE",
            help="A parameter of the method, e.g. --param resample=exhaustive.",
        ),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="One weight a model, separated by commas; equal by default.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random methods.")] = 0,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16; that of the models by default."),
    ] = None,
    to: Annotated[str, typer.Option(help="What to write: hf or orbax.")] = "hf",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, write nothing.")
    ] = False,
    workers: Annotated[int | None, typer.Option(help="Threads; one a core by default.")] = None,
    shard_gb: Annotated[
        float, typer.Option(help="Largest size of an output file, in 10^9 bytes.")
    ] = 5.0,
    overrides: SetOption = None,
) -> None:
    """Merge the members of a run as its config says, or any checkpoints of one architecture.

    ordermerge merge runs/quickstart

    ordermerge merge recipe.yml MERGED

    ordermerge merge --method selection --base BASE --out MERGED MODEL_A MODEL_B MODEL_C

    A recipe is YAML of ours or of mergekit. A MODEL is an HF directory, a hub name, MODEL+ADAPTER (a LoRA), or RUN/member_0.
    """
    from jax_ordermerge.checkpoint import remote
    from jax_ordermerge.commands import merging

    recipe = merging.is_recipe(sources[0])
    target = sources[1] if recipe and out is None and len(sources) > 1 else out
    if len(sources) == 1 and not recipe:
        _through("merge", sources[0], overrides)
        return
    if target is None and not dry_run:
        raise UserError("merging models needs --out DIRECTORY")
    if recipe:
        if len(sources) > 2 - (out is not None):
            raise UserError(
                f"{sources[0]} is a recipe: give it and one directory to write, as in ordermerge merge recipe.yml MERGED"
            )
        plan = merging.plan_recipe(sources[0])
    else:
        plan = merging.plan_models(
            [remote.address(one) or str(one) for one in sources],
            base=base,
            method=method,
            parameters=merging.read_parameters(parameters or []),
            weights=None if weights is None else merging.read_weights(weights),
            seed=seed,
            dtype=dtype,
        )
    for note in plan.notes:
        typer.echo(f"note: {note}", err=True)
    if dry_run or target is None:
        typer.echo(merging.describe_plan(plan), nl=False)
        return
    merging.merge_models(plan, target, to=to, workers=workers, shard_bytes=int(shard_gb * 1e9))
    typer.echo(f"wrote {remote.address(target) or target}")


@app.command()
def search(
    config: RunArgument,
    *,
    space: Annotated[
        Path | None,
        typer.Option(help="YAML: what to choose among; by default the config's, or a wide grid."),
    ] = None,
    budget: Annotated[
        int | None, typer.Option(help="Candidates at most, beside base, members and average.")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="grid, random, tpe or cma-es.")] = None,
    validation: Annotated[
        Path | None,
        typer.Option(help="Examples to choose on; by default data.validation_examples."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of draws and subsets; by default that of the run.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="For results and winner; by default search in the run directory."),
    ] = None,
    export: Annotated[
        bool, typer.Option(help="Write the winner as a Hugging Face directory.")
    ] = True,
    overrides: SetOption = None,
) -> None:
    """Choose the merge to ship among many, on validation examples: made in device memory, only the winner is written.

    ordermerge search runs/quickstart --budget 200 --sampler random
    """
    from jax_ordermerge.config import read_search
    from jax_ordermerge.experiment import pipeline, run_config

    resolved = run_config.read_config(config, overrides or ())
    given = {"budget": budget, "sampler": sampler, "seed": seed}
    chosen = read_search(
        space,
        resolved.merge.auto,
        {key: value for key, value in given.items() if value is not None},
    )
    page = pipeline.search(
        resolved, chosen, out=out, validation=validation, export=export, log=typer.echo
    )
    typer.echo(f"wrote {page}")


@app.command()
def inspect(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="HF directory, hub name or embedded:NAME.")
    ],
    stats: Annotated[
        bool, typer.Option("--stats", help="Read the tensors too: range, mean, zeros, NaN.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the table of a checkpoint's tensors."""
    from jax_ordermerge.commands import checkpoints

    typer.echo(checkpoints.inspect_model(model, stats=stats, as_json=as_json), nl=False)


@app.command()
def diff(
    one: Annotated[
        str, typer.Argument(metavar="A", help="HF directory, hub name or embedded:NAME.")
    ],
    two: Annotated[str, typer.Argument(metavar="B", help="The same.")],
    base: Annotated[
        str | None, typer.Option(help="Compare task vectors from this model too.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare two checkpoints tensor by tensor. Exit code 0 where all bytes are equal, 1 where not."""
    from jax_ordermerge.commands import checkpoints

    text, equal = checkpoints.compare_models(one, two, base=base, as_json=as_json)
    typer.echo(text, nl=False)
    raise typer.Exit(0 if equal else 1)


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="HF directory, Orbax directory made by this command, or run directory."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Directory to write. It must not exist.")],
    to: Annotated[
        str, typer.Option(help="hf, orbax, or peft (the adapter of a member of a run with lora).")
    ] = "hf",
    member: Annotated[int | None, typer.Option(help="Which member of a run, from 0.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="dtype of the tensors written; by default that of the source."),
    ] = None,
) -> None:
    """Convert between Hugging Face directories and Orbax checkpoints, or export one member of a run."""
    from jax_ordermerge.checkpoint import remote
    from jax_ordermerge.commands import checkpoints

    checkpoints.convert_checkpoint(source, out, to=to, member=member, dtype=dtype)
    typer.echo(f"wrote {remote.address(out) or out}")


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="HF directory, hub name or embedded:NAME.")],
    *,
    prompt: Annotated[list[str], typer.Option(help="A prompt. May be repeated.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 128,
    dtype: Annotated[str, typer.Option(help="Compute dtype, float32 or bfloat16.")] = "float32",
    temperature: Annotated[
        float, typer.Option(help="Draw tokens at this temperature; 0 takes the most likely one.")
    ] = 0.0,
    top_k: Annotated[
        int | None, typer.Option(help="Draw among so many of the most likely tokens.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Draw among the most likely tokens that hold this probability."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
) -> None:
    """Complete prompts with a model: greedily, or drawn by seed and number of the prompt."""
    from jax_ordermerge.commands import checkpoints
    from jax_ordermerge.evaluate.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p, seed)
    for text in checkpoints.complete(
        model, prompt, max_new_tokens=max_new_tokens, dtype=dtype, sampling=sampling
    ):
        typer.echo(text)


@app.command()
def doctor(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="[CONFIG|RUN]", help="Also look at its processes, mesh and output directory."
        ),
    ] = None,
    *,
    only_versions: Annotated[
        bool,
        typer.Option(
            "--versions", help="Print versions and what is wrong with them; start nothing."
        ),
    ] = False,
    overrides: SetOption = None,
) -> None:
    """Check this machine: versions, devices, start of several processes, disk, output. Exit code 1 where a run would fail."""
    import rich

    from jax_ordermerge.commands import doctor
    from jax_ordermerge.experiment import run_config

    if only_versions:
        for name, version in doctor.installed():
            typer.echo(f"{name} {version}")
        findings = [one for one in doctor.versions() if one.verdict == "bad"]
    else:
        findings = list(
            doctor.examine(run_config.read_config(config, overrides or ()) if config else None)
        )
    if findings:
        rich.print(doctor.table(findings))
    bad = sum(one.verdict == "bad" for one in findings)
    if bad:
        typer.echo(
            f"not fit: {bad} of {len(findings)} findings would make a run fail"
            if not only_versions
            else "not fit",
            err=True,
        )
        raise typer.Exit(1)
    if not only_versions:
        typer.echo("fit to run")


@app.command()
def launch(
    config: RunArgument,
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="[OPTION=VALUE]...", help="Options of the target, see --options."),
    ] = None,
    *,
    target: Annotated[str, typer.Option(help="tpu-vm, gke, slurm or ssh.")],
    out: Annotated[Path | None, typer.Option(help="File to write; printed by default.")] = None,
    submit: Annotated[
        bool, typer.Option("--submit", help="Run it: sbatch, kubectl apply or bash.")
    ] = False,
    list_options: Annotated[
        bool, typer.Option("--options", help="List the options of the target.")
    ] = False,
    overrides: SetOption = None,
) -> None:
    """Write the script or manifest that runs an experiment on TPU VMs, GKE, SLURM or hosts reached by ssh.

    ordermerge launch CONFIG --target slurm nodes=4 gpus=8 partition=h100 time=12:00:00
    """
    from jax_ordermerge.experiment import run_config
    from jax_ordermerge.launch import render
    from jax_ordermerge.launch.submit import submit as hand_over

    if list_options:
        for name, default, meaning in render.describe(target):
            typer.echo(f"{name:16} {default:12} {meaning}".rstrip())
        return
    pairs = dict(_pair(item, "nodes=4") for item in options or [])
    text = render.render(run_config.read_config(config, overrides or ()), target, pairs)
    if not (out or submit):
        typer.echo(text, nl=False)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = out or Path(folder) / "launch"
        file.write_text(text)
        if out:
            typer.echo(f"wrote {out}")
        if submit and (code := hand_over(target, file)):
            raise typer.Exit(code)


def _pair(item: str, example: str) -> tuple[str, str]:
    name, sign, value = item.partition("=")
    if not (name and sign):
        raise UserError(f"{item}: expected OPTION=VALUE, e.g. {example}")
    return name, value


@app.command()
def judge(
    ours: Annotated[
        Path,
        typer.Argument(
            help="JSON list of instruction and output: AlpacaEval's model_outputs.json."
        ),
    ],
    theirs: Annotated[
        Path,
        typer.Argument(help="The same of the model to compare with, on the same instructions."),
    ],
    *,
    endpoint: Annotated[
        str, typer.Option(help="OpenAI-compatible address, e.g. http://localhost:8000/v1.")
    ],
    model: Annotated[str, typer.Option(help="Name of the judge there.")],
    key_variable: Annotated[
        str, typer.Option(help="Environment variable that holds the key, where one is needed.")
    ] = "OPENAI_API_KEY",
    out: Annotated[Path | None, typer.Option(help="JSON file for the verdicts.")] = None,
) -> None:
    """Let a judge choose between the outputs of two models, each pair in both orders."""
    import os

    from jax_ordermerge.evaluate import judge

    found = judge.compare_files(
        judge.Endpoint(endpoint, model, os.environ.get(key_variable)), ours, theirs, out
    )
    typer.echo(
        f"preferred in {100 * found['win_rate']:.1f} % ± {100 * found['se']:.1f} of {found['n']} instructions;"
        f" {found['turned']} verdicts turned with the order"
    )


def main() -> NoReturn:
    """Run the command line.

    Exit code 0 done, 2 bad input, 130 interrupted by SIGINT and 143 by SIGTERM (a training has then saved a checkpoint), 1 a failure.
    """
    code, patience = 0, None  # who ends as all others do waits for them
    try:
        app(standalone_mode=True)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code, patience = 2, _PATIENCE
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        code = stopped.code
    except PeerLost as lost:
        print(f"error: {lost}", file=sys.stderr)
        code, patience = 1, 0.0
    except KeyboardInterrupt:
        print("interrupted; the same command continues at the last checkpoint", file=sys.stderr)
        code, patience = 130, _PATIENCE
    except Exception:
        traceback.print_exc()
        code, patience = 1, _PATIENCE
    if patience is not None and "jax" in sys.modules:
        from jax_ordermerge import processes

        processes.end(code, patience)
    sys.exit(code)
