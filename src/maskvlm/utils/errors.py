"""The exception for user errors, and the exit codes (BSD sysexits) that go with it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import IntEnum
from math import inf
from numbers import Integral, Real


class ExitCode(IntEnum):
    """Exit status of a command by kind of outcome, so that a scheduler can tell them apart."""

    DONE = 0
    USAGE = 2  # a wrong option, key or value
    BAD_DATA = 65  # a file was found but its content is wrong
    MISSING_INPUT = 66  # a file or folder is missing
    UNAVAILABLE = 69  # a device, port or package is not available
    OUR_BUG = 70
    CANNOT_CREATE = 73  # an output cannot be created
    IO_ERROR = 74  # disk full, read or write failed
    REQUEUE = 75  # stopped with a checkpoint: start the same command again
    REFUSED = 77  # rejected for safety


class UserError(ValueError):
    """An error that the user can fix: shown as one line, without a traceback.

    Args:
        where: file:line, archive member, configuration key or checkpoint path.
        what: what is wrong, with the offending value.
        todo: what to do about it.
        code: exit status of the command.
    """

    def __init__(self, where: object, what: str, todo: str, code: ExitCode = ExitCode.USAGE) -> None:
        self.where, self.what, self.todo, self.code = str(where), what, todo, code
        super().__init__(str(self))
        self.add_note(f"exit status {int(code)}")  # torch only passes on the text of a data worker's exception

    def __str__(self) -> str:
        return f"{self.where}: {self.what}. {self.todo}."

    def __reduce__(self) -> tuple[type["UserError"], tuple[str, str, str, ExitCode]]:
        """Data workers pickle exceptions; the default would lose three of the four parts."""
        return type(self), (self.where, self.what, self.todo, self.code)


class Absent:
    """Collects missing inputs and reports them in one line, so that users need not supply them one by one."""

    def __init__(self) -> None:
        self.errors: list[UserError] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Record a missing input (66) and continue; any other error is raised."""
        try:
            yield
        except UserError as error:
            if error.code != ExitCode.MISSING_INPUT:
                raise
            self.errors.append(error)

    def check(self) -> None:
        """Raise UserError (66) if something was missing: the first in full, the others by name."""
        if not self.errors:
            return
        first = self.errors[0]
        # Each once, in the order found.
        others = dict.fromkeys(f"{error.where}: {error.what}" for error in self.errors)
        del others[f"{first.where}: {first.what}"]
        # The line names at most nine more.
        more = f"; and {len(others) - 9} more" if len(others) > 9 else ""
        what = "; also missing: ".join([first.what, *([" | ".join([*others][:9]) + more] if others else [])])
        raise UserError(first.where, what, first.todo, first.code)


def check_shares(values: Mapping[str, float | None]) -> None:
    """Check that values are shares, 0 to 1; None is accepted.

    Args:
        values: by configuration key.

    Raises:
        UserError: a value is out of range; names the key and the value.
    """
    for key, value in values.items():
        # Not `value < 0`, which is false for NaN.
        if value is not None and not 0 <= value <= 1:
            raise UserError(key, f"{value} is out of range", "Give 0 to 1")


def check_positive_shares(values: Mapping[str, float]) -> None:
    """Check that values are shares above 0, up to 1.

    Args:
        values: by configuration key.

    Raises:
        UserError: a value is out of range; names the key and the value.
    """
    for key, value in values.items():
        if not 0 < value <= 1:
            raise UserError(key, f"{value} is out of range", "Give a number above 0, up to 1")


def check_choices(values: Mapping[str, tuple[object, Sequence[object]]]) -> None:
    """Check that values are among those offered: the command line checks `Literal` arguments, Python does not.

    Args:
        values: by configuration key, the value and what it may be.

    Raises:
        UserError: a value is none of them; names the key, the value and the choices.
    """
    for key, (value, choices) in values.items():
        if value not in choices:
            raise UserError(key, f"{value!r} is not one of the choices", f"Give {', '.join(map(str, choices))}")


def check_counts(least: int, values: Mapping[str, int | None]) -> None:
    """Check that numbers are whole and at least `least`; None is accepted. See `check_least`.

    Raises:
        UserError: a value is not a whole number, or too small; names the key, the value and what to give.
    """
    for key, value in values.items():
        # True is an integer in Python, but no count.
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
            raise UserError(key, f"{value!r:.80} is not a whole number", f"Give a whole number, {least} or more")
    check_least(least, values)


def check_least(least: float, values: Mapping[str, float | None]) -> None:
    """Check that numbers are at least `least`; None is accepted.

    jsonargparse's PositiveInt and similar types would say the same in signatures, but they only check options: a module
    built in Python or from a checkpoint's model spec would accept any number.

    Args:
        least: the smallest value allowed.
        values: by configuration key.

    Raises:
        UserError: a value is too small, infinite or not a number; names the key, the value and the bound.
    """
    for key, value in values.items():
        if value is not None and (not isinstance(value, Real) or value == inf):
            raise UserError(key, f"{value!r:.80} is not a finite number", f"Give {least} or more")
        # Not `value < least`, which is false for NaN.
        if value is not None and not value >= least:
            raise UserError(key, f"{value} is too small", f"Give {least} or more")
