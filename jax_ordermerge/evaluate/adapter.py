"""Our generation and scoring as a model of lm-evaluation-harness (extra `eval`), and its tasks run with it.

Every process is given all requests, and shares each batch with the others: to the harness there is one process.

Source: https://github.com/EleutherAI/lm-evaluation-harness, version 0.4.
"""

import collections
import importlib.util
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import likelihood
from jax_ordermerge.evaluate.harness import Subject
from jax_ordermerge.evaluate.sampling import GREEDY, Sampling

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM

_NEW_TOKENS = (
    256  # of an answer, where a task says nothing else: as the harness's own models have it
)
_RESAMPLES = 1000  # for the errors of metrics that are no means
_SAID = (
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
)  # settings of a task's generation that are known here


def check() -> None:
    """Refuse to go on where lm-evaluation-harness is not installed.

    Raises:
        UserError: with what to install.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "--harness needs lm-evaluation-harness, which is not installed: pip install 'jax_ordermerge[eval]'"
        )


def run(
    subject: Subject,
    names: Sequence[str],
    *,
    include: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    chat: bool = False,
    seed: int = 0,
) -> tuple[dict[str, Any], str]:
    """Put a model to tasks of the harness.

    Args:
        subject: the model.
        names: of tasks, groups or tags.
        include: directory with more tasks, as YAML.
        shots: before each item; None is each task's own number.
        limit: only the first so many items of each task.
        chat: ask in the model's chat template, shots as turns.
        seed: of what is drawn here. Shots are drawn by the harness's own seed, so that numbers compare with others'.

    Returns:
        `{"results", "groups", "versions", "n-shot", "configs", "samples"}` as the harness gives them, in plain values, and its table.

    Raises:
        UserError: a task that is unknown or whose data cannot be had.
    """
    from lm_eval import evaluator
    from lm_eval.utils import make_table

    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    os.environ["DISABLE_MULTIPROC"] = (
        "1"  # its bootstrap would fork a process that holds devices and their threads
    )
    if chat and not subject.tokenizer.chat_template:
        raise UserError("--chat needs a chat template, the tokenizer has none; leave it out")
    found = evaluator.simple_evaluate(
        language_model(subject, seed=seed),
        tasks=_tasks(names, include),
        num_fewshot=shots,
        limit=limit,
        bootstrap_iters=_RESAMPLES,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )
    kept = ("results", "groups", "versions", "n-shot", "configs", "samples")
    table = make_table(found) + (f"\n{make_table(found, 'groups')}" if found.get("groups") else "")
    return {name: _plain(found[name]) for name in kept if name in found}, table


def language_model(subject: Subject, *, seed: int = 0) -> "TemplateLM":
    """Return a model as the harness takes it: `lm_eval.simple_evaluate(language_model(subject), tasks=[...])`.

    Contexts that are too long lose their first tokens, as with the harness's own models.

    Args:
        subject: the model.
        seed: of draws, where a task samples.
    """
    from lm_eval.api.model import TemplateLM

    class Adapter(TemplateLM):
        tokenizer = subject.tokenizer
        tokenizer_name = str(subject.tokenizer.name_or_path).replace("/", "__")
        eot_token_id = subject.tokenizer.eos_token_id
        prefix_token_id = subject.start
        max_length = subject.positions

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **_: Any
        ) -> list[int]:
            if add_special_tokens is None:
                return subject.encode(string)
            return list(
                subject.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)[
                    "input_ids"
                ]
            )

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            return str(
                subject.tokenizer.apply_chat_template(
                    chat_history,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )

        def _loglikelihood_tokens(
            self, requests: Sequence[Any], **_: Any
        ) -> list[tuple[float, bool]]:
            pairs = [
                likelihood.fitted(context, continuation, subject.positions)
                for _, context, continuation in requests
            ]
            return list(zip(*subject.score(pairs), strict=True))

        def loglikelihood_rolling(
            self, requests: "Sequence[Instance]", disable_tqdm: bool = False
        ) -> list[float]:
            texts = [subject.encode(request.args[0]) for request in requests]
            return likelihood.rolling(subject.score, texts, subject.start, subject.positions)

        def generate_until(
            self, requests: "Sequence[Instance]", disable_tqdm: bool = False
        ) -> list[str]:
            return _generate(subject, requests, seed)

    return Adapter()


def _generate(subject: Subject, requests: "Sequence[Instance]", seed: int) -> list[str]:
    """Return the answers, one program's worth of requests after another: those of like settings together."""
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

    groups: dict[tuple[int, Sampling, tuple[str, ...]], list[int]] = collections.defaultdict(list)
    for number, request in enumerate(requests):
        settings: dict[str, Any] = dict(normalize_gen_kwargs(request.args[1], _NEW_TOKENS))
        until, size = settings.pop("until", None) or [], settings.pop("max_gen_toks")
        stops = (until,) if isinstance(until, str) else tuple(until)
        groups[size, _sampling(settings, str(request.task_name), seed), stops].append(number)
    names, answers = _names(requests), [""] * len(requests)
    for (size, sampling, stops), numbers in groups.items():
        room = subject.positions - size
        if room < 1:
            raise UserError(
                f"task {requests[numbers[0]].task_name} asks for {size} new tokens, the model holds {subject.positions} in all;"
                " set max_gen_toks in a YAML of your own (--harness-include)"
            )
        prompts = [subject.encode(requests[number].args[0])[-room:] for number in numbers]
        texts = subject.generate(prompts, size, sampling, [names[number] for number in numbers])
        for number, text in zip(numbers, texts, strict=True):
            answers[number] = postprocess_generated_text(text, list(stops), None)
    return answers


