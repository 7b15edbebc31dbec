"""`maskvlm suite NAME --path FOLDER`: evaluates a model on a published suite (`suites/`)."""

import inspect
import shlex
from pathlib import Path

from rich.console import Console

from maskvlm.config.arguments import OptionParser
from maskvlm.config.bundled_models import DEFAULT, default_model
from maskvlm.config.compose import moment_of_evaluation
from maskvlm.inference.pretrained import PretrainedMaskVLM
from maskvlm.suites.registry import suite_class, suite_names
from maskvlm.suites.run import RESULT, check_ways, lines_of_suite, run_suite, table_of_suite, write_result
from maskvlm.utils.errors import UserError, check_least


def main(arguments: list[str], allowed: list[str]) -> int:
    """Run a suite. Takes arguments as in the shell."""
    name = arguments[0] if arguments and not arguments[0].startswith("-") else ""
    parser = OptionParser(
        f"maskvlm suite {name}".strip(), description="evaluate a model on a published suite", allow_abbrev=False
    )
    parser.add_argument("suite", metavar="NAME", help=f"{', '.join(suite_names())}, or the import path of a class")
    parser.add_argument(
        "--from", dest="source", help=f"checkpoint file, Hugging Face folder or hub name (default: {DEFAULT})"
    )
    parser.add_argument("--path", type=Path, help="folder or file of the suite, as distributed")
    parser.add_argument("--images", type=Path, help="folder of its images (default: images/ in --path, or --path)")
    parser.add_argument(
        "--by", nargs="+", default=[], metavar="WAY", help="how the model scores an item; all: every way the suite has"
    )
    parser.add_argument(
        "--limit", type=int, help="evaluate this many images only, drawn at random, with all their items"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="random seed of --limit and of what a suite draws (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, help="folder for result.json and scores.jsonl (default: checkpoints/suite-NAME-TIME)"
    )
    parser.add_argument("--device", help="torch device, such as cuda (default: cpu)")
    kind = suite_class(name) if name else None
    own = inspect.signature(kind).parameters if kind is not None else {}
    if kind is not None:
        kind.add_options(parser)
    options = parser.parse_args(arguments)
    if kind is None:  # an option precedes the name
        others = shlex.join(word for word in arguments if word != options.suite)
        todo = f"Write maskvlm suite {options.suite} {others}"
        raise UserError("suite", "its name stands before everything else", todo)
    if options.path is None:
        raise UserError(f"suite {name}", "--path is missing", f"See maskvlm suite {name} --help")
    if options.limit is not None:
        check_least(1, {"--limit": options.limit})
    plain_kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    for key, argument in own.items():
        if argument.default is argument.empty and argument.kind in plain_kinds and not hasattr(options, key):
            todo = f"Add --{key} to the parser in its add_options, or give {key} a default"
            raise UserError(f"suite {name}", f"its argument {key} has no option", todo)
    suite = kind(**{key: getattr(options, key) for key in own if hasattr(options, key)})
    ways = suite.ways if options.by == ["all"] else options.by
    folder = options.out or Path("checkpoints") / f"suite-{name}-{moment_of_evaluation()}"
    # Problems with the files are reported before a large model is loaded.
    check_ways(suite, ways, options.limit, reads=True)
    item_rows = suite.read(options.path, options.images)
    options.source = options.source or default_model("used")
    model = PretrainedMaskVLM.from_pretrained(options.source, device=options.device, allow_import=allowed)
    report = run_suite(suite, model, item_rows, ways, options.limit, options.seed)
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    write_result(folder, name, suite, plain, report, model)
    console = Console()
    console.print(f"{name}: {suite.question}", highlight=False, markup=False, soft_wrap=True)
    console.print(table_of_suite(report))
    for line in [*lines_of_suite(report), *(f"trap: {trap}" for trap in suite.traps)]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    print(folder / RESULT, flush=True)
    return 0
