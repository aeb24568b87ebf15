"""The servers of `simulation_check.py`, each in its own process: a teacher with known latencies, and the gateway.

    python -m benchmarks.simulation_servers teacher SETTINGS
    python -m benchmarks.simulation_servers gateway SETTINGS

SETTINGS is a JSON file that `simulation_check.py` writes. The student is a tiny model with random weights. It computes
its batches and then waits until each has taken as long as the settings say, as a larger model on another device would.
"""

import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


def teacher(settings: dict[str, Any]) -> None:
    """An OpenAI-compatible server whose answers take the given seconds, in turn. While a file exists, it
    never answers the requests that arrive."""
    delays, silent = itertools.cycle(settings["teacher_seconds"]), Path(settings["dead_file"])

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/chat/completions":
                return self.reply(404, {})
            if silent.exists():
                time.sleep(2 * settings["teacher_timeout_s"])
                self.close_connection = True
                return None
            time.sleep(next(delays))
            text = json.dumps(body["messages"])
            label = ("negative", "neutral", "positive")[sum(text.encode()) % 3]
            choice = {"message": {"role": "assistant", "content": f'"Prediction": {label}'}, "finish_reason": "stop"}
            usage = {"prompt_tokens": 100, "completion_tokens": 5}
            return self.reply(200, {"choices": [choice], "usage": usage})

        def reply(self, status: int, content: Any) -> None:
            data = json.dumps(content).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError:  # the client has given up
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", settings["teacher_port"]), Handler)
    server.daemon_threads = True
    server.serve_forever()


def gateway(settings: dict[str, Any]) -> None:
    """The real gateway with a tiny student, a threshold that defers a share of the posts, and that teacher."""
    import numpy as np
    import torch

    from benchmarks.workload import train_tokenizer
    from distill.cascade.cascade import Calibration, CascadePolicy
    from distill.cascade.uncertainty import uncertainty
    from distill.models.backbone import ModelSettings, create
    from distill.models.endpoint import Endpoint, EndpointSettings
    from distill.models.local import Local
    from distill.models.reasoner import Answer, ClassScores, Sampling
    from distill.models.tiny import TinySettings
    from distill.serving.gateway import Gateway
    from distill.serving.server import serve
    from distill.serving.settings import ServeSettings, endpoint_for_serving
    from distill.task.labels import LabelSpace
    from distill.task.prompts import EarlierAnswers, Template
    from distill.task.sample import Sample

    class PacedStudent(Local):
        """A student whose batches take the seconds of the settings."""

        def classify(self, samples: Sequence[Sample], earlier: Sequence[EarlierAnswers] | None = None) -> ClassScores:
            begin = time.monotonic()
            scores = super().classify(samples, earlier)
            pause(begin, settings["classify"], len(samples))
            return scores

        def reason(
            self, samples: Sequence[Sample], template: Template = "reason", sampling: Sampling = Sampling()
        ) -> Iterator[tuple[int, Answer]]:
            begin = time.monotonic()
            answers = list(super().reason(samples, template, sampling))
            pause(begin, settings["reason"], len(samples))
            yield from answers

    def pause(begin: float, line: tuple[float, float], size: int) -> None:
        time.sleep(max(begin + line[0] + line[1] * size - time.monotonic(), 0.0))

    torch.set_num_threads(1)
    torch.manual_seed(0)
    labels = LabelSpace()
    with TemporaryDirectory() as folder:
        train_tokenizer(600).save_pretrained(folder)
        size = TinySettings(hidden=64, layers=1, vision_hidden=32, vision_depth=1)
        student = PacedStudent(create(ModelSettings(tiny=size, image_size=28), labels, Path(folder)), "tiny")
    posts = [Sample(str(number), text) for number, text in enumerate(settings["posts"])]
    measure = uncertainty(Local.classify(student, posts).probabilities, "entropy")
    threshold = float(np.quantile(measure, 1 - settings["deferred"]))
    calibration = Calibration("tiny", "scripted", "entropy", 1.0, 1.0, threshold, -1.0, min_label_mass=0.0)
    serving = ServeSettings(**settings["serve"])
    endpoint = EndpointSettings(
        f"http://127.0.0.1:{settings['teacher_port']}/v1", "scripted", timeout_s=settings["teacher_timeout_s"]
    )
    policy = CascadePolicy(labels, calibration)
    serve(
        Gateway(serving, policy, student, Endpoint(endpoint_for_serving(endpoint, serving.deadline_s), labels), "check")
    )


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[2]).read_text())
    (teacher if sys.argv[1] == "teacher" else gateway)(given)
