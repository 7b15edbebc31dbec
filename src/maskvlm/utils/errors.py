"""The one exception for a user's mistake, and the exit codes (BSD sysexits) that go with it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit status of the command by class of outcome, so that a scheduler can tell them apart."""

    DONE = 0
    USAGE = 2  # a wrong option, key or value
    BAD_DATA = 65  # a file was found but its content is wrong
    MISSING_INPUT = 66  # a file or folder is not there
    UNAVAILABLE = 69  # a device, port or package is not there
    OUR_BUG = 70
    CANNOT_CREATE = 73  # an output cannot be created
    IO_ERROR = 74  # disk full, read or write failed
    REQUEUE = 75  # stopped with a checkpoint: start the same command again
    REFUSED = 77  # refused for safety


class UserError(ValueError):
    """A mistake the user can mend: shown as one line, without a traceback.

    Args:
        where: file:line, archive member, configuration key or checkpoint path.
        what: what is wrong, with the offending value.
        todo: what to do about it.
        code: the exit status of the command.
    """

    def __init__(self, where: object, what: str, todo: str, code: ExitCode = ExitCode.USAGE) -> None:
        self.where, self.what, self.todo, self.code = str(where), what, todo, code
        super().__init__(str(self))
        self.add_note(f"exit status {int(code)}")  # torch hands on the text of a data worker's exception alone

    def __str__(self) -> str:
        return f"{self.where}: {self.what}. {self.todo}."

    def __reduce__(self) -> tuple[type["UserError"], tuple[str, str, str, ExitCode]]:
        """Data workers send exceptions as pickles; the default would lose three of the four parts."""
        return type(self), (self.where, self.what, self.todo, self.code)


class Absent:
    """What is missing of several inputs, to be told in one line: who brings the first file need not come back for the
    second."""

    def __init__(self) -> None:
        self.errors: list[UserError] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note an input that is missing (66) and go on; any other error passes."""
        try:
            yield
        except UserError as error:
            if error.code != ExitCode.MISSING_INPUT:
                raise
            self.errors.append(error)

    def check(self) -> None:
        """Raises UserError (66) where something was missing: the first in full, the others by name."""
        if not self.errors:
            return
        first = self.errors[0]
        # Each once, in the order of their finding.
        others = dict.fromkeys(f"{error.where}: {error.what}" for error in self.errors)
        del others[f"{first.where}: {first.what}"]
        # The line names nine more at most.
        more = f"; and {len(others) - 9} more" if len(others) > 9 else ""
        what = "; also missing: ".join([first.what, *([" | ".join([*others][:9]) + more] if others else [])])
        raise UserError(first.where, what, first.todo, first.code)


def check_shares(values: Mapping[str, float | None]) -> None:
    """Refuse what is no share, 0 to 1; None passes.

    Args:
        values: by configuration key.

    Raises:
        UserError: names the key and the value.
    """
    for key, value in values.items():
        # Not `value < 0`, which is false of NaN.
        if value is not None and not 0 <= value <= 1:
            raise UserError(key, f"{value} is out of range", "Give 0 to 1")


def check_least(least: float, values: Mapping[str, float | None]) -> None:
    """Refuse numbers below `least`; None passes.

    jsonargparse's PositiveInt and its like would say the same in signatures, but only options are held against them:
    a module that Python or a checkpoint's model spec builds would take any number.

    Args:
        least: the smallest value allowed.
        values: by configuration key.

    Raises:
        UserError: names the key, the value and the bound.
    """
    for key, value in values.items():
        # Not `value < least`, which is false of NaN.
        if value is not None and not value >= least:
            raise UserError(key, f"{value} is too small", f"Give {least} or more")
