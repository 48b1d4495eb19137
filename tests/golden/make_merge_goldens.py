"""Write tests/golden/merge/mergekit.npz: merges of the models of `checkpoints` by mergekit 0.1.5.

Run by hand: python tests/golden/make_merge_goldens.py

It needs its own environment: `pip install torch==2.13.0 mergekit==0.1.5`. mergekit runs each recipe
as YAML, in a directory where `base`, `a`, `b` and `c` are the models. Keys of the file:

    digest, versions            of the inputs; of the libraries
    CASE/yaml                   the recipe, word for word
    CASE/TENSOR                 float32, the tensors that `recorded` names, one of every kind:
                                the file is small enough to commit
    random/CASE/yaml, seeds
    random/CASE/mean/TENSOR     over the seeds, and std/TENSOR (population): recipes with three
                                members
    random/CASE/kept            uint8, recipes with one member: in how many seeds an element differs
                                from the base, all tensors of `shapes` one after another
    random/CASE/fraction, l1    float32[seeds, tensors of `shapes`], one member: share of the
                                changed elements that are kept; |out - base|_1 / |tau|_1
"""

import importlib.metadata
import os
import pathlib
import shutil
import tempfile
from typing import Any

import checkpoints
import numpy as np
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from safetensors.numpy import load_file

SEEDS = 64
KERNEL = (
    checkpoints.TINY,
    checkpoints.NEAR,
    checkpoints.UNTOUCHED,
    "model.layers.0.mlp.down_proj.weight",
    "model.norm.weight",
)
OF_LAYERS = ("input_layernorm.weight", "k_proj.weight", "down_proj.weight")
HUB = {
    "example-org/base": "base",
    "example-org/math": "a",
    "example-org/code": "b",
    "example-org/chat": "c",
}


def recipe(
    method: str,
    base: str | None,
    members: dict[str, dict[str, Any]],
    parameters: dict[str, Any] | None = None,
    **rest: Any,
) -> str:
    """The YAML text of a recipe over whole models."""
    models = [
        {"model": name, **({"parameters": settings} if settings else {})}
        for name, settings in members.items()
    ]
    text = {"merge_method": method, **({"base_model": base} if base else {}), "models": models}
    text |= {"parameters": parameters} if parameters else {}
    return yaml.safe_dump(
        {**text, "dtype": "float32", **rest}, sort_keys=False, default_flow_style=None
    )


def weighted(
    a: float, b: float | None = None, c: float | None = None, **same: Any
) -> dict[str, dict[str, Any]]:
    """Members with a weight each, and parameters that are the same for all."""
    weights = {"a": a, "b": b, "c": c}
    return {
        name: {"weight": weight, **same} for name, weight in weights.items() if weight is not None
    }


