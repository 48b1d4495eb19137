"""Trackers: the training log in TensorBoard, Weights & Biases or trackio, one run per member.

Only process 0 has trackers.
"""

import contextlib
import contextvars
import importlib.util
import io
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import jax

from jax_ordermerge import config
from jax_ordermerge import layout as layouts
from jax_ordermerge.errors import UserError, first_line
from jax_ordermerge.json_types import Json
from jax_ordermerge.layout import RunLayout, member_name
from jax_ordermerge.train.spec import TrackingSpec


class Tracker(Protocol):
    """A destination of the metrics."""

    def metrics(self, row: Json) -> None:
        """Take a row of the training log."""

    def close(self) -> None:
        """Write what is still in memory."""


def check(tracking: config.Tracking, *, several: bool = False) -> None:
    """Refuse a tracker whose package is not installed, and W&B without a key.

    Args:
        tracking: settings.
        several: whether there are several processes, of which only the first needs the key.

    Raises:
        UserError: the extra to install is named, or how to give a key.

    Example:
        >>> check(config.Tracking())
    """
    # asked without importing: W&B takes seconds to load, and only process 0 needs it
    packages = {
        "tensorboard": ("tensorboardX", tracking.tensorboard),
        "wandb": ("wandb", tracking.wandb is not None),
        "trackio": ("trackio", tracking.trackio is not None),
    }
    for extra, (package, wanted) in packages.items():
        if wanted and importlib.util.find_spec(package) is None:
            raise UserError(
                f"tracking.{extra} needs the package {package}, which is not installed:"
                f" pip install 'jax_ordermerge[{extra}]'"
            )
    if tracking.wandb is not None and not several and not _has_wandb_key():
        raise UserError(
            f"tracking.wandb = {tracking.wandb} needs a key of W&B: run wandb login, set"
            " WANDB_API_KEY, or set WANDB_MODE=offline to keep the metrics on this machine"
        )


