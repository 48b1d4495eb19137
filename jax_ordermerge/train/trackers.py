"""Trackers: the lines of `metrics/train.jsonl` as scalars in TensorBoard or Weights & Biases, one run a member. Process 0 only."""

import importlib.util
import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax

from jax_ordermerge import config as schema
from jax_ordermerge.checkpoint import atomic
from jax_ordermerge.config import Config
from jax_ordermerge.errors import UserError
from jax_ordermerge.train.progress import Watcher


class Tracker(Protocol):
    """Where lines go."""

    def line(self, line: Mapping[str, Any]) -> None:
        """Take a line of `metrics/train.jsonl`."""

    def close(self) -> None:
        """Write what is still in memory."""


def check(tracking: schema.Tracking) -> None:
    """Refuse a tracker whose package is not installed.

    Raises:
        UserError: the extra to install is named.

    Example:
        >>> check(schema.Tracking())
    """
    asked = {
        "tensorboard": ("tensorboardX", tracking.tensorboard),
        "wandb": ("wandb", tracking.wandb is not None),
    }
    for extra, (package, wanted) in asked.items():
        if wanted and importlib.util.find_spec(package) is None:
            raise UserError(
                f"tracking.{extra} needs the package {package}, which is not installed: pip install 'jax_ordermerge[{extra}]'"
            )


def trackers(config: Config, directory: Path, members: Sequence[int], step: int) -> list[Tracker]:
    """Return the trackers of a config; a training that continues goes on in the same runs.

    Args:
        config: of the run.
        directory: of the training; what is kept lies in `tracking/` there.
        members: in the order of the lists of a line.
        step: the training continues after it; what was tracked later is tracked again.

    Example:
        >>> trackers(Config(), Path("."), (0, 1), 0)
        []
    """
    if jax.process_index() != 0:
        return []
    found: list[Tracker] = []
    if config.tracking.tensorboard:
        found.append(TensorBoard(directory / "tracking", members, step))
    if config.tracking.wandb is not None:
        found.append(Wandb(config, directory / "tracking", members))
    return found


class Several:
    """A watcher, and trackers that take the same lines."""

    def __init__(self, watch: Watcher, trackers: Sequence[Tracker]) -> None:
        self._watch, self._trackers = watch, trackers
        self.log = watch.log

    def line(self, line: Mapping[str, Any]) -> None:
        """Hand a line on. The trackers come first: the watcher may end the training."""
        for tracker in self._trackers:
            tracker.line(line)
        self._watch.line(line)


def scalars(line: Mapping[str, Any], place: int) -> dict[str, float]:
    """Return what a line says of the member at a place of its lists.

    Example:
        >>> scalars({"step": 2, "loss": [2.5, 3.0], "mfu": None, "learning_rate": 0.1}, 1)
        {'loss': 3.0, 'learning_rate': 0.1}
    """
    own = {
        key: value[place] if isinstance(value, list) else value
        for key, value in line.items()
        if key != "step"
    }
    return {key: value for key, value in own.items() if value is not None}


class TensorBoard:
    """Event files in `member_{m}/`. Of what came after `step` TensorBoard shows only what is written from here on."""

    def __init__(self, directory: Path, members: Sequence[int], step: int) -> None:
        from tensorboardX import SummaryWriter

        self._writers = [
            SummaryWriter(str(directory / f"member_{m}"), purge_step=step + 1) for m in members
        ]

    def line(self, line: Mapping[str, Any]) -> None:
        """See `Tracker.line`."""
        for place, writer in enumerate(self._writers):
            for name, value in scalars(line, place).items():
                writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        """See `Tracker.close`."""
        for writer in self._writers:
            writer.close()


class Wandb:
    """Runs grouped by the run directory; their ids are kept in `wandb.json`, so that a training that continues finds them."""

    def __init__(self, config: Config, directory: Path, members: Sequence[int]) -> None:
        import wandb

        file = directory / "wandb.json"
        if not file.is_file():
            made = {
                "group": f"{config.name}-{secrets.token_hex(4)}",
                "ids": {str(m): secrets.token_hex(8) for m in members},
            }
            atomic.replace(file, json.dumps(made, indent=1).encode())
        kept = json.loads(file.read_text())
        self._runs = [
            wandb.init(
                project=config.tracking.wandb,
                group=kept["group"],
                name=f"{config.name}/member_{m}",
                id=kept["ids"][str(m)],
                config=schema.to_dict(config),
                dir=str(directory),
                resume="allow",
                reinit="create_new",
            )
            for m in members
        ]

    def line(self, line: Mapping[str, Any]) -> None:
        """See `Tracker.line`; what a run has already is the same bits, and not sent again."""
        for place, run in enumerate(self._runs):
            if line["step"] >= run.step:
                run.log(scalars(line, place), step=line["step"])

    def close(self) -> None:
        """See `Tracker.close`."""
        for run in self._runs:
            run.finish(quiet=True)
