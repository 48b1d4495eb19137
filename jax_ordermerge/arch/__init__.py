"""What a model is: its config, from and to Hugging Face, and the table of its tensors."""

from jax_ordermerge.arch.config import ModelConfig
from jax_ordermerge.arch.families import FAMILIES, Family
from jax_ordermerge.arch.frequencies import rope_frequencies, rope_scale
from jax_ordermerge.arch.rope import Rope
from jax_ordermerge.arch.sizes import ARCHITECTURES, architecture_of
from jax_ordermerge.arch.table import TensorSpec, hf_tensors, parameter_count, tensor_table
from jax_ordermerge.arch.unlisted import UnlistedConfig

__all__ = [
    "ARCHITECTURES",
    "FAMILIES",
    "Family",
    "ModelConfig",
    "Rope",
    "TensorSpec",
    "UnlistedConfig",
    "architecture_of",
    "hf_tensors",
    "parameter_count",
    "rope_frequencies",
    "rope_scale",
    "tensor_table",
]
