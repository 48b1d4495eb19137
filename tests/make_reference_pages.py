"""Write docs/reference/: config keys, commands, merge methods, tasks and Python, from the code.

Run by hand: python tests/make_reference_pages.py
"""

import functools
import inspect
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import get_args

from typer.models import ArgumentInfo, OptionInfo

import jax_ordermerge
from jax_ordermerge.cli import app
from jax_ordermerge.config import TASK_KINDS
from jax_ordermerge.config.evaluation import FileTask
from jax_ordermerge.config.reference import Key, list_keys
from jax_ordermerge.evaluate.tasks.answers import MATCHES
from jax_ordermerge.merge.methods.table import METHODS, Method, parameter_names

FOLDER = pathlib.Path(__file__).parents[1] / "docs" / "reference"
NOTE = "<!-- by tests/make_reference_pages.py -->\n"
SECTIONS = ("Args", "Returns", "Raises", "Attributes", "Example", "Source")


def pages() -> dict[str, str]:
    """Return the text of every page, by its name."""
    makers = {"config": config, "cli": cli, "methods": methods, "tasks": tasks, "python": python}
    return {f"{name}.md": re.sub(r"\n{3,}", "\n\n", NOTE + make()) for name, make in makers.items()}


# ------------------------------------------------------------------------------------- config


def config() -> str:
    """One table per section of the config."""
    parts = [
        "# Config keys\n",
        "A config is a YAML file of differences from these defaults; each key can also be set with"
        " `--set KEY=VALUE` ([how](../howto/settings.md)). `ordermerge config KEY` prints the same"
        " in the terminal.\n",
        "`[]` is an entry of a list. A key with ↻ may change when a run continues; another value of"
        " any other key is refused, or grows the run"
        " ([which](../runs.md#ask-a-finished-run-for-more)).\n",
    ]
    keys = list_keys()
    scalars = [key for key in keys if "." not in key.path and not key.is_section]
    parts.append(_key_table(scalars))
    for section in [key for key in keys if "." not in key.path and key.is_section]:
        below = [key for key in keys if key.path.startswith(f"{section.path}.")]
        meaning = f"{section.meaning}." if section.meaning else ""
        parts += [f"\n## {section.path}\n", f"{meaning} {_notes(section)}".strip() + "\n"]
        rows = below if section.type in ("section", "section, or null") else [section, *below]
        parts.append(_key_table(rows))
    return "\n".join(parts)


def _key_table(keys: list[Key]) -> str:
    rows = []
    for key in keys:
        unit = f" ({key.unit})" if key.unit else ""
        free = " ↻" if key.is_free else ""
        default = _code(key.default) if key.default not in ("", "required") else key.default
        meaning = f"{key.meaning}. {_notes(key)}".strip()
        rows.append((f"`{key.path}`{free}", f"{key.type}{unit}", default, meaning))
    return _table(("key", "takes", "default", "meaning"), rows)


def _notes(key: Key) -> str:
    notes = [f"Goes with: {key.goes_with}."] if key.goes_with else []
    notes += [f"Example: {_code(key.example)}"] if key.example not in ("", key.default) else []
    return " ".join(notes)


# ---------------------------------------------------------------------------------------- cli


def cli() -> str:
    """One chapter per command, with its arguments and options."""
    commands = {
        command.name or command.callback.__name__: command.callback for command in _COMMANDS
    }
    rows = [(f"[`{name}`](#{name})", _plain(_first(_doc(commands[name])))) for name in commands]
    parts = [
        "# Commands\n",
        "`ordermerge COMMAND --help` prints the same. [Exit codes, `--quiet` and `--json`](exit_codes.md).\n",
        _table(("command", "what it does"), rows),
    ]
    for name, function in commands.items():
        parts.append(f"\n## {name}\n")
        for paragraph in _doc(function).split("\n\n"):
            text = " ".join(paragraph.split())
            is_example = text.startswith("ordermerge ")
            parts.append(f"```bash\n{text}\n```\n" if is_example else f"{_plain(text)}\n")
        rows = list(_parameters(function))
        parts.append(_table(("argument or option", "default", "meaning"), rows))
    return "\n".join(parts)


# From the signatures, which do not change with the versions of Typer.
_COMMANDS = app.registered_commands


def _parameters(function: Callable[..., object]) -> Iterator[tuple[str, str, str]]:
    for parameter in inspect.signature(function).parameters.values():
        marks = getattr(parameter.annotation, "__metadata__", ())
        info = next((mark for mark in marks if isinstance(mark, ArgumentInfo | OptionInfo)), None)
        if info is None:
            continue  # the context
        required = parameter.default is parameter.empty
        default = "required" if required else _code(str(parameter.default))
        if parameter.default in (None, False):
            default = ""
        yield f"`{_spell(parameter, info)}`", default, _plain(info.help or "")


