"""The command lines of the documentation and of scripts, and two parsers of them.

`check` reads a line by flags.json, which `record_flags.py` makes from the installed programs.
"""

import json
import pathlib
import re
import shlex

ROOT = pathlib.Path(__file__).parents[2]
FLAGS = json.loads((pathlib.Path(__file__).parent / "flags.json").read_text())
PAGES = ("docs/pods.md", "docs/gpu_clusters.md", "tpu_scripts/README.md", "README.md")


def documented(program: str) -> list[str]:
    """Return the command lines of a program on the pages, as they are typed."""
    lines = []
    for page in PAGES:
        text = (ROOT / page).read_text().replace("\\\n", " ")
        # comments of shells stand after two spaces
        for block in re.findall(r"^ {4,}(\S.*)$", text, re.MULTILINE):
            for part in re.split(r" && |  #|\|\|", block):
                words = part.strip().removeprefix("sudo ")
                if words.startswith(f"{program} "):
                    lines.append(words)
        lines += [
            line for line in re.findall(r"`([^`\n]*)`", text) if line.startswith(f"{program} ")
        ]
    # names of groups of commands in the text
    return [line for line in lines if line not in ("gcloud config", "gcloud compute tpus")]


def check(line: str) -> str | None:
    """Return what is wrong with the flags of a line, by the recorded tables."""
    program, *words = shlex.split(line)
    tables = FLAGS[program]
    command = max(
        (name for name in tables if words[: len(name.split())] == name.split()),
        key=len,
        default=None,
    )
    if command is None:
        return f"{line}: no command that is recorded"
    words = words[len(command.split()) :]
    while words:
        word = words.pop(0)
        if not word.startswith("-") or word == "-":
            continue
        name, sign, _ = word.lstrip("-").partition("=")
        flags = tables[command]
        if name not in flags:
            return f"{line}: --{name} is no flag of {program} {command}"
        if flags[name] and not sign:
            if not words:
                return f"{line}: --{name} needs a value"
            words.pop(0)
    return None
