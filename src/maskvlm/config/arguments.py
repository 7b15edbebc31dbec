"""Options of a command of its own: what argparse says is wrong, as one line."""

import argparse
from typing import NoReturn

from maskvlm.utils.errors import UserError


class OptionParser(argparse.ArgumentParser):
    """Raises UserError where the original prints its usage and ends the process."""

    def error(self, message: str) -> NoReturn:
        raise UserError(self.prog, message, f"See {self.prog} --help")
