"""Write tests/golden/merge/unlisted.npz: merges of unlisted architectures by mergekit 0.1.5.

Run by hand, in the root of the repository:

    PYTHONPATH=. HF_HUB_OFFLINE=1 python tests/golden/make_unlisted_goldens.py

It needs its own environment: `pip install torch==2.13.0 mergekit==0.1.5`. Names and shapes of each
model are those that transformers saves. Its recipes run as `mergekit-yaml`; those of the UNet,
whose config transformers cannot read, as `mergekit-pytorch`. Keys of the file:

    versions            of the libraries, and the day
    METHOD/yaml         the recipe, word for word, in which `base`, `a` and `b` are the models
    KIND/config         config.json
    KIND/shapes         JSON: name -> shape
    KIND/METHOD         float32, `unlisted_inputs.sample` of each tensor by name, one after another
    KIND/METHOD/sum     float64, per tensor by name: the sum of all of its elements
"""

import datetime as dt
import importlib.metadata
import json
import pathlib
import re
import shutil
import subprocess
import tempfile

import numpy as np
import transformers
import unlisted_inputs
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from safetensors.numpy import load_file

from tests.merge import unlisted_models

RECIPES = {
    "linear": """\
merge_method: linear
models:
  - {model: a, parameters: {weight: 0.5}}
  - {model: b, parameters: {weight: 0.2}}
dtype: float32
""",
    "ties": """\
merge_method: ties
base_model: base
models:
  - {model: a, parameters: {weight: 0.6, density: 0.5}}
  - {model: b, parameters: {weight: 0.9, density: 0.7}}
dtype: float32
""",
    # at a density below 1 the masks are random: `mergekit.npz` has their distribution
    "dare_linear": """\
merge_method: dare_linear
base_model: base
models:
  - {model: a, parameters: {weight: 0.6, density: 1.0}}
  - {model: b, parameters: {weight: 0.9, density: 1.0}}
dtype: float32
""",
    "slerp": """\
merge_method: slerp
base_model: base
models: [{model: base}, {model: a}]
parameters: {t: 0.3}
dtype: float32
""",
    "model_stock": """\
merge_method: model_stock
base_model: base
models: [{model: a}, {model: b}]
dtype: float32
""",
}
# `mergekit-yaml` has no architecture of diffusers; of the tensors of Whisper and BERT, as
# transformers saves them, its tables misspell some and lack others.
RAW = ("unet", "whisper", "bert")
# With transformers 5 mergekit merges the experts of a layer as one tensor, under the names of the
# modules. DeepSeek-V3's experts, one by one in a file, it leaves out without a word.
FUSED = ("mixtral", "qwen3_moe", "deepseek_v3")
STEM = {"unet": "diffusion_pytorch_model"}
# T5 1.1, the one that is in mergekit's table.
CHANGES = {"t5": {"feed_forward_proj": "gated-gelu"}}
Shapes = dict[str, tuple[int, ...]]


def merge(kind: str, method: str, directory: pathlib.Path) -> dict[str, np.ndarray]:
    """The output of mergekit for a recipe."""
    file = f"/{STEM.get(kind, 'model')}.safetensors" if kind in RAW else ""
    text = re.sub(r"(model: )(\w+)", rf"\1{directory}/\2{file}", RECIPES[method])
    if kind in RAW:
        (directory / "recipe.yml").write_text(text)
        command = ["mergekit-pytorch", "recipe.yml", "out", "--quiet"]
        subprocess.run(command, cwd=directory, check=True)
    else:
        options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
        config = MergeConfiguration.model_validate(yaml.safe_load(text))
        run_merge(config, str(directory / "out"), options)
    merged = load_file(directory / "out" / "model.safetensors")
    shutil.rmtree(directory / "out")
    return merged


def model_files(kind: str, directory: pathlib.Path) -> tuple[Shapes, dict[str, object]]:
    """Names and shapes as mergekit merges them, and the config, of a model."""
    if kind == "unet":
        unlisted_models.make_unet(directory)
    else:
        unlisted_models.make(directory, kind, **CHANGES.get(kind, {}))
    stored = unlisted_models.load(directory, STEM.get(kind, "model"))
    shapes = {name: x.shape for name, x in stored.items()}
    config = json.loads((directory / "config.json").read_text())
    if kind in FUSED:
        model = transformers.AutoModelForCausalLM.from_pretrained(directory)
        shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    if kind == "gemma3":
        # as Google publishes it, which is what mergekit requires: transformers 5 saves other names
        shapes = {
            name.replace("vision_tower.", "vision_tower.vision_model."): shape
            for name, shape in shapes.items()
            if "vision_tower.head." not in name
        }
    return shapes, config


def goldens_of(kind: str, directory: pathlib.Path) -> dict[str, np.ndarray]:
    """The goldens of an architecture."""
    shapes, config = model_files(kind, directory / "original")
    stem = STEM.get(kind, "model")
    unlisted_inputs.write(directory, unlisted_inputs.tensors(shapes), config, stem)
    goldens = {
        f"{kind}/config": np.array(json.dumps(config)),
        f"{kind}/shapes": np.array(json.dumps(shapes)),
    }
    for method in RECIPES:
        merged = merge(kind, method, directory)
        if merged.keys() != shapes.keys():
            raise ValueError(f"{kind} {method}: {sorted(merged.keys() ^ shapes.keys())}")
        values = [merged[name] for name in sorted(merged)]
        goldens[f"{kind}/{method}"] = np.concatenate([*map(unlisted_inputs.sample, values)])
        goldens[f"{kind}/{method}/sum"] = np.array([x.sum(dtype=np.float64) for x in values])
    return goldens


if __name__ == "__main__":
    names = ("mergekit", "torch", "transformers", "numpy")
    versions = {name: importlib.metadata.version(name) for name in names}
    versions["day"] = dt.datetime.now(dt.UTC).date().isoformat()
    goldens = {"versions": np.array(json.dumps(versions))}
    goldens |= {f"{method}/yaml": np.array(text) for method, text in RECIPES.items()}
    for kind in [*unlisted_models.CLASSES, "unet"]:
        with tempfile.TemporaryDirectory() as name:
            goldens |= goldens_of(kind, pathlib.Path(name))
    target = pathlib.Path(__file__).parent / "merge" / "unlisted.npz"
    np.savez_compressed(target, **goldens)
    print(f"{target.stat().st_size / 1000:.0f} kB")
