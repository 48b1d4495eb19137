"""Record which flags gcloud and kubectl take, for tests on machines without them.

    python tests/launch/record_flags.py > tests/launch/flags.json

It asks the installed programs about the commands of the documentation and of tpu_scripts/.
"""

import datetime as dt
import json
import re
import subprocess
from typing import Any

GCLOUD = (
    "auth login",
    "compute instances create",
    "compute instances delete",
    "compute ssh",
    "config set",
    "filestore instances create",
    "filestore instances delete",
    "filestore instances describe",
    "secrets add-iam-policy-binding",
    "secrets create",
    "secrets versions access",
    "services enable",
    *(
        f"{track}compute tpus {command}"
        for track in ("", "alpha ")
        for command in ("queued-resources create", "tpu-vm scp", "tpu-vm ssh")
    ),
    "compute tpus queued-resources delete",
    "compute tpus queued-resources describe",
    "compute tpus queued-resources list",
    "compute tpus tpu-vm describe",
)
KUBECTL = ("apply", "logs", "create secret generic")


def output(*command: str) -> str:
    """Return what a program prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def gcloud_flags(command: str) -> dict[str, Any]:
    """Return the flags of a command, and whether each takes a value, as gcloud's own parser has them."""
    checked = json.loads(
        output("gcloud", "meta", "lint-gcloud-commands", f"--command-string=gcloud {command}")
    )
    flags: dict[str, bool] = {}

    def walk(node: dict[str, Any]) -> None:
        for argument in node.get("arguments", []):
            if "group" in argument:
                walk(argument["group"])
            elif not argument.get("positional"):
                flags[argument["name"]] = argument["type"] != "bool"

    for answer in checked:
        walk(answer["args_structure"])
    return dict(sorted(flags.items()))


def kubectl_flags(command: str) -> dict[str, bool]:
    """Return the flags of a command by its help, which shows each with its default."""
    text = output("kubectl", *command.split(), "--help") + output("kubectl", "options")
    found = re.findall(r"^ +(?:-(\w), )?--([a-z-]+)=(.*):$", text, re.MULTILINE)
    flags = {}
    for short, long, default in found:
        # boolean flags need no value
        flags[long] = default not in ("true", "false")
        if short:
            flags[short] = flags[long]
    return dict(sorted(flags.items()))


def main() -> None:
    """Print the table."""
    (kubectl,) = re.findall(r"Client Version: (\S+)", output("kubectl", "version", "--client"))
    (gcloud,) = re.findall(r"Google Cloud SDK (\S+)", output("gcloud", "version"))
    table = {
        "recorded": dt.date.today().isoformat(),
        "versions": {"gcloud": gcloud, "kubectl": kubectl},
        "gcloud": {command: gcloud_flags(command) for command in GCLOUD},
        "kubectl": {command: kubectl_flags(command) for command in KUBECTL},
    }
    # a line per command
    print(json.dumps(table).replace('": {', '":\n {').replace("}, ", "},\n "))


if __name__ == "__main__":
    main()
