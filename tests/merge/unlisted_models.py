"""Tiny checkpoints of architectures that are not in the tensor table, made by transformers.

Sizes repeat (16, 32), so that most programs of a merge serve tensors of many models.
"""

import json
import shutil

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import transformers

torch = pytest.importorskip("torch", reason="needs the extra parity")

TEXT = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {
    "num_experts": 2,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 2,
    "num_attention_heads": 2,
    "depth": 2,
    "num_hidden_layers": 2,
    "out_hidden_size": 16,
    "image_size": 8,
    "patch_size": 4,
}
# model_type -> the class and the values of its config
CLASSES = {
    "mixtral": ("MixtralForCausalLM", {**TEXT, **_EXPERTS}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**TEXT, **_EXPERTS}),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {
            **{key: value for key, value in TEXT.items() if key != "head_dim"},
            "moe_intermediate_size": 16,
            "n_routed_experts": 2,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": {
                **TEXT,
                "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
            },
            "vision_config": {
                **_VISION,
                "fullatt_block_indexes": [1],
                "temporal_patch_size": 1,
                "spatial_merge_size": 1,
            },
        },
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {"text_config": TEXT, "vision_config": _VISION, "mm_tokens_per_image": 4},
    ),
    "bert": ("BertForMaskedLM", TEXT),
    "t5": (
        "T5ForConditionalGeneration",
        {
            "vocab_size": 32,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 32,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_heads": 2,
            "relative_attention_num_buckets": 8,
            "tie_word_embeddings": True,
        },
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        {
            "vocab_size": 32,
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "num_mel_bins": 16,
            "max_source_positions": 16,
            "max_target_positions": 16,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
    ),
    "mamba": (
        "MambaForCausalLM",
        {
            "vocab_size": 32,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "state_size": 4,
            "expand": 2,
            "time_step_rank": 4,
            "use_mambapy": False,
        },
    ),
}


def load(directory, stem="model"):
    """The tensors of a directory by name, in numpy."""
    index = directory / f"{stem}.safetensors.index.json"
    files = {f"{stem}.safetensors"}
    if index.is_file():
        files = {*json.loads(index.read_text())["weight_map"].values()}
    tensors = {}
    for file in sorted(files):
        tensors |= safetensors.numpy.load_file(directory / file)
    return tensors


def save(directory, tensors, *, like=None, config=None, stem="model"):
    """A directory with tensors, and the other files of `like` or a config."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in like.iterdir() if like else ():
        if ".safetensors" not in path.name:
            shutil.copyfile(path, directory / path.name)
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, directory / f"{stem}.safetensors", {"format": "pt"})
    return directory


def make(directory, kind, **changes):
    """The base of an architecture, made by transformers; other values of its config by name."""
    name, values = CLASSES[kind]
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**values, **changes))
    model.save_pretrained(directory)
    return directory


def is_float(array):
    # by name: numpy alone has no bfloat16
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"


def perturb(tensors, seed):
    """A member: other numbers in every tensor of real numbers, all else as it is."""
    generator = np.random.default_rng(seed)
    return {
        name: (x + generator.normal(size=x.shape)).astype(x.dtype) if is_float(x) else x
        for name, x in tensors.items()
    }


def make_unet(directory):
    """The names and shapes of a diffusion UNet, as diffusers writes it."""
    shapes = {"conv_in.weight": (16, 4, 3, 3), "conv_in.bias": (16,)}
    for block in ("down_blocks.0", "down_blocks.1", "up_blocks.0", "up_blocks.1", "mid_block"):
        shapes |= {
            f"{block}.resnets.0.norm1.weight": (16,),
            f"{block}.resnets.0.conv1.weight": (16, 16, 3, 3),
            f"{block}.resnets.0.time_emb_proj.weight": (16, 32),
            f"{block}.attentions.0.transformer_blocks.0.attn1.to_q.weight": (16, 16),
            f"{block}.attentions.0.transformer_blocks.0.ff.net.0.proj.weight": (32, 16),
        }
    generator = np.random.default_rng(0)
    tensors = {
        name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()
    }
    config = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.30.0"}
    config |= {"block_out_channels": [16, 16], "in_channels": 4}
    return save(directory, tensors, config=config, stem="diffusion_pytorch_model")
