"""The stage that relates the final loss of every training sample to when it was seen."""

from pathlib import Path
from typing import Literal

import numpy as np

from jax_ordermerge import console
from jax_ordermerge.analysis import imbalance
from jax_ordermerge.analysis.result import asdict
from jax_ordermerge.config import Config
from jax_ordermerge.data import order
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.errors import UserError
from jax_ordermerge.experiment import losses, models
from jax_ordermerge.experiment.context import RunContext, Stage
from jax_ordermerge.experiment.run_config import model_names, result_layouts
from jax_ordermerge.layout import read_npz, write_json, write_npz
from jax_ordermerge.report import formatting
from jax_ordermerge.train.orders import draw_orders


def run(ctx: RunContext) -> None:
    """Measure the training samples under every model, and regress the losses on the positions."""
    config, train, path = ctx.config, ctx.splits["train"], ctx.layout.final_losses
    kinds = model_names(config)
    measured = _read_losses(path, train)
    if "base" not in measured:  # it is the same in all populations
        first = _read_losses(ctx.training_layout.final_losses, train)
        measured |= {name: losses for name, losses in first.items() if name == "base"}
    unit = formatting.loss_unit(config.objective.model_dump())
    # one pass over the training samples per model, on all of them under the final weights: losses
    # from the training log were measured at different times and do not compare
    missing = [name for name in kinds if name not in measured]
    loaded = models.load_models(ctx, missing)
    for name, params in console.track(loaded, len(missing), "analyze", "models"):
        model_losses = losses.require_finite(losses.example_losses(ctx, params, train), train, name)
        measured[name] = model_losses.means.astype(np.float32)
        ctx.log(f"  {name}: {model_losses.mean:.4f} {unit} on the training samples")
        arrays = {
            "names": np.array(list(measured)),
            "ids": train.ids,
            "losses": np.stack(list(measured.values())),
            "tokens": model_losses.counts,
        }
        write_npz(path, arrays)  # after each model, so that an interrupted stage continues
    # the orders are a pure function of the config, so they are drawn again instead of read
    orders = draw_orders(ctx.training, train.lengths, ctx.members)
    positions = [[order.positions(epoch, len(train)) for epoch in epochs] for epochs in orders]
    unit, units = _units(config, orders, len(train))
    analysis = imbalance.analyze(
        np.stack([measured[name] for name, kind in kinds.items() if kind == "member"]),
        np.stack(positions),
        {name: measured[name] for name, kind in kinds.items() if kind == "merge"},
        base_losses=measured["base"],
        sources=train.rows_by_source,
        unit=unit,
        units=units,
        warmup_fraction=_warmup_fraction(config, steps=orders.shape[1] * orders.shape[2]),
        bins=config.analysis.bins,
        bootstrap=config.analysis.bootstrap,
        permutations=config.analysis.permutations,
        seed=config.seed,
    )
    write_json(ctx.layout.analysis, asdict(analysis))


def is_complete(config: Config) -> bool:
    """Whether the statistics are written."""
    return all(run.analysis.is_file() for run in result_layouts(config))


def _read_losses(path: Path, examples: Examples) -> dict[str, np.ndarray]:
    """Return what an interrupted stage has measured, float32[n] by model."""
    if not path.is_file():
        return {}
    arrays = read_npz(path)
    if not np.array_equal(arrays["ids"], examples.ids):
        raise UserError(f"{path} was measured on other samples; remove it to measure again")
    return dict(zip(arrays["names"].tolist(), arrays["losses"], strict=True))


def _units(
    config: Config, orders: np.ndarray, samples: int
) -> tuple[Literal["sample", "batch", "pack"], np.ndarray | None]:
    """Return what the orders moved, and the number of each sample's; None for single samples."""
    # The composition of these is the same in all members and epochs, so any order shows it.
    coordinates = order.locate(orders[0, 0], samples)
    if config.population.level == "batch":
        return "batch", np.unique(coordinates[:, 0], return_inverse=True)[1]
    if config.data.packing == "packs":
        rows = np.unique(coordinates[:, :2], axis=0, return_inverse=True)[1]
        return "pack", rows.reshape(-1)
    return "sample", None


def _warmup_fraction(config: Config, steps: int) -> float:
    # training.warmup is a fraction of the steps below 1, and a number of steps from 1 on
    warmup = config.training.warmup
    return warmup if warmup < 1 else min(1.0, warmup / steps)


STAGE = Stage("analyze", run, is_complete, by_population=True)
