"""Count the tokens of GSM8K's training examples, for the benchmark of packing.

    pip install sentencepiece mistral-common
    python benchmarks/make_lengths.py gsm8k/train.jsonl .../mistral_common/data/tokenizer.model.v1

The text is that of the template `gsm8k`, with the marks of begin and end; the tokenizer is that of Mistral 7B, a SentencePiece
model with 32,000 pieces and single digits, as Llama 2's. Writes benchmarks/gsm8k_lengths.json: how many examples have how many tokens.
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
        counts[
            len(tokenizer.encode(f"Question: {row['question']}\nAnswer: {row['answer']}")) + 2
        ] += 1
    target = pathlib.Path(__file__).parent / "gsm8k_lengths.json"
    target.write_text(json.dumps({str(length): counts[length] for length in sorted(counts)}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
