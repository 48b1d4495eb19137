"""The judge, with a stub of an endpoint on loopback."""

import contextlib
import http.server
import json
import subprocess
import sys
import threading

import pytest

from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import judge


@contextlib.contextmanager
def server(answer):
    """A chat endpoint. `answer(question, number)` is its text, or a status code to fail with."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
            content = answer(body["messages"][0]["content"], len(requests))
            self.send_response(content if isinstance(content, int) else 200)
            self.end_headers()
            if not isinstance(content, int):
                reply = {"choices": [{"message": {"content": content}}]}
                self.wfile.write(json.dumps(reply).encode())

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as stub:
        thread = threading.Thread(target=stub.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{stub.server_port}/v1/"
            yield judge.Endpoint(url, "stub", key="secret"), requests
        finally:
            stub.shutdown()
            thread.join()


def rows(*outputs):
    return [
        {"instruction": f"Task {n}.", "output": text, "generator": "x"}
        for n, text in enumerate(outputs)
    ]


def longer(question, _):
    first = question.split("### Answer A\n")[1].split("\n\n### Answer B")[0]
    second = question.split("### Answer B\n")[1].split("\n\nReply")[0]
    return "A" if len(first) > len(second) else "B" if len(second) > len(first) else "neither"


def test_a_judge_that_sees_the_answers():
    with server(longer) as (endpoint, requests):
        summary, items = judge.compare(
            endpoint, rows("long answer", "no", "same"), rows("short", "longer", "same")
        )
    assert summary == {"win_rate": 0.5, "se": pytest.approx(0.2887, abs=1e-4), "n": 3, "turned": 0}
    assert [item["win"] for item in items] == [1.0, 0.0, 0.5]
    assert len(requests) == 6
    for request in requests:
        assert request["path"] == "/v1/chat/completions"
        assert request["key"] == "Bearer secret"
        assert (request["model"], request["temperature"]) == ("stub", 0)
        assert "### Instruction\nTask" in request["messages"][0]["content"]
    assert "secret" not in repr(endpoint)


@pytest.mark.parametrize("letter", ["A", "B", "The better one is B."])
def test_a_judge_that_prefers_a_position_decides_nothing(letter):
    with server(lambda *_: letter) as (endpoint, _):
        summary, items = judge.compare(
            endpoint, rows("one", "two"), rows("three", "four"), workers=1
        )
    assert summary == {"win_rate": 0.5, "se": 0.0, "n": 2, "turned": 2}
    assert {(item["first"], item["second"]) for item in items} == {
        (1.0, 0.0) if letter == "A" else (0.0, 1.0)
    }


def test_a_busy_endpoint_is_asked_again_and_a_refusing_one_is_named(monkeypatch):
    pauses = []
    monkeypatch.setattr(judge.time, "sleep", pauses.append)
    with server(lambda _, number: 429 if number < 3 else "A") as (endpoint, requests):
        assert judge.prefers(endpoint, "i", "a", "b") == 1.0
        assert len(requests) == 3
    assert pauses == [1.0, 4.0]
    with (
        server(lambda *_: 401) as (endpoint, requests),
        pytest.raises(UserError, match="answers 401") as error,
    ):
        judge.prefers(endpoint, "i", "a", "b")
    assert len(requests) == 1
    assert "secret" not in str(error.value)


def test_bad_input_is_refused(tmp_path):
    nowhere = judge.Endpoint("http://127.0.0.1:9/v1", "m")
    with pytest.raises(UserError, match="cannot be reached"):
        judge.prefers(nowhere, "i", "a", "b")
    with pytest.raises(UserError, match="expected an address"):
        judge.prefers(judge.Endpoint("file:///etc/passwd", "m"), "i", "a", "b")
    with pytest.raises(UserError, match="different instructions"):
        judge.compare(nowhere, rows("a"), rows("a", "b"))
    with pytest.raises(UserError, match="nothing to judge"):
        judge.compare(nowhere, [], [])
    file = tmp_path / "outputs.json"
    for text, message in (
        ('{"a": 1}', "expected a list of objects"),
        ("[", "is no file of outputs"),
        ('[{"output": ""}]', "expected a list"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            judge.read(file)


def test_the_command(tmp_path):
    for name, outputs in (("ours", ("long answer", "no")), ("theirs", ("short", "maybe"))):
        (tmp_path / name).write_text(json.dumps(rows(*outputs)))
    with server(longer) as (endpoint, _):
        command = [
            sys.executable,
            "-m",
            "jax_ordermerge",
            "judge",
            tmp_path / "ours",
            tmp_path / "theirs",
        ]
        options = [
            "--endpoint",
            endpoint.url,
            "--model",
            "stub",
            "--out",
            tmp_path / "verdicts.json",
        ]
        result = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    assert "50.0 % ± 50.0 of 2 instructions" in result.stdout
    assert [
        item["win"] for item in json.loads((tmp_path / "verdicts.json").read_text())["items"]
    ] == [1.0, 0.0]
