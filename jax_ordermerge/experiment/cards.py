"""What the model cards of a run say: from which base, on which data orders, in which dtype."""

from jax_ordermerge.checkpoint import sidecar_files
from jax_ordermerge.config import Config
from jax_ordermerge.data.prompt_card import prompt_section
from jax_ordermerge.data.prompt_format import PromptFormat
from jax_ordermerge.layout import member_name
from jax_ordermerge.merge.sources.public_names import public_name
from jax_ordermerge.merge.sources.references import Member


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
