"""Write the tables of docs/models.md from the rows of `arch.FAMILIES` and `arch.ARCHITECTURES`.

Run by hand: python tests/make_models_page.py
"""

import pathlib

from jax_ordermerge.arch import ARCHITECTURES, FAMILIES, Family, ModelConfig, parameter_count
from jax_ordermerge.checkpoint import gguf_metadata
from jax_ordermerge.errors import UserError

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "models.md"
_FLAGS = ("attention_bias", "mlp_bias", "use_sliding_window")
_ROPES = {
    "linear": {"factor": 2.0},
    "llama3": {"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"factor": 2.0},
    "longrope": {"short_factor": [1.0] * 64, "long_factor": [2.0] * 64},
}


def with_tables(page: str) -> str:
    """Return the page with its tables as they should be."""
    # a table stands between two comments, which a reader of the page does not see
    for name, table in (("families", families()), ("sizes", sizes())):
        begin, end = f"<!-- {name}, by tests/make_models_page.py -->\n", f"<!-- end of {name} -->"
        head, _, rest = page.partition(begin)
        _, _, tail = rest.partition(end)
        page = f"{head}{begin}\n{table}\n{end}{tail}"
    return page


def families() -> str:
    """One row per family."""
    rows = [
        (
            f"`{name}`",
            f"`{family.architecture}`",
            family.models,
            "; ".join(_differences(family)) or "nothing",
            "yes" if name in gguf_metadata.ARCHITECTURES else "no",
            ", ".join(_refused(name)),
        )
        for name, family in FAMILIES.items()
    ]
    head = ("`model_type`", "class", "models", "beside Llama", "GGUF", "refused")
    return _table(head, rows)


def sizes() -> str:
    """One row per family: the names that plans know, with their parameters."""
    rows = []
    for family in FAMILIES:
        names = [
            f"`{name}` {parameter_count(config) / 1e9:.3g}"
            for name, config in ARCHITECTURES.items()
            if config.family == family
        ]
        rows.append((f"`{family}`", ", ".join(names) or "none"))
    return _table(("`model_type`", "names, and billions of parameters"), rows)


def _differences(family: Family) -> list[str]:
    fields = dict(family.fields)
    every = {2: "second", 4: "fourth", 6: "sixth"}.get(family.full_attention_interval)
    windows = {
        "all": "`sliding_window` in every layer",
        "by_layer": "`sliding_window` with `use_sliding_window`, by layer",
        "by_type": f"`sliding_window` by `layer_types` (without it, every {every} layer is full)",
    }
    parts = {
        "biases of q, k and v": family.qkv_bias,
        "norms of q and k, per head": family.qk_norm == "per_head",
        "norms of q and k, over all heads": family.qk_norm == "full",
        "norms after attention and MLP": family.norm_placement == "after",
        "norms before and after attention and MLP": family.norm_placement == "both",
        "norms count from 1": fields.get("norm_offset"),
        "GELU": fields.get("activation") == "gelu_tanh",
        "embeddings times the root of their size": "embedding_scale" in fields,
        "q, k and v in one matrix, gate and up in one": fields.get("fused_projections"),
        windows.get(family.window, ""): family.window != "none",
        "layers with a window have a rope of their own": family.sliding_rope,
        "`partial_rotary_factor`": family.rope.partial,
        "`no_rope_layers`": family.no_rope_layers,
        ", ".join(f"`{key}`" for key in family.numbers): family.numbers,
    }
    return [text for text, applies in parts.items() if applies]


def _refused(family: str) -> list[str]:
    flags = [f"`{key}`" for key in _FLAGS if not _is_read(family, {key: True})]
    shape = {"head_dim": 128, "max_position_embeddings": 8192}
    ropes = {kind: {"rope_type": kind, **rope} for kind, rope in _ROPES.items()}
    unread = [
        f"rope type `{kind}`"
        for kind, rope in ropes.items()
        if not _is_read(family, {**shape, "rope_scaling": rope})
    ]
    return flags + unread


def _is_read(family: str, change: dict) -> bool:
    """Whether a file of the family with these keys is read, by trying."""
    try:
        ModelConfig.from_hf({"model_type": family, **change})
    except UserError:
        return False
    return True


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