def _sampling(settings: Mapping[str, Any], task: str, seed: int) -> Sampling:
    unknown = [name for name in settings if name not in _SAID]
    if unknown:
        raise UserError(
            f"task {task} sets generation_kwargs.{unknown[0]}, which is not offered here; known are {', '.join(_SAID)}"
        )
    temperature = float(settings.get("temperature") or 0.0)
    if not temperature or not settings.get("do_sample", True):
        return GREEDY
    top_k, top_p = settings.get("top_k"), settings.get("top_p")
    return Sampling(
        temperature, int(top_k) if top_k else None, float(top_p) if top_p else None, seed
    )


def _names(requests: "Sequence[Instance]") -> list[str]:
    """Return a name for each request by task, item and how often the item was asked before: what it draws depends on no other."""
    seen: collections.Counter[str] = collections.Counter()
    names = []
    for request in requests:
        item = f"{request.task_name}/{request.doc_id}"
        names.append(f"{item}/{seen[item]}")
        seen[item] += 1
    return names


def _tasks(names: Sequence[str], include: Path | None) -> list[Any]:
    from lm_eval.tasks import TaskManager

    if include is not None and not include.is_dir():
        raise UserError(
            f"--harness-include {include}: no such directory; give one with YAML files of tasks"
        )
    manager = TaskManager(include_path=None if include is None else str(include))
    found: list[Any] = []
    for name in names:
        try:
            loaded = manager.load(name)
        except Exception as error:  # the harness raises whatever its parts raise: unknown names, hubs out of reach, missing files
            said = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(
                f"--harness {name} cannot be loaded: {said}; see lm-eval ls tasks, or give --harness-include DIR"
            ) from error
        found += [loaded["groups"][name]] if name in loaded["groups"] else loaded["tasks"].values()
    return found


def _plain(value: Any) -> Any:
    """Return what JSON can hold of a result: numbers and texts, anything else as it is printed."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not float("-inf") < value < float("inf"):
        return str(value)
    if isinstance(value, bool | int | float | str) or value is None:
        return value
    return _plain(value.item()) if hasattr(value, "item") else str(value)
