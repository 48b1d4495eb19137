"""A chat endpoint on loopback that can fail in the ways of real ones."""

import contextlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

from jax_ordermerge.evaluate.endpoint import Endpoint


class Fault(NamedTuple):
    """A response that is none of a chat model."""

    status: int = 200
    body: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    drop: bool = False


class Message(NamedTuple):
    """The message of a choice, whose content may be null."""

    content: str | None
    finish_reason: str = "stop"


Answer = str | Message | Fault


@contextlib.contextmanager
def serve(answer: Callable[[str, int], Answer]) -> Iterator[tuple[Endpoint, list[dict]]]:
    """Yield an endpoint and its requests. `answer(question, number)` is what it answers."""
    requests: list[dict] = []
    lock = threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                requests.append(
                    {"path": self.path, "key": self.headers.get("Authorization"), **body}
                )
                reply = answer(body["messages"][0]["content"], len(requests))
            if isinstance(reply, Fault) and reply.drop:
                self.close_connection = True
                return
            if isinstance(reply, str):
                reply = Message(reply)
            if isinstance(reply, Message):
                message = {"content": reply.content}
                choice = {"message": message, "finish_reason": reply.finish_reason}
                reply = Fault(body=json.dumps({"choices": [choice]}))
            self.send_response(reply.status)
            for name, value in reply.headers:
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(reply.body.encode())

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield (
                Endpoint(f"http://127.0.0.1:{server.server_port}/v1/", "stub", key="secret"),
                requests,
            )
        finally:
            server.shutdown()
            thread.join()
