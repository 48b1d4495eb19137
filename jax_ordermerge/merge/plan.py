"""What a merge of models will do, tensor by tensor, with every input checked: made before anything is computed or written."""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import numpy as np

from jax_ordermerge import arch
from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.config.merge import Dtype
from jax_ordermerge.errors import UserError, did_you_mean
from jax_ordermerge.merge.methods import table
from jax_ordermerge.merge.sources.storage import Source

DTYPES: tuple[str, ...] = get_args(Dtype)
# what a fine-tune may change without being another architecture
MAY_DIFFER = {
    "bos_token_id",
    "eos_token_ids",
    "pad_token_id",
    "initializer_range",
    "max_position_embeddings",
}


class View(NamedTuple):
    """A tensor of a source: its number in the plan, and the name there."""

    source: int
    name: str


@dataclasses.dataclass(frozen=True)
class Output:
    """One tensor to be written.

    Attributes:
        name, shape, layer: of the merged model; `layer` is None outside the layers.
        members: in the order that weights and random choices refer to.
        base: None where the method can do without and none was given.
        method, parameters: of this tensor, as `table.check_parameters` returned them.
        weights: as `table.check_weights` returned them.
    """

    name: str
    shape: tuple[int, ...]
    layer: int | None
    members: tuple[View, ...]
    base: View | None
    method: str
    parameters: Mapping[str, Any]
    weights: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """A merge with everything checked and resolved.

    Attributes:
        config: of the merged model.
        sources: the models, each once.
        outputs: every tensor of `config`, in file order.
        seed: of the methods that draw.
        dtype: models are rounded to it before merging.
        out_dtype: of the tensors written.
        stochastic: round to bfloat16 at random instead of to nearest even.
        recipe: what is written into the output about all this, without paths of this machine.
        tokenizer_from: directory of the tokenizer files, if any.
        notes: what a user should know (a stated rule that was applied).
        chat_template: text that replaces that of the tokenizer.
        tokenizer_files: name -> text, of files that replace those in `tokenizer_from`.
    """

    config: ModelConfig
    sources: tuple[Source, ...]
    outputs: tuple[Output, ...]
    seed: int
    dtype: np.dtype[Any]
    out_dtype: np.dtype[Any]
    recipe: Mapping[str, Any]
    stochastic: bool = False
    tokenizer_from: Path | None = None
    notes: tuple[str, ...] = ()
    chat_template: str | None = None
    tokenizer_files: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def input_bytes(self) -> int:
        """Bytes that are read at least once."""
        views = {
            view
            for out in self.outputs
            for view in (*out.members, *([out.base] if out.base else []))
        }
        infos = [self.sources[view.source].info(view.name) for view in views]
        return sum(math.prod(info.shape) * info.dtype.itemsize for info in infos)

    @property
    def output_bytes(self) -> int:
        """Bytes of the tensors that are written."""
        return sum(math.prod(out.shape) for out in self.outputs) * self.out_dtype.itemsize


def uniform(
    members: Sequence[Source],
    base: Source | None,
    *,
    method: str,
    seed: int = 0,
    weights: Sequence[float] | None = None,
    parameters: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    tokenizer_from: Path | None = None,
) -> Plan:
    """Plan a merge of models of one architecture by one method throughout.

    Args:
        members: in the order that weights and random choices refer to. Config and tokenizer are those of the first.
        base: may be None for methods that do not need it, and then no diagnostics are made.
        method, seed, weights, parameters: as for `population.merge`.
        dtype: models are rounded to it before merging, and the output is stored in it; None is that of the members.
        tokenizer_from: by default the first member's directory.

    Raises:
        UserError: bad input; the architectures differ (the difference is named).
    """
    checked = table.check_parameters(method, parameters)
    table.refuse_data_dependent(method)
    if not members:
        raise UserError("nothing to merge: give the directories of the members")
    if table.METHODS[method].needs_base(checked) and base is None:
        needs = "with resample " if method == "selection" else ""
        raise UserError(f"merge method {method} {needs}needs the base model; give it with --base")
    prepared = table.check_weights(method, weights, len(members), checked)
    sources = (*members, *([] if base is None else [base]))
    for other in sources[1:]:
        check_same(sources[0], other)
    config, stored = members[0].config, resolve_dtype(dtype, members)
    views = range(len(members))
    outputs = tuple(
        Output(
            name,
            spec.hf_shape,
            layer,
            tuple(View(i, name) for i in views),
            None if base is None else View(len(members), name),
            method,
            checked,
            prepared,
        )
        for name, spec, layer in arch.hf_tensors(config)
    )
    recipe = {
        "merge_method": method,
        "models": [Path(one.label).name for one in members],
        "base_model": None if base is None else Path(base.label).name,
        "weights": None if weights is None else [float(w) for w in weights],
        "parameters": checked,
        "seed": seed,
        "dtype": stored.name,
    }
    return Plan(
        config,
        sources,
        outputs,
        seed,
        stored,
        stored,
        recipe,
        tokenizer_from=tokenizer_from or members[0].directory,
    )


def check_same(one: Source, other: Source, but: Collection[str] = ()) -> None:
    """Require equal architectures.

    Args:
        one, other: the models.
        but: fields of `ModelConfig` in which they may differ.

    Raises:
        UserError: the first difference is named.
    """
    for field in dataclasses.fields(ModelConfig):
        a, b = getattr(one.config, field.name), getattr(other.config, field.name)
        if field.name not in MAY_DIFFER and field.name not in but and a != b:
            raise UserError(
                f"{one.label} and {other.label} are of different architectures: {field.name} is {a!r} and {b!r};"
                " only equal ones can be merged"
            )


def resolve_dtype(dtype: str | None, members: Sequence[Source]) -> np.dtype[Any]:
    """Return the dtype asked for, or the one in which all members are stored.

    Raises:
        UserError: it is not offered, or the members differ.
    """
    if dtype is not None:
        if dtype not in DTYPES:
            raise UserError(f"dtype '{dtype}' is not offered{did_you_mean(dtype, DTYPES)}")
        return np.dtype(jax.numpy.dtype(dtype))
    found = {one.info(name).dtype for one in members for name, _, _ in arch.hf_tensors(one.config)}
    names = sorted(one.name for one in found)
    if len(found) > 1 or names[0] not in DTYPES:
        raise UserError(
            f"the members are stored in {' and '.join(names)}; choose one of {', '.join(DTYPES)} with dtype"
        )
    return found.pop()
