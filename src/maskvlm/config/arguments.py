"""Options of a stand-alone command: argparse's errors as one line."""

import argparse
from typing import NoReturn

from maskvlm.config.given_options import nearest
from maskvlm.utils.errors import UserError


class OptionParser(argparse.ArgumentParser):
    """Raises UserError instead of printing the usage and ending the process."""

    def error(self, message: str) -> NoReturn:
        # argparse only lists unknown options
        if message.startswith("unrecognized arguments: "):
            options = [word.partition("=")[0] for word in message.split() if word.startswith("--")]
            known = [name for name in self._option_string_actions if name.startswith("--") and name != "--help"]
            near = next((match for option in options if (match := nearest(option, known, 0.6))), None)
            message += f" (did you mean {near}?)" if near else ""
        raise UserError(self.prog, message, f"See {self.prog} --help")
