"""Accelerator types of Cloud TPU, such as v5p-64: how many chips and hosts they are."""

import re
from typing import Final, NamedTuple

# By the pages of Cloud TPU: the number of a type counts cores (two per chip) for v4 and v5p, chips
# for v5e and v6e. Chips per host: four, and for v5e and v6e eight on a host that is alone.
_CORES_PER_CHIP: Final = {"v4": 2, "v5p": 2, "v5litepod": 1, "v6e": 1}
_HOST_CHIPS: Final = 4
_LONE_HOST_CHIPS: Final = {"v4": 4, "v5p": 4, "v5litepod": 8, "v6e": 8}


class TpuType(NamedTuple):
    """A TPU slice by its accelerator type."""

    family: str
    chips: int  # a chip is a jax device in all of these generations
    hosts: int


def parse_type(text: str) -> TpuType:
    """Read an accelerator type.

    Raises:
        ValueError: it is unknown, in the way of validators of pydantic.

    Example:
        >>> parse_type("v5p-64"), parse_type("v6e-8").hosts
        (TpuType(family='v5p', chips=32, hosts=8), 1)
    """
    family, _, number = text.partition("-")
    if family == "tpu7x":
        raise ValueError("Cloud TPU has no TPU7x as VMs; use --target gke accelerator=tpu7x")
    if family not in _CORES_PER_CHIP or not re.fullmatch("[1-9][0-9]*", number):
        names = ", ".join(f"{name}-N" for name in _CORES_PER_CHIP)
        raise ValueError(f"type = {text}: expected {names}, such as v5p-64")
    chips, rest = divmod(int(number), _CORES_PER_CHIP[family])
    if rest:
        raise ValueError(
            f"type = {text}: the number of {family} counts cores, two per chip; give an even one"
        )
    on_one_host = chips <= _LONE_HOST_CHIPS[family]
    return TpuType(family, chips, 1 if on_one_host else -(-chips // _HOST_CHIPS))
