"""Rows of an invented data set, written as each kind of file."""

import csv
import gzip
import json

from jax_ordermerge.data.source import load_examples

ROWS = [{"question": f"{n} + {n}?", "answer": f"It is {2 * n}, é\n#### {2 * n}"} for n in range(12)]


def write(path, rows=ROWS):
    name = path.name
    if name.endswith(".parquet"):
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif name.endswith(".csv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    else:
        text = (
            "\n".join(map(json.dumps, rows)) + "\n"
            if "jsonl" in name
            else json.dumps({"data": rows} if "wrapped" in name else rows)
        )
        data = text.encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return str(path)


def load_train(data, tokenizer, seed=0):
    return load_examples(data, tokenizer, "train", seed=seed)
