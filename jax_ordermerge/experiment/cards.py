"""What model cards say: from which base, on which data orders, in which dtype, how it was measured.

The card of an export is written beside it. For a hub it gets what only a hub shows.
"""

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jax_ordermerge.checkpoint import json_files, remote, sidecar_files
from jax_ordermerge.checkpoint.resolve import assets_directory, is_on_hub
from jax_ordermerge.config import Config
from jax_ordermerge.config.data import list_sources
from jax_ordermerge.data import listing
from jax_ordermerge.data.prompt_card import prompt_section
from jax_ordermerge.data.prompt_format import PromptFormat
from jax_ordermerge.errors import UserError, first_line
from jax_ordermerge.experiment.run_config import read_config
from jax_ordermerge.json_types import Json, JsonRow
from jax_ordermerge.layout import RunLayout, member_name, read_json
from jax_ordermerge.merge.sources.public_names import public_name
from jax_ordermerge.merge.sources.references import Member

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_LICENSE = ("license", "license_name", "license_link")


def describe_training(config: Config, dtype: str) -> str:
    """Return sentences on how the members of a run came about, as Markdown.

    Args:
        config: of the run.
        dtype: of the tensors beside the card.

    Example:
        >>> print(describe_training(Config(), "bfloat16"))
        One base model, `quickstart` (shipped with jax_ordermerge), was fine-tuned 4 times on the
        same data in 4 different orders (level `sample`, 3 epochs, seed 0), in float32; the tensors
        here are bfloat16.
    """
    count, training = config.population.members, config.training
    base = public_name(config.model.base).origin
    base += " of random weights" if config.model.init == "random" else ""
    adapters = ""
    if (lora := config.lora) is not None:
        adapters = f" as adapters of rank {lora.rank} and alpha {lora.alpha:g}"
    epochs = f"{training.epochs} epoch{'s' if training.epochs > 1 else ''}"
    # members are trained in float32, so an export in another dtype has lost digits
    rounding = "" if dtype == "float32" else f"; the tensors here are {dtype}"
    differences = {
        "order": f"in {count} different orders",
        "init": f"in one order, from {count} initializations of the adapters",
        "all": f"in {count} different orders, from {count} initializations of the adapters",
    }
    return (
        f"One base model, {base}, was fine-tuned {count} times{adapters} on the same data"
        f" {differences[config.population.vary]} (level `{config.population.level}`, {epochs},"
        f" seed {config.seed}), in float32{rounding}."
    )


def member_card(
    config: Config, member: Member, form: PromptFormat, dtype: str, *, adapter: bool
) -> str:
    """Return the text of the model card of a member.

    Args:
        config: of the run.
        member: of the run, of whose directory the card has the last part.
        form: how the member is asked.
        dtype: of the tensors.
        adapter: whether they are those of its adapter alone.
    """
    name = f"{member.layout.root.resolve().name}/{member_name(member.number)}"
    step = "" if member.step is None else f" at step {member.step} of its training"
    text = (
        f"{describe_training(config, dtype)} This is member {member.number}{step}, `{name}`"
        + (": its adapter." if adapter else ".")
        + f"\n\n{prompt_section(form, adapter=adapter)}"
    )
    return sidecar_files.model_card(
        name,
        text,
        base_model=public_name(config.model.base).card_id,
        relation="adapter" if adapter else "finetune",
    )


# -------------------------------------------------------------------------------------------- hub


class HubCard(NamedTuple):
    """The model card of an upload.

    Attributes:
        text: of `README.md`.
        base: name of the base on the hub; of the first of several models; None where none is known.
        notes: what it leaves out.
    """

    text: str
    base: str | None
    notes: tuple[str, ...]


def hub_card(directory: Path, run: RunLayout | None) -> HubCard:
    """Return the card of an exported model for a hub: with license, data sets, results and recipe.

    Args:
        directory: of the model.
        run: whose merge it is, if it is one.

    Raises:
        UserError: the card is not valid, or an adapter names its base by a path.
    """
    notes = list[str]()
    path = directory / sidecar_files.CARD
    try:
        text = path.read_text() if path.is_file() else sidecar_files.model_card(directory.name)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8; write it anew in UTF-8") from error
    card = _parse(text)
    # cards of merges have it already
    recipe = directory / sidecar_files.RECIPE
    tags = card.data.get("tags") or ["jax_ordermerge"]
    card.data["tags"] = tags if "merge" in tags or not recipe.is_file() else [*tags, "merge"]
    named = card.data.get("base_model") or []
    bases = named if isinstance(named, list) else [named]
    public = [name for name in bases if _is_hub_name(name)]
    notes += [
        f"base_model {name} is no name on the hub (OWNER/NAME), so the card leaves it out"
        for name in bases
        if name not in public
    ]
    # only where a name is left out: otherwise the author's own form of the key stays
    if public != bases:
        card.data["base_model"] = public or None
        if not public:
            card.data.pop("base_model_relation", None)
    _check_adapter(directory)
    config = None if run is None else read_config(run.root)
    # what the author wrote goes before what the base says
    if not has_license(str(card)):
        for key, value in _known_license(public, config).items():
            card.data[key] = value
        if public and not has_license(str(card)):
            notes.append(f"the license is that which {public[0]} names on the hub")
    if run is not None and config is not None:
        if names := _hub_datasets(config):
            card.data["datasets"] = names
        if results := _results(run, config, directory.name):
            card.data["model_name"] = card.data.get("model_name") or directory.name
            card.data["eval_results"] = [*(card.data.get("eval_results") or ()), *results]
    # a card that has the recipe in it, as mergekit writes, is left as it is
    if recipe.is_file() and "merge_method:" not in card.text:
        card.text += f"\n## Recipe\n\n```yaml\n{recipe.read_text().strip()}\n```\n"
    return HubCard(str(card), public[0] if public else None, tuple(notes))


