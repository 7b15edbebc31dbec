from pathlib import Path

import pytest

from maskvlm.utils.paths import expand_user


def test_home_and_unknown_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_user("~/photos") == Path("/home/me/photos")
    assert expand_user(Path("photos/~")) == Path("photos/~")
    # no error: a command then says that there is no such file
    assert expand_user("~no such user/photos") == Path("~no such user/photos")
