"""Keys of a Hugging Face `config.json`: which are read, refused or ignored."""

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Final

from jax_ordermerge.errors import UserError
from jax_ordermerge.json_types import JsonRow, JsonValue

# How to pass over keys, for messages.
IGNORE_HINT: Final = (
    "if the model does not depend on it, pass over it with model.ignore_config_keys in a config, or"
    " with --ignore-config-keys"
)
# Keys that change the model in ways that are not implemented, and the values without effect.
_MUST_BE: Final[dict[str, tuple[JsonValue, ...]]] = {
    # two names of the same function
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "is_decoder": (False, True, None),
    "logit_scale": (1, None),
    # Multipliers and caps are of relatives of Llama (Gemma 2, Cohere, Granite). A converted model
    # may keep such a key under the model_type of Llama.
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "residual_multiplier": (1, None),
    "embedding_multiplier": (1, None),
    "attention_multiplier": (None,),
    "logits_scaling": (1, None),
    # mixtures of experts have other tensors than the table
    "num_experts": (0, None),
    "num_local_experts": (0, None),
    "pruned_heads": ({}, None),
}
_READ: Final = frozenset(
    [
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        # read where the rope has none of its own
        "original_max_position_embeddings",
        "sliding_window",
        "use_sliding_window",
        "max_window_layers",
        "layer_types",
        "attention_bias",
        "mlp_bias",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "initializer_range",
    ]
)
# Keys on training, serving and bookkeeping, which do not change the forward pass.
_NEUTRAL: Final = frozenset(
    [
        "architectures",
        "torch_dtype",
        "dtype",
        "transformers_version",
        "use_cache",
        "_name_or_path",
        # Rates of dropout are neutral, because nothing here drops: the order of the data must be
        # all that differs between members.
        "attention_dropout",
        "auto_map",
        # notes of other trainers and exporters, which transformers does not read
        "is_llama_config",
        "rope_interleaved",
        "transformers.js_config",
        "neftune_noise_alpha",
        "model_max_length",
        "max_sequence_length",
        "gradient_checkpointing",
        "keys_to_ignore_at_inference",
        "ignore_index",
        "model_name",
        "unsloth_version",
        "unsloth_fixed",
        # splits matmuls to repeat the rounding of the pretraining; the function is the same
        "pretraining_tp",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "torchscript",
        "id2label",
        "label2id",
        "finetuning_task",
        "task_specific_params",
        "problem_type",
        "chunk_size_feed_forward",
        "tokenizer_class",
        "prefix",
        "unk_token_id",
        "sep_token_id",
        "decoder_start_token_id",
        "hidden_dropout",
        "hidden_dropout_prob",
        "resid_pdrop",
        "embd_pdrop",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "attn_implementation",
        "cache_implementation",
        "use_bfloat16",
        "tf_legacy_loss",
        # older names of keys of Gemma, which transformers does not read
        "sliding_window_size",
        "_sliding_window_pattern",
        "cross_attention_hidden_size",
        "tie_encoder_decoder",
        "remove_invalid_values",
        # From here on: defaults of generation, which older transformers wrote into this file.
        "max_length",
        "min_length",
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "repetition_penalty",
        "num_beams",
        "length_penalty",
        "exponential_decay_length_penalty",
        "suppress_tokens",
        "begin_suppress_tokens",
        "bad_words_ids",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "diversity_penalty",
        "num_beam_groups",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "num_return_sequences",
    ]
)


def check_keys(
    config: JsonRow,
    ignore: frozenset[str],
    path: str,
    family_keys: Collection[str] = (),
    family_must_be: Mapping[str, tuple[JsonValue, ...]] = MappingProxyType({}),
) -> None:
    """Refuse keys that are unknown or change the model in a way that is not implemented.

    Args:
        config: the parsed file.
        ignore: keys that are not checked.
        path: of the file, for messages.
        family_keys: keys that the family of the file reads and others do not.
        family_must_be: keys that the family knows, and their values without effect.

    Raises:
        UserError: such keys are named, or a key of `ignore` that the model reads.
    """
    # A key that is read would be used in spite of the wish to ignore it.
    readable = _READ | set(family_keys)
    if read := sorted(ignore & readable & config.keys()):
        raise UserError(
            f"{path}: {', '.join(read)} cannot be ignored, because the model depends on it; change"
            " the file instead"
        )
    # An allow list: a key of tomorrow may change the mathematics, and a model that is computed
    # wrongly still gives plausible losses.
    unknown, must_be = {}, {**_MUST_BE, **family_must_be}
    for key, value in config.items():
        if key in ignore or key in readable:
            continue
        if key in must_be:
            if value not in must_be[key]:
                supported = [repr(value) for value in must_be[key] if value is not None]
                raise UserError(
                    f"{path}: {key} = {value!r} is not supported"
                    f" (supported: {', '.join(supported) or 'absent'})"
                )
        # transformers writes defaults of options that a model does not have; null and false of an
        # unknown key are taken for such
        elif key not in _NEUTRAL and value not in (None, False):
            unknown[key] = value
    if unknown:
        listed = ", ".join(f"{key} = {value!r}" for key, value in unknown.items())
        raise UserError(
            f"{path}: unknown {'keys' if len(unknown) > 1 else 'key'} {listed}; {IGNORE_HINT}"
            f" {','.join(unknown)}"
        )