def _spell(parameter: inspect.Parameter, info: ArgumentInfo | OptionInfo) -> str:
    """Return a parameter as it is typed."""
    kind = parameter.annotation.__origin__
    if isinstance(info, ArgumentInfo):
        return info.metavar or parameter.name.upper()
    flag = f"--{parameter.name.replace('_', '-')}"
    # in `Annotated` the first name of an option lies where Typer had the default
    names = [info.default] if isinstance(info.default, str) else []
    name = [*names, *(info.param_decls or ()), flag][0]
    if kind is bool:
        return name if name != flag or names else f"{flag}, --no-{flag[2:]}"
    words = {"int": "INTEGER", "float": "NUMBER", "Path": "PATH"}
    types = [kind, *get_args(kind)]
    word = next((words[t.__name__] for t in types if getattr(t, "__name__", "") in words), "TEXT")
    return f"{name} {info.metavar or word}"


# ------------------------------------------------------------------------------------ methods


def methods() -> str:
    """One chapter per merge method: equation, parameters, what it needs."""
    rows = [
        (f"[`{name}`](#{name})", _plain(_first(_doc(_function(method)))), _source(method))
        for name, method in sorted(METHODS.items())
    ]
    parts = [
        "# Merge methods\n",
        "For `merge.methods` of a config, `ordermerge merge --method` and `merge_method` of"
        " [recipes](../recipes.md#methods), where names that are also mergekit's have mergekit's"
        " defaults. Every method gives the same bits from files, from Orbax checkpoints and from"
        " device memory ([exactness](../explanation/exactness.md)). theta_0 is the base, tau_i ="
        " theta_i - theta_0 the task vector of member i, w_i its weight.\n",
        _table(("method", "what it computes", "source"), rows),
    ]
    for name, method in sorted(METHODS.items()):
        parts += [f"\n## {name}\n", *_method(name, method)]
    return "\n".join(parts)


def _source(method: Method) -> str:
    number = r"(\d{4}\.\d{5})"
    return re.sub(number, r"[\1](https://arxiv.org/abs/\1)", method.reference)


def _default(value: object) -> str:
    if value is inspect.Parameter.empty:
        return "required"
    return _code({None: "null", True: "true", False: "false"}.get(value, str(value)))


def _function(method: Method) -> object:
    prepare = method.prepare
    return prepare.func if isinstance(prepare, functools.partial) else prepare


def _method(name: str, method: Method) -> list[str]:
    text, sections = _split(_doc(_function(method)))
    parts = [*(f"{_plain(paragraph)}\n" for paragraph in text.split("\n\n"))]
    signature = inspect.signature(_function(method)).parameters
    defaults = {key: signature[key].default for key in parameter_names(name)}
    meanings = dict(_entries(sections.get("Args", "")))
    rows = [
        (f"`{key}`", _default(value), _plain(meanings.get(key, "")))
        for key, value in defaults.items()
    ]
    if rows:
        parts.append(_table(("parameter", "default", "meaning"), rows))
    least, most = method.members
    number = f"{least}" if least == most else f"{least} or more"
    weights = {
        "none": "takes none",
        "sum": "used as they are",
        "mean": "divided by their sum",
        "probabilities": "probabilities of the members",
    }[method.weights]
    facts = [
        f"Source: {_source(method)}",
        f"members: {number if most > least or least > 1 else '1'}",
        f"base: {'needed' if method.needs_base(defaults) else 'not needed'}",
        f"weights: {weights}",
    ]
    facts += ["draws by seed"] if method.draws else []
    facts += ["result consists of bits of the members"] if method.exact else []
    facts += [f"needs data: {method.needs}"] if method.needs else []
    return [*parts, f"\n*{'; '.join(facts)}.*\n"]


# -------------------------------------------------------------------------------------- tasks


def tasks() -> str:
    """One row per kind, and the keys of all."""
    rows = []
    for kind, entry in TASK_KINDS.items():
        match = MATCHES.get(kind)
        meaning = _first(_doc(match or entry.run)).removeprefix("Return whether ")
        judged = f"right: {meaning}" if match else meaning
        needs = "needed" if issubclass(entry.settings, FileTask) else ""
        rows.append((f"`{kind}`", _plain(judged), entry.result, needs))
    keys = [key for key in list_keys() if key.path.startswith("evaluation.tasks")]
    return "\n".join(
        [
            "# Tasks\n",
            "What `evaluation.tasks` of a config, and the file of `ordermerge evaluate MODEL"
            " --config FILE`, may hold. How answers are compared, and what is asked:"
            " [evaluation](../evaluation.md).\n",
            _table(("`kind`", "how an answer is judged", "result", "`data`"), rows),
            "\n## Keys\n",
            _key_table(keys),
        ]
    )


