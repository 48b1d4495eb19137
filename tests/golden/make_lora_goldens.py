"""Write tests/golden/merge/lora.npz: merges of adapters with the base of `checkpoints` by PEFT.

Run by hand: python tests/golden/make_lora_goldens.py

It needs its own environment: `pip install torch==2.13.0 peft==0.21.2 transformers==5.24.0`. Keys of
the file:

    digest, versions            of the inputs; of the libraries
    CASE/config                 adapter_config.json, word for word
    CASE/adapter/TENSOR         of adapter_model.safetensors
    CASE/merged/TENSOR          float32, tensors of `merge_and_unload` that differ from the base
"""

import importlib.metadata
import json
import pathlib
import tempfile
from typing import Any

import checkpoints
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

CASES: dict[str, dict[str, Any]] = {
    "plain": {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]},
    "rslora": {
        "r": 4,
        "lora_alpha": 2,
        "use_rslora": True,
        "fan_in_fan_out": True,
        "target_modules": ["k_proj", "lm_head"],
    },
    "patterns": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": "all-linear",
        "rank_pattern": {"v_proj": 5, "layers.1.mlp.up_proj": 3},
        "alpha_pattern": {r"layers\.0\..*q_proj": 1, "o_proj": 7},
    },
    "embedding": {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": ["embed_tokens", "v_proj"],
        "modules_to_save": ["lm_head"],
    },
}


def merged(
    directory: str, settings: dict[str, Any], generator: np.random.Generator
) -> dict[str, np.ndarray]:
    """One adapter with random weights: its files and the tensors that it changes."""
    model = AutoModelForCausalLM.from_pretrained(f"{directory}/base", dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name or "modules_to_save" in name:
            values = 0.2 * (generator.random(tuple(parameter.shape)) - 0.5)
            parameter.data = torch.from_numpy(values.astype(np.float32))
    model.save_pretrained(f"{directory}/adapter")
    arrays = {
        "config": np.array(
            (pathlib.Path(directory) / "adapter" / "adapter_config.json").read_text()
        )
    }
    arrays |= {
        f"adapter/{name}": values
        for name, values in load_file(f"{directory}/adapter/adapter_model.safetensors").items()
    }
    base = load_file(f"{directory}/base/model.safetensors")
    for name, values in model.merge_and_unload().state_dict().items():
        if not np.array_equal(values.numpy(), base[name]):
            arrays[f"merged/{name}"] = values.numpy()
    return arrays


if __name__ == "__main__":
    torch.set_num_threads(1)
    inputs = checkpoints.models()
    versions = {
        name: importlib.metadata.version(name)
        for name in ("peft", "torch", "transformers", "numpy")
    }
    goldens = {
        "digest": np.array(checkpoints.digest(inputs)),
        "versions": np.array(json.dumps(versions)),
    }
    random = np.random.Generator(np.random.PCG64(checkpoints.SEED))
    for case, chosen in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            checkpoints.write(pathlib.Path(folder), {"base": inputs["base"]})
            goldens |= {
                f"{case}/{key}": values for key, values in merged(folder, chosen, random).items()
            }
    target = pathlib.Path(__file__).parent / "merge" / "lora.npz"
    np.savez_compressed(target, **goldens)
    print(f"{len(CASES)} adapters: {target.stat().st_size / 1000:.0f} kB")
