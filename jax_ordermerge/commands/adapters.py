"""PEFT adapters: of a member, of a merge of adapters, and of any model on its base."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jax_ordermerge import arch, console
from jax_ordermerge.checkpoint import convert, remote, sidecar_files
from jax_ordermerge.data.prompt_card import prompt_section
from jax_ordermerge.data.prompt_format import PromptFormat
from jax_ordermerge.errors import UserError
from jax_ordermerge.experiment import cards, waves
from jax_ordermerge.experiment.run_config import read_config
from jax_ordermerge.experiment.specs import training_spec
from jax_ordermerge.json_types import JsonRow
from jax_ordermerge.layout import RunLayout, member_name, read_json
from jax_ordermerge.merge import low_rank, plan
from jax_ordermerge.merge.methods import table
from jax_ordermerge.merge.recipe import planner
from jax_ordermerge.merge.sources import (
    lora,
    peft_export,
    peft_files,
    public_names,
    references,
)
from jax_ordermerge.merge.sources.references import read_prompt_format
from jax_ordermerge.merge.sources.storage import AnySource, Source
from jax_ordermerge.record import base_digest, refuse_other_base
from jax_ordermerge.train import members

# What vLLM takes for --max-lora-rank; an adapter may have less.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_LISTED = 3  # tensors named in a note; the card of the adapter names all


def export_member(member: references.Member, out: Path, dtype: str | None) -> None:
    """Write the adapter of a member of a run with `lora`.

    Raises:
        UserError: the run has no adapters, its base is another one now, or the checkpoint was not
            kept.
    """
    layout, number, step = member
    config = read_config(layout.root)
    # the name may be that of another model by now, and the adapter is of the one in training
    base_dir = convert.resolve(config.model.base)
    refuse_other_base(layout, config.model, base_digest(config.model, base_dir))
    form = read_prompt_format(layout)
    model = convert.load_config(base_dir, config.model.ignore_config_keys).with_ends(form.stops)
    wave = waves.member_layout(layout, number)
    adapter = members.restore_adapter(training_spec(config), model, wave, number, step=step)
    assert config.lora is not None  # restore_adapter refuses a run without it
    peft_export.write_adapter(
        out,
        adapter,
        model,
        config.lora,
        base=_base_name(config.model.base),
        # as it was trained: factors are small, and bfloat16 would round them before their product
        dtype=dtype or "float32",
        tokenizer_from=base_dir,
        prompt_format=form,
        card=cards.member_card(config, member, form, dtype or "float32", adapter=True),
    )


def _base_name(base: str) -> str:
    """Return the name by which PEFT loads a base; with a note where it is a path."""
    # The adapter names its base, which PEFT loads by that name: a hub name works anywhere.
    name = public_names.public_name(base)
    if name.kind == "hub":
        return name.text  # also of a directory in the cache of the hub
    path = str(convert.resolve(base).absolute())  # PEFT loads it from any working directory
    console.print_message(
        f"note: {peft_files.CONFIG} names the base by its directory here, {path}; to publish"
        " the adapter, give base_model_name_or_path the name of the base on the hub"
    )
    return path


# --------------------------------------------------------------------------- merges of adapters


def export_merge(
    source: str,
    out: Path,
    dtype: str | None,
    *,
    ignore: Collection[str] = (),
    allow_bin: bool = False,
) -> None:
    """Write a merge of adapters as one adapter of their summed rank, without loss.

    Args:
        source: RUN/NAME, a merge of a run with `lora`; or a recipe of models with adapters.
        out: directory to write.
        dtype: of the factors, float32 by default.
        ignore: unknown keys of `config.json` of the models of a recipe to ignore.
        allow_bin: read `.bin` files of PyTorch for a recipe.

    Raises:
        UserError: the source is something else, or the merge has no low rank.
    """
    if source.endswith((".yml", ".yaml")):
        merged = _open_recipe(source, ignore, allow_bin)
    else:
        merged = _open_merge(source)
        if ignore:
            raise UserError(
                "--ignore-config-keys goes with an HF directory or a recipe; a run has"
                " model.ignore_config_keys"
            )
    settings, adapter = low_rank.join(merged.adapters, merged.merges)
    _note_rank(settings.rank)
    text = (
        f"The merge `{Path(source).name}` of {len(merged.adapters)} adapters as one adapter, of the"
        " rank that they span together. Nothing was left out.\n\n"
        f"{prompt_section(merged.form, adapter=True)}"
    )
    peft_export.write_adapter(
        out,
        adapter,
        merged.config,
        settings,
        base=_base_name(merged.base),
        dtype=dtype or "float32",
        tokenizer_from=merged.tokenizer_from,
        prompt_format=merged.form,
        card=_card(out, text, merged.base),
    )


class _Merge(NamedTuple):
    """A merge of adapters that is one again.

    Attributes:
        adapters: the models.
        merges: Hugging Face name -> how the tensor is merged, and the numbers of the adapters.
        base: name of their base.
        config: of the merge.
        form: how it is asked.
        tokenizer_from: directory of its tokenizer files, if any.
    """

    adapters: list[lora.LoRA]
    merges: Mapping[str, tuple[low_rank.Combine, Sequence[int]]]
    base: str
    config: arch.ModelConfig
    form: PromptFormat
    tokenizer_from: Path | None


def _open_merge(source: str) -> _Merge:
    """Open the members of RUN/NAME, with how they were merged."""
    path = remote.expand(source)
    # a bucket holds the run, and in it nothing of the name RUN/NAME
    parent = remote.fetch(path.parent) if remote.address(source) is not None else path.parent
    layout = RunLayout(parent)
    rows = (read_json(layout.merges) or {}).get("merges", []) if layout.is_run else []
    row = next((row for row in rows if row["name"] == path.name), None)
    if row is None:
        raise UserError(
            "--to peft goes with a member of a run, RUN/member_0; a merge of its adapters,"
            " RUN/average; a recipe of adapters; or with --base and --rank any model; not with"
            f" {source} alone"
        )
    # joined adapters are of the last step, and would be another model
    if "checkpoints" in row:
        raise UserError(
            f"{source} averages checkpoints, of which convert joins no adapters; give --base and"
            " --rank for an approximation"
        )
    config = read_config(layout.root)
    # dense members have full rank: their average is no adapter of k r
    if config.lora is None:
        raise UserError(
            f"{layout.root} has no adapters: it was trained with lora: null; give --base and --rank"
        )
    refuse_other_base(
        layout, config.model, base_digest(config.model, convert.resolve(config.model.base))
    )
    numbers = range(config.population.members)
    opened = [
        references.open_member(layout, number, f"{layout.root}/{member_name(number)}")
        for number in numbers
    ]
    adapters = [_as_adapter(member) for member in opened]
    combine = _combination(source, row["method"], row["weights"], row["parameters"], len(numbers))
    names = [name for name, _, _ in arch.hf_tensors(adapters[0].config)]
    first = adapters[0]
    return _Merge(
        adapters,
        dict.fromkeys(names, (combine, numbers)),
        config.model.base,
        first.config,
        first.prompt_format,
        first.directory,
    )


def _open_recipe(source: str, ignore: Collection[str], allow_bin: bool) -> _Merge:
    """Open the models of a recipe, with how each tensor is merged."""
    merge_plan = planner.plan_recipe(remote.fetch(source), ignore=ignore, allow_bin=allow_bin)
    for note in merge_plan.notes:
        console.print_note(f"note: {note}")
    config = merge_plan.config
    if isinstance(config, arch.UnlistedConfig):
        raise UserError(
            f"{source} is of models that are not in the table of architectures, or of adapters"
            " without their base, which ordermerge merge writes as an adapter"
        )
    # new tokens are rows of the embedding
    if merge_plan.added_tokens:
        raise UserError(f"{source} adds tokens, which an adapter of linear layers cannot hold")
    # not all models of the plan: the base of task vectors is one of them
    used = sorted({view.source for output in merge_plan.outputs for view in output.members})
    adapters = [_as_adapter(merge_plan.sources[number]) for number in used]
    # by files and not by name, which may be spelled in two ways
    if len({adapter.base.identity() for adapter in adapters}) > 1:
        raise UserError(f"{source}: the adapters have several bases; one adapter has one")
    merges = {}
    for output in merge_plan.outputs:
        # task vectors from another model than that of the adapters are no products of theirs
        start = None if output.base is None else merge_plan.sources[output.base.source]
        if start is not None and start.identity() != adapters[0].base.identity():
            raise UserError(
                f"{source}: base_model is {start.label}, and the adapters are of"
                f" {adapters[0].base.label}; give that one"
            )
        if any(view.name != output.name for view in output.members):
            raise UserError(f"{source} moves layers, which an adapter on the base cannot")
        weights = None if output.weights is None else output.weights.tolist()
        combine = _combination(
            source, output.method, weights, output.parameters, len(output.members)
        )
        merges[output.name] = combine, [used.index(view.source) for view in output.members]
    form = merge_plan.prompt_format
    if merge_plan.chat_template is not None:
        form = dataclasses.replace(form, chat_template=merge_plan.chat_template)
    return _Merge(
        adapters,
        merges,
        references.split_name(adapters[0].label)[0],
        config,
        form,
        merge_plan.tokenizer_from,
    )


def _as_adapter(model: AnySource) -> lora.LoRA:
    if not isinstance(model, lora.LoRA):
        raise UserError(
            f"{model.label} is no adapter: only a merge of adapters alone is one; give --base and"
            " --rank for an approximation"
        )
    return model


def _combination(
    source: str,
    method: str,
    weights: Sequence[float] | None,
    parameters: JsonRow,
    count: int,
) -> low_rank.Combine:
    # the record of a merge has only what its config gave
    checked = table.check_parameters(method, parameters)
    combine = low_rank.combination(method, weights, checked, count)
    if combine is None:
        raise UserError(
            f"{source}: {method} is no weighted sum of the adapters, which alone is an adapter"
            " again (as knots is); give --base and --rank for an approximation"
        )
    return combine


# ------------------------------------------------------------------------------- approximations


def check_low_rank(base: str, rank: int) -> None:
    """Check the options of `export_low_rank`, before a model is opened.

    Raises:
        UserError: the rank is not positive, or the base is nothing that PEFT loads.
    """
    if rank < 1:
        raise UserError(f"--rank {rank} must be positive")
    # what only this package opens, PEFT could not load the adapter on
    if references.is_composed(base):
        raise UserError(
            f"--base {base}: PEFT loads the base by this name, so it must be a Hugging Face"
            " directory or hub name"
        )


def export_low_rank(
    model: Source,
    source: str,
    out: Path,
    *,
    base: Source,
    base_name: str,
    rank: int,
    dtype: str | None,
) -> None:
    """Write the change of a model as an adapter of a rank, and say what it leaves out.

    Args:
        model: the model.
        source: its name.
        out: directory to write.
        base: the model that it began from.
        base_name: by which PEFT loads the base: a Hugging Face directory or hub name.
        rank: of every matrix.
        dtype: of the factors, float32 by default.

    Raises:
        UserError: the base is of another architecture, or nothing changed.
    """
    plan.check_same(base, model)
    specs = arch.tensor_table(model.config)
    tracked = console.track(specs, len(specs), "decompose", "tensors")
    result = low_rank.approximate(model, base, rank, dtype or "float32", tracked)
    _note_rank(rank)
    for line in _describe(result):
        console.print_message(line)
    text = (
        f"The change of `{public_names.short_names([source])[source]}` from its base, as an adapter"
        f" of rank {rank}.\n\n{_error_table(result)}\n\n"
        f"{prompt_section(model.prompt_format, adapter=True)}"
    )
    peft_export.write_adapter(
        out,
        result.adapter,
        model.config,
        result.settings,
        base=_base_name(base_name),
        dtype=dtype or "float32",
        tokenizer_from=model.directory,
        prompt_format=model.prompt_format,
        card=_card(out, text, base_name),
    )


def _describe(result: low_rank.LowRank) -> Iterator[str]:
    """Yield lines on what the adapter leaves out."""
    # a small error in all may hide one matrix that lost most of its change
    worst = max(result.matrices, key=lambda change: change.error)
    yield (
        f"rank {result.settings.rank}: relative error {result.error:.4g} in all, largest"
        f" {worst.error:.4g} in {worst.name}"
    )
    if result.left_out:
        ordered = sorted(result.left_out, key=lambda change: -change.norm)
        listed = ", ".join(
            f"{change.name} (by {change.norm:.4g}, {_relative(change)} of its length)"
            for change in ordered[:_LISTED]
        )
        unnamed = len(ordered) - _LISTED
        rest = f" and {unnamed} more, listed in README.md" if unnamed > 0 else ""
        yield (
            f"note: {len(ordered)} tensors changed that an adapter of linear layers cannot hold;"
            f" they stay as in the base: {listed}{rest}"
        )


def _relative(change: low_rank.Change) -> str:
    return f"{change.norm / change.base_norm:.2g}" if change.base_norm else "all"


def _error_table(result: low_rank.LowRank) -> str:
    """Return Markdown: what the adapter leaves out, in all and per tensor."""
    total = f"It leaves out {result.error:.4g} of the change (Frobenius norms, all tensors)."
    rows = [
        f"| `{change.name}` | {change.norm:.4g} | {change.error:.4g} |"
        for change in (*result.matrices, *result.left_out)
    ]
    header = ["| tensor | norm of the change | relative error |", "|---|---|---|"]
    remark = "\n\nWhat has the error 1 stays as in the base." if result.left_out else ""
    return f"{total}{remark}\n\n" + "\n".join([*header, *rows])


def _card(out: Path, text: str, base: str) -> str:
    name = public_names.public_name(base).card_id
    return sidecar_files.model_card(out.name, text, base_model=name, relation="adapter")


def _note_rank(rank: int) -> None:
    if rank not in VLLM_RANKS:
        larger = next((x for x in VLLM_RANKS if x > rank), None)
        hint = f"start it with --max-lora-rank {larger}" if larger else "it takes at most 512"
        console.print_message(f"note: rank {rank} is not a --max-lora-rank of vLLM; {hint}")
