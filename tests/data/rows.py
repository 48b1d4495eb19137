"""Rows of an invented data set, written as each kind of file."""

import csv
import gzip
import io
import json

from jax_ordermerge.data.source import load_examples

ROWS = [{"question": f"{n} + {n}?", "answer": f"It is {2 * n}, é\n#### {2 * n}"} for n in range(12)]


def write(path, rows=ROWS):
    name = path.name.lower()
    names = list(dict.fromkeys(column for row in rows for column in row))
    if name.endswith(".parquet"):
        import pyarrow as pa
        from pyarrow import parquet

        # Arrow takes the columns of the first row otherwise
        complete = [{column: row.get(column) for column in names} for row in rows]
        parquet.write_table(pa.Table.from_pylist(complete), path)
        return str(path)
    if ".csv" in name or ".tsv" in name:
        file = io.StringIO(newline="")
        writer = csv.DictWriter(file, names, delimiter="," if ".csv" in name else "\t")
        writer.writeheader()
        for row in rows:
            # lists and objects have no other form in a cell than their JSON
            writer.writerow(
                {
                    column: json.dumps(value) if isinstance(value, (list, dict)) else value
                    for column, value in row.items()
                }
            )
        text = file.getvalue()
    elif "jsonl" in name:
        text = "\n".join(map(json.dumps, rows)) + "\n"
    else:
        text = json.dumps({"data": rows} if "wrapped" in name else rows)
    if name.endswith(".zst"):
        import pyarrow as pa

        with pa.output_stream(path, compression="zstd") as stream:
            stream.write(text.encode())
    else:
        data = text.encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return str(path)


def load_train(data, tokenizer, seed=0):
    return load_examples(data, tokenizer, "train", seed=seed)
