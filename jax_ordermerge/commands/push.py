"""Upload of an exported model to the Hugging Face hub: which files, the card, one commit."""

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jax_ordermerge import console, record
from jax_ordermerge.checkpoint import json_files, other_files, remote
from jax_ordermerge.checkpoint.sidecar_files import CARD, GENERATION, RECIPE, TOKENIZER_FILES
from jax_ordermerge.errors import UserError, first_line
from jax_ordermerge.experiment import cards
from jax_ordermerge.layout import RunLayout
from jax_ordermerge.merge import manifest
from jax_ordermerge.merge.sources import references

if TYPE_CHECKING:
    import huggingface_hub

_WEIGHTS, _INDEX = ".safetensors", ".safetensors.index.json"
_CONFIGS = ("config.json", "adapter_config.json")
# Beside the files of a model: what says how it was made, and under which terms it may be used.
_RECORDS = (CARD, RECIPE, manifest.REPORT, manifest.MANIFEST)
_TERMS = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
_LISTED = 10  # names in a message


@dataclasses.dataclass(frozen=True)
class Upload:
    """What is to be uploaded.

    Attributes:
        directory: of the model.
        files: paths relative to it, without the card.
        left_out: names of files and directories that stay here.
        card: text of the model card.
        base: name of the base on the hub, None where none is known.
        notes: for the user.
    """

    directory: Path
    files: tuple[Path, ...]
    left_out: tuple[str, ...]
    card: str
    base: str | None
    notes: tuple[str, ...]


def prepare(source: str) -> Upload:
    """Find the files of a model, and write its card. Nothing is uploaded.

    Args:
        source: directory of a model or adapter, `RUN/average`, or a run with one merge.

    Raises:
        UserError: there is no such model, it is incomplete, or it has no safetensors.
    """
    directory = _find_directory(source)
    if not any((directory / name).is_file() for name in _CONFIGS):
        raise UserError(
            f"{source} is no exported model (it has neither {' nor '.join(_CONFIGS)}); write one"
            f" with ordermerge convert {source} DIRECTORY"
        )
    files, left_out = _list_files(directory)
    _check_weights(source, directory, files)
    # a merge of a run lies in merged/NAME of it
    run = RunLayout(directory.parent.parent)
    is_of_run = run.is_run and run.merged(directory.name) == directory
    record.refuse_model_of_edited_run(directory)
    card = cards.hub_card(directory, run if is_of_run else None)
    notes = (*card.notes, *_private_paths(directory, files, card.text))
    return Upload(directory, files, left_out, card.text, card.base, notes)


def _find_directory(source: str) -> Path:
    if references.find_member(source) is not None:
        raise UserError(
            f"{source} is a member of a run; export it first: ordermerge convert {source} DIRECTORY"
        )
    path = references.find_merge(source)
    if path is None:
        path = remote.fetch(source) if remote.address(source) else remote.expand(source)
    if path.is_file():
        raise UserError(f"{source} is a file; give the directory of a model, or RUN/average")
    if not path.is_dir():
        raise UserError(f"{source} not found; give the directory of a model, or RUN/average")
    layout = RunLayout(path.resolve())
    if not layout.is_run or any((path / name).is_file() for name in _CONFIGS):
        return path.resolve()
    merges = sorted(x.name for x in layout.merged("").glob("*") if layout.is_merged(x.name))
    # which of several is meant, nobody can guess, and an upload is public
    if len(merges) != 1:
        listed = ", ".join(f"{source}/{name}" for name in merges)
        raise UserError(
            f"{source} is a run with {len(merges)} merges; name one: {listed or 'none'}"
        )
    return layout.merged(merges[0])


def _list_files(directory: Path) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    files, left_out = list[Path](), list[str]()
    # Trainers leave checkpoint-500 with a model of its own. Parts of one model are in modules.json.
    models = {path.relative_to(directory).parts[0] for path in directory.glob("*/**/*.safetensors")}
    if (directory / "modules.json").is_file():
        models = set()
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory)
        if path.is_dir():
            continue
        if name.parts[0] not in models and _is_pushed(name):
            files.append(name)
        else:
            # of a directory that is left out as a whole, such as .git, the name alone
            is_part = name.parts[0] in models or name.parts[0].startswith(".")
            left_out.append(f"{name.parts[0]}/" if is_part and len(name.parts) > 1 else str(name))
    # the card is apart: what is uploaded may say more than the file here
    return tuple(x for x in files if str(x) != CARD), tuple(dict.fromkeys(left_out))


