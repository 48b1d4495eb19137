"""A tiny Llama base and three fine-tuned members: the inputs of the merge goldens.

They are the same to the last bit wherever they are made. Every value is one of bfloat16, so float32
and bfloat16 files hold the same numbers, and every difference to the base is exact in float32. As
after fine-tuning in bfloat16, about half of a member's elements are bit for bit those of the base.
No two differences of a tensor, over all members, have the same size: a cut by size has one answer.
Three tensors are special, see `TINY`, `NEAR` and `UNTOUCHED`.
"""

import hashlib
import json
import pathlib
from collections.abc import Mapping

import numpy as np

Tensors = dict[str, np.ndarray]

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
MEMBERS = ("a", "b", "c")
SEED = 20260131
# 256 times smaller than the others, some differences below 1e-5
TINY = "model.layers.0.self_attn.k_proj.weight"
# only small elements changed: the members have a cosine above 0.9995 to the base
NEAR = "model.layers.1.mlp.down_proj.weight"
UNTOUCHED = "model.layers.1.input_layernorm.weight"  # member c left it at the base


def shapes() -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape, embedding first, head last."""
    layer = {
        "input_layernorm": (16,),
        "self_attn.q_proj": (16, 16),
        "self_attn.k_proj": (8, 16),
        "self_attn.v_proj": (8, 16),
        "self_attn.o_proj": (16, 16),
        "post_attention_layernorm": (16,),
        "mlp.up_proj": (24, 16),
        "mlp.gate_proj": (24, 16),
        "mlp.down_proj": (16, 24),
    }
    layers = {
        f"model.layers.{number}.{name}.weight": shape
        for number in range(2)
        for name, shape in layer.items()
    }
    return {
        "model.embed_tokens.weight": (40, 16),
        **layers,
        "model.norm.weight": (16,),
        "lm_head.weight": (40, 16),
    }


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The nearest bfloat16 values (ties to even), as float32."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def _bell(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Nearly normal numbers, mean 0, variance 1.

    Sums of uniform numbers, whose stream is the same in every version of numpy.
    """
    return generator.random((12, *shape)).sum(axis=0) - 6


def _distinct(values: np.ndarray, base: np.ndarray, changed: np.ndarray) -> np.ndarray:
    """Move changed elements [m, n] away from zero until no two differ in size."""
    bits = values.view(np.uint32).copy()
    seen = {np.float32(0.0)}
    for member, element in np.argwhere(changed):
        while abs(bits[member, element : element + 1].view(np.float32)[0] - base[element]) in seen:
            bits[member, element] += 0x10000
        seen.add(abs(bits[member, element : element + 1].view(np.float32)[0] - base[element]))
    return bits.view(np.float32)


def _tensor(
    name: str, shape: tuple[int, ...], generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Base [*s] and members [m, *s]; differences are partly common, and half of them zero."""
    unit = _bell(generator, shape)
    shared, individual = _bell(generator, shape), _bell(generator, (len(MEMBERS), *shape))
    changed = generator.random((len(MEMBERS), *shape)) < 0.5
    scale = 2.0**-10 if name == TINY else 0.25
    base = 1 + 0.1 * unit if len(shape) == 1 else scale * unit
    task_vectors = 0.4 * scale * (0.8 * shared + 0.6 * individual)
    if name == NEAR:
        small = generator.random(shape) < 0.6
        base, task_vectors = np.where(small, base / 128, base), task_vectors / 32
        changed &= small
    if name == UNTOUCHED:
        changed[MEMBERS.index("c")] = False
    base = to_bfloat16(base)
    members = np.where(changed, to_bfloat16(base + task_vectors), base)
    flat = _distinct(
        members.reshape(len(MEMBERS), -1), base.reshape(-1), changed.reshape(len(MEMBERS), -1)
    )
    return base, flat.reshape(members.shape)


def models() -> dict[str, Tensors]:
    """{"base", "a", "b", "c"} -> Hugging Face name -> float32 array of bfloat16 values."""
    generator = np.random.Generator(np.random.PCG64(SEED))
    result: dict[str, Tensors] = {name: {} for name in ("base", *MEMBERS)}
    for name, shape in shapes().items():
        result["base"][name], members = _tensor(name, shape, generator)
        for member, values in zip(MEMBERS, members, strict=True):
            result[member][name] = values
    return result


def digest(checkpoints: Mapping[str, Tensors]) -> str:
    """sha256 of names, shapes and little-endian float32 bytes of all models."""
    total = hashlib.sha256()
    for model in sorted(checkpoints):
        for name in sorted(checkpoints[model]):
            values = checkpoints[model][name]
            total.update(f"{model} {name} {values.shape}\n".encode())
            total.update(values.astype("<f4").tobytes())
    return total.hexdigest()


def write(directory: pathlib.Path, checkpoints: Mapping[str, Tensors]) -> None:
    """A Hugging Face directory a model, float32 safetensors."""
    from safetensors.numpy import save_file

    for model, tensors in checkpoints.items():
        (directory / model).mkdir(parents=True)
        (directory / model / "config.json").write_text(json.dumps(CONFIG, indent=2))
        save_file(tensors, directory / model / "model.safetensors", metadata={"format": "pt"})
