"""Our generation and scoring as a model of lm-evaluation-harness (extra `eval`).

Every process gets all requests and computes its share of each batch: the harness sees one process.

Source: https://github.com/EleutherAI/lm-evaluation-harness, version 0.4.
"""

import collections
import importlib.util
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from jax_ordermerge.config.evaluation import SMALLEST_TEMPERATURE
from jax_ordermerge.errors import UserError, first_line
from jax_ordermerge.evaluate import likelihood
from jax_ordermerge.evaluate.eval_model import EvalModel, name_items
from jax_ordermerge.evaluate.sampling import GREEDY, Sampling
from jax_ordermerge.json_types import Json

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM

# Of an answer, where a task does not set it: the default of the harness's own models.
_MAX_NEW_TOKENS = 256
_RESAMPLES = 1000  # for the errors of metrics that are no means
_GENERATION_SETTINGS = ("do_sample", "temperature", "top_k", "top_p")
_RESULTS = ("results", "groups", "versions", "n-shot", "configs", "samples")
Untyped: TypeAlias = Any  # the harness is optional and its types are loose


def check() -> None:
    """Refuse to go on where lm-evaluation-harness is not installed.

    Raises:
        UserError: with what to install.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "--harness needs lm-evaluation-harness, which is not installed: pip install "
            "'jax_ordermerge[eval]'"
        )


def run(
    model: EvalModel,
    names: Sequence[str],
    *,
    include: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    chat: bool = False,
    seed: int = 0,
) -> tuple[Json, str]:
    """Evaluate a model on tasks of the harness.

    Args:
        model: the model.
        names: of tasks, groups or tags.
        include: directory with more tasks, as YAML.
        shots: solved examples before each item; None is the number that each task sets.
        limit: use only the first so many items of each task.
        chat: ask in the model's chat template, with shots as turns.
        seed: of sampled answers. The harness draws shots by its own seed, so that numbers compare
            with published ones.

    Returns:
        `results`, `groups`, `versions`, `n-shot`, `configs` and `samples` of the harness as plain
        JSON, and its table of results.

    Raises:
        UserError: a task is unknown, or its data are out of reach.
    """
    from lm_eval import evaluator
    from lm_eval.utils import make_table

    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    # Its bootstrap would fork this process, which holds devices and their threads.
    os.environ["DISABLE_MULTIPROC"] = "1"
    if chat and not model.tokenizer.chat_template:
        raise UserError("--chat needs a chat template, the tokenizer has none; leave it out")
    results = evaluator.simple_evaluate(
        language_model(model, seed=seed),
        tasks=_load_tasks(names, include),
        num_fewshot=shots,
        limit=limit,
        bootstrap_iters=_RESAMPLES,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )
    table = make_table(results)
    if results.get("groups"):
        table += f"\n{make_table(results, 'groups')}"
    return {name: _to_json(results[name]) for name in _RESULTS if name in results}, table


def language_model(model: EvalModel, *, seed: int = 0) -> "TemplateLM":
    """Return a model as `lm_eval.simple_evaluate` takes it.

    Contexts that are too long lose their first tokens, as in the harness's own models.

    Args:
        model: the model.
        seed: of sampled answers.
    """
    # The class is local because its base needs the harness, which is optional.
    from lm_eval.api.model import TemplateLM

    class Adapter(TemplateLM):
        tokenizer = model.tokenizer
        # The harness names caches by it, so it must be a file name.
        tokenizer_name = str(model.tokenizer.name_or_path).replace("/", "__")
        eot_token_id = model.tokenizer.eos_token_id
        prefix_token_id = model.start
        max_length = model.positions

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **_: Untyped
        ) -> list[int]:
            if add_special_tokens is None:
                return model.encode(string)
            options = {"add_special_tokens": add_special_tokens, "verbose": False}
            return list(model.tokenizer(string, **options)["input_ids"])

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            try:
                text = model.tokenizer.apply_chat_template(
                    chat_history,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            # a template of one prompt refuses shots as turns, others a system message
            except Exception as error:
                roles = ", ".join(message["role"] for message in chat_history)
                raise UserError(
                    f"--chat: the chat template refuses the roles {roles}: {first_line(error)};"
                    " leave --chat out, or give --shots 0"
                ) from error
            return str(text)

        def _loglikelihood_tokens(
            self, requests: Sequence[Untyped], **_: Untyped
        ) -> list[tuple[float, bool]]:
            pairs = [
                likelihood.truncate_pair(context, continuation, model.positions)
                for _, context, continuation in requests
            ]
            return list(zip(*model.score(pairs), strict=True))

        def loglikelihood_rolling(
            self, requests: "Sequence[Instance]", disable_tqdm: bool = False
        ) -> list[float]:
            texts = [model.encode(request.args[0]) for request in requests]
            return likelihood.rolling_logprobs(model.score, texts, model.start, model.positions)

        def generate_until(
            self, requests: "Sequence[Instance]", disable_tqdm: bool = False
        ) -> list[str]:
            return _generate(model, requests, seed)

    return Adapter()


def _generate(model: EvalModel, requests: "Sequence[Instance]", seed: int) -> list[str]:
    """Return the answers. Requests with the same settings are generated in the same batches."""
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

    groups: dict[tuple[int, Sampling, tuple[str, ...]], list[int]] = collections.defaultdict(list)
    # Settings are part of the compiled program, so each group is a call of its own.
    for number, request in enumerate(requests):
        settings: Json = dict(normalize_gen_kwargs(request.args[1], _MAX_NEW_TOKENS))
        until, max_new_tokens = settings.pop("until", None) or [], settings.pop("max_gen_toks")
        stops = (until,) if isinstance(until, str) else tuple(until)
        sampling = _sampling(settings, str(request.task_name), seed)
        groups[max_new_tokens, sampling, stops].append(number)
    # Answers in the order of the requests, which the groups have lost.
    names, answers = _request_names(requests), [""] * len(requests)
    for (max_new_tokens, sampling, stops), numbers in groups.items():
        longest_prompt = model.positions - max_new_tokens
        if longest_prompt < 1:
            raise UserError(
                f"task {requests[numbers[0]].task_name} asks for {max_new_tokens} new tokens, the "
                f"model holds {model.positions} in all; set max_gen_toks in a YAML of your own "
                "(--harness-include)"
            )
        # Long prompts lose their beginning: shots are there, the question is at the end.
        prompts = [model.encode(requests[i].args[0])[-longest_prompt:] for i in numbers]
        with name_items([names[i] for i in numbers]):
            texts = model.generate(prompts, max_new_tokens, sampling, [names[i] for i in numbers])
        for number, text in zip(numbers, texts, strict=True):
            # by the function of the harness, so that stops cut as in its own models
            answers[number] = postprocess_generated_text(text, list(stops), None)
    return answers


def _sampling(settings: Mapping[str, Untyped], task: str, seed: int) -> Sampling:
    unknown = [name for name in settings if name not in _GENERATION_SETTINGS]
    if unknown:
        raise UserError(
            f"task {task} sets generation_kwargs.{unknown[0]}, which is not offered here; known "
            f"are {', '.join(_GENERATION_SETTINGS)}"
        )
    temperature = float(settings.get("temperature") or 0.0)
    # Tasks often set a temperature beside do_sample: false, which wins in transformers.
    if 0 <= temperature < SMALLEST_TEMPERATURE or not settings.get("do_sample", True):
        return GREEDY
    top_k, top_p = settings.get("top_k"), settings.get("top_p")
    return Sampling(
        temperature, int(top_k) if top_k else None, float(top_p) if top_p else None, seed
    )


def _request_names(requests: "Sequence[Instance]") -> list[str]:
    """Return a name for each request: the task, the item, and how often it was asked before.

    Samples are drawn by name, so an answer does not depend on the other requests.
    """
    repeats: collections.Counter[str] = collections.Counter()
    names = []
    for request in requests:
        item = f"{request.task_name}/{request.doc_id}"
        names.append(f"{item}/{repeats[item]}")
        repeats[item] += 1
    return names


def _load_tasks(names: Sequence[str], include: Path | None) -> list[Untyped]:
    from lm_eval.tasks import TaskManager

    if include is not None and not include.is_dir():
        raise UserError(
            f"--harness-include {include}: no such directory; give one with YAML files of tasks"
        )
    manager = TaskManager(include_path=None if include is None else str(include))
    tasks: list[Untyped] = []
    for name in names:
        try:
            loaded = manager.load(name)
        # The harness passes on any error of its parts: unknown names, unreachable hubs, absent
        # files.
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(
                f"--harness {name} cannot be loaded: {reason}; see lm-eval ls tasks, or give "
                "--harness-include DIR"
            ) from error
        tasks += [loaded["groups"][name]] if name in loaded["groups"] else loaded["tasks"].values()
    return tasks


def _to_json(value: Untyped) -> Untyped:
    """Return a result as JSON: NaN, infinities and other types become text."""
    if isinstance(value, Mapping):
        return {str(name): _to_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    # JSON has neither NaN nor infinities.
    if isinstance(value, float) and not float("-inf") < value < float("inf"):
        return str(value)
    if isinstance(value, bool | int | float | str) or value is None:
        return value
    return _to_json(value.item()) if hasattr(value, "item") else str(value)
