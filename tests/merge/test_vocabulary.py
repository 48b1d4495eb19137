"""Models with different vocabularies: rows go by token, and the tokenizer gets new tokens."""

import json
import os
import subprocess

import numpy as np
import pytest

from jax_ordermerge import arch, tree
from jax_ordermerge.checkpoint import convert
from jax_ordermerge.checkpoint.safetensors import Reader
from jax_ordermerge.errors import UserError
from jax_ordermerge.merge import engine
from jax_ordermerge.merge.recipe import planner
from jax_ordermerge.merge.sources import storage, vocabulary
from tests.merge.test_sources import assert_reads_in_any_run, read_tensor

EMBED = "model.embed_tokens.weight"


def tokenizer(*tokens, added=()):
    entries = [
        {"id": len(tokens) + i, "content": token, "special": True} for i, token in enumerate(added)
    ]
    return {
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [],
        },
        "added_tokens": entries,
    }


def model(directory, rows, tokens=None, *, tied=False, dtype="float32", seed=0):
    """A tiny model with r + seed / 8 in row r of the embedding, and minus that in the head."""
    config = arch.ModelConfig(
        vocab_size=rows,
        hidden_size=4,
        intermediate_size=4,
        num_layers=2,
        num_heads=2,
        tie_embeddings=tied,
    )
    generator = np.random.default_rng(seed)
    flat = {
        spec.path: generator.normal(size=spec.shape).astype(np.float32)
        for spec in arch.tensor_table(config)
    }
    number = np.arange(rows, dtype=np.float32)[:, None] + np.float32(seed / 8)
    flat["embed/weight"] = np.broadcast_to(number, (rows, 4))
    if not tied:
        flat["head/weight"] = -flat["embed/weight"]
    convert.export(tree.unflatten(flat), config, directory, dtype=dtype)
    if tokens is not None:
        (directory / "tokenizer.json").write_text(json.dumps(tokens))
    return storage.Directory(directory, directory.name)


def rows_of(source, name="model.embed_tokens.weight"):
    values = read_tensor(source, name)
    assert (values == values[:, :1]).all()
    assert_reads_in_any_run(source, name, np.random.default_rng(4))
    return values[:, 0].astype(float).tolist()


def test_the_vocabulary_is_that_of_the_donor_and_rows_go_by_token(tmp_path):
    first_model = model(tmp_path / "one", 3, tokenizer("a", "b", "c"))
    second_model = model(tmp_path / "other", 4, tokenizer("c", "a", "b", added=["[PAD]"]), seed=1)
    aligned = vocabulary.align([first_model, second_model], first=0, donor=0)
    assert aligned.sources[0] is first_model
    assert rows_of(aligned.sources[1]) == [1.125, 2.125, 0.125]
    assert rows_of(aligned.sources[1], "lm_head.weight") == [-1.125, -2.125, -0.125]
    assert aligned.notes == ("other has '[PAD]', which the merged vocabulary has not: left out",)
    assert not aligned.added_tokens


def test_a_row_that_a_model_lacks_is_that_of_the_first_which_has_it(tmp_path):
    base = model(tmp_path / "base", 2, tokenizer("a", "b"))
    first_model = model(tmp_path / "one", 3, tokenizer("a", "b", added=["[PAD]"]), seed=1)
    second_model = model(tmp_path / "two", 3, tokenizer("a", "b", added=["[PAD]"]), seed=2)
    aligned = vocabulary.align([first_model, second_model, base], first=2, donor=1)
    assert [rows_of(source) for source in aligned.sources] == [
        [0.125, 1.125, 2.125],
        [0.25, 1.25, 2.25],
        [0, 1, 2.125],
    ]
    assert (
        "base lacks '[PAD]': taken from the first model that has it, the base first"
        in aligned.notes
    )


def test_the_union_appends_added_tokens_and_writes_them_into_the_tokenizer(tmp_path):
    base = model(
        tmp_path / "base", 5, tokenizer("a", "b", added=["<s>"])
    )  # second_model rows of padding
    first_model = model(tmp_path / "one", 4, tokenizer("a", "b", added=["<s>", "[PAD]"]), seed=1)
    second_model = model(
        tmp_path / "two", 6, tokenizer("a", "b", added=["<s>", "<x>", "<y>", "[PAD]"]), seed=2
    )
    aligned = vocabulary.align([base, first_model, second_model], first=0, donor=0, union=True)
    # [PAD] and <x> take the padding, <y> is a new row
    assert rows_of(aligned.sources[0]) == [0, 1, 2, 3.125, 3.25, 4.25]
    assert rows_of(aligned.sources[1]) == [0.125, 1.125, 2.125, 3.125, 3.25, 4.25]
    assert rows_of(aligned.sources[2]) == [0.25, 1.25, 2.25, 5.25, 3.25, 4.25]
    added = aligned.added_tokens
    assert [(entry["content"], entry["id"]) for entry in added] == [
        ("[PAD]", 3),
        ("<x>", 4),
        ("<y>", 5),
    ]