PLAIN: dict[str, dict[str, Any]] = {"a": {}, "b": {}, "c": {}}
PAIR: dict[str, dict[str, Any]] = {"base": {}, "a": {}}
OWN = {
    "a": {"weight": 0.5, "density": 0.7},
    "b": {"weight": 0.3, "density": 0.25},
    "c": {"weight": 0.4, "density": 1.0},
}
FILTERS = [
    {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
    {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
    {"value": 0.5},
]
FALL_THROUGH = {
    "a": {"weight": [{"filter": "mlp", "value": [0.2, 0.8]}, {"filter": "layers.1", "value": 2}]},
    "b": {},
    "c": {"weight": 0.3},
}
SLICES = """\
slices:
  - sources:
      - {model: base, layer_range: [0, 1]}
      - {model: a, layer_range: [0, 1]}
    parameters: {t: [0.25, 0.75]}
  - sources:
      - {model: base, layer_range: [1, 2]}
      - {model: b, layer_range: [0, 1]}
  - sources:
      - {model: c, layer_range: [0, 2]}
      - {model: a, layer_range: [0, 2]}
    base_model: c
merge_method: slerp
base_model: base
parameters:
  t: [{filter: mlp, value: [0.1, 0.9]}, {value: 0.4}]
dtype: float32
"""
SLICE_WEIGHTS = """\
slices:
  - sources:
      - {model: base, layer_range: [0, 2]}
      - {model: a, layer_range: [0, 2], parameters: {weight: [0.2, 1.0], density: [0.9, 0.3]}}
      - {model: b, layer_range: [0, 2]}
    parameters: {density: 0.6, normalize: false}
merge_method: ties
base_model: base
parameters: {weight: 0.7, normalize: true, lambda: [0.5, 1.5]}
dtype: float32
"""

CASES = {
    # one kernel in one setting on the tensors of KERNEL; names and layers of tensors matter below
    "linear": recipe("linear", None, weighted(0.5, 0.2, 0.9)),
    "linear_unnormalized": recipe("linear", None, weighted(0.5, 0.2, 0.9), {"normalize": False}),
    "linear_base_listed": recipe("linear", "base", {"base": {"weight": 0.4}, **weighted(0.5, 0.2)}),
    "linear_out_bfloat16": recipe("linear", None, weighted(1, 1, 1), out_dtype="bfloat16"),
    "slerp": recipe("slerp", "base", PAIR, {"t": 0.3}),
    "slerp_base_second": recipe("slerp", "base", {"a": {}, "base": {}}, {"t": 0.3}),
    "slerp_members": recipe("slerp", "a", {"a": {}, "b": {}}, {"t": "7e-1"}),
    "nuslerp": recipe("nuslerp", None, weighted(0.6, 0.2)),
    "nuslerp_base": recipe("nuslerp", "base", weighted(0.6, 0.2)),
    "nuslerp_row_wise_false": recipe(
        "nuslerp", None, weighted(0.6, 0.2), {"nuslerp_flatten": False}
    ),
    "nuslerp_row_wise_true": recipe(
        "nuslerp", None, weighted(0.6, 0.2), {"nuslerp_flatten": False, "nuslerp_row_wise": True}
    ),
    "nuslerp_base_row_wise_false": recipe(
        "nuslerp", "base", weighted(1, 1), {"nuslerp_flatten": False}
    ),
    "nuslerp_base_row_wise_true": recipe(
        "nuslerp", "base", weighted(1, 1), {"nuslerp_flatten": False, "nuslerp_row_wise": True}
    ),
    "multislerp": recipe("multislerp", None, weighted(0.5, 0.2, 0.9)),
    "multislerp_base": recipe("multislerp", "base", weighted(0.5, 0.2, 0.9)),
    "multislerp_unnormalized": recipe(
        "multislerp", "base", weighted(0.5, 0.2, 0.9), {"normalize_weights": False}
    ),
    "karcher": recipe("karcher", None, PLAIN),
    "karcher_one_step": recipe("karcher", None, PLAIN, {"max_iter": 1}),
    "karcher_base_appended": recipe("karcher", "base", PLAIN),
    "task_arithmetic": recipe("task_arithmetic", "base", weighted(0.5, 0.3, 0.4)),
    "task_arithmetic_lambda": recipe(
        "task_arithmetic", "base", weighted(0.5, 0.3, 0.4), {"lambda": 0.7}
    ),
    "task_arithmetic_normalize": recipe(
        "task_arithmetic", "base", weighted(0.5, 0.3, 0.4), {"normalize": True}
    ),
    "task_arithmetic_negative": recipe("task_arithmetic", "base", weighted(0.8, -0.5)),
    "ties": recipe("ties", "base", weighted(1, 1, 1, density=0.5)),
    "ties_own": recipe("ties", "base", OWN),
    "ties_lambda": recipe("ties", "base", weighted(0.5, 0.3, 0.4, density=0.2), {"lambda": 1.3}),
    "ties_unnormalized": recipe("ties", "base", OWN, {"normalize": False, "int8_mask": True}),
    "ties_rescale": recipe(
        "ties", "base", weighted(0.5, 0.3, 0.4), {"rescale": True, "density": 0.3}
    ),
    "ties_negative": recipe("ties", "base", weighted(0.8, -0.5, 0.3, density=0.3)),
    "breadcrumbs": recipe("breadcrumbs", "base", weighted(0.5, 0.3, 0.4, density=0.6, gamma=0.1)),
    "breadcrumbs_ties": recipe(
        "breadcrumbs_ties", "base", weighted(0.5, 0.3, 0.4, density=0.6, gamma=0.1)
    ),
    "breadcrumbs_default_gamma": recipe(
        "breadcrumbs", "base", weighted(0.5, 0.3, 0.4, density=0.995)
    ),
    "dare_linear_dense": recipe("dare_linear", "base", weighted(0.5, 0.3, 0.4)),
    "dare_ties_dense": recipe("dare_ties", "base", weighted(0.5, 0.3, 0.4)),
    "della_dense": recipe("della", "base", weighted(0.5, 0.3, 0.4)),
    "della_linear_dense": recipe("della_linear", "base", weighted(0.5, 0.3, 0.4)),
    "model_stock": recipe("model_stock", "base", PLAIN),
    "model_stock_filter_wise": recipe("model_stock", "base", PLAIN, {"filter_wise": True}),
    "model_stock_two": recipe("model_stock", "base", {"a": {}, "b": {}}),
    "sce": recipe("sce", "base", PLAIN, {"select_topk": 0.3}),
    "sce_all": recipe("sce", "base", PLAIN),
    "arcee_fusion": recipe("arcee_fusion", "base", PAIR),
    "ram": recipe("ram", "base", PLAIN),
    "ramplus_tl": recipe("ramplus_tl", "base", PLAIN),
    "ramplus_tl_own": recipe(
        "ramplus_tl", "base", PLAIN, {"r": 0.5, "alpha": 1.5, "epsilon": 0.05}
    ),
    "nearswap": recipe("nearswap", "base", PAIR, {"t": 0.05}),
    "passthrough": recipe("passthrough", None, {"b": {}}),
}
NAMED = {
    "linear_base_appended": recipe(
        "linear", "base", {"a": {}, "b": {"weight": 2}}, {"weight": 0.5}
    ),
    "linear_fall_through": recipe("linear", None, FALL_THROUGH, {"weight": 0.6}),
    "slerp_gradient": recipe("slerp", "base", PAIR, {"t": [0, 0.5, 1]}),
    "slerp_filters": recipe("slerp", "base", PAIR, {"t": FILTERS}),
    "slerp_slices": SLICES,
    "ties_slices": SLICE_WEIGHTS,
    "passthrough_scale": recipe(
        "passthrough",
        None,
        {"b": {"scale": [{"filter": "o_proj", "value": 0}, {"filter": "mlp", "value": [0.5, 2]}]}},
    ),
}
RANDOM = {
    "dare_linear": recipe("dare_linear", "base", weighted(0.5, 0.3, 0.4, density=0.6)),
    "dare_ties": recipe("dare_ties", "base", weighted(0.5, 0.3, 0.4, density=0.6)),
    "della": recipe("della", "base", weighted(0.5, 0.3, 0.4, density=0.6, epsilon=0.3)),
    "della_linear": recipe(
        "della_linear", "base", weighted(0.5, 0.3, 0.4, density=0.6, epsilon=0.3)
    ),
    "dare_linear_alone": recipe("dare_linear", "base", weighted(1, density=0.4)),
    "dare_linear_alone_unscaled": recipe(
        "dare_linear", "base", weighted(1, density=0.4), {"rescale": False}
    ),
    "della_linear_alone": recipe("della_linear", "base", weighted(1, density=0.6)),
    "della_linear_alone_unscaled": recipe(
        "della_linear", "base", weighted(1, density=0.6), {"rescale": False}
    ),
}


def examples() -> dict[str, str]:
    """The recipes of merge/examples, with the directories in place of the hub's names."""
    texts = {}
    for path in sorted((pathlib.Path(__file__).parent / "merge" / "examples").glob("*.yml")):
        text = path.read_text()
        for name, directory in HUB.items():
            text = text.replace(name, directory)
        texts[f"example_{path.stem}"] = text
    return texts


def recorded(case: str, tensor: str) -> bool:
    """Whether a tensor of a case goes into the file."""
    if "arcee_fusion" in case and tensor in (checkpoints.TINY, checkpoints.NEAR):
        return False  # a divergence of 1e-8 is float32's rounding: no one's result
    return (
        tensor in KERNEL if case in CASES else "layers" not in tensor or tensor.endswith(OF_LAYERS)
    )


def merge(text: str, seed: int = 0) -> checkpoints.Tensors:
    """The output of mergekit for a recipe, as float32."""
    options = MergeOptions(
        copy_tokenizer=False, write_model_card=False, quiet=True, random_seed=seed
    )
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), "out", options)
    # a bfloat16 file is beyond numpy: through torch, whose float32 holds every value of it
    tensors = (
        load_file("out/model.safetensors")
        if "out_dtype" not in text
        else _load_with_torch("out/model.safetensors")
    )
    shutil.rmtree("out")
    return {name: values.astype(np.float32) for name, values in tensors.items()}


