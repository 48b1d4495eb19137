"""What a plan is made for: the architecture, and the examples where they are at hand. Weights are never read."""

import dataclasses
from pathlib import Path

import numpy as np

from jax_ordermerge.arch import ARCHITECTURES, ModelConfig, architecture_of
from jax_ordermerge.checkpoint import convert
from jax_ordermerge.config import Config
from jax_ordermerge.data import pack, source
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.errors import UserError, did_you_mean
from jax_ordermerge.experiment.specs import training_spec
from jax_ordermerge.plan import compiled
from jax_ordermerge.plan.analytic import Work
from jax_ordermerge.train import batches, flops


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the experiment is made of.

    Attributes:
        model: the architecture.
        named: where it is from.
        train: tokenized examples; None where they are not at hand.
        examples, tests: how many are trained on, and tested with; None where that is not known.
        test: tokenized test examples, if they are at hand.
        notes: what could not be read and what was taken in its place.
    """

    model: ModelConfig
    named: str
    train: Examples | None
    test: Examples | None
    examples: int | None
    tests: int | None
    notes: tuple[str, ...]


def read(
    config: Config,
    architecture: str | None = None,
    examples: int | None = None,
    tests: int | None = None,
) -> Inputs:
    """Find the architecture and the examples of a config.

    Args:
        config: of the run.
        architecture: a name of `arch.ARCHITECTURES`, a config.json or a directory with one; by default that of `model.base`.
        examples, tests: numbers to plan with, in place of the data of the config, which then are not read.

    Raises:
        UserError: there is no such architecture.
    """
    notes: list[str] = []
    base = None
    if architecture is None:
        try:
            base = convert.resolve(config.model.base, weights=False)
            model, named = (
                convert.load_config(base, config.model.ignore_config_keys),
                config.model.base,
            )
        except UserError as error:
            known = architecture_of(config.model.base)
            if known is None:
                raise UserError(
                    f"{error}; or give --architecture, a config.json or one of {', '.join(ARCHITECTURES)}"
                ) from error
            model, named = known, f"{config.model.base} by its name"
            notes.append(
                f"the files of {config.model.base} are not at hand: its published shape is taken"
            )
    else:
        model, named = _architecture(architecture, config), architecture
    train = test = None
    if base is not None and examples is None:
        try:
            train, test = _examples(config, base)
        except UserError as error:
            notes.append(f"data not read: {error}")
    if train is None:
        notes.append(
            f"every example is taken to be {config.data.max_length} tokens long (data.max_length)"
        )
    if train is None and examples is None:
        notes.append("the number of examples is not known: give --examples for hours")
    held = config.data.validation_examples + config.data.test_examples
    counted = (
        len(train) if train is not None else None if examples is None else max(examples - held, 1)
    )
    tested = len(test) if test is not None else tests or config.data.test_examples or None
    return Inputs(model, named, train, test, counted, tested, tuple(notes))


def _architecture(name: str, config: Config) -> ModelConfig:
    known = architecture_of(name)
    if known is not None:
        return known
    path = Path(name).expanduser()
    if path.name == "config.json" and path.is_file():
        path = path.parent
    if not path.is_dir():
        raise UserError(
            f"--architecture {name}: neither a config.json, nor a directory with one, nor a known name{did_you_mean(name, ARCHITECTURES)}"
        )
    return convert.load_config(path, config.model.ignore_config_keys)


def _examples(config: Config, base: Path) -> tuple[Examples, Examples | None]:
    tokenizer = source.load_tokenizer(base)
    pairs = config.objective.kind == "dpo"
    data = config.data.model_copy(update={"format": "preference"}) if pairs else config.data
    splits = source.load_splits(data, tokenizer, seed=config.seed)
    train = splits["train"]
    if pairs:  # only their values are measured in a run; the program is the same
        train = dataclasses.replace(train, reference=np.zeros((len(train), 2), np.float32))
    return train, splits.get("test")


def work(config: Config, inputs: Inputs) -> Work:
    """Return what a step of one member is given, on average over a training."""
    spec = training_spec(config)
    examples = inputs.train or compiled.made_up(spec)
    plan = batches.make_plan(spec, examples, (0,))
    lengths = np.concatenate([part.lengths for part in examples.parts])
    epoch = plan.epoch_steps
    steps = None
    if inputs.train is not None:
        steps = plan.steps
    elif inputs.examples is not None:
        steps = config.training.epochs * -(-inputs.examples // config.training.batch)
    rows = config.training.batch * len(list(examples.parts))
    return Work(
        rows,
        plan.lengths[-1],
        float(lengths.sum()) / epoch,
        flops.training_flops(inputs.model, lengths, config.lora) / epoch,
        steps,
    )


def padded(
    examples: Examples | None, count: int | None, config: Config
) -> tuple[float, int] | None:
    """Return the tokens of a pass over examples, padding included, and the longest row; None where their number is not known."""
    if examples is not None:
        longest = pack.bucket_lengths(examples.sequences.longest, config.data.buckets)[-1]
        return float(len(examples.sequences) * longest), longest
    if count is None:
        return None
    sequences = count * (2 if config.objective.kind == "dpo" else 1)
    return float(sequences * config.data.max_length), config.data.max_length
