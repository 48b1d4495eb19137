"""Every check of a run that is made before anything is written, each in one place.

`ordermerge plan` and `launch` read neither weights nor data. They call `check_config`, which needs
the config alone.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.checkpoint import convert
from jax_ordermerge.checkpoint.safetensors import Reader
from jax_ordermerge.config import Config
from jax_ordermerge.config.merge import Search
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.errors import UserError
from jax_ordermerge.experiment import sample_generations
from jax_ordermerge.merge.methods import table
from jax_ordermerge.model import lora
from jax_ordermerge.search import search
from jax_ordermerge.train import trackers


def check_config(config: Config) -> None:
    """Check what the schema cannot: the merge methods and their parameters.

    Raises:
        UserError: a method is unknown, its parameters are wrong, or it needs data that are not there.
    """
    for spec in config.merge.methods:
        table.check_parameters(spec.method, spec.parameters)
        table.refuse_weights(spec.method, spec.weights)
        needs = table.METHODS[spec.method].needs
        if needs == "validation" and not config.data.validation_examples:
            raise UserError(
                f"merge method {spec.method} chooses on validation data: "
                "set data.validation_examples"
            )


def check_tracking(config: Config) -> None:
    """Check the libraries of `tracking`; only the machine that trains needs them."""
    trackers.check(config.tracking)


def check_groups(config: Config, groups: int) -> None:
    """Check that the device groups share the members evenly.

    Args:
        config: of the run.
        groups: size of the mesh axis `order`.

    Raises:
        UserError: they do not.
    """
    for key, members in (
        ("members", config.population.members),
        ("wave", config.population.wave or groups),
    ):
        if members % groups:
            raise UserError(
                f"population.{key} = {members} is not a multiple of the order axis"
                f" ({groups} device groups); change one"
            )


def check_model(config: Config, base_dir: Path, model: ModelConfig) -> None:
    """Check the base model: adapters, tensors and context length.

    Raises:
        UserError: a LoRA target is unknown, a tensor is absent or has another shape, or examples
            may be longer than the context.
    """
    if config.lora is not None:
        lora.targets(model, config.lora)
    if config.model.init == "pretrained":
        convert.check_tensors(Reader(base_dir), model)
    if config.data.max_length > model.max_position_embeddings:
        raise UserError(
            f"data.max_length = {config.data.max_length} is above the"
            f" {model.max_position_embeddings} positions of {config.model.base}"
        )


def check_data(
    config: Config, model: ModelConfig, tokenizer: Any, splits: Mapping[str, Examples]
) -> None:
    """Check the examples against the objective, the model, the prompts and the search.

    Raises:
        UserError: the first of these that does not fit.
    """
    if splits["train"].rejected is not None and config.objective.kind != "dpo":
        raise UserError(
            f"data.train = {config.data.train} holds preference pairs, objective.kind = sft learns"
            " responses; set it to dpo"
        )
    if len(tokenizer) > model.vocab_size:
        raise UserError(
            f"{config.model.base}: the tokenizer has {len(tokenizer)} tokens,"
            f" the model {model.vocab_size}"
        )
    if config.samples.every is not None:
        sample_generations.read_prompts(config, model, tokenizer, splits)
    if config.merge.auto is not None:
        check_search(config, model, splits, config.merge.auto)


def check_search(
    config: Config, model: ModelConfig, splits: Mapping[str, Examples], space: Search
) -> None:
    """Check a search for a merge, before members are trained for it.

    Raises:
        UserError: there are no validation examples, some of them are also in another split, or the
            space is wrong.
    """
    if "validation" not in splits:
        raise UserError(
            "a merge is chosen on validation examples: set data.validation_examples,"
            " or give ordermerge search --validation FILE"
        )
    others = {name: examples for name, examples in splits.items() if name != "validation"}
    search.check_disjoint(splits["validation"], others)
    seed = config.seed if space.seed is None else space.seed
    search.check_space(space, config.population.members, model, seed)