def _load_with_torch(path: str) -> checkpoints.Tensors:
    from safetensors.torch import load_file as load_torch

    return {name: values.float().numpy() for name, values in load_torch(path).items()}


def spread(text: str) -> dict[str, np.ndarray]:
    """Mean and deviation of a random recipe over the seeds."""
    runs = [merge(text, seed) for seed in range(SEEDS)]
    arrays = {"yaml": np.array(text), "seeds": np.array(SEEDS)}
    for tensor in KERNEL:
        values = np.stack([run[tensor] for run in runs]).astype(np.float64)
        arrays[f"mean/{tensor}"] = values.mean(axis=0).astype(np.float32)
        arrays[f"std/{tensor}"] = values.std(axis=0).astype(np.float32)
    return arrays


def masks(text: str, inputs: dict[str, checkpoints.Tensors]) -> dict[str, np.ndarray]:
    """What a random recipe of member a alone keeps."""
    runs = [merge(text, seed) for seed in range(SEEDS)]
    changed, fractions, lengths = [], [], []
    for tensor, base in inputs["base"].items():
        tau = (inputs["a"][tensor] - base).reshape(-1)
        moved = np.stack([run[tensor] - base for run in runs]).reshape(SEEDS, -1)
        changed.append((moved != 0).sum(axis=0))
        fractions.append((moved != 0).sum(axis=1) / (tau != 0).sum())
        lengths.append(abs(moved).sum(axis=1, dtype=np.float64) / abs(tau).sum(dtype=np.float64))
    return {
        "yaml": np.array(text),
        "seeds": np.array(SEEDS),
        "kept": np.concatenate(changed).astype(np.uint8),
        "fraction": np.stack(fractions, axis=1).astype(np.float32),
        "l1": np.stack(lengths, axis=1).astype(np.float32),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    inputs = checkpoints.models()
    versions = {
        name: importlib.metadata.version(name)
        for name in ("mergekit", "torch", "transformers", "numpy")
    }
    goldens = {"digest": np.array(checkpoints.digest(inputs)), "versions": np.array(str(versions))}
    target = pathlib.Path(__file__).parent.resolve() / "merge" / "mergekit.npz"
    recipes = {**CASES, **NAMED, **examples()}
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        checkpoints.write(pathlib.Path(), inputs)
        for name, text in recipes.items():
            goldens[f"{name}/yaml"] = np.array(text)
            goldens |= {
                f"{name}/{tensor}": values
                for tensor, values in merge(text).items()
                if recorded(name, tensor)
            }
        for name, text in RANDOM.items():
            arrays = masks(text, inputs) if "alone" in name else spread(text)
            goldens |= {f"random/{name}/{key}": values for key, values in arrays.items()}
        os.chdir(target.parent)
    np.savez_compressed(target, **goldens)
    print(
        f"{len(recipes)} recipes and {len(RANDOM)} random ones: "
        f"{target.stat().st_size / 1000:.0f} kB"
    )
