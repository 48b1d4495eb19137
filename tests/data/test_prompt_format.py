"""The chat template of an export renders the prompts of the training, token by token."""

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jax_ordermerge.checkpoint import convert, sidecar_files
from jax_ordermerge.config import Data
from jax_ordermerge.data import chat, prompt_format
from jax_ordermerge.data.formats import Record
from jax_ordermerge.data.prompt_format import to_jinja
from jax_ordermerge.data.tokenizers import load_tokenizer
from tests.data.rows import load_train, write

PROMPTS = (
    "2 + 3?",
    " a",
    "a ",
    "",
    "Two\n\nlines\n",
    'It\'s {prompt} {{ 1 }} {% if %} "quoted" \\n',
    "é ▁ x",
    "▁x",
)
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789:\n.,?#+"


def metaspace_tokenizer(**flags):
    """A space is put before a text, but not after a special token, as in newer Llamas."""
    pieces = ["<unk>", "<s>", "</s>", "▁", *LETTERS, "▁Q", "▁B", "▁a", "▁2"]
    merges = [("▁", letter) for letter in "QBa2"]
    inner = Tokenizer(
        models.BPE(
            vocab={piece: number for number, piece in enumerate(pieces)},
            merges=merges,
            unk_token="<unk>",
        )
    )
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.add_special_tokens([AddedToken(text, special=True, **flags) for text in ("<s>", "</s>")])
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(params=["bytes", "bytes without BOS", "pieces", "metaspace", "quickstart"])
def tokenizer(request, byte_tokenizer, piece_tokenizer):
    make = {
        "bytes": byte_tokenizer,
        "bytes without BOS": lambda: byte_tokenizer(bos=False),
        "pieces": lambda: piece_tokenizer,
        "metaspace": metaspace_tokenizer,
        "quickstart": lambda: load_tokenizer(convert.resolve("embedded:quickstart")),
    }
    return make[request.param]()


def exported(tokenizer, template, tmp_path):
    """Return the tokenizer that transformers reads from an exported directory."""
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "out").mkdir()
    sidecar_files.copy_tokenizer(tmp_path / "base", tmp_path / "out")
    sidecar_files.write_chat_template(tmp_path / "out", to_jinja(template, tokenizer))
    return AutoTokenizer.from_pretrained(tmp_path / "out")


def ask(tokenizer, message, **variables):
    return tokenizer.apply_chat_template(
        [message], add_generation_prompt=True, return_dict=False, **variables
    )


@pytest.mark.parametrize("template", ["plain", "gsm8k", "alpaca"])
def test_an_export_asks_as_the_training_did(tokenizer, template, tmp_path):
    served = exported(tokenizer, template, tmp_path)
    for prompt in PROMPTS:
        tokens = chat.prompt_tokens(Record.single_turn(prompt), template, tokenizer).tolist()
        assert ask(served, {"role": "user", "content": prompt}) == tokens, prompt
        if chat.special_tokens(tokenizer).bos is not None:
            assert tokens.count(served.bos_token_id) == 1


@pytest.mark.parametrize("alpaca_input", ["2 and 3", "a\nb", " x "])
def test_the_input_of_alpaca_is_a_key_a_variable_or_a_line(tokenizer, alpaca_input, tmp_path):
    served = exported(tokenizer, "alpaca", tmp_path)
    record = Record.single_turn("Add.", alpaca_input=alpaca_input)
    tokens = chat.prompt_tokens(record, "alpaca", tokenizer).tolist()
    message, line = {"role": "user", "content": "Add."}, dict(record.messages[0])
    assert line["content"] == f"Add.\n{alpaca_input}"
    assert ask(served, message | {"input": alpaca_input}) == tokens
    assert ask(served, message, input=alpaca_input) == tokens
    assert ask(served, line, input=alpaca_input) == tokens
    assert ask(served, message) != tokens


@pytest.mark.parametrize("template", ["plain", "gsm8k", "alpaca"])
def test_a_whole_conversation_has_the_text_of_training(byte_tokenizer, template, tmp_path):
    tokenizer = byte_tokenizer()
    served = exported(tokenizer, template, tmp_path)
    for response in ("Jo", "Jo</s>"):
        record = Record.single_turn("Who?", response)
        (encoded,) = chat.encode([record], template, tokenizer)
        whole = served.apply_chat_template(list(record.messages), return_dict=False)
        assert whole == encoded.tokens


def test_what_was_not_trained_is_refused(byte_tokenizer, tmp_path):
    served = exported(byte_tokenizer(), "gsm8k", tmp_path)
    for roles in (["system", "user"], ["user", "assistant", "user"], ["assistant"]):
        messages = [{"role": role, "content": "Hi"} for role in roles]
        with pytest.raises(Exception, match="one user message and its response"):
            served.apply_chat_template(messages)


def test_a_tokenizer_that_no_template_can_serve(tmp_path):
    # white space after BOS is lost, and a prompt may begin with it
    tokenizer = metaspace_tokenizer(rstrip=True)
    assert to_jinja("plain", tokenizer) is None


# ------------------------------------------------------------------ which template is exported


def described(path, tokenizer, **settings):
    examples = load_train(Data(train=path, **settings), tokenizer)
    return prompt_format.describe(examples, tokenizer)


def test_a_tokenizer_keeps_its_own_template_where_that_was_trained(
    tmp_path, byte_tokenizer, chatml
):
    tokenizer = byte_tokenizer(chat_template=chatml)
    rows = [{"question": "Who?", "answer": "Jo"}]
    path = write(tmp_path / "a.jsonl", rows)
    form = described(path, tokenizer, template="chat")
    assert form.chat_template is None
    # another template was trained, so it is what is served
    for template in ("alpaca", "gsm8k", "plain"):
        form = described(path, tokenizer, template=template)
        assert form.chat_template == to_jinja(template, tokenizer)


def test_prompts_that_hold_the_chat_template_already_keep_it(tmp_path, byte_tokenizer, chatml):
    tokenizer = byte_tokenizer(chat_template=chatml)
    prompt = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    rows = [{"prompt": prompt, "completion": "Jo<|im_end|>"}]
    path = write(tmp_path / "a.jsonl", rows)
    assert described(path, tokenizer).chat_template is None
    # without a chat template in the base there is nothing to keep
    bare = byte_tokenizer()
    assert described(path, bare).chat_template == to_jinja("plain", bare)
    # one row of another form: the prompts are plain
    rows.append({"prompt": "Who?", "completion": "Jo"})
    path = write(tmp_path / "b.jsonl", rows)
    assert described(path, tokenizer).chat_template == to_jinja("plain", tokenizer)


def test_texts_have_no_prompt_and_export_no_template(tmp_path, byte_tokenizer):
    path = write(tmp_path / "a.jsonl", [{"text": "A text."}])
    assert described(path, byte_tokenizer()).chat_template is None
