"""The arguments with which an object was built, found by the object itself."""

import inspect
from typing import Any


def given_arguments(instance: object) -> dict[str, Any]:
    """The arguments of the constructor that is building an object, by name, defaults included; `*args` under that name.

    When called in the constructor of a base class, it returns the arguments of the most derived class, whose `__init__`
    has called this one, so derived classes need not record anything. If such an `__init__` changes an argument before
    it calls its base, the changed value is returned.
    """
    frame, arguments = inspect.currentframe(), dict[str, Any]()
    frame = None if frame is None else frame.f_back
    while frame is not None and frame.f_code.co_name == "__init__":
        names, rest, more, values = inspect.getargvalues(frame)
        # Skip a constructor that builds another object on the way.
        if not names or values[names[0]] is not instance:
            break
        arguments = {name: values[name] for name in names[1:]} | (values[more] if more else {})
        arguments |= {f"*{rest}": values[rest]} if rest and values[rest] else {}
        frame = frame.f_back
    return {name: _snapshot(value) for name, value in arguments.items()}


def _snapshot(value: Any) -> Any:
    """A copy of a value, as the caller may later change a mapping or list that it passed."""
    if isinstance(value, dict):
        return {key: _snapshot(part) for key, part in value.items()}
    return [_snapshot(part) for part in value] if isinstance(value, list) else value
