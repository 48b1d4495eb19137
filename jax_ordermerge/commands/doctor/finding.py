"""The result of one check of a machine."""

from typing import Literal, NamedTuple


class Finding(NamedTuple):
    """Result of one check.

    Attributes:
        subject: what was checked.
        verdict: `error` means that a run would fail.
        detail: the result in words, with the remedy of an error.
    """

    subject: str
    verdict: Literal["ok", "note", "error"]
    detail: str
