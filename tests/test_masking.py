"""Passwords and keys in a recipe: masked in every file, page, message and upload, and the chain still runs."""

import base64
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from distill.errors import RunError, SettingsError
from distill.masking import is_variable_name, mask
from distill.models.endpoint import EndpointSettings
from distill.models.endpoint.http import HttpClient
from distill.recipe import to_yaml
from distill.serving.settings import ServeSettings
from tests import micro
from tests.commands import ROWS, Command, rows_recipe
from tests.models.openai_server import Server, answer, answers, endpoint, posts

URL = "https://user:s3cret@models.example/v1"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"cannot reach {URL} now", "cannot reach https://***@models.example/v1 now"),
        ("http://u:p@ss@h:8/v1 and https://token@h", "http://***@h:8/v1 and https://***@h"),
        ("https://h/v1?api_key=abc&x=1", "https://h/v1?api_key=***&x=1"),
        ("https://h/v1?sig=abc&pwd=d&access_code=e", "https://h/v1?sig=***&pwd=***&access_code=***"),
        ("annotate.endpoint.api_key_env: sk-abc123 is wrong", "annotate.endpoint.api_key_env: *** is wrong"),
        ("{'api_key_env': 'sk-abc123', 'model': 'm'}", "{'api_key_env': '***', 'model': 'm'}"),
        ("api_key_env:\n  concurrency: 8", "api_key_env:\n  concurrency: 8"),
        ("api_key_env: TEACHER_KEY", "api_key_env: TEACHER_KEY"),
        ("http://h:8000/v1/a@b mail: me@host.org", "http://h:8000/v1/a@b mail: me@host.org"),
    ],
)
def test_text(text: str, expected: str) -> None:
    assert mask(text) == expected
    assert mask({"a": [text, 3, None]}) == {"a": [expected, 3, None]}


def test_secrets_among_the_arguments_of_a_logger() -> None:
    arguments = {"api_key": "s3cret", "apiKey": "s3cret", "api_token": "s3cret", "password": "s3cret"}
    kept = {"max_tokens": 5, "token": None, "api_key": "", "key": "accuracy", "api_key_env": "TEACHER_KEY"}
    logger = {"class_path": "lightning.pytorch.loggers.CometLogger", "init_args": arguments}
    assert "s3cret" not in str(mask({"trainer": {"loggers": [logger]}}))
    assert mask({"a": kept}) == {"a": kept}