# ------------------------------------------------------------------------------------- python


def python() -> str:
    """One chapter per public name."""
    parts = [
        "# Python\n",
        "What `import jax_ordermerge` offers. Names are loaded on first use; the import itself"
        " takes milliseconds. Axes: `M` member, `B` batch, `T` query position, `S` key position,"
        " `D` embed, `L` layer, `V` vocab.\n",
        "```python\nimport jax_ordermerge as jom\n```\n",
    ]
    for name in jax_ordermerge.__all__:
        public = getattr(jax_ordermerge, name)
        parts.append(f"\n## {name}\n")
        if name == "__version__":
            parts.append("The version of the package, as text.\n")
            continue
        module = jax_ordermerge._PUBLIC[name]
        parts.append(f"`jax_ordermerge.{module}.{name}`\n")
        if not inspect.isclass(public):
            signature = _signature(public)
            parts.append(f"```python\n{name}{signature}\n```\n")
        elif name == "Config":
            parts.append("Its fields: [config keys](config.md).\n")
        parts += _render(_doc(public))
    return "\n".join(parts)


def _signature(function: object) -> str:
    """Return a signature with one parameter per line where it is long."""
    signature = inspect.signature(function)  # type: ignore[arg-type]
    # as written: annotations are long when they are resolved
    parameters, marker = [], False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not marker:
            parameters.append("*")
            marker = True
        default = parameter.default
        has_default = default is not parameter.empty
        shown = getattr(default, "__name__", None) or repr(default)
        parameters.append(f"{parameter.name}={shown}" if has_default else parameter.name)
    text = f"({', '.join(parameters)})"
    return text if len(text) < 80 else "(\n    " + ",\n    ".join(parameters) + ",\n)"


def _render(doc: str) -> list[str]:
    text, sections = _split(doc)
    parts = [f"{_plain(paragraph)}\n" for paragraph in text.split("\n\n") if paragraph.strip()]
    for title, body in sections.items():
        parts.append(f"**{title}**\n")
        if title == "Example":
            parts.append(f"```python\n{inspect.cleandoc(body)}\n```\n")
        elif entries := _entries(body):
            parts.append("\n".join(f"- `{key}`: {_plain(value)}" for key, value in entries) + "\n")
        else:
            parts.append(_plain(" ".join(body.split())) + "\n")
    return parts


# ------------------------------------------------------------------------------------ helpers


def _doc(public: object) -> str:
    return inspect.getdoc(public) or ""


def _split(doc: str) -> tuple[str, dict[str, str]]:
    """Split a docstring into its text and its sections."""
    pieces = re.split(rf"^({'|'.join(SECTIONS)}):[ \n]", doc, flags=re.MULTILINE)
    return pieces[0].strip(), dict(zip(pieces[1::2], pieces[2::2], strict=True))


def _entries(body: str) -> list[tuple[str, str]]:
    """Return the `name: text` entries of a section; none where it is plain text."""
    lines = inspect.cleandoc("\n" + body).splitlines()
    entries: list[tuple[list[str], list[str]]] = []
    for line in lines:
        match = re.match(r"([\w, *]+): (.*)", line)
        if match and not line.startswith(" "):
            entries.append((match[1].split(", "), [match[2]]))
        elif entries:
            entries[-1][1].append(line.strip())
        elif line.strip():
            return []
    return [(name, " ".join(text)) for names, text in entries for name in names]


def _first(text: str) -> str:
    return " ".join(inspect.cleandoc(text).split("\n\n")[0].split())


def _plain(text: str) -> str:
    """Return text of the code as Markdown: what would be markup is escaped outside of code."""
    joined = " ".join(text.split())
    parts = re.split(r"(`[^`]*`)", joined)
    return "".join(
        part if part.startswith("`") else re.sub(r"([*_\[\]<>{}|])", r"\\\1", part)
        for part in parts
    )


def _code(text: str) -> str:
    return f"`{text}`" if "`" not in text else text


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    cells = [[re.sub(r"(?<!\\)\|", r"\\|", cell) for cell in line] for line in lines]
    return "".join("| " + " | ".join(line) + " |\n" for line in cells)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for page, written in pages().items():
        (FOLDER / page).write_text(written)
