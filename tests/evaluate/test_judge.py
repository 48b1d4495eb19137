"""The judge of two models, with an endpoint on loopback that can fail."""

import collections
import contextlib
import dataclasses
import functools
import json
import subprocess
import sys
import threading

import pytest

from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import judge
from jax_ordermerge.evaluate.endpoint import Endpoint
from tests.evaluate.chat_server import Fault, Message, serve


def rows(*outputs):
    return [
        {"instruction": f"Task {n}.", "output": text, "generator": "x"}
        for n, text in enumerate(outputs)
    ]


def write(path, rows):
    path.write_text(json.dumps(rows))
    return path


def longer(question, _):
    first = question.split("### Answer A\n")[1].split("\n\n### Answer B")[0]
    second = question.split("### Answer B\n")[1].split("\n\nReply")[0]
    return "A" if len(first) > len(second) else "B" if len(second) > len(first) else "neither"


def test_a_judge_that_sees_the_answers():
    with serve(longer) as (endpoint, requests):
        summary, items = judge.compare(
            endpoint, rows("long answer", "no", "same"), rows("short", "longer", "same")
        )
    assert summary == {
        "win_rate": 0.5,
        "se": pytest.approx(0.2887, abs=1e-4),
        "n": 3,
        "turned": 0,
        "unread": 0,
    }
    assert [item["win"] for item in items] == [1.0, 0.0, 0.5]
    assert len(requests) == 6
    for request in requests:
        assert request["path"] == "/v1/chat/completions"
        assert request["key"] == "Bearer secret"
        assert (request["model"], request["temperature"]) == ("stub", 0)
        assert "### Instruction\nTask" in request["messages"][0]["content"]


@pytest.mark.parametrize("letter", ["A", "B", "The better one is B."])
def test_a_judge_that_prefers_a_position_decides_nothing(letter):
    with serve(lambda *_: letter) as (endpoint, _):
        summary, items = judge.compare(
            endpoint, rows("one", "two"), rows("three", "four"), workers=1
        )
    assert summary == {"win_rate": 0.5, "se": 0.0, "n": 2, "turned": 2, "unread": 0}
    assert {(item["first"], item["second"]) for item in items} == {
        (1.0, 0.0) if letter == "A" else (0.0, 1.0)
    }


def test_a_pair_that_cannot_be_read_is_counted_apart():
    def answer(question, number):
        if "Task 1" in question and "### Answer A\nours" in question:
            return "I cannot tell."
        return "A" if "### Answer A\nours" in question else "B"

    with serve(answer) as (endpoint, _):
        summary, items = judge.compare(endpoint, rows("ours", "ours"), rows("b", "b"))
    # One of two is read, and won: a half for the other would have given 0.75.
    assert summary == {"win_rate": 1.0, "se": None, "n": 1, "turned": 0, "unread": 1}
    assert items[1] == {
        "instruction": "Task 1.",
        "first": None,
        "second": 1.0,
        "win": None,
        "replies": ["I cannot tell.", "B"],
    }


def test_a_judge_whose_thoughts_take_all_tokens_is_an_error_that_says_so():
    with (
        serve(lambda *_: Message("<think>Let me see: A", "length")) as (endpoint, _),
        pytest.raises(UserError, match=r"no verdict of 1 pairs .*see: A'.* larger --max-tokens"),
    ):
        judge.compare(endpoint, rows("a"), rows("b"))


HTML = "<html>504 Gateway Time-out</html>"
FAULTS = [
    Fault(429, "slow down", (("Retry-After", "2"),)),
    Fault(504, HTML),
    Fault(drop=True),
    Fault(200, HTML),
    Message(None),
    Fault(503, "loading"),
]