def test_a_key_in_place_of_a_variable_is_refused_without_repeating_it(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ["sk-abc123def456", "hf_abcdefghijklmnop12QRST", "AKIAIOSFODNN7EXAMPLE", "84f0c1d2e3b4a5968778695a4b3c2d1e"]
    for key in [*keys, "my key", "1KEY", "AIzaSyA1bcDEfgHIjklMNopQRstUVwxYZ012345"]:
        assert not is_variable_name(key)
        for section in (lambda k: EndpointSettings("http://h/v1", "m", k), lambda k: ServeSettings(api_key_env=k)):
            with pytest.raises(SettingsError, match=r"^api_key_env takes the name of an environment variable") as error:
                section(key)
            assert key not in str(error.value)
    for name in ("OPENAI_API_KEY", "hf_token", "KEY2", "_x", "AZURE_OPENAI_KEY_WEST_EUROPE_2"):
        assert is_variable_name(name) and EndpointSettings("http://h/v1", "m", name)
    monkeypatch.setenv("hf_abcdefghijklmnop12QRST", "key")  # it is a variable after all
    assert is_variable_name("hf_abcdefghijklmnop12QRST")


def test_an_address_that_may_hold_a_password_is_not_repeated() -> None:
    for url in ("https://user:s3/cret@h/v1", "https://user:12/s3cret@h/v1", "ftp://user:s3cret@h", "s3cret@h"):
        with pytest.raises(SettingsError, match=r"^base_url is not an address; it takes an address such as") as error:
            EndpointSettings(url, "m")
        assert "cret" not in str(error.value)


def test_printed_recipes_and_messages_hold_no_password(distill: Command, tmp_path: Path) -> None:
    path = micro.write(tmp_path, micro.RECORDED | {"annotate": {"endpoint": {"base_url": URL, "model": "m"}}})
    printed = distill("run", "--config", path, "--print_config").stdout
    assert "https://***@models.example/v1" in printed and "s3cret" not in printed
    assert "s3cret" not in to_yaml(micro.read(path))
    wrong = distill("run", "--config", path, "--annotate.endpoint", URL)
    assert wrong.status == 2 and "s3cret" not in wrong.stderr and "https://***@models" in wrong.error
    key = distill("run", "--config", path, "--annotate.endpoint.api_key_env", "sk-abc123def456", "--print_config")
    assert "sk-abc" not in key.stdout + key.stderr
    key = distill("run", "--config", path, "--annotate.endpoint.api_key_env", "sk-abc123def456")
    assert key.status == 2 and "sk-abc" not in key.stderr
    assert key.error.startswith("annotate.endpoint.api_key_env takes the name of an environment variable")


def test_a_chain_with_a_password_leaves_it_nowhere(distill: Command, tmp_path: Path) -> None:
    """Files, records of wandb offline, output and logs, also of a failure. A rerun has nothing to do."""
    with Server(answer=answer) as server:
        login = server.url.replace("://", "://user:s3cret@")
        path = rows_recipe(tmp_path, train=ROWS)
        content = yaml.safe_load(path.read_text())
        content |= {"annotate": {"endpoint": {"base_url": login, "model": "big-vl"}}, "tracking": {"mode": "offline"}}
        given = tmp_path.parent / f"{tmp_path.name}.yaml"  # the only file with the password
        given.write_text(yaml.safe_dump(content))
        arguments = ["run", "--config", str(given), "--until", "annotate", "--annotate.endpoint.base_url", login]
        code = "from distill.cli import main; raise SystemExit(main())"  # wandb records the arguments of the process
        environment = {name: value for name, value in os.environ.items() if name != "WANDB_MODE"}
        command = [sys.executable, "-c", code, *arguments]
        first = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert (first.returncode, first.stdout) == (0, "ran annotate\n"), first.stderr
        assert set(server.keys) == {f"Basic {base64.b64encode(b'user:s3cret').decode()}"}
        assert "nothing to do" in distill(*arguments).stdout
        saved = tmp_path / "runs/micro/recipe.yaml"
        assert "nothing to do" in distill("run", "--config", saved, "--until", "annotate").stdout
    failed = distill(*arguments, "--annotate.endpoint.model", "other", "--annotate.endpoint.max_attempts", "1",
                     "--tracking.mode", "disabled")  # fmt: skip
    assert failed.status == 1 and failed.error.startswith("no server answers at base_url http://***@127.0.0.1")
    assert "s3cret" not in first.stderr + failed.stdout + failed.stderr
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert any("wandb" in file.parts for file in files)
    assert [file for file in files if b"s3cret" in file.read_bytes()] == []


def test_a_probe_prints_no_password(distill: Command, tmp_path: Path) -> None:
    login = "http://user:s3cret@127.0.0.1:9/v1?api-key=s3cret"
    path = micro.write(tmp_path, micro.RECORDED | {"annotate": {"endpoint": {"base_url": login, "model": "m"}}})
    printed = distill("plan", "--config", path, "--probe")
    assert "no server answers at base_url http://***@127.0.0.1:9/v1?api-key=***: " in printed.stdout
    assert "s3cret" not in printed.stdout + printed.stderr


@pytest.mark.parametrize("status", [401, 402, 404, 500])
def test_messages_of_an_endpoint_hold_no_password(status: int, tmp_path: Path) -> None:
    """The gateway passes them on to its clients."""
    with Server(rates={str(status): 1.0}) as server:
        teacher = endpoint(server.url.replace("://", "://user:s3cret@"), max_attempts=1)
        with pytest.raises(RunError, match=r"http://\*\*\*@127.0.0.1") as error:
            answers(teacher, posts(tmp_path, 100))
    assert "s3cret" not in str(error.value)


def test_a_masked_login_is_not_sent() -> None:
    with pytest.raises(SettingsError, match=r"the key in .* was masked when the recipe was saved; write it again"):
        HttpClient(EndpointSettings("https://models.example/v1?key=***", "m"))
    settings = EndpointSettings("https://***@models.example/v1", "m")
    with pytest.raises(SettingsError, match="was masked when the recipe was saved; write user and password again"):
        HttpClient(settings)