def _has_wandb_key() -> bool:
    """Return whether W&B has a key or needs none, as far as that can be told without its package.

    On a terminal it asks for one.
    """
    variables = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_ANONYMOUS")
    if sys.stdin.isatty() or any(os.environ.get(name) for name in variables):
        return True
    if os.environ.get("WANDB_MODE", "online") not in ("online", "shared"):
        return True
    # files of settings may say any of these, too
    settings = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb") / "settings"
    if any(path.expanduser().is_file() for path in (settings, Path("wandb/settings"))):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").partition("://")[2]
    files = [Path(os.environ.get("NETRC") or "~/.netrc"), Path("~/_netrc")]
    return any(
        host.split("/")[0] in path.expanduser().read_text(errors="replace")
        for path in files
        if path.expanduser().is_file()
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
        return []  # all processes have the same rows
    trackers: list[Tracker] = []
    if tracking.settings.tensorboard:
        trackers.append(TensorBoard(layout, members, step))
    if tracking.settings.wandb is not None:
        trackers.append(Wandb(tracking, layout, members))
    if tracking.settings.trackio is not None:
        trackers.append(Trackio(tracking, layout, members))
    return trackers


def scalars(row: Json, position: int) -> dict[str, float]:
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
    """Event files, one directory per member."""

    def __init__(self, layout: RunLayout, members: Sequence[int], step: int) -> None:
        from tensorboardX import SummaryWriter

        # `purge_step` hides what a killed session wrote after the checkpoint; the files stay. Their
        # names have the time in seconds alone: without the suffix a session that is resumed within
        # a second would overwrite the file of the one before.
        self._writers = [
            SummaryWriter(
                str(layout.tracking / member_name(m)),
                purge_step=step + 1,
                filename_suffix=f".{step:08d}",
            )
            for m in members
        ]

    def metrics(self, row: Json) -> None:
        """See `Tracker.metrics`."""
        for position, writer in enumerate(self._writers):
            for name, value in scalars(row, position).items():
                writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """See `Tracker.close`."""
        for writer in self._writers:
            writer.close()


class Wandb:
    """Runs on Weights & Biases, in one group."""

    def __init__(self, tracking: TrackingSpec, layout: RunLayout, members: Sequence[int]) -> None:
        import wandb

        # The ids are stored in the run directory: a resumed training goes on in the same runs.
        if not layout.tracker_runs("wandb").is_file():
            identity = {
                "group": _new_group(tracking.name),
                "ids": {str(m): secrets.token_hex(8) for m in members},
            }
            layouts.write_json(layout.tracker_runs("wandb"), identity)
        identity = layouts.read_json(layout.tracker_runs("wandb"))
        try:
            self._runs = [
                wandb.init(
                    project=tracking.settings.wandb,
                    group=identity["group"],
                    name=f"{tracking.name}/{member_name(m)}",
                    id=identity["ids"][str(m)],
                    config=dict(tracking.resolved_config),
                    dir=str(layout.tracking),
                    resume="allow",
                    reinit="create_new",  # several runs are open in one process
                )
                for m in members
            ]
        except wandb.errors.Error as error:
            raise UserError(
                f"tracking.wandb = {tracking.settings.wandb}: W&B does not start"
                f" ({first_line(error)}); run wandb login, or set WANDB_MODE=offline"
            ) from error

    def metrics(self, row: Json) -> None:
        """See `Tracker.metrics`."""
        # W&B refuses steps that go back. A row that it has already has the same bits.
        for position, run in enumerate(self._runs):
            if row["step"] >= run.step:
                run.log(scalars(row, position), step=row["step"])

    def close(self) -> None:
        """See `Tracker.close`."""
        for run in self._runs:
            run.finish(quiet=True)


class Trackio:
    """Runs on trackio, in one group: on this machine, in a Space or on a server."""

    def __init__(self, tracking: TrackingSpec, layout: RunLayout, members: Sequence[int]) -> None:
        import trackio

        self._path = layout.tracker_runs("trackio")
        if not self._path.is_file():
            identity = {"group": _new_group(tracking.name), "step": 0}
            layouts.write_json(self._path, identity)
        self._identity: Json = layouts.read_json(self._path)
        group = self._identity["group"]

        def start(member: int) -> "trackio.Run":
            # the name is the identity of a run, so the group is a part of it
            return trackio.init(
                project=tracking.settings.trackio,
                group=group,
                name=f"{group}/{member_name(member)}",
                config=dict(tracking.resolved_config),
                resume="allow",
                embed=False,
            )

        self._runs = []
        for member in members:
            # It ends the run before it, which it finds in a context variable: each has a context of
            # its own. What it prints is no part of the output of a command.
            with contextlib.redirect_stdout(io.StringIO()):
                try:
                    self._runs.append(contextvars.copy_context().run(start, member))
                except (OSError, ValueError, RuntimeError) as error:
                    raise UserError(
                        f"tracking.trackio = {tracking.settings.trackio}: trackio does not start"
                        f" ({first_line(error)}); check TRACKIO_SPACE_ID, TRACKIO_SERVER_URL and"
                        " the name of the project"
                    ) from error

    def metrics(self, row: Json) -> None:
        """See `Tracker.metrics`."""
        # It takes a step twice. A row that it has already has the same bits.
        if row["step"] <= self._identity["step"]:
            return
        for position, run in enumerate(self._runs):
            run.log(scalars(row, position), step=row["step"])
        self._identity["step"] = row["step"]
        layouts.write_json(self._path, self._identity)

    def close(self) -> None:
        """See `Tracker.close`."""
        with contextlib.redirect_stdout(io.StringIO()):
            for run in self._runs:
                run.finish()


def _new_group(name: str) -> str:
    # random, because a name may be used again for another run directory
    return f"{name}-{secrets.token_hex(4)}"