def _is_pushed(name: Path) -> bool:
    is_hidden = any(part.startswith(".") for part in name.parts)
    is_weights = name.name.endswith((_WEIGHTS, _INDEX)) and not is_hidden
    is_record = str(name) in _RECORDS or (len(name.parts) == 1 and name.stem.upper() in _TERMS)
    return is_weights or is_record or other_files.is_side_file(name)


def _check_weights(source: str, directory: Path, files: Sequence[Path]) -> None:
    names = {str(file) for file in files}
    if not any(name.endswith(_WEIGHTS) for name in names):
        raise UserError(
            f"{source} has no *{_WEIGHTS}; other weights are not uploaded: write it with ordermerge"
            f" convert {source} DIRECTORY, --allow-bin for .bin"
        )
    # links of a cache that was cleaned lead nowhere
    if absent := [name for name in sorted(names) if not (directory / name).is_file()]:
        raise UserError(f"{source}: {absent[0]} cannot be read; restore or remove it")
    for index in (name for name in names if name.endswith(_INDEX)):
        weight_map = json_files.read_json(directory / index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{source}: {index} has no weight_map; restore it")
        # of an interrupted copy: a loader would fail, after a download of hours
        if missing := sorted({*weight_map.values()} - names):
            raise UserError(f"{source}: {index} names {missing[0]}, which is absent")


def _private_paths(directory: Path, files: Sequence[Path], card: str) -> Iterator[str]:
    """Yield notes on files that name a path of this machine, which readers elsewhere see."""
    # other trainers write where the base or the data lay
    pattern = r"(?<=name_or_path\": \")(?:/|~|\.)[^\"]*"
    # in a container it may be / or unknown, and then says nothing
    if user_dir := os.path.expanduser("~").strip("/~"):
        pattern += rf"|/{re.escape(user_dir)}/[^\s\"']*"
    texts = {CARD: card}
    for file in files:
        # not the words of a vocabulary, which may look like paths
        if file.suffix in (".json", ".yaml") and file.name not in TOKENIZER_FILES:
            # what is not UTF-8 is uploaded as it is, and searched all the same
            texts[str(file)] = (directory / file).read_text(errors="replace")
    for name, text in texts.items():
        if match := re.search(pattern, text):
            yield f"{name} names {match[0]}, a path of this machine"


def _sizes(upload: Upload) -> dict[str, int]:
    """Return the bytes of each file of an upload, in the order of their names."""
    sizes = {str(file): (upload.directory / file).stat().st_size for file in upload.files}
    # that of the upload, which is longer than the one on the disk
    sizes[CARD] = len(upload.card.encode())
    return dict(sorted(sizes.items()))


def describe(upload: Upload) -> Iterator[str]:
    """Yield lines on the files of an upload, and what it leaves here."""
    sizes = _sizes(upload)
    for name, size in sizes.items():
        yield f"{size:>15,} bytes  {name}"
    yield f"{sum(sizes.values()):>15,} bytes  in {len(sizes)} files"
    if upload.left_out:
        rest = len(upload.left_out) - _LISTED
        ending = f" and {rest} more" if rest > 0 else ""
        yield (
            "note: not uploaded, being neither safetensors nor known files of a model:"
            f" {', '.join(upload.left_out[:_LISTED])}{ending}"
        )
    yield from (f"note: {note}" for note in upload.notes)


def push(
    upload: Upload,
    repo_id: str,
    *,
    private: bool,
    update: bool,
    revision: str,
    message: str,
    log: Callable[[str], None],
) -> str:
    """Create a repository of the hub and commit an upload to it. Return the address of the commit.

    Args:
        upload: from `prepare`.
        repo_id: OWNER/NAME, or NAME of the user's own.
        private: whether only its owner sees the repository.
        update: commit to a repository that exists. Weights, configs and tokenizer files that the
            upload lacks are deleted in the same commit: a loader would take them for parts of the
            model.
        revision: the branch; one that does not exist is begun at main.
        message: of the commit.
        log: called with a line about what was deleted.

    Raises:
        UserError: there is no token, or the hub refuses it; the name is not valid, or taken; the
            message is empty; or the hub cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    check_name(repo_id)
    if not message.strip():
        raise UserError("--message is empty; say what the commit is, or leave the option out")
    token = get_token()
    if token is None:
        raise UserError(
            "no token for the Hugging Face hub: set HF_TOKEN, or log in with `hf auth login`"
        )
    # before it is sent: an error about a header would quote it
    if not re.fullmatch(r"[!-~]+", token):
        raise UserError("the token for the Hugging Face hub has characters that no token has")
    api = HfApi(token=token)
    with _hub_errors(repo_id, api.endpoint):
        # first, since it may fail, and a new repository would stay behind
        text = _with_license(api, upload, log)
        # None and not False: an organization may make its new repositories private by default
        repo_id = api.create_repo(repo_id, private=private or None, exist_ok=update).repo_id
        # a new repository has main alone
        if revision != "main":
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(file.as_posix(), upload.directory / file) for file in upload.files
        ]
        # from memory: the card beside the model stays as its author left it
        operations.append(CommitOperationAdd(CARD, text.encode()))
        if update:
            names = {operation.path_in_repo for operation in operations}
            for name in api.list_repo_files(repo_id, revision=revision):
                if name == CARD:
                    log(f"note: {CARD} there is replaced")
                elif name not in names and _is_loaded(Path(name)):
                    operations.append(CommitOperationDelete(name))
                    log(f"note: {name} of an earlier upload is deleted")
        commit = api.create_commit(
            repo_id, operations, commit_message=message, revision=revision, num_threads=4
        )
    return str(commit.commit_url)


def _is_loaded(path: Path) -> bool:
    """Return whether a loader takes a file of another upload for a part of this one."""
    return (
        other_files.is_weights(path)
        or other_files.is_tokenizer(path)
        or path.name in (*_CONFIGS, GENERATION)
    )


def check_name(repo_id: str) -> None:
    """Refuse what cannot be the name of a repository.

    Raises:
        UserError: it is none.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        # by the rule of the hub, before anything is hashed or sent
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"{repo_id}: expected OWNER/NAME, as a repository of the hub") from error


