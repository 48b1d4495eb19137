"""Files beside the tensors suit servers, and transformers loads models without warnings."""

import json
import shutil

import huggingface_hub
import jax
import numpy as np
import pytest

from jax_ordermerge import arch
from jax_ordermerge.checkpoint import convert, sidecar_files
from jax_ordermerge.errors import UserError

CONFIG = arch.ModelConfig(
    vocab_size=6, hidden_size=4, intermediate_size=8, num_layers=1, num_heads=2
)
TEMPLATE = """{%- for message in messages %}
    {{- message.role + ': ' }}
    {%- if message.role == 'assistant' %}
        {% generation %}
        {{- message.content }}
        {%- endgeneration -%}
    {%- else %}
        {{ message.content }}
    {%- endif %}
{% endfor %}
"""


def read(path) -> dict[str, object]:
    return json.loads(path.read_text())


def source_of(tmp_path, **files):
    source = tmp_path / "source"
    source.mkdir()
    for name, content in files.items():
        (source / name.replace("__", ".")).write_bytes(
            content if isinstance(content, bytes) else json.dumps(content).encode()
        )
    return source


def written(tmp_path, config=CONFIG, **options):
    target = tmp_path / "target"
    target.mkdir()
    sidecar_files.write(target, config, "bfloat16", **options)
    return target


# ---------------------------------------------------------------- configs and card


def test_configs_say_the_same_and_nothing_about_sampling(tmp_path):
    config = arch.ModelConfig(
        vocab_size=6,
        hidden_size=4,
        intermediate_size=8,
        num_layers=1,
        num_heads=2,
        bos_token_id=0,
        eos_token_ids=(2, 3),
        pad_token_id=5,
    )
    target = written(tmp_path, config)
    assert sorted(p.name for p in target.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
    ]
    assert read(target / "generation_config.json") == {
        "bos_token_id": 0,
        "eos_token_id": [2, 3],
        "pad_token_id": 5,
    }
    assert read(target / "config.json") == config.to_hf("bfloat16")
    assert arch.ModelConfig.from_hf(read(target / "config.json")) == config


def test_card_is_what_the_hub_reads(tmp_path):
    text = sidecar_files.model_card(
        "Merge", "Made of 4.", base_model="org/base", relation="merge", tags=["merge"]
    )
    target = written(tmp_path, card=text, recipe="method: average\n")
    card = huggingface_hub.ModelCard.load(target / "README.md")
    assert card.data.to_dict() == {
        "base_model": "org/base",
        "base_model_relation": "merge",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["merge", "jax_ordermerge"],
    }
    assert "# Merge\n\nMade of 4." in card.text
    assert (target / "merge_config.yaml").read_text() == "method: average\n"
    assert "base_model" not in sidecar_files.model_card("No base")


# ---------------------------------------------------------------- tokenizer


def test_tokenizer_files_are_copied_byte_for_byte(tmp_path):
    odd = b'{"model": {"vocab": {"\\u00e9": 0}},\r\n  "x":1}'
    files = {
        name.replace(".", "__"): odd + bytes([i])
        for i, name in enumerate(sidecar_files.TOKENIZER_FILES)
    }
    source = source_of(
        tmp_path,
        tokenizer_config__json=b'{"tokenizer_class":"LlamaTokenizer",  "eos_token": "</s>"}',
        **files,
    )
    (source / "model.safetensors").write_bytes(b"weights")
    (source / "training_args.bin").write_bytes(b"x")
    target = written(tmp_path, tokenizer_from=source)
    for name in (*sidecar_files.TOKENIZER_FILES, "tokenizer_config.json"):
        assert (target / name).read_bytes() == (source / name).read_bytes()
    assert {p.name for p in target.iterdir()} == {
        *sidecar_files.TOKENIZER_FILES,
        "tokenizer_config.json",
        "config.json",
        "generation_config.json",
        "README.md",
    }


def test_source_without_a_tokenizer_is_fine_and_an_absent_one_is_not(tmp_path):
    assert not (
        written(tmp_path, tokenizer_from=source_of(tmp_path)) / "tokenizer_config.json"
    ).exists()
    with pytest.raises(UserError, match="to copy the tokenizer from, does not exist"):
        sidecar_files.copy_tokenizer(tmp_path / "nowhere", tmp_path)


def test_classes_unknown_to_transformers_4_are_renamed(tmp_path):
    tokenizer_config = {
        "tokenizer_class": "TokenizersBackend",
        "extra_special_tokens": ["<a>", "é"],
        "model_max_length": 512,
    }
    target = written(
        tmp_path, tokenizer_from=source_of(tmp_path, tokenizer_config__json=tokenizer_config)
    )
    assert read(target / "tokenizer_config.json") == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<a>", "é"],
        "model_max_length": 512,
    }


