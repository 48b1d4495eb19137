"""A pairwise judge behind an OpenAI-compatible endpoint, on output files as of AlpacaEval.

Every pair is shown in both orders, because judges prefer a position. A win counts 1, a verdict that
changes with the order 1/2.

Sources: Dubois et al., "AlpacaFarm", 2023, https://arxiv.org/abs/2305.14387 (format, question);
Zheng et al., "Judging LLM-as-a-judge", 2023, https://arxiv.org/abs/2306.05685 (both orders).
"""

import functools
import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from pathlib import Path
from typing import TypeAlias

from jax_ordermerge.checkpoint import atomic
from jax_ordermerge.errors import UserError, first_line
from jax_ordermerge.evaluate import verdict
from jax_ordermerge.evaluate.endpoint import Endpoint, Reply, Sleep
from jax_ordermerge.evaluate.metrics import mean_and_error
from jax_ordermerge.json_types import Json

QUESTION = """Which of two answers to an instruction would people prefer: the one that is more \
helpful, correct and to the point?

### Instruction
{instruction}

### Answer A
{first}

### Answer B
{second}

Reply with one letter, A or B."""
Output: TypeAlias = Json  # `instruction`, `output`, and what AlpacaEval adds


class ReplyFile:
    """The replies of a judge on a disk: JSON Lines, each written when it came.

    The key of a reply is the digest of its request. So a run that was broken off continues, and
    asks anew where the judge, its settings or an answer have changed.
    """

    def __init__(self, path: Path) -> None:
        """Read the replies of earlier runs.

        Raises:
            UserError: the file cannot be read or written, or holds a line that is no reply.
        """
        self.path, self._lock = path, threading.Lock()
        self._replies: dict[str, Reply] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # opened before anything is asked: what cannot be kept should not be paid for
            self._file = path.open("a+", encoding="utf-8")
            self._file.seek(0)
            lines = self._file.read().split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"the replies of the judge cannot be kept in {path}: {error}; give another file "
                "with --replies"
            ) from error
        # The last line of a run that was killed may be cut; its question is asked again.
        if cut := lines.pop():
            self._file.truncate(self._file.tell() - len(cut.encode()))
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                self._replies[row["digest"]] = Reply(str(row["reply"]), bool(row["cut"]))
            except (ValueError, LookupError, TypeError) as error:
                self.close()
                raise UserError(
                    f"{path}, line {number}: no reply of a judge; move the file away, or give "
                    "another one with --replies"
                ) from error

    def __len__(self) -> int:
        return len(self._replies)

    def get(self, digest: str) -> Reply | None:
        """Return the reply to a request, None where there is none yet."""
        return self._replies.get(digest)

    def add(self, digest: str, reply: Reply, **about: str) -> None:
        """Write a reply, with what a reader wants to know about it."""
        # Locked, as workers end at the same time; flushed, since each reply was paid for.
        row = {"digest": digest, "reply": reply.text, "cut": reply.cut, **about}
        with self._lock:
            self._replies[digest] = reply
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def prefers(
    endpoint: Endpoint,
    instruction: str,
    first: str,
    second: str,
    *,
    replies: ReplyFile | None = None,
    sleep: Sleep = time.sleep,
    on_retry: Callable[[str], None] | None = None,
) -> tuple[float | None, Reply | None]:
    """Ask which of two answers a judge prefers.

    Args:
        endpoint: the judge.
        instruction, first, second: what it is shown.
        replies: keeps the reply, or has it already.
        sleep, on_retry: see `Endpoint.ask`.

    Returns:
        1 for the first answer, 0 for the second, 1/2 for a stated tie, and None where no verdict
        can be read; and the reply.

    Raises:
        UserError: the endpoint does not answer, see `Endpoint.ask`.
    """
    question = QUESTION.format(instruction=instruction, first=first, second=second)
    digest = endpoint.digest(question)
    reply = None if replies is None else replies.get(digest)
    if reply is None:
        reply = endpoint.ask(question, sleep, on_retry)
        # A reply without text is not kept: another run may get one.
        if reply is not None and replies is not None:
            replies.add(digest, reply, judge=endpoint.model, instruction=instruction)
    return (None if reply is None else verdict.parse(reply.text, cut=reply.cut)), reply


