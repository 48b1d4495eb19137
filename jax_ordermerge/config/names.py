"""Names in a config that become names of files or directories."""

from typing import Annotated, Final

import pydantic

# A component of a path has at most 255 bytes; `.NAME.json.partial-12345678` must fit.
_LONGEST: Final = 200


def name_problem(name: str) -> str | None:
    """Return why a name cannot be that of a file in its directory, None where it can.

    Example:
        >>> name_problem("gsm8k, 5 shots"), name_problem("../x")
        (None, 'holds a slash')
        >>> name_problem("..")
        'stands for a directory'
    """
    if not name.strip():
        return "is empty"
    if name in (".", ".."):
        return "stands for a directory"
    if "/" in name:
        return "holds a slash"
    if not name.isprintable():
        return "holds a character that cannot be printed"
    # such files are not copied to a bucket
    if ".partial" in name or name.endswith(".lock"):
        return "is that of an unfinished file"
    length = len(name.encode())
    return f"is {length} bytes long, at most {_LONGEST} are allowed" if length > _LONGEST else None


def _check(name: str) -> str:
    if problem := name_problem(name):
        raise ValueError(f"the name {name!r} {problem}; it names a file, choose another")
    return name


FileName = Annotated[str, pydantic.AfterValidator(_check)]
