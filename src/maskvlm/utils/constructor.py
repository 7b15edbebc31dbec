"""How an object was built, as it tells it itself."""

import inspect
from typing import Any


def given_arguments(instance: object) -> dict[str, Any]:
    """The arguments of the constructor that is building an object, by name, defaults included; `*args` under that name.

    Asked in the constructor of a base class it is the most specific class that counts, whose `__init__` has called this
    one: whoever writes a class below has nothing to note. An argument that such an `__init__` changes before it calls
    its base is found as changed.
    """
    frame, arguments = inspect.currentframe(), dict[str, Any]()
    frame = None if frame is None else frame.f_back
    while frame is not None and frame.f_code.co_name == "__init__":
        names, rest, more, values = inspect.getargvalues(frame)
        # A constructor that builds another object on the way is none of this one's.
        if not names or values[names[0]] is not instance:
            break
        arguments = {name: values[name] for name in names[1:]} | (values[more] if more else {})
        arguments |= {f"*{rest}": values[rest]} if rest and values[rest] else {}
        frame = frame.f_back
    return {name: _snapshot(value) for name, value in arguments.items()}


def _snapshot(value: Any) -> Any:
    """A value as it is now: whoever gave a mapping or a list may change it later."""
    if isinstance(value, dict):
        return {key: _snapshot(part) for key, part in value.items()}
    return [_snapshot(part) for part in value] if isinstance(value, list) else value
