"""A tiny base model with a tokenizer, and a tiny task, made on the spot."""

import json
import pathlib

import yaml

from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.checkpoint import convert
from jax_ordermerge.model import llama

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefgh", "plus", "is", "?", "."]


def make_tokenizer():
    import tokenizers
    import transformers

    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


def byte_tokenizer() -> dict:
    """Return settings of `make_base` for a tokenizer whose tokens are bytes: one that GGUF has."""
    import tokenizers
    import transformers

    level = tokenizers.pre_tokenizers.ByteLevel
    tokens = ["<pad>", "<s>", "</s>", *sorted(level.alphabet())]
    bpe = tokenizers.Tokenizer(
        tokenizers.models.BPE({token: i for i, token in enumerate(tokens)}, [])
    )
    bpe.pre_tokenizer = level(add_prefix_space=False)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **names)
    return {"tokenizer": fast, "vocab_size": len(tokens)}


def make_base(directory: pathlib.Path, seed: int = 0, tokenizer=None, **change) -> pathlib.Path:
    fast = tokenizer or make_tokenizer()
    files = directory.with_name(directory.name + "-tokenizer")
    fast.save_pretrained(files)
    shape = {
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "max_position_embeddings": 32,
        "tie_embeddings": True,
        "bos_token_id": 1,
        "eos_token_ids": (2,),
        "pad_token_id": 0,
    }
    config = ModelConfig(**(shape | change))
    convert.export(
        llama.init_params(config, seed), config, directory, dtype="float32", source=files
    )
    return directory


def make_config(folder: pathlib.Path, **sections) -> pathlib.Path:
    rows = [
        {"prompt": f"{a} plus {b} is ?", "completion": f"{b} {a} ."}
        for a in "abcdefgh"
        for b in "abcdefgh"
    ]
    for name, part in (("train", rows[:44]), ("test", rows[44:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    raw = {
        "name": "tiny",
        "output": str(folder / "run"),
        "model": {"base": str(folder / "base"), "compute_dtype": "float32"},
        "mesh": {"order": 1, "fsdp": 1},
        "data": {
            "train": str(folder / "train.jsonl"),
            "test": str(folder / "test.jsonl"),
            "max_length": 16,
            "template": "plain",
            "validation_examples": 4,
        },
        "population": {"members": 2},
        "training": {
            "epochs": 2,
            "batch": 8,
            "learning_rate": 3e-3,
            "log_every": 2,
            "checkpoint_every": 4,
        },
        "analysis": {"bootstrap": 50, "permutations": 50, "batch": 16},
        "merge": {
            # not that of the base, which is float32
            "dtype": "bfloat16",
            "methods": [
                {"method": "average"},
                {"method": "selection", "parameters": {"resample": "exhaustive"}},
            ],
            "controls": "none",
        },
        "evaluation": {"batch": 8, "tasks": [{"name": "swap", "max_new_tokens": 4}]},
    }
    for name, change in sections.items():
        raw[name] = {**raw.get(name, {}), **change} if isinstance(change, dict) else change
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(raw))
    return file
