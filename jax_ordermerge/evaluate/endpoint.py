"""A chat model behind an OpenAI-compatible address, asked again while it is busy."""

import contextlib
import dataclasses
import email.utils
import hashlib
import http.client
import json
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Final, NamedTuple, TypeAlias

from jax_ordermerge.config.evaluation import SMALLEST_TEMPERATURE
from jax_ordermerge.errors import UserError
from jax_ordermerge.json_types import Json

# Seconds before further tries. Together two minutes: limits are often per minute, and a server
# that loads a model again needs about as long.
_PAUSES: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
_LONGEST_WAIT: Final = 600.0  # of a Retry-After; after a longer one the user comes back
_BUSY: Final = (408, 409, 425, 429)  # status codes beside those from 500 on
_EMPTY_TRIES: Final = 2  # further tries after a reply without text
_REPORTED_WAIT: Final = 4.0  # seconds from which a pause is worth a line
_SHOWN: Final = 300  # characters of a reply that is an error
# Waits so many seconds before the next try; true ends the tries.
Sleep: TypeAlias = Callable[[float], bool | None]


class Reply(NamedTuple):
    """What a model says.

    Attributes:
        text: empty only where the model was cut before it said anything.
        cut: whether it ended at the largest number of tokens.
    """

    text: str
    cut: bool


class Interrupted(Exception):
    """Another question failed for good while this one waited."""


