"""Count the tokens of the training examples of GSM8K, for the benchmark of packing.

    pip install sentencepiece mistral-common
    python benchmarks/make_lengths.py gsm8k/train.jsonl .../mistral_common/data/tokenizer.model.v1

The text is that of the template `gsm8k`, with the tokens of begin and end. The tokenizer is that of
Mistral 7B: like that of Llama 2 a SentencePiece model with 32,000 pieces and single digits. Writes
benchmarks/gsm8k_lengths.json: the number of examples by number of tokens.
"""

import collections
import json
import pathlib
import sys


def main(data: str, model: str) -> None:
    """Write the histogram."""
    import sentencepiece

    tokenizer = sentencepiece.SentencePieceProcessor(model_file=model)
    counts: collections.Counter[int] = collections.Counter()
    for line in pathlib.Path(data).read_text().splitlines():
        row = json.loads(line)
        text = f"Question: {row['question']}\nAnswer: {row['answer']}"
        counts[len(tokenizer.encode(text)) + 2] += 1
    target = pathlib.Path(__file__).parent / "gsm8k_lengths.json"
    target.write_text(json.dumps(dict(sorted(counts.items()))) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
