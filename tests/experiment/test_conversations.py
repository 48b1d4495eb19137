"""A run on conversations of two answers, whose template changes the first once the second is there."""

import json

import numpy as np
import pytest

from jax_ordermerge.config import load_config
from jax_ordermerge.experiment import pipeline
from tests.data.conftest import byte_tokenizer  # noqa: F401  (a fixture)
from tests.experiment import tiny

torch = pytest.importorskip("torch", reason="needs the extra parity")
ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"{number}?"},
            {"role": "assistant", "content": f"It is {number}."},
            {"role": "user", "content": "And?"},
            {"role": "assistant", "content": f"{number + 1}!"},
        ]
    }
    for number in range(6)
]


def test_two_answers_under_the_template_of_qwen3(tmp_path, shared_data, byte_tokenizer):  # noqa: F811
    """The run ends, and its losses of the base are those of transformers on the same tokens."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    path = shared_data / "templates" / "qwen3.jinja"
    if not path.is_file():
        pytest.skip("published templates are absent")
    tokenizer = byte_tokenizer(chat_template=path.read_text(), bos=False, eos="<|im_end|>")
    torch.manual_seed(0)
    twin = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=128,
            initializer_range=0.3,  # losses that depend on the prefix
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    twin = twin.float().eval()
    twin.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    file = tiny.make_config(
        tmp_path,
        data={
            "train": str(tmp_path / "rows.jsonl"),
            "test": None,
            "template": "auto",
            "max_length": 128,
            "validation_examples": 2,
        },
        evaluation={"tasks": []},
        training={"epochs": 1, "batch": 4},
        merge={"methods": [{"method": "average"}], "dtype": "float32"},
    )
    directory = pipeline.run(load_config(file, []), log=lambda line: None)
    with np.load(directory / "losses" / "final.npz") as losses:
        base = losses["losses"][losses["names"].tolist().index("base")]
        ids = losses["ids"]
    assert len(ids) == 2 * len(ROWS) - 2
    for number, loss in zip(ids, base, strict=True):
        talk = ROWS[number // 2]["messages"][: 2 + 2 * (number % 2)]
        prompt = tokenizer.apply_chat_template(
            talk[:-1], add_generation_prompt=True, return_dict=False
        )
        # without the line feed behind the end token
        tokens = tokenizer.apply_chat_template(talk, return_dict=False)[:-1]
        with torch.no_grad():
            logits = twin(torch.tensor([tokens])).logits[0]
        expected = torch.nn.functional.cross_entropy(
            logits[len(prompt) - 1 : -1], torch.tensor(tokens[len(prompt) :])
        )
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)