def faulty():
    """Return a server whose every second answer is a fault.

    The others are prose, or have thoughts before them. No question gets an empty reply more often
    than a judge asks again, however its workers take turns.
    """
    empty = collections.Counter()

    def answer(question, number):
        if number % 2:
            fault = FAULTS[number // 2 % len(FAULTS)]
            if isinstance(fault, Message):
                empty[question] += 1
                return fault if empty[question] < 3 else FAULTS[-1]
            return fault
        letter = longer(question, number)
        if letter == "neither":
            return letter
        other = "B" if letter == "A" else "A"
        return [
            letter,
            f"<think>{other} is better. Verdict: {other}</think>\n**{letter}**",
            f"Answer {other} is not bad, but the better answer is {letter}.",
        ][number // 2 % 3]

    return answer


def test_faults_lose_no_verdict_and_change_no_number(tmp_path):
    ours = write(tmp_path / "ours.json", rows(*["x" * (3 * n % 7) for n in range(12)]))
    theirs = write(tmp_path / "theirs.json", rows(*["x" * (5 * n % 6) for n in range(12)]))
    with serve(longer) as (endpoint, _):
        expected = judge.compare(endpoint, judge.read(ours), judge.read(theirs))
    pauses = []
    with serve(faulty()) as (endpoint, requests):
        found = judge.compare(
            endpoint, judge.read(ours), judge.read(theirs), sleep=pauses.append, workers=3
        )
    assert found == expected
    assert len(requests) == 24 + len(pauses)
    assert 2.0 in pauses


@pytest.mark.parametrize("fault", [Fault(402, "quota"), Fault(401, "expired key")])
def test_a_run_that_is_broken_off_resumes_to_the_same_numbers(fault, tmp_path, monkeypatch):
    monkeypatch.setattr("jax_ordermerge.evaluate.endpoint._PAUSES", (0.0, 0.0))
    ours = write(tmp_path / "ours.json", rows(*["x" * (3 * n % 7) for n in range(12)]))
    theirs = write(tmp_path / "theirs.json", rows(*["x" * (5 * n % 6) for n in range(12)]))
    out, kept = tmp_path / "verdicts.json", tmp_path / "verdicts.replies.jsonl"
    with serve(longer) as (endpoint, _):
        expected = judge.compare_files(endpoint, ours, theirs)
    # equal answers are one question in both orders
    questions = len((tmp_path / "ours.replies.jsonl").read_text().splitlines())
    lines, asked, runs = [], 0, 0
    while not out.is_file():
        runs += 1
        with serve(lambda q, n: longer(q, n) if n <= 7 else fault) as (endpoint, requests):
            run = functools.partial(
                judge.compare_files, endpoint, ours, theirs, out, log=lines.append
            )
            if asked + 7 < questions:
                with pytest.raises(UserError, match=rf"{fault.body}.*replies are kept in {kept}"):
                    run()
            else:
                summary = run()
        asked += min(len(requests), 7)
        assert len(kept.read_text().splitlines()) == asked
    assert (summary, asked, runs) == (expected, questions, 3)
    assert any(line.startswith("14 replies are kept") for line in lines)
    verdicts = json.loads(out.read_text())
    assert verdicts["settings"] == {"temperature": 0.0, "max_tokens": 1024}
    assert [item["win"] for item in verdicts["items"]][:3] == [0.5, 0.0, 1.0]


def test_replies_are_kept_by_content(tmp_path):
    ours, theirs = (
        write(tmp_path / "a.json", rows("long", "no")),
        write(tmp_path / "b", rows("b", "b")),
    )
    with serve(longer) as (endpoint, requests):
        judge.compare_files(endpoint, ours, theirs)
        assert len(requests) == 4
        judge.compare_files(endpoint, ours, theirs)
        assert len(requests) == 4
        # other settings, and another answer
        judge.compare_files(dataclasses.replace(endpoint, max_tokens=2048), ours, theirs)
        assert len(requests) == 8
        write(ours, rows("long", "longer"))
        judge.compare_files(endpoint, ours, theirs)
        assert len(requests) == 10
        # another order of the rows
        write(ours, rows("long", "longer")[::-1])
        write(theirs, rows("b", "b")[::-1])
        judge.compare_files(endpoint, ours, theirs)
        assert len(requests) == 10


def test_a_reply_file_that_was_cut_or_is_another(tmp_path):
    path = tmp_path / "replies.jsonl"
    store = judge.ReplyFile(path)
    store.add("1", judge.Reply("A \u2028 ü", False))
    store.add("2", judge.Reply("B", True))
    store.close()
    path.write_text(path.read_text()[:-5])
    store = judge.ReplyFile(path)
    assert store.get("1") == judge.Reply("A \u2028 ü", False)
    assert store.get("2") is None
    store.add("2", judge.Reply("B", True))
    store.close()
    with contextlib.closing(judge.ReplyFile(path)) as store:
        assert len(store) == 2
    path.write_text('{"instruction": "x"}\n')
    with pytest.raises(UserError, match="line 1: no reply of a judge"):
        judge.ReplyFile(path)
    with pytest.raises(UserError, match="cannot be kept in"):
        judge.ReplyFile(tmp_path)


def test_threads_write_whole_lines(tmp_path):
    store = judge.ReplyFile(tmp_path / "replies.jsonl")
    threads = [
        threading.Thread(
            target=lambda t=t: [
                store.add(f"{t}/{n}", judge.Reply("x" * 5000, False)) for n in range(20)
            ]
        )
        for t in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.close()
    with contextlib.closing(judge.ReplyFile(tmp_path / "replies.jsonl")) as store:
        assert len(store) == 160


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("form", ["list", "lines"])
def test_outputs_are_read_as_a_list_or_as_lines(tmp_path, mark, form):
    expected = rows("a\u2028ü", "b")
    texts = [json.dumps(row, ensure_ascii=False) for row in expected]
    text = json.dumps(expected) if form == "list" else "\r\n".join([*texts, ""])
    (tmp_path / "x.json").write_bytes(mark + text.encode())
    assert judge.read(tmp_path / "x.json") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}', "row 0: expected an object with instruction and output"),
        ("[", "is no file of outputs"),
        ('[{"output": ""}]', "row 0: expected an object"),
        ('[{"instruction": "a", "output": "b"}, 7]', "row 1: expected an object"),
        ('[{"instruction": "a", "output": null}]', "row 0: output is null, expected a text"),
        ('{"instruction": "a", "output": ["b"]}', r"row 0: output is \[\"b\"\], expected a text"),
        ('{"instruction": null, "output": "b"}', "row 0: instruction is null"),
        ('{"instruction": "a", "output": "b"}\n{"instruction"', "is no file of outputs"),
    ],
)
def test_outputs_that_cannot_be_judged(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=message):
        judge.read(tmp_path / "x.json")