def _is_hub_name(name: object) -> bool:
    # a relative path may look like one
    return isinstance(name, str) and bool(_HUB_NAME.fullmatch(name)) and is_on_hub(name)


def has_license(text: str) -> bool:
    """Return whether a card names a license.

    Example:
        >>> has_license("---\\nlicense: mit\\n---\\n# Model")
        True
    """
    return bool(license_of(_parse(text).data.to_dict()))


def license_of(metadata: JsonRow) -> Json:
    """Return the keys of a card's metadata that name its license.

    Example:
        >>> license_of({"license": "other", "license_name": "llama3", "tags": ["merge"]})
        {'license': 'other', 'license_name': 'llama3'}
    """
    return {key: metadata[key] for key in _LICENSE if metadata.get(key)}


def with_keys(text: str, keys: Mapping[str, object]) -> str:
    """Return a card with further keys in its metadata.

    Example:
        >>> print(with_keys("---\\ntags:\\n- merge\\n---\\n# Model", {"license": "mit"}))
        ---
        tags:
        - merge
        license: mit
        ---
        # Model
    """
    card = _parse(text)
    for key, value in keys.items():
        card.data[key] = value
    return str(card)


def _parse(text: str) -> "ModelCard":
    from huggingface_hub import ModelCard

    try:
        return ModelCard(text)
    except Exception as error:  # of YAML, or of the keys: each library raises its own
        raise UserError(
            f"the metadata of {sidecar_files.CARD} cannot be read: {first_line(error)}"
        ) from error


def _check_adapter(directory: Path) -> None:
    path = directory / "adapter_config.json"
    base = json_files.read_json(path).get("base_model_name_or_path") if path.is_file() else ""
    # PEFT loads the base by this name; the path is also nobody else's business
    if base and not is_on_hub(str(base)):
        raise UserError(
            f"{path}: base_model_name_or_path is {base}, a path of this machine; give the name of"
            " the base on the hub"
        )


def _known_license(bases: list[str], config: Config | None) -> Json:
    """Return the license of the base as a card on this machine names it. Nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache

    paths = [try_to_load_from_cache(name, sidecar_files.CARD) for name in bases[:1]]
    if config is not None:
        # Not by `resolve`: it would fetch a bucket, convert a GGUF file, or miss a base that is
        # no longer there.
        base = config.model.base
        directory = remote.expand(base)
        if base.startswith("embedded:"):
            directory = assets_directory() / base.removeprefix("embedded:")
        paths.append(str(directory / sidecar_files.CARD))
    for path in paths:
        # what is known to be absent is an object of its own
        if isinstance(path, str) and Path(path).is_file():
            return license_of(_parse(Path(path).read_text()).data.to_dict())
    return {}


def _hub_datasets(config: Config) -> list[str]:
    """Return the data sets of the hub that a run was trained on."""
    names = []
    for source in list_sources(config.data.train):
        # raises where a file is no longer there, which is no data set of a hub
        with contextlib.suppress(UserError):
            match = listing.HUB_NAME.fullmatch(source.path)
            if match and listing.list_files(source.path) is None:
                names.append(match["name"])
    return list(dict.fromkeys(names))


def _results(run: RunLayout, config: Config, name: str) -> list["EvalResult"]:
    """Return what a run measured of a merge, in the form that a hub shows."""
    from huggingface_hub import EvalResult

    summaries = (read_json(run.evaluations) or {"models": []})["models"]
    # a run may have been evaluated before this merge was added
    summary = next((x for x in summaries if x["name"] == name), None)
    if summary is None:
        return []
    # the losses are of the run's own test examples, which no data set on a hub is
    losses = {key: summary.get(key) for key in ("loss", "perplexity")}
    measured = {f"test examples of {config.name}": losses}
    measured |= summary.get("tasks", {}) | summary.get("texts", {})
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset.replace(" ", "-"),
            dataset_name=dataset,
            metric_type=metric,
            metric_name=metric,
            metric_value=value,
        )
        for dataset, metrics in measured.items()
        for metric, value in metrics.items()
        # standard errors and numbers of items are no results; `value` is one of the others again
        if isinstance(value, float) and metric not in ("se", "value") and not metric.endswith("_se")
    ]
