"""Write the tokenizer and the config that the pretraining of the quickstart base starts from.

    python examples/quickstart_base/make_tokenizer.py runs/quickstart_start

The vocabulary is the 256 bytes and all words of the generated texts. So a word or a number is one
token, and any other text is spelled in bytes. `ignore_merges` looks up whole words: no merges are
learned.
"""

import json
import sys
from collections import Counter
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from jax_ordermerge.arch import ModelConfig, parameter_count
from jax_ordermerge.data.synthetic import DATASETS, generated

# listed, because a data set that is added later must not renumber the tokens of the shipped base
SOURCES = ("quickstart", "quickstart_pretrain")
SPECIAL = ("<pad>", "<s>", "</s>")
FRAME = "Question: Answer:\nAnswer: ####"  # words that prompt templates add
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
}


def make_tokenizer() -> Tokenizer:
    """Return the tokenizer; its vocabulary follows from the generated text alone."""
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    words: Counter[str] = Counter()
    for name in SOURCES:
        for split in DATASETS[name].sizes:
            for record in generated(name, split):
                words.update(
                    word for text in record.values() for word, _ in splitter.pre_tokenize_str(text)
                )
    words.update(word for word, _ in splitter.pre_tokenize_str(FRAME))
    pieces = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += sorted(word for word in words if word not in set(pieces))
    tokenizer = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], ignore_merges=True)
    )
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", SPECIAL.index("<s>"))]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    )
    return tokenizer


def main(directory: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json, config.json and generation_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    pad, bos, eos = range(3)
    config = ModelConfig(
        vocab_size=tokenizer.get_vocab_size(),
        max_position_embeddings=256,
        tie_embeddings=True,
        bos_token_id=bos,
        eos_token_ids=(eos,),
        pad_token_id=pad,
        initializer_range=0.04,
        **SHAPE,
    )
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # known to transformers 4 and 5
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
    }
    generation = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad, "do_sample": False}
    tokenizer.save(str(directory / "tokenizer.json"))
    for name, content in (
        ("tokenizer_config.json", tokenizer_config),
        ("config.json", config.to_hf("float32")),
        ("generation_config.json", generation),
    ):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")
    print(f"{directory}: {config.vocab_size} tokens, {parameter_count(config):,} parameters")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