def compare(
    endpoint: Endpoint,
    ours: Sequence[Output],
    theirs: Sequence[Output],
    *,
    workers: int = 4,
    replies: ReplyFile | None = None,
    sleep: Sleep | None = None,
    on_progress: Callable[[int], None] | None = None,
    on_retry: Callable[[str], None] | None = None,
) -> tuple[Json, list[Json]]:
    """Judge the outputs of two models on the same instructions, each pair in both orders.

    Args:
        endpoint: the judge.
        ours, theirs: rows with `instruction` and `output`, in the same order; see `read`.
        workers: number of questions that are asked at the same time.
        replies: keeps the replies, and has those of a run that was broken off.
        sleep: waits so many seconds before a question is asked again.
        on_progress: receives the number of pairs that are judged.
        on_retry: receives why a question is asked again.

    Returns:
        `win_rate`, `se`, `n`, `turned`, the number of pairs whose verdict depends on the order, and
        `unread`, the number of pairs in which a verdict could not be read; they are not among the
        `n`. Per instruction `instruction`, `first` and `second` (1 if the judge prefers ours, shown
        first and second, 1/2 for a tie that it states) and their mean `win`; of unread pairs all
        three may be None, and `replies` says what the judge wrote.

    Raises:
        UserError: the instructions differ, there are none, the endpoint does not answer, or no pair
            could be read.
    """
    _check_pairs(ours, theirs)
    stop = threading.Event()

    def wait(seconds: float) -> bool:
        if sleep is None:
            return stop.wait(seconds)
        sleep(seconds)
        return stop.is_set()

    def judge_both_orders(our_row: Output, their_row: Output) -> Json:
        instruction, ours, theirs = our_row["instruction"], our_row["output"], their_row["output"]
        ask = functools.partial(
            prefers, endpoint, instruction, replies=replies, sleep=wait, on_retry=on_retry
        )
        first, first_reply = ask(ours, theirs)
        turned, second_reply = ask(theirs, ours)
        # of the second question too, how much *ours* is preferred
        second = None if turned is None else 1.0 - turned
        item: Json = {"instruction": instruction, "first": first, "second": second, "win": None}
        if first is None or second is None:
            # With one order alone the bias of the judge for a position would enter the mean.
            texts = [reply and reply.text for reply in (first_reply, second_reply)]
            return item | {"replies": texts}
        # A verdict that turns with the order is a tie.
        return item | {"win": (first + second) / 2}

    with futures.ThreadPoolExecutor(workers) as pool:
        # Threads wait for the network; the endpoint batches what arrives at the same time.
        pairs = [pool.submit(judge_both_orders, *rows) for rows in zip(ours, theirs, strict=True)]
        try:
            for count, done in enumerate(futures.as_completed(pairs), 1):
                # Raises what a worker raised: one failure ends all, because a judge that is
                # unreachable for one question is so for the others.
                done.result()
                if on_progress is not None:
                    on_progress(count)
        except BaseException:
            # Workers that wait for a retry end at once, and questions not begun are dropped.
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    items = [pair.result() for pair in pairs]
    return _summarize(items), items


def _check_pairs(ours: Sequence[Output], theirs: Sequence[Output]) -> None:
    # Compared by text: files of other runs may have other items or another order.
    for number, (our_row, their_row) in enumerate(zip(ours, theirs, strict=False)):
        if our_row["instruction"] != their_row["instruction"]:
            raise UserError(
                f"the two files of outputs have different instructions, first in row {number}; "
                "judge models on the same ones, in the same order"
            )
    if len(ours) != len(theirs):
        raise UserError(
            f"the two files of outputs have different instructions: {len(ours)} and {len(theirs)}; "
            "judge models on the same ones, in the same order"
        )
    if not ours:
        raise UserError("the files of outputs are empty; there is nothing to judge")


