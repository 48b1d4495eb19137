"""Every check of a run that is made before anything is written.

`ordermerge plan` and `launch` call `check_config`, too: it needs the config alone, where the others
need devices, weights or data. Checks of one section against a number, which the planner makes as
well, are methods of the section: `Population.check_groups`, `Data.check_length`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from jax.sharding import Mesh

from jax_ordermerge import arch
from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.checkpoint import alias, convert
from jax_ordermerge.checkpoint.safetensors import Reader
from jax_ordermerge.config import Config, load_config
from jax_ordermerge.config.evaluation import TASK_KINDS, ShotsTask, Task
from jax_ordermerge.config.merge import LOSS, Search
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.data.listing import HUB_NAME
from jax_ordermerge.data.tokenizers import Tokenizer
from jax_ordermerge.errors import UserError, did_you_mean
from jax_ordermerge.evaluate import harness
from jax_ordermerge.experiment import sample_generations
from jax_ordermerge.experiment.specs import training_spec
from jax_ordermerge.experiment.splits import Overlap, check_splits, refuse_overlaps
from jax_ordermerge.layout import RunLayout
from jax_ordermerge.merge.methods import table
from jax_ordermerge.model import lora, quantization
from jax_ordermerge.search import search
from jax_ordermerge.train import frozen
from jax_ordermerge.train.frozen import Storage


def check_config(config: Config) -> None:
    """Check what the schema cannot: the output, the merge methods, their parameters and weights.

    Raises:
        UserError: several processes cannot write checkpoints to the output; a method is unknown,
            does not take these parameters, weights or number of members, or needs data that are
            absent.
    """
    # Orbax would find out at the first checkpoint, after hours.
    if config.distributed.coordinator is not None:
        alias.check_path(config.directory)
    # the files of a run among those of a model could not be told apart any more
    if (config.directory / "config.json").is_file():
        raise UserError(
            f"output {config.directory} is a model (it has config.json); choose another directory"
            " with --set output=DIRECTORY"
        )
    members = config.population.members
    for spec in config.merge.methods:
        parameters = table.check_parameters(spec.method, spec.parameters)
        needs = table.METHODS[spec.method].needs
        if needs is None:
            table.check_weights(spec.method, spec.weights, members, parameters)
            continue
        # the models that such a method merges are not the members alone: with `fisher` there are
        # as many diagonals beside them, with `validation` it is a choice of them
        table.refuse_weights(spec.method, spec.weights)
        if needs == "validation" and not config.data.validation_examples:
            raise UserError(
                f"merge method {spec.method} chooses on validation data:"
                " set data.validation_examples"
            )


def check_groups(config: Config, groups: int) -> None:
    """Check that the device groups share the members: of all populations, or if needed of one.

    Args:
        config: of the run.
        groups: size of the mesh axis `order`.

    Raises:
        UserError: they do not.
    """
    population = config.population
    population.check_groups(groups)
    # these run the members of one population beside each other, and all else takes any number
    uses = [str(control) for control in config.merge.controls if control == "ensemble"]
    uses += [spec.method for spec in config.merge.methods if spec.method == "fisher"]
    if uses and population.members % groups:
        raise UserError(
            f"{uses[0]} divides the members of a population over the device groups;"
            f" population.members = {population.members} is not a multiple of mesh.order ="
            f" {groups}: change one of them, or leave out {uses[0]}"
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
        # by the headers of the files; the tensors themselves are read when they are needed
        convert.check_tensors(Reader(base_dir), model)
    config.data.check_length(model.context_length, config.model.base)


def check_frozen(config: Config, model: ModelConfig, mesh: Mesh) -> None:
    """Check that a quantized base can be made, and divided over the mesh.

    Raises:
        UserError: qwix is not installed, or a block would be on two devices.
    """
    if config.lora is not None and config.lora.quantizes:
        quantization.check_installed(f"lora.base_dtype = {config.lora.base_dtype}")
        frozen.abstract(arch.tensor_table(model), Storage.of(training_spec(config)), mesh)


def check_data(
    config: Config,
    model: ModelConfig,
    tokenizer: Tokenizer,
    splits: Mapping[str, Examples],
    overlaps: Sequence[Overlap],
) -> None:
    """Check the examples against each other, the objective, the model, prompts and search.

    Raises:
        UserError: the first of these that does not fit.
    """
    check_splits(config, splits, overlaps)
    # a token beyond the table would read the row of another token: gathers clamp on devices
    if len(tokenizer) > model.vocab_size:
        raise UserError(
            f"{config.model.base}: the tokenizer has {len(tokenizer)} tokens,"
            f" the model {model.vocab_size}"
        )
    for task in config.evaluation.tasks:
        # the evaluation would find out as well, after the training
        if isinstance(task, ShotsTask) and task.data is None and "test" not in splits:
            raise UserError(
                f"evaluation task {task.name} has no data; set data.test or the task's own data"
            )
    check_tasks(config, model, tokenizer, splits)
    if config.samples.every is not None:
        sample_generations.read_prompts(config, model, tokenizer, splits)
    if config.merge.auto is not None:
        check_search(config, model, tokenizer, splits, overlaps, config.merge.auto)


def check_tasks(
    config: Config, model: ModelConfig, tokenizer: Tokenizer, splits: Mapping[str, Examples]
) -> None:
    """Check the data of the evaluation tasks that no earlier start of the run has checked.

    Before members are trained that they measure, or merged: a trained run may get further tasks.

    Raises:
        UserError: a row or a reference does not fit its task, or a prompt is too long.
    """
    run = RunLayout(config.directory)
    # A config is written after its tasks were checked. They are checked again while the training
    # goes on, which is the expensive part; later their own stage finds out what has changed.
    checked: Sequence[Task] = ()
    if run.is_run and run.training_state.is_file():
        checked = load_config(run.config).evaluation.tasks
    for task in config.evaluation.tasks:
        if task in checked:
            continue
        paths = (task.data, task.shots_from if isinstance(task, ShotsTask) else None)
        # A machine that trains need not reach the hub.
        if any(path and HUB_NAME.fullmatch(path) and not Path(path).exists() for path in paths):
            continue
        try:
            harness.check(
                task, model, tokenizer, config.data, test=splits.get("test"), seed=config.seed
            )
        except UserError as error:
            named = task.name in str(error)
            # Errors that name their task are passed on; those of a row or a file get the name here.
            raise error if named else UserError(f"evaluation task {task.name}: {error}") from error


def reason_against(
    config: Config, model: ModelConfig, tokenizer: Tokenizer, validation: Examples, task: Task
) -> str:
    """Return why a search cannot measure a task on validation examples; empty where it can.

    It can where the items of the task are the examples of the test split, asked as they were
    learned. Nothing is chosen on items on which a run reports.
    """
    if TASK_KINDS[task.kind].result != "accuracy":
        return f"its kind, {task.kind}, has no right answers"
    if not isinstance(task, ShotsTask) or task.data is not None:
        return "it has data of its own, on which the run reports it"
    # Without `data.test` a task that would read its rows from the file of the test split fails.
    data = config.data.model_copy(update={"test": None})
    try:
        harness.check(
            of_all_examples(task), model, tokenizer, data, test=validation, seed=config.seed
        )
    except UserError:
        return "with shots, a prompt or a description it reads the rows of data.test"
    return ""


def of_all_examples(task: Task) -> Task:
    """Return a task without its limit, which is of the reported items."""
    return task.model_copy(update={"limit": None})


def check_search(
    config: Config,
    model: ModelConfig,
    tokenizer: Tokenizer,
    splits: Mapping[str, Examples],
    overlaps: Sequence[Overlap],
    space: Search,
) -> None:
    """Check a search for a merge, before members are trained for it.

    Raises:
        UserError: there are no validation examples, some of them are also in another split, the
            measure cannot be measured on them, or the space is wrong.
    """
    if "validation" not in splits:
        raise UserError(
            "a merge is chosen on validation examples: set data.validation_examples,"
            " or give ordermerge search --validation FILE"
        )
    validation = splits["validation"]
    # Fewer have no standard error that a choice could rest on.
    if len(validation) < search.MIN_EXAMPLES:
        raise UserError(
            f"{len(validation)} validation examples are too few to choose a merge on;"
            f" set data.validation_examples to {search.MIN_EXAMPLES} or more"
        )
    # A member has learned the training examples, and the claim rests on the test examples: on
    # either of them the choice would be biased. data.allow_overlap does not change that.
    refuse_overlaps(
        [overlap for overlap in overlaps if overlap.split == "validation"],
        "a merge is chosen on examples that are in no other split; remove them",
    )
    tasks = {task.name: task for task in config.evaluation.tasks}
    if LOSS in tasks:
        raise UserError(f"evaluation task {LOSS} has the name of a measure; give it another name")
    for name in space.measure:
        if name == LOSS:
            continue
        if name not in tasks:
            hint = did_you_mean(name, [LOSS, *tasks])
            raise UserError(
                f"measure {name} of a search{hint}: expected loss or a task of evaluation.tasks"
            )
        if reason := reason_against(config, model, tokenizer, validation, tasks[name]):
            raise UserError(
                f"measure {name} of a search: {reason}; choose by loss, or by a task of which the"
                " items are those of data.test, asked as they are trained"
            )
    seed = config.seed if space.seed is None else space.seed
    search.check_space(space, config.population.members, model, seed)
