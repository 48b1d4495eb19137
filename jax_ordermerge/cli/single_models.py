"""Commands about single models and checkpoints, inside runs or not."""

import functools
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from jax_ordermerge import console
from jax_ordermerge.cli.app import (
    AllowBin,
    AsJson,
    IgnoreKeys,
    Model,
    Overrides,
    Quiet,
    app,
    check_outputs,
    json_option,
    refuse_options,
    run_through,
    split_keys,
)
from jax_ordermerge.errors import UserError

MethodParameters = Annotated[
    list[str] | None,
    Option(
        "--param",
        metavar="KEY=VALUE",
        help="Parameter of the method, as in resample=exhaustive. May be repeated.",
    ),
]


@app.command()
def merge(
    context: typer.Context,
    sources: Annotated[
        list[str],
        Argument(
            metavar="CONFIG|RUN|RECIPE|MODEL...",
            help="A config or run; a recipe and the directory to write; or models.",
        ),
    ],
    *,
    out: Annotated[Path | None, Option(help="Directory to write. It must not exist.")] = None,
    base: Annotated[str | None, Option(help="With MODEL...: their base model.")] = None,
    method: Annotated[str | None, Option(help="With MODEL...: average by default.")] = None,
    parameters: MethodParameters = None,
    weights: Annotated[
        str | None, Option(help="One per model, separated by commas; equal by default.")
    ] = None,
    seed: Annotated[int, Option(help="Seed of the random methods.")] = 0,
    dtype: Annotated[
        str | None, Option(help="float32, bfloat16 or float16; that of the models by default.")
    ] = None,
    to: Annotated[str, Option(help="Format to write: hf or orbax.")] = "hf",
    dry_run: Annotated[bool, Option("--dry-run", help="Print the plan; write nothing.")] = False,
    workers: Annotated[int | None, Option(min=1, help="Threads; one per core by default.")] = None,
    shard_gb: Annotated[float, Option(help="Largest output file, in 10^9 bytes.")] = 5.0,
    allow_nan: Annotated[
        bool, Option("--allow-nan", help="Merge NaN and infinities, and count them.")
    ] = False,
    ignore_config_keys: IgnoreKeys = None,
    allow_bin: AllowBin = False,
    overrides: Overrides = None,
    as_json: Annotated[bool, json_option("With --dry-run: print the plan as JSON.")] = False,
    quiet: Quiet = False,
) -> None:
    """Merge the members of a run, or checkpoints of one architecture.

    ordermerge merge runs/quickstart

    ordermerge merge recipe.yml MERGED

    ordermerge merge --method selection --base BASE --out MERGED MODEL_A MODEL_B MODEL_C

    A recipe is YAML of ours or of mergekit. A MODEL is an HF or Orbax directory, a hub name,
    MODEL+ADAPTER (a LoRA), RUN/member_0, RUN/member_0@200 (at a step), or RUN/average (a merge).
    """
    from jax_ordermerge.commands import merge as command

    paths = [Path(source) for source in sources]
    kind = command.kind_of(paths)
    refuse_options(context, *command.MODES[kind])
    if kind == "run":
        run_through("merge", paths[0], overrides)
        return
    if not dry_run:
        refuse_options(context, "it goes with --dry-run", ignored=["as_json"])
    target = command.find_target(paths, out, kind)
    command.check_output(target, to, kind, is_written=not dry_run)
    shard_bytes = command.read_shard_size(shard_gb)
    write = functools.partial(
        command.merge_models, to=to, workers=workers, shard_bytes=shard_bytes, allow_nan=allow_nan
    )
    if dry_run:
        target = None
        write = functools.partial(command.print_plan, workers=workers, as_json=as_json)
    ignore = split_keys(ignore_config_keys)
    if kind == "recipe":
        command.merge_recipe(paths[0], target, write, ignore, allow_bin=allow_bin)
        return
    merge_plan = command.plan_models(
        sources,
        base=base,
        method=method,
        parameters=parameters or (),
        weights=weights,
        seed=seed,
        dtype=dtype,
        ignore=ignore,
        allow_bin=allow_bin,
    )
    command.carry_out(merge_plan, target, write)


@app.command()
def inspect(
    model: Model,
    stats: Annotated[bool, Option("--stats", help="Add range, mean, zeros and NaN.")] = False,
    as_json: AsJson = False,
    ignore_config_keys: IgnoreKeys = None,
    allow_bin: AllowBin = False,
    quiet: Quiet = False,
) -> None:
    """Print the table of a checkpoint's tensors. MODEL may also be a safetensors file."""
    from jax_ordermerge.commands import inspect as command

    ignore = split_keys(ignore_config_keys)
    text = command.inspect_model(
        model, stats=stats, as_json=as_json, ignore=ignore, allow_bin=allow_bin
    )
    console.print_result(text, end="")


