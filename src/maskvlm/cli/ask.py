"""`maskvlm METHOD --from CHECKPOINT image.jpg "text"`: what was typed is checked, then the model is asked.

Answers are for reading; with `--json` one line of JSON each. Images go to `--out`.
"""

import sys

from maskvlm.cli.shell_methods import check_options, check_typed, method_parser


def main(arguments: list[str], allowed: list[str]) -> int:
    """Ask; arguments begin with the method."""
    method = arguments[0]
    check_options(method, arguments[1:])
    options = method_parser(method).parse_args(arguments[1:])
    # The parser takes both names for one option, so only the words tell which was typed.
    if any(word.partition("=")[0] == "--hide" for word in arguments):
        print("warning: --hide is called --mask-ratio now", file=sys.stderr, flush=True)
    check_typed(method, options)
    # Only now, so that a mistake costs no import of torch.
    from maskvlm.cli.ask_model import ask_method

    return ask_method(method, options, allowed)