LISTED = ("<|x|>", "<|im_start|>", "<|im_end|>")


def write_tokenizer(directory, kind, added):
    """Write a tokenizer of characters, with added tokens in every file that may list them."""
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *"abcdefgh"])}
    entries = [
        {"id": vocab.get(token, len(vocab) + i - 3), "content": token, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i, token in enumerate(["<unk>", "<s>", "</s>", *added])
    ]
    content = {
        "version": "1.0",
        "added_tokens": entries,
        "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "unk_token": "<unk>", "vocab": vocab, "merges": []},
    }
    config = {
        "tokenizer_class": kind,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "</s>",
        "additional_special_tokens": list(added),
        "added_tokens_decoder": {
            str(entry["id"]): {key: value for key, value in entry.items() if key != "id"}
            for entry in entries
        },
    }
    texts = {
        "tokenizer.json": content,
        "tokenizer_config.json": config,
        "special_tokens_map.json": {"eos_token": "</s>", "additional_special_tokens": list(added)},
        "added_tokens.json": {entry["content"]: entry["id"] for entry in entries[3:]},
    }
    for name, text in texts.items():
        (directory / name).write_text(json.dumps(text))


def merge_union(tmp_path, kind):
    for name, seed, added in (("base", 0, LISTED[:1]), ("one", 1, LISTED)):
        model(tmp_path / name, 11 + len(added), seed=seed)
        write_tokenizer(tmp_path / name, kind, added)
    engine.merge_plan(
        planner.plan_recipe(
            f"merge_method: linear\nmodels: [{{model: {tmp_path}/base}}, {{model: {tmp_path}/one}}]\n"
            "parameters: {weight: 1}\ntokenizer_source: union\n"
        ),
        tmp_path / "out",
    )
    return tmp_path / "out"


KINDS = ("LlamaTokenizerFast", "Qwen2TokenizerFast", "PreTrainedTokenizerFast")
LOAD = """
import json, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
text = "a<|im_start|>b<|im_end|>"
ids = tokenizer(text, add_special_tokens=False).input_ids
print(json.dumps([ids, tokenizer.decode(ids, skip_special_tokens=True)]))
"""


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_knows_the_added_tokens_of_a_union(tmp_path, kind):
    from transformers import AutoTokenizer

    read = AutoTokenizer.from_pretrained(merge_union(tmp_path, kind), local_files_only=True)
    assert read.convert_tokens_to_ids(list(LISTED)) == [11, 12, 13]
    ids = read("a<|im_start|>b<|im_end|>", add_special_tokens=False).input_ids
    assert ids == [3, 12, 4, 13]
    assert read.decode(ids, skip_special_tokens=True) == "ab"
    assert set(LISTED) <= set(read.all_special_tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_an_older_transformers_knows_them_too(tmp_path, kind):
    python = os.environ.get("ORDERMERGE_TRANSFORMERS_4")
    if python is None:
        pytest.skip("ORDERMERGE_TRANSFORMERS_4 names no Python with transformers 4.57")
    out = subprocess.run(
        [python, "-c", LOAD, merge_union(tmp_path, kind)], capture_output=True, check=True
    ).stdout
    assert json.loads(out.splitlines()[-1]) == [[3, 12, 4, 13], "ab"]


def test_every_file_that_lists_added_tokens_lists_the_new_ones(tmp_path):
    out = merge_union(tmp_path, "LlamaTokenizerFast")
    read = {path.stem: json.loads(path.read_text()) for path in out.glob("*token*.json")}
    names = ["<unk>", "<s>", "</s>", *LISTED]
    assert [entry["content"] for entry in read["tokenizer"]["added_tokens"]] == names
    decoder = read["tokenizer_config"]["added_tokens_decoder"]
    assert {number: entry["content"] for number, entry in decoder.items()} == {
        "0": "<unk>",
        "1": "<s>",
        "2": "</s>",
        "11": "<|x|>",
        "12": "<|im_start|>",
        "13": "<|im_end|>",
    }
    assert read["added_tokens"] == {"<|x|>": 11, "<|im_start|>": 12, "<|im_end|>": 13}
    assert read["tokenizer_config"]["additional_special_tokens"] == list(LISTED)
    assert read["special_tokens_map"]["additional_special_tokens"] == list(LISTED)


def plan_average(*models):
    listed = ", ".join(f"{{model: {source.directory}}}" for source in models)
    return planner.plan_recipe(
        f"merge_method: linear\nmodels: [{listed}]\nparameters: {{weight: 1}}\n"
    )


def test_equal_sizes_with_other_rows_are_matched_by_token(tmp_path):
    first = model(tmp_path / "one", 3, tokenizer("a", "b", "c"))
    second = model(tmp_path / "two", 3, tokenizer("c", "a", "b"), seed=4)
    plan = plan_average(first, second)
    assert any("two has 'a', 'b', 'c' in other rows than" in note for note in plan.notes)
    engine.merge_plan(plan, tmp_path / "out")
    # rows 0, 1, 2 of `one` with rows 1, 2, 0 of `two`, each half: r + 0 and r' + 0.5
    merged = Reader(tmp_path / "out").read(EMBED)[:, 0]
    assert merged.tolist() == [(0 + 1.5) / 2, (1 + 2.5) / 2, (2 + 0.5) / 2]


def test_a_renamed_row_keeps_its_place(tmp_path):
    first = model(tmp_path / "one", 3, tokenizer("a", "b", "<reserved>"))
    second = model(tmp_path / "two", 3, tokenizer("a", "b", "<|im_start|>"), seed=4)
    plan = plan_average(first, second)
    expected = "in 1 rows ('<|im_start|>' for '<reserved>'): they are merged row by row"
    assert any(expected in note for note in plan.notes)
    engine.merge_plan(plan, tmp_path / "out")
    assert Reader(tmp_path / "out").read(EMBED)[:, 0].tolist() == [0.25, 1.25, 2.25]


def test_equal_vocabularies_need_no_note(tmp_path):
    first = model(tmp_path / "one", 3, tokenizer("a", "b", "c"))
    second = model(tmp_path / "two", 3, tokenizer("a", "b", "c"), seed=4)
    # the same vocabulary in another order of the file
    path = tmp_path / "two" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    content["model"]["vocab"] = dict(reversed(vocab.items()))
    path.write_text(json.dumps(content))
    assert not any("rows" in note for note in plan_average(first, second).notes)


def test_models_without_a_tokenizer_go_by_number(tmp_path):
    first_model = model(tmp_path / "one", 3, tokenizer("a", "b", "c"))
    second_model = model(tmp_path / "other", 5, seed=1)
    aligned = vocabulary.align([first_model, second_model], first=0, donor=0)
    assert rows_of(aligned.sources[1]) == [0.125, 1.125, 2.125]
    assert aligned.notes == (
        "other has no tokenizer.json: its rows are matched by number",
        "other has row 3, row 4, which the merged vocabulary has not: left out",
    )
    aligned = vocabulary.align([first_model, second_model], first=0, donor=1)
    assert rows_of(aligned.sources[0]) == [0, 1, 2, 3.125, 4.125]


def test_rows_of_a_wider_dtype_are_kept(tmp_path):
    first_model = model(tmp_path / "one", 2, dtype="bfloat16")
    second_model = model(tmp_path / "other", 3, seed=1)
    aligned = vocabulary.align([first_model, second_model], first=0, donor=1).sources[0]
    assert aligned.info("model.embed_tokens.weight").dtype == np.float32
    assert aligned.info("model.norm.weight").dtype.name == "bfloat16"
    assert rows_of(aligned) == [0, 1, 2.125]


def test_rows_asked_for_and_padding(tmp_path):
    first_model = model(tmp_path / "one", 2, tokenizer("a", "b"))
    second_model = model(tmp_path / "other", 3, tokenizer("b", "a", added=["<x>"]), seed=1)
    forced = {"a": vocabulary.TokenSource(1, True), "<x>": vocabulary.TokenSource(1, False)}
    aligned = vocabulary.align(
        [first_model, second_model], first=0, donor=1, token_sources=forced, multiple=4
    )
    assert rows_of(aligned.sources[0]) == [1, 1.125, 2.125, 0]
    assert rows_of(aligned.sources[1]) == [0.125, 1.125, 2.125, 0]
    assert "1 rows of the embedding are zero: no model has them" in aligned.notes
    with pytest.raises(UserError, match="other has no token 'q'"):
        vocabulary.align(
            [first_model, second_model],
            first=0,
            donor=1,
            token_sources={"q": vocabulary.TokenSource(1, False)},
        )


def test_trained_vocabularies_that_differ_have_no_union(tmp_path):
    first_model, second_model = (
        model(tmp_path / "one", 2, tokenizer("a", "b")),
        model(tmp_path / "other", 2, tokenizer("a", "z")),
    )
    with pytest.raises(
        UserError, match="other has the token 'z' in its trained vocabulary and one has not"
    ):
        vocabulary.align([first_model, second_model], first=0, donor=0, union=True)
    with pytest.raises(UserError, match=r"three has no tokenizer\.json to extend"):
        vocabulary.align([model(tmp_path / "three", 2), first_model], first=0, donor=0, union=True)
    (tmp_path / "other" / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(UserError, match="has no vocabulary of tokens and numbers"):
        vocabulary.align([first_model, second_model], first=0, donor=0)


def test_a_tied_model_untied_has_its_embedding_for_a_head(tmp_path):
    tied = model(tmp_path / "tied", 3, tied=True)
    source = storage.Untied(tied)
    assert not source.config.tie_embeddings
    assert rows_of(source, "lm_head.weight") == rows_of(tied) == [0, 1, 2]
    assert (
        read_tensor(source, "model.norm.weight").tobytes()
        == read_tensor(tied, "model.norm.weight").tobytes()
    )


# ------------------------------------------------------------------------- tokens of the recipe


def plan_tokens(tmp_path, tokens, source="base"):
    """Average two models: rows r of `one`, r + 0.5 of `two`, which has <x> besides."""
    model(tmp_path / "one", 3, tokenizer("a", "b", "c"))
    model(tmp_path / "two", 4, tokenizer("a", "b", "c", added=["<x>"]), seed=4)
    return planner.plan_recipe(
        f"merge_method: linear\nmodels: [{{model: {tmp_path}/one}}, {{model: {tmp_path}/two}}]\n"
        f"parameters: {{weight: 1}}\ntokenizer: {{source: {source}, tokens: {tokens}}}\n"
    )


def merged_rows(plan, tmp_path):
    engine.merge_plan(plan, tmp_path / "out")
    return Reader(tmp_path / "out").read(EMBED)[:, 0].tolist()


def test_a_token_takes_the_row_of_another_token(tmp_path):
    """What mergekit calls model_token: by text or by number, for those that lack it or for all."""
    plan = plan_tokens(
        tmp_path,
        f"{{<x>: {{source: {{kind: model_token, model: {tmp_path}/one, token: b}}}},"
        f" c: {{source: {{kind: model_token, model: {tmp_path}/two, token_id: 0}}, force: true}}}}",
        "union",
    )
    # <x>: row 1 of `one` (which lacks it) with row 3 of `two`; c: row 0 of `two` in both
    assert merged_rows(plan, tmp_path) == [0.25, 1.25, 0.5, (1 + 3.5) / 2]


def test_a_token_of_zeros_and_tokens_that_are_added(tmp_path):
    plan = plan_tokens(
        tmp_path,
        f"{{<new>: {{source: {{kind: model_token, model: {tmp_path}/two, token: <x>}}}},"
        " <zero>: {source: {kind: zero}}, b: {source: {kind: zero}, force: true}}",
    )
    assert any("added to the vocabulary: '<new>', '<zero>'" in note for note in plan.notes)
    assert merged_rows(plan, tmp_path) == [0.25, 0, 2.25, 3.5, 0]
    content = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert [(e["content"], e["id"]) for e in content["added_tokens"]] == [
        ("<new>", 3),
        ("<zero>", 4),
    ]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ("{q: {source: ONE}}", "one has no token 'q'"),
        ("{a: {source: {kind: model_token, model: ONE, token: q}}}", "one has no token 'q'"),
        ("{a: {source: {kind: model_token, model: ONE, token_id: 3}}}", "one has no token 3"),
        ("{a: {source: {kind: model_token, model: ONE}}}", "takes one of token and token_id"),
        (
            "{a: {source: {kind: model_token, model: ONE, token: a, token_id: 0}}}",
            "takes one of token and token_id",
        ),
        ("{a: {source: {kind: nothing}}}", "expected zero or model_token"),
        ("{a: {source: {kind: zero, model: ONE}}}", "model"),
    ],
)
def test_token_sources_that_name_nothing(tmp_path, tokens, message):
    with pytest.raises(UserError, match=message):
        plan_tokens(tmp_path, tokens.replace("ONE", str(tmp_path / "one")))


@pytest.mark.parametrize("name", ["chatml", "llama3"])
def test_named_chat_templates_render_as_published(tmp_path, name, shared_data):
    from transformers.utils.chat_template_utils import render_jinja_template

    published = {
        "chatml": (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
        "llama3": (shared_data / "templates" / "llama3.jinja").read_text(),
    }[name]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": 'Say "hi"\nnow.'},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "again"},
    ]
    plan = plan_tokens(tmp_path, "{}")
    assert plan.chat_template is None
    plan = planner.plan_recipe(
        f"merge_method: linear\nmodels: [{{model: {tmp_path}/one}}]\nparameters: {{weight: 1}}\n"
        f"chat_template: {name}\n"
    )
    assert any(f"chat_template {name} writes <|" in note for note in plan.notes)
    rendered = [
        render_jinja_template(
            [messages], chat_template=text, add_generation_prompt=True, bos_token="<s>"
        )[0]
        for text in (plan.chat_template, published)
    ]
    assert rendered[0] == rendered[1]