@app.command()
def diff(
    a: Annotated[str, Argument(metavar="A", help="A model by any name that merge takes.")],
    b: Annotated[str, Argument(metavar="B", help="The model that it is compared with.")],
    base: Annotated[str | None, Option(help="Compare task vectors from it, too.")] = None,
    as_json: AsJson = False,
    ignore_config_keys: IgnoreKeys = None,
    allow_bin: AllowBin = False,
    quiet: Quiet = False,
) -> None:
    """Compare two checkpoints tensor by tensor. Exit code 0 if all bytes are equal, else 1."""
    from jax_ordermerge.commands import inspect as command

    ignore = split_keys(ignore_config_keys)
    text, equal = command.compare_models(
        a, b, base=base, as_json=as_json, ignore=ignore, allow_bin=allow_bin
    )
    console.print_result(text, end="")
    raise typer.Exit(0 if equal else 1)  # as diff(1) does, for scripts


@app.command()
def convert(
    source: Annotated[
        str,
        Argument(
            metavar="SOURCE", help="A model by any name that merge takes; or a run, with --member."
        ),
    ],
    out: Annotated[
        Path,
        Argument(metavar="OUT", help="Directory or GGUF file to write. It must not exist."),
    ],
    *,
    to: Annotated[str, Option(help="hf, orbax, peft (an adapter), or gguf.")] = "hf",
    member: Annotated[int | None, Option(help="Number of a member of a run, from 0.")] = None,
    dtype: Annotated[
        str | None,
        Option(
            help="float32, bfloat16 or float16, of gguf also q8_0; that of the source by default."
        ),
    ] = None,
    ignore_config_keys: IgnoreKeys = None,
    allow_bin: AllowBin = False,
    base: Annotated[
        str | None, Option(help="With --rank: the model that the adapter is for.")
    ] = None,
    rank: Annotated[
        int | None, Option(help="Rank of an adapter of any model, nearest to its change.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Write a model in another format: HF, Orbax, PEFT or GGUF.

    ordermerge convert BASE+ADAPTER MERGED

    ordermerge convert RUN/member_0 MEMBER --to orbax

    ordermerge convert MERGED ADAPTER --to peft --base BASE --rank 64

    ordermerge convert RUN/average ADAPTER --to peft   # of adapters, exact

    ordermerge convert RUN/average MODEL.gguf --to gguf --dtype q8_0   # for llama.cpp, Ollama
    """
    from jax_ordermerge.checkpoint import remote
    from jax_ordermerge.commands import convert as command
    from jax_ordermerge.commands import serving

    command.convert_checkpoint(
        source,
        out,
        to=to,
        member=member,
        dtype=dtype,
        ignore=split_keys(ignore_config_keys),
        allow_bin=allow_bin,
        base=base,
        rank=rank,
    )
    console.print_message(f"wrote {remote.address(out) or out}")
    # the servers whose commands are printed read these formats, and from a disk
    if to in ("hf", "gguf") and remote.address(out) is None:
        serving.print_commands(out)


@app.command()
def push(
    source: Annotated[
        str,
        Argument(
            metavar="RUN|MODEL",
            help="Directory of a model or adapter, RUN/average, or a run with one merge.",
        ),
    ],
    repo_id: Annotated[str, Argument(metavar="REPO_ID", help="OWNER/NAME on the hub.")],
    *,
    private: Annotated[
        bool, Option("--private", help="The new repository is seen by its owner alone.")
    ] = False,
    update: Annotated[
        bool, Option("--update", help="Commit to a repository that exists; replace its weights.")
    ] = False,
    revision: Annotated[str, Option(help="Branch to commit to; it may be new.")] = "main",
    message: Annotated[str, Option(help="Message of the commit.")] = "Upload by ordermerge push",
    dry_run: Annotated[
        bool, Option("--dry-run", help="Print files, sizes and card; needs no network.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Upload an exported model to the Hugging Face hub.

    With its card, recipe and results.

    ordermerge push RUN/average OWNER/NAME --dry-run

    The token is that of HF_TOKEN or of `hf auth login`.
    """
    from jax_ordermerge.commands import push as command

    if private and update:
        raise UserError("--private is for a new repository; of one that exists it changes nothing")
    upload = command.prepare(source)
    if dry_run:
        command.print_dry_run(
            upload,
            repo_id,
            private=private,
            update=update,
            revision=revision,
            message=message,
            as_json=as_json,
        )
        return
    # on stderr: a script reads the address of the commit, and nothing else, from stdout
    for line in command.describe(upload):
        console.print_note(line)
    url = command.push(
        upload,
        repo_id,
        private=private,
        update=update,
        revision=revision,
        message=message,
        log=console.print_note,
    )
    if as_json:
        console.print_json({"url": url})
    else:
        console.print_result(url)


@app.command()
def generate(
    context: typer.Context,
    model: Model,
    *,
    prompt: Annotated[list[str] | None, Option(help="A prompt. May be repeated.")] = None,
    prompts: Annotated[
        Path | None, Option(help="File of prompts: .txt with one per line, or rows with prompt.")
    ] = None,
    stop: Annotated[
        list[str] | None, Option(help="A completion ends before this text. May be repeated.")
    ] = None,
    json_lines: Annotated[
        bool,
        Option("--json", help="Print the prompts with their completions as JSON Lines."),
    ] = False,
    raw: Annotated[
        bool, Option("--raw", help="Continue the prompt as text, without the chat template.")
    ] = False,
    system: Annotated[str | None, Option(help="System message before each prompt.")] = None,
    variables: Annotated[
        list[str] | None,
        Option(
            "--variable",
            metavar="KEY=VALUE",
            help="Variable of the chat template, e.g. enable_thinking=false. May be repeated.",
        ),
    ] = None,
    max_new_tokens: Annotated[int, Option(help="Largest number of tokens of a completion.")] = 128,
    dtype: Annotated[str, Option(help="Compute dtype, float32 or bfloat16.")] = "float32",
    temperature: Annotated[
        float, Option(help="0 takes the most likely token; above 0 tokens are drawn.")
    ] = 0.0,
    top_k: Annotated[
        int | None, Option(help="Draw among so many most likely tokens; all by default.")
    ] = None,
    top_p: Annotated[
        float | None, Option(help="Draw among the most likely tokens of this sum; all by default.")
    ] = None,
    seed: Annotated[int, Option(help="Seed of the draws.")] = 0,
    ignore_config_keys: IgnoreKeys = None,
    allow_bin: AllowBin = False,
    quiet: Quiet = False,
) -> None:
    """Answer prompts with a model, greedily or drawn.

    Draws depend on the seed and the number of the prompt.

    A prompt is a user message in the chat template of the model, which is the template that it was
    trained with. A model without one continues the prompt as text.
    """
    import json

    from jax_ordermerge.commands import generate as command
    from jax_ordermerge.config.evaluation import SMALLEST_TEMPERATURE
    from jax_ordermerge.evaluate.sampling import Sampling

    # a negative temperature has an error of its own, from `Sampling`
    if 0 <= temperature < SMALLEST_TEMPERATURE:
        mode = "without --temperature above 0 nothing is drawn"
        refuse_options(context, mode, ignored=["seed"])
    sampling = Sampling(temperature, top_k, top_p, seed)
    asking = command.Asking(raw, system, command.read_variables(variables or ()))
    stops = command.check_stops(stop or ())
    rows = command.read_prompts(prompt or (), prompts)
    texts = command.complete(
        model,
        [row["prompt"] for row in rows],
        max_new_tokens=max_new_tokens,
        dtype=dtype,
        sampling=sampling,
        ignore=split_keys(ignore_config_keys),
        allow_bin=allow_bin,
        asking=asking,
        # stdout is the answers alone
        log=console.print_note,
    )
    for row in command.complete_rows(rows, texts, stops):
        console.print_result(
            json.dumps(row, ensure_ascii=False, default=str) if json_lines else row["completion"]
        )


@app.command()
def judge(
    ours: Annotated[
        Path, Argument(metavar="OURS", help="JSON of AlpacaEval: instruction and output.")
    ],
    theirs: Annotated[Path, Argument(metavar="THEIRS", help="The same of the other model.")],
    *,
    endpoint: Annotated[str, Option(help="OpenAI-compatible address: http://HOST/v1.")],
    model: Annotated[str, Option(help="Name of the judge at the endpoint.")],
    key_variable: Annotated[
        str, Option(help="Environment variable of its API key.")
    ] = "OPENAI_API_KEY",
    max_tokens: Annotated[int, Option(min=1, help="Largest number of tokens of a reply.")] = 1024,
    temperature: Annotated[float, Option(min=0, help="Of a reply; 0 is greedy.")] = 0.0,
    request: Annotated[
        str, Option(metavar="JSON", help="Further fields of a request; null leaves one out.")
    ] = "{}",
    workers: Annotated[int, Option(min=1, help="Questions at the same time.")] = 4,
    out: Annotated[Path | None, Option(help="JSON file for the verdicts.")] = None,
    replies: Annotated[
        Path | None, Option(help="JSON Lines of the replies. By default beside --out, or OURS.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Let a judge choose between the outputs of two models.

    Each pair is asked in both orders.

    Replies are written as they come: the same command continues where it was broken off.
    """
    from jax_ordermerge.commands import judge as command

    # before the first question: replies of a judge may cost money
    check_outputs(out, replies, are_files=True)
    options = command.JudgeOptions(
        endpoint, model, key_variable, max_tokens, temperature, request, workers
    )
    summary = command.judge_files(
        ours, theirs, options, out=out, replies=replies, log=console.print_message
    )
    if as_json:
        console.print_json(summary)
    else:
        console.print_result(command.describe(summary))
