"""Methods of a plug-in's class against those of its base class."""

import functools
from collections.abc import Callable
from typing import Any

import pytest

from maskvlm.utils.errors import UserError
from maskvlm.utils.overrides import check_overrides


class Base:
    def read(self, path: str, images: str) -> None: ...


def anything(function: Callable[..., Any]) -> Callable[..., Any]:
    """As a decorator that times calls, or adds an argument."""

    @functools.wraps(function)
    def inner(self: Any, *given: Any) -> Any:
        return function(self, given[0])

    return inner


class Fewer(Base):
    def read(self, path: str) -> None:  # type: ignore[override]
        ...


class Wrapped(Base):
    @anything
    def read(self, path: str) -> None:  # type: ignore[override]
        ...


class Static(Base):
    @staticmethod
    def read(path: str, images: str) -> None:  # type: ignore[override]
        ...


class Late:
    """A descriptor that needs what is set later."""

    def __call__(self) -> None: ...

    def __get__(self, instance: Any, kind: Any = None) -> Any:
        return self if instance is None else instance.card


class Lazy(Base):
    read: Any = Late()


def test_a_method_with_other_arguments_is_named() -> None:
    with pytest.raises(UserError, match=r"Fewer\.read: is called as read\(path, images\)"):
        check_overrides(Fewer(), Base)


@pytest.mark.parametrize("kind", [Base, Wrapped, Static, Lazy])
def test_what_can_be_called_passes(kind: type[Base]) -> None:
    check_overrides(kind(), Base)


def test_a_method_that_is_not_called_is_not_checked() -> None:
    check_overrides(Fewer(), Base, unused=("read",))
