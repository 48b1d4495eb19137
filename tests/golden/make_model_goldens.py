"""Write tests/golden/model/*.npz: logits of transformers on torch for every tiny family.

Run by hand: python tests/golden/make_model_goldens.py

The weights come from `families.weights` (sines of indices), so only logits are stored:
float32[8, 96] each.
"""

import pathlib

import families
import numpy as np
import torch
import transformers

from jax_ordermerge import tree
from jax_ordermerge.arch import ModelConfig, hf_tensors


def torch_model(config: ModelConfig, params: tree.Tree) -> transformers.PreTrainedModel:
    """The transformers model of a config with these weights, in float32."""
    hf_config = transformers.AutoConfig.for_model(**config.to_hf("float32"))
    model = (
        transformers.AutoModelForCausalLM.from_config(hf_config, attn_implementation="eager")
        .to(torch.float32)
        .eval()
    )
    flat = tree.flatten(params)
    state = {
        name: torch.tensor(np.asarray(flat[spec.path] if layer is None else flat[spec.path][layer]))
        for name, spec, layer in hf_tensors(config)
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = {"lm_head.weight"} if config.tie_embeddings else set()
    if set(missing) - tied or unexpected:
        raise ValueError(
            "the tensor table does not name the tensors of transformers: "
            f"missing {missing}, unexpected {unexpected}"
        )
    return model


def logits(config: ModelConfig, params: tree.Tree, tokens: np.ndarray) -> np.ndarray:
    """float32[B, T, V]."""
    with torch.no_grad():
        return (
            torch_model(config, params)(torch.tensor(tokens, dtype=torch.long))
            .logits.float()
            .numpy()
        )


if __name__ == "__main__":
    directory = pathlib.Path(__file__).parent / "model"
    directory.mkdir(exist_ok=True)
    for name, config in families.FAMILIES.items():
        values = logits(config, families.weights(config), families.tokens(config))
        # one row, every third position: enough to see any difference, small enough to commit
        np.savez_compressed(directory / f"{name}.npz", logits=values[1, ::3])
        print(f"{name}: logits up to {abs(values).max():.2f}, spread {values.std():.2f}")
