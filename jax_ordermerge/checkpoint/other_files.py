"""What lies beside the weights of a model whose files are not understood: copied byte by byte."""

import filecmp
import re
from collections.abc import Collection
from pathlib import Path

from jax_ordermerge.checkpoint import atomic, sidecar_files

# Weights, of this model or of other forms of it: beside a merge they would still be those of one
# member. An index belongs to its weights.
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".onnx_data", ".h5"),
    *(".msgpack", ".ot", ".tflite", ".mlmodel", ".pdparams"),
)
_INDEX = (".safetensors.index.json", ".bin.index.json")
# Of tokenizers, processors, modules and code. Other JSON may be anything, also credentials.
_SIDE_SUFFIXES = (".jinja", ".model", ".spm", ".tiktoken", ".py")
_SIDE_JSON = re.compile(r"(config|tokens|tokenizer|vocab|template|normalizer|modules)\w*\.json")
# What a merge writes itself, or what belongs to a repository, a training, or an earlier merge.
_NOT_OF_MODEL = (
    sidecar_files.CARD,
    "merge.json",
    "manifest.json",
    sidecar_files.RECIPE,
    "mergekit_config.yml",
    "training_args.bin",
    "trainer_state.json",
    "all_results.json",
    "train_results.json",
    "eval_results.json",
    "runs",
)


def list_files(directory: Path) -> tuple[list[Path], list[str]]:
    """Return the files that belong to a model besides its weights, and what is left out.

    Directories with files but no weights belong to the model, as `1_Pooling` of an embedding
    model does. Names with a point in front are of a repository.

    Returns:
        Paths relative to the directory, and names of directories with weights of their own.
    """
    files, left_out = [], []
    # sorted: notes name the same files on every file system
    for path in sorted(directory.iterdir()):
        if path.name.startswith(".") or path.name in _NOT_OF_MODEL:
            continue
        if path.is_file() and not is_weights(path):
            files.append(path.relative_to(directory))
        elif path.is_dir():
            inner = [file for file in sorted(path.rglob("*")) if file.is_file()]
            # all or nothing: a module without its weights, or with those of one member, is none
            if any(map(is_weights, inner)):
                left_out.append(path.name)
            else:
                files += [file.relative_to(directory) for file in inner]
    return files, left_out


def is_side_file(path: Path) -> bool:
    """Return whether a file beside the weights of a model is one of those that a loader may read.

    Others may be anything: notes, keys, results of a training.

    Args:
        path: relative to the directory of the model.

    Example:
        >>> is_side_file(Path("1_Pooling/config.json")), is_side_file(Path("trainer_state.json"))
        (True, False)
        >>> is_side_file(Path("vocab.txt")), is_side_file(Path("service_account.json"))
        (True, False)
    """
    is_hidden = any(part.startswith(".") for part in path.parts)
    if is_hidden or path.parts[0] in _NOT_OF_MODEL or is_weights(path):
        return False
    if path.name in sidecar_files.TOKENIZER_FILES or path.suffix in _SIDE_SUFFIXES:
        return True
    return _SIDE_JSON.search(path.name) is not None


def copy(
    source: Path, target: Path, *, tokenizer_from: Path | None, without: Collection[str] = ()
) -> None:
    """Copy the files of `list_files`, but some names, through to the disk.

    Args:
        source: directory of the model.
        target: an existing directory.
        tokenizer_from: directory of the model whose tokenizer files are copied instead.
        without: names to leave out.
    """
    donor = source if tokenizer_from is None else tokenizer_from
    # files of two tokenizers beside each other would be read as one
    files = [(donor, file) for file in list_files(donor)[0] if is_tokenizer(file)]
    files += [(source, file) for file in list_files(source)[0] if not is_tokenizer(file)]
    for directory, file in files:
        if str(file) not in without:
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            # through a temporary file: a crash leaves no half of a file that would be taken for one
            atomic.write_bytes(target / file, (directory / file).read_bytes())


def different_files(a: Path, b: Path, without: Collection[str] = ()) -> list[str]:
    """Return the files besides the weights that two models have not alike."""
    first, second = ({str(file) for file in list_files(x)[0]} - {*without} for x in (a, b))
    return sorted(
        name
        for name in first | second
        # their bytes: sizes and times of a copy may agree where its content was edited
        if name not in first & second or not filecmp.cmp(a / name, b / name, shallow=False)
    )


def code_files(directory: Path) -> list[str]:
    """Return the files of code that lie beside a model: copied, and never run."""
    return [str(file) for file in list_files(directory)[0] if file.suffix == ".py"]


def is_tokenizer(file: Path) -> bool:
    """Return whether a file belongs to the tokenizer of a model.

    Example:
        >>> is_tokenizer(Path("spiece.model")), is_tokenizer(Path("config.json"))
        (True, False)
    """
    names = (*sidecar_files.TOKENIZER_FILES, sidecar_files.TOKENIZER_CONFIG)
    templates = (sidecar_files.CHAT_TEMPLATE, sidecar_files.MORE_TEMPLATES)
    # of SentencePiece, under names that models choose
    is_model = file.suffix in (".model", ".spm", ".tiktoken")
    # the first part: templates may lie in a directory of their own
    return file.parts[0] in (*names, *templates) or is_model


def is_weights(path: Path) -> bool:
    """Return whether a file holds weights, or says which of several files do.

    Example:
        >>> is_weights(Path("tf_model.h5")), is_weights(Path("tokenizer.model"))
        (True, False)
    """
    return path.suffix in _WEIGHTS or path.name.endswith(_INDEX)
