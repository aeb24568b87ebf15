"""The section that a message about a field of several sections begins with."""

import pytest

from distill.errors import SettingsError, in_section


@pytest.mark.parametrize(
    ("section", "message", "shown"),
    [
        ("student", "model.path: gone cannot be loaded", "student.model.path: gone cannot be loaded"),
        ("student", "packing: it leaks; set packing to false", "student.packing: it leaks; set packing to false"),
        ("annotate.endpoint", "api_key_env: X is not set", "annotate.endpoint.api_key_env: X is not set"),
        ("student", "task.labels: rename one", "task.labels: rename one"),
        ("student", "modelled badly", "modelled badly"),
        ("", "model.path: gone", "model.path: gone"),
    ],
)
def test_only_fields_of_several_sections_are_named_with_theirs(section: str, message: str, shown: str) -> None:
    with pytest.raises(SettingsError) as error, in_section(section):
        raise SettingsError(message)
    assert str(error.value) == shown
