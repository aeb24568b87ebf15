"""Settings of the gateway and of its endpoints."""

import math
from typing import Any

import pytest

from distill.errors import SettingsError
from distill.models.endpoint import EndpointSettings
from distill.serving.settings import ServeSettings, endpoint_for_serving


@pytest.mark.parametrize(
    "change",
    [
        {"deadline_s": 0},
        {"deadline_s": math.nan},
        {"queue": 0},
        {"batch_size": -1},
        {"batch_wait_ms": -1},
        {"port": 70000},
        {"max_body_mb": 0},
        {"image_hosts": ["https://images.example.org"]},
        {"image_hosts": ["a b"]},
    ],
)
def test_invalid_settings_are_refused_by_name(change: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(change))):
        ServeSettings(**change)


def test_a_part_of_the_deadline_is_reserved_for_writing() -> None:
    assert ServeSettings(deadline_s=30).answer_s == 29.5
    assert ServeSettings(deadline_s=1).answer_s == pytest.approx(0.9)


def test_serving_endpoints_have_no_retries_and_keep_the_deadline() -> None:
    settings = EndpointSettings("http://localhost/v1", "big", timeout_s=120, deadline_s=600, max_image_side=640)
    served = endpoint_for_serving(settings, 8)
    assert (served.max_attempts, served.agreement_samples) == (1, 1)
    assert (served.timeout_s, served.deadline_s) == (8, 8)
    assert (served.base_url, served.max_image_side) == (settings.base_url, 640)
    assert endpoint_for_serving(EndpointSettings("http://localhost/v1", "big", timeout_s=2), 8).timeout_s == 2
    two = EndpointSettings("http://one/v1", "big", replicas=["http://two/v1"])
    assert (endpoint_for_serving(two, 8).timeout_s, endpoint_for_serving(two, 8).deadline_s) == (4, 8)
