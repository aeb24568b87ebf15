"""A round-robin load balancer of the tests."""

import itertools
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx


@contextmanager
def balanced(urls: Sequence[str]) -> Iterator[tuple[str, Counter[str]]]:
    """The address of a balancer of these servers, and how many requests it has sent to each."""
    turns, sent, lock = itertools.cycle(urls), Counter[str](), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            with lock:
                url = next(turns)
                sent[url] += 1
            body = self.rfile.read(int(self.headers["Content-Length"]))
            reply = httpx.post(url + self.path, content=body, headers={"Content-Type": self.headers["Content-Type"]})
            self.send_response(reply.status_code)
            self.send_header("Content-Length", str(len(reply.content)))
            self.end_headers()
            self.wfile.write(reply.content)

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", sent
    finally:
        server.shutdown()
        server.server_close()
