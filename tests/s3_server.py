"""An S3 server on this machine (moto) in a process of its own, and what clients need to reach it."""

import os
import socket
import subprocess
import sys
import time
from typing import Any, Self


class S3:
    """A server without content; `environment` is what a client reads.

    Raises:
        RuntimeError: it does not start.
    """

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
        }  # fmt: skip
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if time.monotonic() > end or self.process.poll() is not None:
                    raise RuntimeError("the S3 server does not start") from None
                time.sleep(0.1)

    def __enter__(self) -> Self:
        self.before = dict(os.environ)
        os.environ.update(self.environment)
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.environment:
            os.environ.pop(name)
            if name in self.before:
                os.environ[name] = self.before[name]
        self.process.terminate()
        self.process.wait()

    def bucket(self, name: str) -> str:
        """Make a bucket; returns its URL."""
        self.files().mkdir(name)
        return f"s3://{name}"

    def files(self) -> Any:
        """The file system of the server."""
        import fsspec

        return fsspec.filesystem("s3")

    def put(self, url: str, content: bytes) -> None:
        self.files().pipe_file(url, content)