def _with_license(api: "huggingface_hub.HfApi", upload: Upload, log: Callable[[str], None]) -> str:
    """Return the card with the license of its base, which the hub knows where no file here does."""
    if upload.base is None or cards.has_license(upload.card):
        return upload.card
    from huggingface_hub.errors import HfHubHTTPError

    try:
        data = api.model_info(upload.base).card_data
    except HfHubHTTPError:
        data = None
    license_keys = cards.license_of(data.to_dict() if data else {})
    if not license_keys:
        log(f"note: {upload.base} names no license on the hub, so the card has none")
    return cards.with_keys(upload.card, license_keys)


@contextlib.contextmanager
def _hub_errors(repo_id: str, endpoint: str) -> Iterator[None]:
    """Make one line of what the hub refuses. No message holds the token."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status == 409:
            line = f"{repo_id} exists already; commit to it with --update"
        elif status == 401:
            line = f"{endpoint} does not accept the token (HF_TOKEN, or that of hf auth login)"
        elif status == 403:
            line = f"the token may not write to {repo_id}; make one with the right to write"
        else:
            line = f"{endpoint} refused the upload to {repo_id}: {_reason(error)}"
        raise UserError(line) from error
    except RuntimeError as error:
        # of the files themselves, which hides what the store answered in its cause
        reason = _reason(error.__cause__ or error)
        raise UserError(
            f"the upload to {repo_id} broke off: {reason}; try again with --update"
        ) from error
    # all failures of the network are one of these
    except (OSError, errors.HTTPError) as error:
        raise UserError(f"{endpoint} cannot be reached: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """Return what went wrong, without the address: that of a store is signed, as good as a key."""
    response = getattr(error, "response", None)
    if response is not None:
        message = getattr(error, "server_message", None)
        return f"HTTP {response.status_code}{f' ({message})' if message else ''}"
    return first_line(error)


def print_dry_run(
    upload: Upload,
    repo_id: str,
    *,
    private: bool,
    update: bool,
    revision: str,
    message: str,
    as_json: bool = False,
) -> None:
    """Print what `push` would do with the same arguments: files, sizes, card. Needs no network."""
    check_name(repo_id)
    if as_json:
        console.print_json(
            {
                "repo_id": repo_id,
                "revision": revision,
                "private": private,
                "update": update,
                "message": message,
                "bytes": _sizes(upload),
                "left_out": upload.left_out,
                "notes": upload.notes,
                "card": upload.card,
            }
        )
        return
    kind = "an update" if update else f"a new {'private ' if private else ''}repository"
    console.print_result(f"to {repo_id}, branch {revision}, {kind}: {message}")
    for line in describe(upload):
        show = console.print_note if line.startswith("note") else console.print_result
        show(line)
    console.print_result(f"\n{upload.card}", end="")
