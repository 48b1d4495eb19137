"""Release a version: check, build, tag. Pushing the tag publishes (.github/workflows/release.yml).

    python scripts/release.py 0.2.0 --dry-run    # check and build; change nothing
    python scripts/release.py 0.2.0              # the same, then make the tag v0.2.0

The workflow calls `--check-tag v0.2.0` and `--notes v0.2.0`. It needs hatchling, and nothing else.
"""

import argparse
import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Without these an installed package would not do what the README promises.
CONTENTS = ("jax_ordermerge/py.typed", "jax_ordermerge/configs/quickstart.yaml")
CHECKLIST = """\
Before the tag is pushed, by hand:
  [ ] .ci/run is green on a machine that has never seen the project
  [ ] benchmarks/RESULTS.md: no figure is slower than in the last release, or it says why
  [ ] the README's two commands work in an empty environment with the wheel in dist/
  [ ] docker/constraints.txt is the set that the tests ran with
  [ ] CHANGELOG.md: what breaks goes first, and says what to do
After it is published:
  [ ] pip install jax_ordermerge=={version} && ordermerge run quickstart
  [ ] CHANGELOG.md has an empty [Unreleased] for what comes next
"""


def git(root: pathlib.Path, *arguments: str) -> str:
    result = subprocess.run(
        ["git", *arguments], cwd=root, check=True, capture_output=True, text=True
    )
    return result.stdout.strip()


def read_version(root: pathlib.Path) -> str:
    """Return the version in the source, which is the one that is built."""
    text = (root / "jax_ordermerge" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)[1]


def read_notes(root: pathlib.Path, version: str) -> str:
    """Return the entry of a version in CHANGELOG.md without its heading; empty if there is none."""
    text = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    heading = rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$"
    entry = re.search(rf"{heading}(.*?)(?=^## \[|\Z)", text, re.MULTILINE | re.DOTALL)
    return entry[1].strip() + "\n" if entry and entry[1].strip() else ""


def find_problems(root: pathlib.Path, version: str) -> list[str]:
    """Return what stands in the way of a release, one line each."""
    problems = []
    if not re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", version):
        problems.append(f"{version} is no version: expected X.Y.Z, also with a1, b1 or rc1")
    if (present := read_version(root)) != version:
        problems.append(f"jax_ordermerge/__init__.py says {present}; set it to {version}")
    if not read_notes(root, version):
        problems.append(f"CHANGELOG.md has no entry '## [{version}] - YYYY-MM-DD' with a text")
    if (branch := git(root, "rev-parse", "--abbrev-ref", "HEAD")) != "main":
        problems.append(f"the branch is {branch}; releases are made from main")
    if git(root, "status", "--porcelain"):
        problems.append("there are changes that are not committed")
    if git(root, "tag", "--list", f"v{version}"):
        problems.append(f"the tag v{version} exists")
    return problems


def build(root: pathlib.Path, out: pathlib.Path, version: str) -> list[pathlib.Path]:
    """Build sdist and wheel, and return their paths."""
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out)]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    paths = sorted(out.glob(f"jax_ordermerge-{version}*"))
    (wheel,) = (path for path in paths if path.suffix == ".whl")
    with zipfile.ZipFile(wheel) as archive:
        missing = set(CONTENTS) - set(archive.namelist())
    if missing:
        raise SystemExit(f"error: {wheel.name} lacks {', '.join(sorted(missing))}")
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("version", nargs="?", help="to release, e.g. 0.2.0")
    parser.add_argument("--dry-run", action="store_true", help="check and build; change nothing")
    parser.add_argument("--check-tag", metavar="TAG", help="check that a tag is of this version")
    parser.add_argument("--notes", metavar="TAG", help="print the entry of CHANGELOG.md")
    arguments = parser.parse_args()
    if tag := arguments.check_tag:
        if tag != f"v{read_version(ROOT)}":
            raise SystemExit(f"error: the tag is {tag}, the source is v{read_version(ROOT)}")
        return
    if tag := arguments.notes:
        print(read_notes(ROOT, tag.removeprefix("v")), end="")
        return
    if not (version := arguments.version):
        parser.error("give a version, e.g. 0.2.0 --dry-run")
    if problems := find_problems(ROOT, version):
        raise SystemExit("\n".join(f"error: {problem}" for problem in problems))
    with tempfile.TemporaryDirectory() as scratch:
        out = pathlib.Path(scratch) if arguments.dry_run else ROOT / "dist"
        for path in build(ROOT, out, version):
            print(f"built {path.name}, {path.stat().st_size:,} bytes")
    if arguments.dry_run:
        print(f"would make the tag v{version}")
    else:
        git(ROOT, "tag", "--annotate", f"v{version}", "--message", f"Version {version}")
        print(f"made the tag v{version}; publish it: git push origin v{version}")
    print(CHECKLIST.format(version=version), end="")


if __name__ == "__main__":
    main()
