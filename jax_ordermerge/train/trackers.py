"""Trackers: the rows of the training log in TensorBoard or Weights & Biases, one run per member.

Only process 0 has trackers.
"""

import importlib.util
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax

from jax_ordermerge import config
from jax_ordermerge import layout as layouts
from jax_ordermerge.errors import UserError
from jax_ordermerge.layout import RunLayout, member_name
from jax_ordermerge.train.progress import Watcher
from jax_ordermerge.train.spec import TrackingSpec


class Tracker(Protocol):
    """A destination of the metrics."""

    def metrics(self, row: Mapping[str, Any]) -> None:
        """Take a row of the training log."""

    def close(self) -> None:
        """Write what is still in memory."""


def check(tracking: config.Tracking) -> None:
    """Refuse a tracker whose package is not installed.

    Raises:
        UserError: the extra to install is named.

    Example:
        >>> check(config.Tracking())
    """
    packages = {
        "tensorboard": ("tensorboardX", tracking.tensorboard),
        "wandb": ("wandb", tracking.wandb is not None),
    }
    for extra, (package, wanted) in packages.items():
        if wanted and importlib.util.find_spec(package) is None:
            raise UserError(
                f"tracking.{extra} needs the package {package}, which is not installed:"
                f" pip install 'jax_ordermerge[{extra}]'"
            )


def open_trackers(
    tracking: TrackingSpec, layout: RunLayout, members: Sequence[int], step: int
) -> list[Tracker]:
    """Open the trackers that the settings ask for. A resumed training goes on in the same runs.

    Args:
        tracking: settings.
        layout: run directory, where the identities of the runs are stored.
        members: in the order of the lists of a row.
        step: step that the training continues after; later rows are tracked again.

    Example:
        >>> from pathlib import Path
        >>> open_trackers(TrackingSpec(), RunLayout(Path(".")), (0, 1), 0)
        []
    """
    if jax.process_index() != 0:
        return []
    trackers: list[Tracker] = []
    if tracking.settings.tensorboard:
        trackers.append(TensorBoard(layout, members, step))
    if tracking.settings.wandb is not None:
        trackers.append(Wandb(tracking, layout, members))
    return trackers


class Several:
    """A watcher together with trackers that take the same rows."""

    def __init__(self, watch: Watcher, trackers: Sequence[Tracker]) -> None:
        self._watch, self._trackers = watch, trackers
        self.log = watch.log

    def metrics(self, row: Mapping[str, Any]) -> None:
        """Pass a row on. The trackers come first: the watcher may end the training."""
        for tracker in self._trackers:
            tracker.metrics(row)
        self._watch.metrics(row)


def scalars(row: Mapping[str, Any], position: int) -> dict[str, float]:
    """Return the values of a row that belong to the member at a position of its lists.

    Example:
        >>> scalars({"step": 2, "loss": [2.5, 3.0], "mfu": None, "learning_rate": 0.1}, 1)
        {'loss': 3.0, 'learning_rate': 0.1}
    """
    values = {
        name: value[position] if isinstance(value, list) else value
        for name, value in row.items()
        if name != "step"
    }
    return {name: value for name, value in values.items() if value is not None}


class TensorBoard:
    """Event files, one directory per member.

    TensorBoard hides what a killed session wrote after `step`; those steps are trained again.
    """

    def __init__(self, layout: RunLayout, members: Sequence[int], step: int) -> None:
        from tensorboardX import SummaryWriter

        self._writers = [
            SummaryWriter(str(layout.tracking / member_name(m)), purge_step=step + 1)
            for m in members
        ]

    def metrics(self, row: Mapping[str, Any]) -> None:
        """See `Tracker.metrics`."""
        for position, writer in enumerate(self._writers):
            for name, value in scalars(row, position).items():
                writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """See `Tracker.close`."""
        for writer in self._writers:
            writer.close()


class Wandb:
    """Runs on Weights & Biases, in a group per run directory.

    Their ids are stored in the run directory, so that a resumed training goes on in them.
    """

    def __init__(self, tracking: TrackingSpec, layout: RunLayout, members: Sequence[int]) -> None:
        import wandb

        if not layout.wandb_runs.is_file():
            identity = {
                "group": f"{tracking.name}-{secrets.token_hex(4)}",
                "ids": {str(m): secrets.token_hex(8) for m in members},
            }
            layouts.write_json(layout.wandb_runs, identity)
        identity = layouts.read_json(layout.wandb_runs)
        self._runs = [
            wandb.init(
                project=tracking.settings.wandb,
                group=identity["group"],
                name=f"{tracking.name}/{member_name(m)}",
                id=identity["ids"][str(m)],
                config=dict(tracking.config),
                dir=str(layout.tracking),
                resume="allow",
                reinit="create_new",
            )
            for m in members
        ]

    def metrics(self, row: Mapping[str, Any]) -> None:
        """See `Tracker.metrics`. A row that W&B has already has the same bits; it is not resent."""
        for position, run in enumerate(self._runs):
            if row["step"] >= run.step:
                run.log(scalars(row, position), step=row["step"])

    def close(self) -> None:
        """See `Tracker.close`."""
        for run in self._runs:
            run.finish(quiet=True)
