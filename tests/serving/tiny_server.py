"""Script of the tests: serves a tiny student with the gateway in a process of its own.

    python tiny_server.py STUDENT_FOLDER PORT TEACHER_URL

Every post is deferred to the teacher.
"""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"


def main(folder: str, port: str, teacher_url: str) -> None:
    import torch

    from distill.cascade.cascade import Calibration, CascadePolicy
    from distill.models.backbone import ModelSettings, load
    from distill.models.endpoint import Endpoint, EndpointSettings
    from distill.models.local import Local
    from distill.serving.gateway import Gateway
    from distill.serving.server import serve
    from distill.serving.settings import ServeSettings, endpoint_for_serving
    from distill.task.labels import LabelSpace

    torch.set_num_threads(1)
    labels = LabelSpace()
    settings = ServeSettings(port=int(port), deadline_s=20.0, max_new_tokens=16)
    student = Local(load(ModelSettings(image_size=28), labels, Path(folder)), "tiny")
    teacher = Endpoint(endpoint_for_serving(EndpointSettings(teacher_url, "big-vl"), settings.deadline_s), labels)
    policy = CascadePolicy(labels, Calibration("tiny", "big-vl", "entropy", 1.0, 1.0, -1.0, 1.0))
    serve(Gateway(settings, policy, student, teacher, "cascade"))


if __name__ == "__main__":
    main(*sys.argv[1:])