def test_files_that_do_not_go_together():
    nowhere = Endpoint("http://127.0.0.1:9/v1", "m")
    with pytest.raises(UserError, match="different instructions: 1 and 2"):
        judge.compare(nowhere, rows("a"), rows("a", "b"))
    with pytest.raises(UserError, match="different instructions, first in row 1"):
        judge.compare(nowhere, rows("a", "b"), [rows("a")[0], rows("b")[0]])
    with pytest.raises(UserError, match="nothing to judge"):
        judge.compare(nowhere, [], [])


def test_the_command(tmp_path):
    for name, outputs in (("ours", ("long answer", "no")), ("theirs", ("short", "maybe"))):
        write(tmp_path / name, rows(*outputs))
    command = [
        sys.executable,
        "-m",
        "jax_ordermerge",
        "judge",
        tmp_path / "ours",
        tmp_path / "theirs",
    ]
    with serve(longer) as (endpoint, requests):
        options = [
            "--endpoint",
            endpoint.url,
            "--model",
            "stub",
            "--out",
            tmp_path / "verdicts.json",
        ]
        options += ["--max-tokens", "9", "--temperature", "0.5", "--request", '{"seed": 3}']
        result = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
        refused = subprocess.run(
            [*command, *options, "--request", "[]"], capture_output=True, text=True, check=False
        )
    assert "50.0 % ± 50.0 of 2 instructions" in result.stdout
    assert {(r["max_tokens"], r["temperature"], r["seed"]) for r in requests} == {(9, 0.5, 3)}
    assert [
        item["win"] for item in json.loads((tmp_path / "verdicts.json").read_text())["items"]
    ] == [1.0, 0.0]
    assert refused.returncode == 2
    assert "--request []: expected a JSON object" in refused.stderr
