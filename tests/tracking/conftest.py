"""wandb without the login of this machine, and a stand-in for its server."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.wandb_server import KEY, WandbServer

wandb = pytest.importorskip("wandb")


@pytest.fixture(autouse=True)
def logged_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from wandb.sdk.lib import wbauth

    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    yield
    wbauth.unauthenticate_session()


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server


@pytest.fixture
def login(server: WandbServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Log in to the stand-in."""
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    wandb.teardown()  # it reads the environment once
    yield
    wandb.teardown()