def _summarize(items: Sequence[Json]) -> Json:
    read_items = [item for item in items if item["win"] is not None]
    if not read_items:
        texts = [text for item in items for text in item["replies"] if text]
        sample = f"'{' '.join(texts[0].split())[-80:]}'" if texts else "nothing"
        raise UserError(
            f"no verdict of {len(items)} pairs can be read: the judge writes {sample}; a judge that"
            " thinks needs a larger --max-tokens"
        )
    # Instructions are the sampling unit: the two orders of a pair are not independent.
    mean, error = mean_and_error([item["win"] for item in read_items])
    return {
        "win_rate": mean,
        "se": error,
        "n": len(read_items),
        "turned": sum(item["first"] != item["second"] for item in read_items),
        "unread": len(items) - len(read_items),
    }


def compare_files(
    endpoint: Endpoint,
    ours: str | Path,
    theirs: str | Path,
    out: Path | None = None,
    *,
    replies: Path | None = None,
    workers: int = 4,
    log: Callable[[str], None] | None = None,
) -> Json:
    """Judge two files of outputs and return the summary of `compare`.

    Args:
        endpoint: the judge.
        ours, theirs: files of outputs.
        out: file for the summary and the verdict on every item.
        replies: file of the replies, by default beside `out` or else beside `ours`. The same call
            with the same file continues where another was broken off.
        workers: see `compare`.
        log: receives lines about the progress.

    Raises:
        UserError: see `compare`; it says how many replies are kept.
    """
    # Everything that can fail without the judge comes first.
    our_rows, their_rows = read(ours), read(theirs)
    _check_pairs(our_rows, their_rows)
    if out is not None and out.is_dir():
        raise UserError(f"--out {out} is a directory; give a file")
    store = ReplyFile(replies or Path(out or ours).with_suffix(".replies.jsonl"))
    log = log or (lambda line: None)
    if len(store):
        log(f"{len(store)} replies are kept in {store.path}; they are not asked for again")

    def progress(count: int) -> None:
        # ten lines in all
        if count * 10 // len(our_rows) > (count - 1) * 10 // len(our_rows):
            log(f"judged {count} of {len(our_rows)} pairs")

    try:
        summary, items = compare(
            endpoint,
            our_rows,
            their_rows,
            workers=workers,
            replies=store,
            on_progress=progress,
            on_retry=log,
        )
    except UserError as error:
        kept_replies = f"; {len(store)} replies are kept in {store.path}" if len(store) else ""
        raise UserError(f"{error}{kept_replies}") from error
    finally:
        store.close()
    if out is not None:
        settings = {"temperature": endpoint.temperature, "max_tokens": endpoint.max_tokens}
        settings |= endpoint.request
        verdicts = {"judge": endpoint.model, "settings": settings, **summary, "items": items}
        atomic.replace(out, json.dumps(verdicts, indent=1).encode())
    return summary


def read(path: str | Path) -> list[Json]:
    """Read a file of outputs: objects with the texts `instruction` and `output`.

    They are a JSON list, or JSON Lines; a byte order mark is passed over.

    Raises:
        UserError: there is no such file, or it has another form.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no file of outputs: {first_line(error)}") from error
    expected = "as AlpacaEval's model_outputs.json"
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not {"instruction", "output"} <= set(row):
            raise UserError(
                f"{path}, row {number}: expected an object with instruction and output, {expected}"
            )
        for name in ("instruction", "output"):
            # str(None) would be judged as the answer "None"
            if not isinstance(row[name], str):
                raise UserError(
                    f"{path}, row {number}: {name} is {json.dumps(row[name])[:40]}, expected a "
                    'text; remove the row from both files, or write "" for an answer without text'
                )
    return list(rows)
