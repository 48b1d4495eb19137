"""The chat endpoint: retries with a clock of the test, and what refusals say."""

import dataclasses
import email.utils

import pytest

from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate.endpoint import Endpoint, Interrupted, Reply
from tests.evaluate.chat_server import Fault, Message, serve

HTML = "<html><body><h1>502 Bad Gateway</h1></body></html>"
FAULTS = {
    "429": Fault(429, '{"error": "rate limit"}'),
    "500": Fault(500),
    "502 with a page": Fault(502, HTML),
    "503": Fault(503),
    "504": Fault(504, "upstream timed out"),
    "drop": Fault(drop=True),
    "page with status 200": Fault(200, HTML),
    "error with status 200": Fault(200, '{"error": {"message": "overloaded"}}'),
    "empty": Fault(200, ""),
    "no choices": Fault(200, '{"choices": []}'),
    "list": Fault(200, "[]"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_passes_is_waited_for(name):
    pauses = []
    with serve(lambda _, n: FAULTS[name] if n <= 5 else "A") as (endpoint, requests):
        assert endpoint.ask("?", sleep=pauses.append) == Reply("A", False)
    assert len(requests) == 6
    assert pauses == [1, 2, 4, 8, 16]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_stays_is_an_error_after_more_than_a_minute(name):
    pauses, lines = [], []
    with (
        serve(lambda *_: FAULTS[name]) as (endpoint, _),
        pytest.raises(UserError, match="start the same command again later"),
    ):
        endpoint.ask("?", sleep=pauses.append, on_retry=lines.append)
    assert sum(pauses) > 60
    assert lines[-1].endswith("trying again in 64 s")


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7),
        ("0", 0),
        ("1.5", 1.5),
        ("-3", 0),
        (email.utils.formatdate(1_000_090, usegmt=True), 90),
        (email.utils.formatdate(999_000, usegmt=True), 0),
        ("soon", 1),  # cannot be read: the first pause
    ],
)
def test_retry_after_is_kept_to(value, seconds):
    pauses = []
    fault = Fault(429, headers=(("Retry-After", value),))
    with serve(lambda _, n: fault if n == 1 else "A") as (endpoint, _):
        endpoint = dataclasses.replace(endpoint, now=lambda: 1_000_000.0)
        assert endpoint.ask("?", sleep=pauses.append) == Reply("A", False)
    assert pauses == [seconds]


def test_a_wait_of_an_hour_is_left_to_the_user():
    fault = Fault(429, "quota", headers=(("Retry-After", "3600"),))
    with (
        serve(lambda *_: fault) as (endpoint, requests),
        pytest.raises(UserError, match=r"answers 429 .*quota and asks to wait 3600 s"),
    ):
        endpoint.ask("?", sleep=lambda _: pytest.fail("slept"))
    assert len(requests) == 1


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 422])
def test_a_refusal_is_shown_with_its_body_and_not_asked_again(status):
    body = '{"error": "max_tokens is not supported,\\n use max_completion_tokens; key secret"}'
    with (
        serve(lambda *_: Fault(status, body)) as (endpoint, requests),
        pytest.raises(UserError, match=rf"answers {status} .*use max_completion_tokens") as raised,
    ):
        endpoint.ask("?")
    assert len(requests) == 1
    assert "secret" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_reply_without_text_is_asked_for_twice_more():
    pauses = []
    with serve(lambda _, n: Message(None) if n <= 2 else "B") as (endpoint, _):
        assert endpoint.ask("?", sleep=pauses.append) == Reply("B", False)
    assert pauses == [1, 2]
    # other faults before do not count
    faults = [Fault(503), Fault(503), Message(None), Fault(503), Message(None)]
    with serve(lambda _, n: faults[n - 1] if n <= 5 else "A") as (endpoint, _):
        assert endpoint.ask("?", sleep=lambda _: None) == Reply("A", False)
    with serve(lambda *_: Message("  ")) as (endpoint, requests):
        assert endpoint.ask("?", sleep=pauses.append) is None
    assert len(requests) == 3


def test_a_reply_that_was_cut_says_so():
    with serve(lambda *_: Message("<think>I", "length")) as (endpoint, _):
        assert endpoint.ask("?") == Reply("<think>I", True)
    with serve(lambda *_: Message(None, "length")) as (endpoint, requests):
        assert endpoint.ask("?") == Reply("", True)
    assert len(requests) == 1


def test_parts_of_a_text_are_joined():
    body = '{"choices": [{"message": {"content": [{"text": "so "}, {"text": "A"}, {"x": 1}]}}]}'
    with serve(lambda *_: Fault(200, body)) as (endpoint, _):
        assert endpoint.ask("?") == Reply("so A", False)


def test_settings_are_sent_and_null_leaves_one_out():
    with serve(lambda *_: "A") as (endpoint, requests):
        endpoint.ask("?")
        changed = {"max_tokens": None, "max_completion_tokens": 7, "reasoning_effort": "low"}
        other = dataclasses.replace(endpoint, temperature=0.5, request=changed)
        other.ask("?")
    first, second = (
        {k: v for k, v in r.items() if k not in ("path", "key", "messages")} for r in requests
    )
    assert first == {"model": "stub", "temperature": 0.0, "max_tokens": 1024}
    changed.pop("max_tokens")
    assert second == {"model": "stub", "temperature": 0.5, **changed}
    digests = {endpoint.digest("?"), other.digest("?"), endpoint.digest("!")}
    assert len(digests) == 3
    assert dataclasses.replace(endpoint, url="http://x/v1", key=None).digest("?") in digests


def test_tries_end_where_another_question_failed():
    with serve(lambda *_: Fault(503)) as (endpoint, requests), pytest.raises(Interrupted):
        endpoint.ask("?", sleep=lambda _: True)
    assert len(requests) == 1


def test_an_address_that_is_wrong_is_an_error_at_once():
    def sleep(seconds):
        raise AssertionError("tried again")

    with pytest.raises(UserError, match="cannot be reached"):
        Endpoint("http://127.0.0.1:9/v1", "m").ask("?", sleep=sleep)
    with pytest.raises(UserError, match="expected an address"):
        Endpoint("file:///etc/passwd", "m")
    with pytest.raises(UserError, match="characters that cannot be sent"):
        Endpoint("http://127.0.0.1:9/a b", "m").ask("?", sleep=sleep)
    with pytest.raises(UserError, match="characters that cannot be sent") as raised:
        Endpoint("http://127.0.0.1:9/v1", "m", key="sec\nret").ask("?", sleep=sleep)
    assert "sec" not in str(raised.value)
    with serve(lambda *_: "A") as (endpoint, requests):
        dataclasses.replace(endpoint, key="secret\n").ask("?")
    assert requests[0]["key"] == "Bearer secret"
    assert "secret" not in repr(endpoint)
