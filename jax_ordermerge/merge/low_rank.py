"""A merged model as a low-rank adapter on its base.

Of any model, by the truncated SVD of its change. Of k adapters of rank r without loss, where the
merge has rank k r: sum_i w_i s_i B_i A_i = [w_1 s_1 B_1 .. w_k s_k B_k] [A_1; ..; A_k], and KnOTS,
whose basis the factors B span.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from jax_ordermerge import tree
from jax_ordermerge.arch import TensorSpec
from jax_ordermerge.checkpoint import safetensors
from jax_ordermerge.config import Lora
from jax_ordermerge.errors import UserError
from jax_ordermerge.json_types import JsonRow
from jax_ordermerge.merge.methods import knots, spectral
from jax_ordermerge.merge.sources import storage
from jax_ordermerge.merge.sources.lora import LoRA
from jax_ordermerge.merge.sources.storage import Source
from jax_ordermerge.model import lora

_BLOCK = 1 << 20  # elements of a tensor that are compared at a time


class Change(NamedTuple):
    """How far a tensor of a model is from that of its base.

    Attributes:
        name: Hugging Face name.
        norm: ||theta - theta_0||.
        residual: ||theta - theta_0 - B A||, with the factors as they are written. The whole norm
            where the adapter cannot hold the change.
        base_norm: ||theta_0||.
    """

    name: str
    norm: float
    residual: float
    base_norm: float

    @property
    def error(self) -> float:
        """The residual per norm, 0 of a tensor that did not change."""
        return self.residual / self.norm if self.norm else 0.0


class LowRank(NamedTuple):
    """An adapter, and what it leaves out.

    Attributes:
        settings: rank and targets. alpha equals the rank, so that the factors are the change.
        adapter: the dict of `model.lora.table`, float32.
        matrices: of the targets.
        left_out: tensors that changed and that an adapter of linear layers cannot hold.
    """

    settings: Lora
    adapter: tree.Tree
    matrices: tuple[Change, ...]
    left_out: tuple[Change, ...]

    @property
    def error(self) -> float:
        """What the adapter leaves out of the change of all tensors, per norm of that change."""
        changes = (*self.matrices, *self.left_out)
        # every tensor has its share in both sums, also those that the adapter cannot hold
        residual, norm = (
            math.hypot(*(getattr(change, part) for change in changes))
            for part in ("residual", "norm")
        )
        return residual / norm


def approximate(
    model: Source, base: Source, rank: int, dtype: DTypeLike, layers: Iterable[TensorSpec]
) -> LowRank:
    """Return the adapter of a rank that is nearest to the change of each matrix.

    Args:
        model: of the architecture of the base.
        base: the base.
        rank: of every matrix; a matrix of fewer rows or columns has zeros beyond.
        dtype: the factors are rounded to it.
        layers: the entries of the tensor table, in any wrapper that shows progress.

    Raises:
        UserError: the rank is above that of every matrix, no linear layer changed, or a change is
            not finite.
    """
    # only what PEFT and every server take as targets: the linear layers
    targets = lora.targets(model.config, Lora())
    linear, largest = {spec.path for spec in targets}, max(min(spec.hf_shape) for spec in targets)
    if rank > largest:
        raise UserError(f"--rank {rank}: no matrix of {model.label} has a rank above {largest}")
    adapter, matrices, left_out = dict[str, np.ndarray](), list[Change](), list[Change]()
    modules = []
    for spec in layers:
        names = spec.hf_names()
        if spec.path not in linear:
            changes = [_change(model, base, name) for name in names]
            left_out += [change for change in changes if change.norm]
            continue
        left, right, changes = [], [], []
        for name in names:
            change = _change(model, base, name)
            # float64: the Gram matrix of `spectral.svd` has the squares of the singular values
            values = storage.read(model, name).astype(np.float64)
            values -= storage.read(base, name).astype(np.float64)
            # the residual of the factors as they are rounded: what a server will compute with
            b, a = factor(values, rank, dtype)
            residual = float(np.linalg.norm(values - b.astype(np.float64) @ a))
            changes.append(change._replace(residual=residual))
            left.append(b)
            right.append(a)
        # A module is adapted in all layers or in none: one list of targets serves all of them.
        if any(change.norm for change in changes):
            path = spec.path.removesuffix("weight")
            adapter[f"{path}lora_a"], adapter[f"{path}lora_b"] = np.stack(right), np.stack(left)
            matrices += changes
            modules.append(spec.hf_name.split(".")[-2])
    if not modules:
        raise UserError(
            f"{model.label} and {base.label} have the same linear layers: there is nothing for an"
            " adapter to hold"
        )
    settings = Lora(rank=rank, alpha=rank, targets=tuple(modules))
    return LowRank(settings, tree.unflatten(adapter), tuple(matrices), tuple(left_out))


def _change(model: Source, base: Source, name: str) -> Change:
    """Return the change of a tensor."""
    # in blocks: of a model of 70 B one embedding is 8 GiB in float64
    size = math.prod(base.info(name).shape)
    squares = np.zeros(2)
    for start in range(0, size, _BLOCK):
        first, last = (_read(source, name, start, size) for source in (base, model))
        squares += [np.square(last - first).sum(), np.square(first).sum()]
    norm, base_norm = np.sqrt(squares).tolist()
    # LAPACK does not come to an end, or raises without a name
    if not math.isfinite(norm):
        raise UserError(
            f"{model.label} or {base.label} has elements of {name} that are NaN or infinite"
        )
    return Change(name, norm, norm, base_norm)


def _read(source: Source, name: str, start: int, size: int) -> np.ndarray:
    """Return a block of a tensor, float64[n]."""
    block = np.empty(min(_BLOCK, size - start), source.info(name).dtype)
    source.read_into(name, start, block)
    return block.astype(np.float64)


def factor(change: np.ndarray, rank: int, dtype: DTypeLike) -> tuple[np.ndarray, np.ndarray]:
    """Return B [m, rank] and A [rank, n], float32, of the nearest matrix B A.

    Both have the roots of the singular values, so that neither overflows or vanishes in bfloat16.

    Args:
        change: float64[m, n].
        rank: of the factors. Beyond that of the matrix they are zero.
        dtype: the factors are rounded to it.

    Example:
        >>> b, a = factor(np.diag([4.0, 1.0]), 1, "float32")
        >>> (abs(b) @ abs(a)).tolist()
        [[4.0, 0.0], [0.0, 0.0]]
    """
    u, s, vt = spectral.svd(np, change)
    # a matrix may be smaller than the rank, which is one number for all
    count = min(rank, len(s))
    roots = np.sqrt(s[:count])
    b, a = np.zeros((change.shape[0], rank)), np.zeros((rank, change.shape[1]))
    b[:, :count], a[:count] = u[:, :count] * roots[None], roots[:, None] * vt[:count]
    rounded = (safetensors.cast(x, np.dtype(dtype), "a factor") for x in (b, a))
    left, right = (x.astype(np.float32) for x in rounded)
    return left, right


class Term(NamedTuple):
    """The change s B A that an adapter makes to one matrix: s, B [m, r] and A [r, n]."""

    scale: float
    b: np.ndarray
    a: np.ndarray


# Of the terms of all members, None of one that leaves the matrix as it is: B and A of the merge.
Combine = Callable[[Sequence[Term | None]], tuple[np.ndarray, np.ndarray] | None]


def join(
    members: Sequence[LoRA], merges: Mapping[str, tuple[Combine, Sequence[int]]]
) -> tuple[Lora, tree.Tree]:
    """Return a merge of adapters as one adapter, with its settings.

    Its rank is the largest of a matrix, mostly the sum of the ranks. Other matrices get zeros
    beyond theirs: servers want one rank for all.

    Args:
        members: adapters on one base.
        merges: Hugging Face name of each matrix -> how it is merged, and the numbers of the
            members.

    Raises:
        UserError: an adapter changes more than s B A of linear layers, or nothing is left.
    """
    # all members first: reading factors takes longer than to refuse them
    for member in members:
        _refuse_beyond_factors(member)
    targets = lora.targets(members[0].config, Lora())
    factors = {
        name: merges[name][0]([_term(members[number], name) for number in merges[name][1]])
        for spec in targets
        for name in spec.hf_names()
    }
    # not the sum over members: they may adapt other modules
    rank = max((pair[0].shape[1] for pair in factors.values() if pair is not None), default=0)
    if not rank:
        raise UserError("the adapters, or their weights, are zero: the merge is its base")
    adapter, modules = dict[str, np.ndarray](), []
    for spec in targets:
        pairs = [factors[name] for name in spec.hf_names()]
        # as a target it would be zeros, for which a server keeps memory and computes products
        if not any(pairs):
            continue
        layers, rows, columns = spec.shape
        left = np.zeros((layers, rows, rank), np.float32)
        right = np.zeros((layers, rank, columns), np.float32)
        for layer, pair in enumerate(pairs):
            if pair is not None:
                b, a = pair
                left[layer, :, : len(a)], right[layer, : len(a)] = b, a
        path = spec.path.removesuffix("weight")
        adapter[f"{path}lora_a"], adapter[f"{path}lora_b"] = right, left
        modules.append(spec.hf_name.split(".")[-2])
    # alpha = rank is s = 1: the scales of the members are in B
    settings = Lora(rank=rank, alpha=rank, targets=tuple(modules))
    return settings, tree.unflatten(adapter)


def _term(member: LoRA, name: str) -> Term | None:
    product = member.products.get(name)
    return None if product is None else Term(product.scale, *product.read_factors())


def _refuse_beyond_factors(member: LoRA) -> None:
    linear = {name for spec in lora.targets(member.config, Lora()) for name in spec.hf_names()}
    # DoRA normalizes each row, so its change is no product
    scaled = {name for name, product in member.products.items() if product.magnitude is not None}
    beyond = sorted(scaled | ({*member.products} - linear) | member.replaced)
    if beyond:
        raise UserError(
            f"{member.label} changes {beyond[0]} by more than s B A of a linear layer; give --base"
            " and --rank for an approximation"
        )


def combination(
    method: str, weights: Sequence[float] | None, parameters: JsonRow, count: int
) -> Combine | None:
    """Return how a merge method combines factors; None where its result has no low rank.

    Args:
        method: name of the merge method.
        weights: of the members, or None.
        parameters: of the method, with every default.
        count: number of members.

    Example:
        >>> combine = combination("average", (1, 3), {"normalize": True}, 2)
        >>> b, a = np.ones((2, 1)), np.ones((1, 3))
        >>> combine([Term(2.0, b, a), None])[0].tolist()
        [[0.5], [0.5]]
        >>> combination("ties", None, {}, 2) is None
        True
    """
    factors = [1.0] * count if weights is None else [float(weight) for weight in weights]
    # without the division the base would have another factor than 1
    if method == "average" and (parameters["normalize"] or math.isclose(sum(factors), 1)):
        return partial(_weighted_sum, [factor / sum(factors) for factor in factors])
    if method == "task_arithmetic":
        divisor = sum(factors) if weights is None or parameters["normalize"] else 1.0
        scale = parameters["scale"]
        return partial(_weighted_sum, [scale * factor / divisor for factor in factors])
    # the one method here that is no sum: it stays in the space that the factors B span
    if method == "knots":
        return partial(_knots, parameters["density"], parameters["scale"])
    return None


def _weighted_sum(
    coefficients: Sequence[float], terms: Sequence[Term | None]
) -> tuple[np.ndarray, np.ndarray] | None:
    present = [
        # coefficient and scale in B alone: one rounding, and A keeps the bits of the training
        (np.float32(c * term.scale) * term.b, term.a)
        for c, term in zip(coefficients, terms, strict=True)
        if c and term is not None
    ]
    if not present:
        return None
    return np.hstack([b for b, _ in present]), np.vstack([a for _, a in present])


def _knots(
    density: float, scale: float, terms: Sequence[Term | None]
) -> tuple[np.ndarray, np.ndarray] | None:
    # members that leave the matrix as it is have no sign, so they do not take part
    present = [
        (term.scale * term.b.astype(np.float64), term.a.astype(np.float64))
        for term in terms
        if term is not None
    ]
    if not present:
        return None
    b, a = knots.merge_factors(present, density)
    return (scale * b).astype(np.float32), a.astype(np.float32)
