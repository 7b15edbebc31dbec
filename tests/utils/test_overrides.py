"""Methods of a plug-in's class against those of its base class."""

import functools
from typing import Any

import pytest

from maskvlm.utils.errors import UserError
from maskvlm.utils.overrides import check_overrides


class Base:
    def read(self, path: str, images: str) -> None: ...


class Fewer(Base):
    def read(self, path: str) -> None: ...  # type: ignore[override]


class Wrapped(Base):
    """As with a decorator that adds an argument."""

    @functools.wraps(Fewer.read)
    def read(self, *given: Any) -> Any: ...


class Static(Base):
    @staticmethod
    def read(path: str, images: str) -> None: ...  # type: ignore[override]


def test_a_method_with_other_arguments_is_named() -> None:
    with pytest.raises(UserError, match=r"Fewer\.read: is called as read\(path, images\)"):
        check_overrides(Fewer(), Base)
    check_overrides(Fewer(), Base, unused=("read",))  # it is not called
    for kind in (Base, Wrapped, Static):
        check_overrides(kind(), Base)