@pytest.mark.parametrize("where", ["file", "config", "both"])
def test_the_chat_template_is_in_both_files_without_training_marks(tmp_path, where):
    files = {
        "tokenizer_config__json": {"chat_template": TEMPLATE if where == "config" else "stale"}
        if where != "file"
        else {}
    }
    if where != "config":
        files["chat_template__jinja"] = TEMPLATE.encode()
    target = written(tmp_path, tokenizer_from=source_of(tmp_path, **files))
    template = (target / "chat_template.jinja").read_text()
    assert read(target / "tokenizer_config.json")["chat_template"] == template
    assert "generation" not in template


@pytest.mark.parametrize("where", ["files", "config"])
def test_named_chat_templates_are_read_by_transformers(tmp_path, where):
    from transformers import AutoTokenizer

    source = convert.resolve("embedded:quickstart")
    texts = {"default": "D", "rag": "R {% generation %}x{% endgeneration %}", "tool_use": "T"}
    copy = tmp_path / "source"
    shutil.copytree(source, copy)
    config = read(copy / "tokenizer_config.json")
    config.pop("chat_template", None)
    if where == "config":
        config["chat_template"] = [{"name": n, "template": t} for n, t in texts.items()]
    else:
        (copy / "additional_chat_templates").mkdir()
        (copy / "chat_template.jinja").write_text("D")
        for name in ("rag", "tool_use"):
            (copy / "additional_chat_templates" / f"{name}.jinja").write_text(texts[name])
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    target = written(tmp_path, tokenizer_from=copy)
    expected = {**texts, "rag": "R {% if true %}x{% endif %}"}
    assert sidecar_files.read_chat_templates(target) == expected
    loaded = AutoTokenizer.from_pretrained(target, local_files_only=True)
    assert loaded.chat_template == expected
    # the default alone is replaced
    sidecar_files.write_chat_template(target, "new")
    loaded = AutoTokenizer.from_pretrained(target, local_files_only=True)
    assert loaded.chat_template == {**expected, "default": "new"}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([{"name": "default"}], "neither a text nor a list"),
        (["text"], "neither a text nor a list"),
        (7, "neither a text nor a list"),
        ([{"name": "../up", "template": "x"}], "cannot name a file"),
    ],
)
def test_chat_templates_of_another_form_are_refused(tmp_path, entry, message):
    source = source_of(tmp_path, tokenizer_config__json={"chat_template": entry})
    with pytest.raises(UserError, match=message):
        written(tmp_path, tokenizer_from=source)


def test_inference_template_renders_the_same_text():
    compile_template = pytest.importorskip(
        "transformers.utils.chat_template_utils"
    )._compile_jinja_template
    messages = [
        {"role": "user", "content": " a\n"},
        {"role": "assistant", "content": "b "},
        {"role": "user", "content": "c"},
    ]
    renders = {
        compile_template(text).render(messages=messages)
        for text in (TEMPLATE, sidecar_files.inference_template(TEMPLATE))
    }
    assert len(renders) == 1
    assert "assistant:" in renders.pop()


@pytest.mark.parametrize("content", [b"{", b"[]"])
def test_broken_tokenizer_config_is_refused(tmp_path, content):
    with pytest.raises(UserError, match=r"tokenizer_config\.json"):
        written(tmp_path, tokenizer_from=source_of(tmp_path, tokenizer_config__json=content))


# ---------------------------------------------------------------- transformers as the reader


@pytest.mark.parametrize("kind", ["untied", "tied", "qwen2"])
@pytest.mark.parametrize(("dtype", "shard_bytes"), [("float32", 10**9), ("bfloat16", 3000)])
def test_transformers_loads_it_clean(make_directory, tmp_path, kind, dtype, shard_bytes):
    torch = pytest.importorskip("torch", reason="needs the extra parity")
    transformers = pytest.importorskip("transformers")
    directory, config, arrays = make_directory(kind, dtype)
    _, params = convert.load_params(directory)
    convert.export(params, config, tmp_path / "out", dtype=dtype, shard_bytes=shard_bytes)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=getattr(torch, dtype), output_loading_info=True
    )
    assert not any(
        info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    )
    state = model.state_dict()
    if config.tie_embeddings:
        assert torch.equal(state.pop("lm_head.weight"), state["model.embed_tokens.weight"])
    assert state.keys() == arrays.keys()
    for name, array in arrays.items():
        assert state[name].float().numpy().tobytes() == array.astype(np.float32).tobytes()


def test_a_real_tokenizer_still_tokenizes(shared_data, tmp_path):
    transformers = pytest.importorskip("transformers")
    source = shared_data / "models" / "stories260K"
    config, params = convert.load_params(source)
    convert.export(params, config, tmp_path / "out", dtype="float32", source=source)
    text = "Once upon a time, there was a little girl."
    ids = [
        transformers.AutoTokenizer.from_pretrained(where)(text)["input_ids"]
        for where in (source, tmp_path / "out")
    ]
    assert ids[0] == ids[1]
    _, again = convert.load_params(tmp_path / "out")
    assert jax.tree.all(jax.tree.map(np.array_equal, params, again))
