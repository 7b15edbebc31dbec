"""`maskvlm METHOD --from CHECKPOINT image.jpg "text"`: check the command line, then run the method on a model.

Answers are printed for people to read, or with `--json` as one line of JSON each. Images are written to `--out`.
"""

import sys

from maskvlm.cli.shell_methods import check_options, check_typed, method_parser, with_piped


def main(arguments: list[str], allowed: list[str]) -> int:
    """Run a method; `arguments` begins with its name."""
    method = arguments[0]
    check_options(method, arguments[1:])
    options = method_parser(method).parse_args(arguments[1:])
    # The parser takes both names for one option, so only the raw words show which one was typed.
    if any(word.partition("=")[0] == "--hide" for word in arguments):
        print("warning: --hide is called --mask-ratio now", file=sys.stderr, flush=True)
    check_typed(method, options)
    options.inputs = with_piped(method, options.inputs)
    # Imported here so that a mistake is reported before torch is imported.
    from maskvlm.cli.ask_model import ask_method

    return ask_method(method, options, allowed)
