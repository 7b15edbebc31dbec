"""Guards that tests take away, to see that the test of each would notice.

    @pytest.mark.guard("maskvlm.checkpoint.hf_folder:check_sums")
    def test_a_changed_byte_is_refused(build): ...

runs twice: as the program is, and with that function doing nothing, where the test must fail. In the second turn the
function is taken away in this process, and in every process that `build.command` starts. `gives` is what it then gives,
an expression that may use `args`; None unless told:

    @pytest.mark.guard("maskvlm.config.safe_yaml:check_yaml", gives="args[0]")

The program itself knows nothing of this: no switch of its own turns a guard off.
"""

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

VARIABLE = "MASKVLM_TESTS_TAKE_AWAY"  # read by this file alone
HERE = Path(__file__).resolve()


class Build(NamedTuple):
    """The program as it is, or without one guard (`module:function`, and what the function then gives)."""

    guard: str | None = None
    gives: str = "None"

    def command(self, *words: object) -> list[str]:
        """What starts `python -m maskvlm WORDS` in this build."""
        front = ["-m", "maskvlm"] if self.guard is None else [str(HERE), f"{self.guard}={self.gives}"]
        return [sys.executable, *front, *map(str, words)]


def function_of(guard: str) -> Any:
    """The function that a guard's name means: `module:function` or `module:Class.method`."""
    module, _, path = guard.partition(":")
    target: Any = importlib.import_module(module)
    for name in path.split("."):
        target = getattr(target, name)
    target = getattr(target, "fget", target)  # of a property
    return getattr(target, "__wrapped__", getattr(target, "__func__", target))


@contextmanager
def without(guard: str, gives: str = "None") -> Iterator[None]:
    """Take a guard away. Its code is replaced in place, wherever the function was imported to."""
    function = function_of(guard)
    was, defaults = function.__code__, function.__kwdefaults__
    free = "".join(f"{name} = None\n    " for name in was.co_freevars)
    inner = f"def outer():\n    {free}def taken(*args, **kwargs):\n        {', '.join(was.co_freevars) or '()'}\n"
    namespace: dict[str, Any] = {}
    exec(f"{inner}        return {gives}\n    return taken", namespace)
    function.__code__, function.__kwdefaults__ = namespace["outer"]().__code__, None
    try:
        yield
    finally:
        function.__code__, function.__kwdefaults__ = was, defaults


def main() -> int:
    """Run the command without the guard that the first argument names; processes that it starts do likewise."""
    if VARIABLE not in os.environ:
        os.environ[VARIABLE] = sys.argv.pop(1)
    sys.path[:0] = [str(HERE.parents[1] / "src"), str(HERE.parents[1])]
    guard, _, gives = os.environ[VARIABLE].partition("=")
    from maskvlm.cli.main import main as command

    with without(guard, gives or "None"):
        return command()


if __name__ == "__main__":
    sys.exit(main())
