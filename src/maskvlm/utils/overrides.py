"""Checks the methods of a plug-in's class against its base class, before a run of hours calls them."""

import inspect
from collections.abc import Callable, Collection
from typing import Any

from maskvlm.utils.errors import UserError


def check_overrides(instance: object, base: type, unused: Collection[str] = ()) -> None:
    """Check that every method of `base` that the class of `instance` overrides takes the arguments with which it is
    called, which are those of `base` by position.

    Args:
        unused: methods that are not called.

    Raises:
        UserError: a method does not take them; names it and the arguments.
    """
    kind = type(instance)
    for name, method in vars(base).items():
        if not inspect.isfunction(method) or (name.startswith("_") and name != "__call__") or name in unused:
            continue
        own: Callable[..., Any] | None = getattr(kind, name, None)
        # A method of a base class in between has been checked by its own tests.
        if own is method or not callable(own):
            continue
        given = [*inspect.signature(method).parameters][1:]
        try:
            # What a decorator takes may differ from what the function takes that it wraps.
            signature = inspect.signature(getattr(instance, name), follow_wrapped=False)
        except (AttributeError, TypeError, ValueError):  # it tells no arguments, or not before it is used
            continue
        try:
            signature.bind(*given)
        except TypeError:
            called = f"{name}({', '.join(given)})"
            where = f"{kind.__module__}.{kind.__qualname__}.{name}"
            raise UserError(where, f"is called as {called}", "Let it take these arguments") from None
