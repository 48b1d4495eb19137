"""Writing the adapter of a member in the format of PEFT.

Source: PEFT 0.21, https://github.com/huggingface/peft.
"""

import json
import sys
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from jax_ordermerge import tree
from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.checkpoint import atomic, safetensors, shards, sidecar_files
from jax_ordermerge.config import Lora
from jax_ordermerge.data.prompt_card import prompt_section
from jax_ordermerge.data.prompt_format import PromptFormat
from jax_ordermerge.merge.sources.peft_files import CONFIG, STEM
from jax_ordermerge.merge.sources.public_names import public_name
from jax_ordermerge.model.lora import table, targets


def write_adapter(
    directory: str | Path,
    adapter: tree.Tree,
    config: ModelConfig,
    settings: Lora,
    *,
    base: str,
    dtype: DTypeLike = np.float32,
    tokenizer_from: Path | None = None,
    prompt_format: PromptFormat | None = None,
    card: str | None = None,
) -> None:
    """Write an adapter as PEFT does, with a model card.

    Args:
        directory: target; it must not exist or be empty.
        adapter: the dict of `model.lora.table`.
        config: of the base model.
        settings: rank, alpha and targets.
        base: name or directory of the base model.
        dtype: of the tensors.
        tokenizer_from: directory whose tokenizer files are copied, if any.
        prompt_format: how the model was asked in training.
        card: text of `README.md`; by default one that names the base.

    Raises:
        UserError: the target is not empty.
    """
    specs, arrays = table(config, settings), tree.flatten(adapter)
    modules = {spec.hf_name.split(".")[-2] for spec in targets(config, settings)}
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        # PEFT declares it an integer, and takes a float
        "lora_alpha": int(settings.alpha) if settings.alpha.is_integer() else settings.alpha,
        "use_rslora": settings.rslora,
        "target_modules": sorted(modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    form = prompt_format or PromptFormat()
    card = card or sidecar_files.model_card(
        Path(directory).name,
        prompt_section(form, adapter=True),
        base_model=public_name(base).card_id,
        relation="adapter",
    )
    with atomic.new_directory(directory) as partial:
        atomic.write_text(partial / CONFIG, json.dumps(content, indent=2) + "\n")
        atomic.write_text(partial / "README.md", card)
        # An adapter has no config.json, which would make it a model. Who loads it reads here where
        # its responses end, and how it is asked.
        sidecar_files.write_generation_config(partial, config)
        if tokenizer_from is not None:
            sidecar_files.copy_tokenizer(tokenizer_from, partial, form.chat_template)
        shapes = {name: spec.hf_shape for spec in specs for name in spec.hf_names()}
        # PEFT reads a single file, whatever its size
        with shards.ShardFiles(partial, shapes, dtype, sys.maxsize, stem=STEM) as files:
            files.create()
            for spec in specs:
                # the dict stacks the layers, PEFT has a tensor for each
                layers = np.asarray(arrays[spec.path])
                for name, values in zip(spec.hf_names(), layers, strict=True):
                    files.write(name, 0, safetensors.cast(values, dtype, name))
