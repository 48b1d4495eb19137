"""Inputs of a plan: the architecture, and the examples if they can be read. Weights never are."""

import dataclasses
from pathlib import Path

import numpy as np

from jax_ordermerge.arch import ARCHITECTURES, ModelConfig, architecture_of
from jax_ordermerge.checkpoint import convert, remote
from jax_ordermerge.data import pack, source, tokenizers
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.errors import UserError, did_you_mean
from jax_ordermerge.plan import compiled
from jax_ordermerge.plan.analytic import Workload
from jax_ordermerge.plan.spec import PlanSpec
from jax_ordermerge.train import batches, flops

_PROMPT_FRACTION = 0.5  # of data.max_length, if no test example is there to measure prompts


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Model and data of an experiment.

    Attributes:
        model: architecture.
        model_name: where the architecture is from.
        train: tokenized training examples; None if they cannot be read.
        test: tokenized test examples; None if they cannot be read or there are none.
        train_count: number of training examples; None if it is not known.
        test_count: number of test examples; None if it is not known.
        notes: what could not be read, and what is used in its place.
        base_dtype: that config.json of the base names; None if the base cannot be read.
        unread: why the examples cannot be read; None where they are read, or not looked for.
    """

    model: ModelConfig
    model_name: str
    train: Examples | None
    test: Examples | None
    train_count: int | None
    test_count: int | None
    notes: tuple[str, ...]
    base_dtype: str | None = None
    unread: str | None = None

    def prompt_length(self, spec: PlanSpec) -> int:
        """Return the tokens of the longest test prompt, or a guess without test examples."""
        if self.test is None:
            # at least one token, because no program has an empty prompt
            return max(int(_PROMPT_FRACTION * spec.data.max_length), 1)
        return max(len(self.test.prompt(row)) for row in range(len(self.test)))


def read_inputs(
    spec: PlanSpec,
    architecture: str | None = None,
    examples: int | None = None,
    tests: int | None = None,
) -> Inputs:
    """Read the architecture and the examples that settings name.

    Args:
        spec: settings.
        architecture: a name of `arch.ARCHITECTURES`, a config.json or a directory with one; by
            default that of `model.base`.
        examples: number of training examples to plan with; data files are then not read.
        tests: number of test examples to plan with if none are read.

    Raises:
        UserError: the architecture is not known.
    """
    notes: list[str] = []
    base = None
    if architecture is not None:
        model, name = _read_architecture(architecture, spec), architecture
    else:
        try:
            # config and tokenizer alone: the plan of a model must not begin with its download
            base = convert.resolve(spec.model.base, weights=False)
            model, name = convert.load_config(base, spec.model.ignore_config_keys), spec.model.base
        except UserError as error:
            # gated models need a login, but their shapes are public, and a plan needs no more
            published = architecture_of(spec.model.base)
            if published is None:
                raise UserError(
                    f"{error}; or give --architecture, a config.json or one of"
                    f" {', '.join(ARCHITECTURES)}"
                ) from error
            model, name = published, f"{spec.model.base} by its name"
            notes.append(f"{spec.model.base} cannot be read: its published shape is used")
    train = test = unread = None
    # without the base there is no tokenizer, so lengths cannot be measured
    if base is not None and examples is None:
        try:
            train, test = _read_examples(spec, base)
        except UserError as error:
            unread = str(error)
            notes.append(f"data not read: {unread}")
    if train is None:
        notes.append(
            f"every example counts as {spec.data.max_length} tokens long (data.max_length)"
        )
    if train is None and examples is None:
        notes.append("the number of examples is not known: give --examples to get hours")
    train_count = None
    if train is not None:
        train_count = len(train)
    elif examples is not None:
        # as a run does: held-out examples are taken from the training file
        train_count = max(examples - spec.data.validation_examples - spec.data.test_examples, 1)
    test_count = len(test) if test is not None else tests or spec.data.test_examples or None
    # weights are not read, and a config.json without a dtype is rare
    dtype = None
    if base is not None:
        dtype = convert.named_dtype(base)
    return Inputs(model, name, train, test, train_count, test_count, tuple(notes), dtype, unread)


def _read_architecture(name: str, spec: PlanSpec) -> ModelConfig:
    published = architecture_of(name)
    if published is not None:
        return published
    path = remote.expand(name)
    # the reader takes directories; a user may have the file alone
    if path.name == "config.json" and path.is_file():
        path = path.parent
    if not path.is_dir():
        raise UserError(
            f"--architecture {name}: expected a config.json, a directory with one or a known"
            f" name{did_you_mean(name, ARCHITECTURES)}"
        )
    return convert.load_config(path, spec.model.ignore_config_keys)


def _read_examples(spec: PlanSpec, base: Path) -> tuple[Examples, Examples | None]:
    # the splits of a run, by its seed: lengths are those of the very examples that are trained on
    splits = source.load_splits(spec.data, tokenizers.load_tokenizer(base), seed=spec.seed)
    train = splits["train"]
    if spec.has_pairs:
        # a run measures the log-probabilities of the base; only their values depend on it
        train = dataclasses.replace(train, reference=np.zeros((len(train), 2), np.float32))
    return train, splits.get("test")


def measure_workload(spec: PlanSpec, inputs: Inputs) -> Workload:
    """Return the inputs of a training step of one member, on average over the training."""
    # Orders permute examples, so every member has the same tokens per epoch: one member is enough.
    examples = inputs.train or compiled.longest_examples(spec)
    plan = batches.make_plan(spec, examples, (0,))
    lengths = np.concatenate([part.lengths for part in examples.parts])
    steps = None
    # with packing the number of steps is that of the packs, which only the plan knows
    if inputs.train is not None:
        steps = plan.steps
    elif inputs.train_count is not None:
        steps = spec.training.epochs * -(-inputs.train_count // spec.training.batch)
    return Workload(
        # two parts, chosen and rejected, for preference pairs
        rows=spec.training.batch * len(list(examples.parts)),
        # the longest bucket: memory must hold for it
        length=plan.lengths[-1],
        tokens=float(lengths.sum()) / plan.epoch_steps,
        flops=flops.training_flops(inputs.model, lengths, spec.lora) / plan.epoch_steps,
        steps=steps,
    )


def padded_tokens(
    examples: Examples | None, count: int | None, spec: PlanSpec
) -> tuple[int, int] | None:
    """Return the tokens of a pass over examples with padding, and the length of the longest row.

    None if neither the examples nor their number is known.
    """
    if examples is not None:
        # all at the longest bucket: an upper bound, as hours of a plan should not be too low
        longest = pack.bucket_lengths(examples.sequences.longest, spec.data.buckets)[-1]
        return len(examples.sequences) * longest, longest
    if count is None:
        return None
    sequences = count * (2 if spec.has_pairs else 1)
    return sequences * spec.data.max_length, spec.data.max_length