class _Transient(Exception):
    """A failure that may pass.

    Attributes:
        wait: seconds that the server asks for, None where it does not say.
    """

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """The endpoint of a chat model.

    Attributes:
        url: up to the version, e.g. `http://localhost:8000/v1`.
        model: its name there.
        key: sent as a bearer token, and never shown.
        max_tokens: of a reply. A model that thinks needs more than the letter it ends with.
        temperature: 0 is greedy.
        request: further fields of a request. They win over the others; null leaves a field out.
        timeout: seconds to wait for a reply.
        now: seconds since 1970.
    """

    url: str
    model: str
    # Not in the repr, so that no log or traceback shows it.
    key: str | None = dataclasses.field(default=None, repr=False)
    max_tokens: int = 1024
    temperature: float = 0.0
    request: Json = dataclasses.field(default_factory=dict)
    timeout: float = 120.0
    now: Callable[[], float] = dataclasses.field(default=time.time, repr=False)
    # Whether an answer came, ever: a name that cannot be reached is then no typing error.
    _answered: threading.Event = dataclasses.field(default_factory=threading.Event, repr=False)

    def __post_init__(self) -> None:
        # urlopen would also read file: addresses.
        if not self.url.startswith(("http://", "https://")):
            raise UserError(
                f"judge {self.url}: expected an address such as http://localhost:8000/v1"
            )

    def body(self, text: str) -> Json:
        """Return the request that asks a text."""
        fields = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            # as in generation: a server may divide by it in float32
            "temperature": 0.0 if self.temperature < SMALLEST_TEMPERATURE else self.temperature,
            "max_tokens": self.max_tokens,
            **self.request,
        }
        # `request` may rename a field, as newer models do with `max_completion_tokens`: null leaves
        # the old one out.
        return {name: value for name, value in fields.items() if value is not None}

    def digest(self, text: str) -> str:
        """Return a digest of a question, the model and its settings. The address does not count."""
        # sorted: the same settings in another order are the same question
        return hashlib.sha256(json.dumps(self.body(text), sort_keys=True).encode()).hexdigest()

    def ask(
        self,
        text: str,
        sleep: Sleep = time.sleep,
        on_retry: Callable[[str], None] | None = None,
    ) -> Reply | None:
        """Return the reply to a message, or None where it stays without text.

        Args:
            text: of the message.
            sleep: waits so many seconds before the next try; true ends the tries.
            on_retry: receives why and when a question is asked again, after the first tries.

        Raises:
            UserError: the endpoint is out of reach, refuses, or answers in another form.
            Interrupted: `sleep` returned true.
        """
        wait: float | None
        empty_replies = 0
        for pause in (*_PAUSES, None):
            try:
                return self._try(text)
            except _Empty:
                # What the model wants to say. A second try may differ, many would only cost.
                empty_replies += 1
                if empty_replies > _EMPTY_TRIES or pause is None:
                    return None
                wait = pause
            except _Transient as error:
                wait = pause if error.wait is None or pause is None else error.wait
                if wait is None or wait > _LONGEST_WAIT:
                    raise UserError(
                        f"judge {self._address} {error}; start the same command again later"
                    ) from error
                if on_retry is not None and wait >= _REPORTED_WAIT:
                    on_retry(f"judge {error}; trying again in {wait:.0f} s")
            if sleep(wait):
                raise Interrupted
        raise AssertionError("the last try returns or raises")

    @property
    def _address(self) -> str:
        return f"{self.url.rstrip('/')}/chat/completions"

    def _try(self, text: str) -> Reply:
        headers = {"Content-Type": "application/json"}
        if self.key:
            # a variable that was set from a file ends with a line feed
            headers["Authorization"] = f"Bearer {self.key.strip()}"
        data = json.dumps(self.body(text)).encode()
        request = urllib.request.Request(self._address, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                content = reply.read()
        except urllib.error.HTTPError as error:
            self._answered.set()
            raise self._refusal(error) from error
        except (ValueError, http.client.InvalidURL) as error:
            # without the text of the error, which may hold the key
            raise UserError(
                f"judge {self.url}: the address or the key has characters that cannot be sent; "
                "check both"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            # Before the first answer the address is likely wrong, and waiting would hide that.
            refused = isinstance(reason, ConnectionRefusedError | socket.gaierror)
            if isinstance(reason, ssl.SSLError) or (refused and not self._answered.is_set()):
                raise UserError(
                    f"judge {self._address} cannot be reached ({reason}); check the address"
                ) from error
            problem = str(reason) or type(reason).__name__
            raise _Transient(f"broke the connection ({problem})") from error
        self._answered.set()
        return self._reply(content)

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        body = b""
        with contextlib.suppress(OSError, http.client.HTTPException):
            body = error.read(1 << 16)
        wait = self._retry_after(error.headers.get("Retry-After"))
        error.close()
        problem = f"answers {error.code} {error.reason}: {self._excerpt(body)}"
        if error.code in _BUSY or error.code >= 500:
            later = f" and asks to wait {wait:.0f} s" if wait is not None else ""
            return _Transient(problem + later, wait)
        # A wrong key does not get right.
        return UserError(f"judge {self._address} {problem}; check address, model, key and settings")

    def _reply(self, content: bytes) -> Reply:
        """Return what an answer with status 200 says."""
        # Servers differ in the fields around it; this one is the same everywhere.
        try:
            choice = json.loads(content)["choices"][0]
            text, cut = choice["message"]["content"], choice.get("finish_reason") == "length"
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            # A proxy puts its own page in place of the server's answer, or an error under 200.
            problem = f"does not answer as chat completions do: {self._excerpt(content)}"
            raise _Transient(problem) from error
        # Some servers send the parts of a text.
        if isinstance(text, list):
            text = "".join(str(part.get("text") or "") for part in text if isinstance(part, dict))
        if not isinstance(text, str) or not text.strip():
            if cut:
                return Reply("", cut)  # the tokens were spent on thoughts, which are not shown
            raise _Empty("answers without text")
        return Reply(text, cut)

    def _retry_after(self, value: str | None) -> float | None:
        """Return the seconds that a header Retry-After asks for: a number, or a date."""
        if value is None:
            return None
        with contextlib.suppress(ValueError, OverflowError):
            return max(float(value), 0.0)
        with contextlib.suppress(ValueError, TypeError):
            return max(email.utils.parsedate_to_datetime(value).timestamp() - self.now(), 0.0)
        return None

    def _excerpt(self, body: bytes) -> str:
        text = " ".join(body.decode(errors="replace").split())
        # Some servers repeat the key that they refuse.
        if self.key:
            text = text.replace(self.key, "***")
        return text[:_SHOWN] or "(no text)"


class _Empty(_Transient):
    """A reply of the right form without text."""
