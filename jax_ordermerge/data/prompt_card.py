"""The part of a model card that says how the model is asked."""

from jax_ordermerge.data.prompt_format import PromptFormat

_LOAD_MODEL = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "MODEL"  # this directory, or its name on a hub
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path)
"""
_LOAD_ADAPTER = """\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, GenerationConfig

path = "MODEL"  # this directory, or its name on a hub
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoPeftModelForCausalLM.from_pretrained(path)
model.generation_config = GenerationConfig.from_pretrained(path)  # where responses end
"""
_ASK = """\
messages = [{"role": "user", "content": "How many legs do three horses have?"}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
# by name: tokenizers of transformers 4 return token_type_ids too, which these models refuse
ids, mask = inputs["input_ids"], inputs["attention_mask"]
output = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=256)
print(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
"""


def prompt_section(form: PromptFormat, *, adapter: bool = False) -> str:
    """Return the section of a model card, as Markdown; empty where nothing is known.

    Args:
        form: how the model is asked.
        adapter: whether the directory holds an adapter and not a model.

    Example:
        >>> print(prompt_section(PromptFormat(example="Q: Why?\\nA:"))[:57])
        ## Prompt
        <BLANKLINE>
        The model was trained on prompts of this form:
        >>> prompt_section(PromptFormat())
        ''
    """
    parts = []
    if form.example:
        # a fence that is longer than any inside
        fence = "```" if "```" not in form.example else "`````"
        load = _LOAD_ADAPTER if adapter else _LOAD_MODEL
        parts += [
            "The model was trained on prompts of this form:",
            f"{fence}text\n{form.example}\n{fence}",
            "This is the chat template of the tokenizer:",
            f"```python\n{load}{_ASK}```",
        ]
        # Engines serve adapters under other names, each in its own way.
        if not adapter:
            parts.append(
                "`vllm serve MODEL` asks in the same way under `/v1/chat/completions`; other"
                " prompts, under `/v1/completions`, are unlike those of the training."
            )
    if form.notes:
        parts.append("\n".join(f"- {note}" for note in form.notes))
    return "\n\n".join(["## Prompt", *parts]) if parts else ""
