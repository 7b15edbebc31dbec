"""`python -m maskvlm COMMAND ...`: finds what it can before seconds of imports; every error is one line."""

import argparse
import importlib.util
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from maskvlm.config.compose import COMMANDS as COMPOSED
from maskvlm.config.compose import find_tasks
from maskvlm.config.given import config_files, nearest, places
from maskvlm.config.given import options as settings
from maskvlm.config.safe_yaml import cut
from maskvlm.training.failure import EARLIER, failed_first, process_rank, report
from maskvlm.training.peers import leave
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.launch import Finished, Stopped, leave_after_parent, requeue

USAGE = """python -m maskvlm COMMAND [-c FILE.yaml ...] [--key value ...]

  data      prepare a data set once (data SET RAW, as it is distributed); data-check ROOT verifies a prepared one
  fit       train; evaluates along the way and at the end
  validate  measure a checkpoint (--ckpt_path) on the validation split
  test      measure a checkpoint on the test split
  preview   write a contact sheet of the data (--out FILE.png)
  submit    write and submit the SLURM batch script of fit
  bench     time a few training steps
  fill match rank caption score explain reconstruct inpaint, and verbs of tasks such as answer
            ask a model: VERB --from CHECKPOINT PICTURE "TEXT" (and --help)
  convert   a checkpoint to the hub's format or back (convert CHECKPOINT FOLDER)
  embed     a data set's vectors as Parquet; index makes them searchable, search finds (search "TEXT" --from CHECKPOINT)
  demo      a page to try a model in, on this machine alone
  export    ONNX or torch.export files, checked against torch (export --from CHECKPOINT FOLDER)
  where     print the folder of an installed package's task (where acme.ocr)
  TASK.TOOL a task's own tool with its own options, such as vqa.score

  --folder FOLDER       where everything of a run is written (also --run, but not under torchrun)
  --print_config        print the composed configuration and stop
  --allow-import NAME   let files name classes of this package (also MASKVLM_ALLOW_IMPORT=a,b)
  --debug               show tracebacks

`python -m maskvlm fit --help` lists all keys. `make` composes the files for you."""
COMMANDS = ("fit", "validate", "test", "preview", "submit", "bench", "convert", "where")
OWN = {
    "data": ("maskvlm.data.prepare.command", "main"),
    "data-check": ("maskvlm.data.prepare.command", "verify"),
    "embed": ("maskvlm.cli.embed", "main"),
    "index": ("maskvlm.cli.search", "make"),
    "search": ("maskvlm.cli.search", "main"),
    "export": ("maskvlm.inference.onnx_export", "main"),
    "demo": ("maskvlm.demo.serve", "main"),
}
"""Commands with options of their own: module and function."""
VERBS = ("fill", "match", "rank", "caption", "score", "explain", "reconstruct", "inpaint")


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status (see `errors.ExitCode`)."""
    code = end_of(argv)
    leave(code)
    return code


def end_of(argv: list[str] | None) -> int:
    """Whatever ends a command, as an exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    debug = "--debug" in arguments
    try:
        find_tasks()
        arguments = composed(arguments)
        if arguments and "." in arguments[0] and "/" not in arguments[0]:
            return tool(arguments[0])([word for word in arguments[1:] if word != "--debug"])
        if arguments and (arguments[0] in OWN or is_verb(arguments)):
            return ask(arguments)
        options, arguments = split(arguments)
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(USAGE, flush=True)
            return 0
        check(arguments)
        EARLIER[:] = [failed_first(run_folder(arguments))]
        return dispatch(arguments, options)
    except Finished as finished:
        print(finished, flush=True)
        return 0
    except Stopped as stopped:
        return stopped_early(stopped)
    except KeyboardInterrupt:
        return interrupted(run_folder(arguments) if arguments[:1] == ["fit"] else None)
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # Lightning turns it into exit(1)
            return interrupted(run_folder(arguments) if arguments[:1] == ["fit"] else None)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception as error:
        return report(error, run_folder(arguments), debug)


def composed(arguments: list[str]) -> list[str]:
    """The command with its files, where it is given in words; with options of its own it is composed already."""
    options_alone = config_files(arguments) or any(
        word.partition("=")[0] in ("--from", "--vectors") for word in arguments
    )
    if not arguments or arguments[0] not in COMPOSED or options_alone:
        return arguments
    return COMPOSED[arguments[0]](arguments[1:])


def is_verb(arguments: list[str]) -> bool:
    """A verb of the core, or a word that may be one of a task: a checkpoint is named and no command sounds like it."""
    word = arguments[0]
    if word in VERBS:
        return True
    from_somewhere = any(each == "--from" or each.startswith("--from=") for each in arguments)
    return from_somewhere and word.isidentifier() and nearest(word, [*COMMANDS, *OWN], 0.6) is None


def ask(arguments: list[str]) -> int:
    """What has options of its own; those of every command are taken out."""
    front = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    front.add_argument("--debug", action="store_true")
    front.add_argument("--allow-import", action="append", default=[])
    options, rest = front.parse_known_args(arguments)
    if rest[0] in OWN:
        module, name = OWN[rest[0]]
        command: Callable[[list[str], list[str]], int] = getattr(importlib.import_module(module), name)
        return command(rest[1:], options.allow_import)
    from maskvlm.cli.ask import main as answer

    return answer(rest, options.allow_import)


def stopped_early(stopped: Stopped) -> int:
    """A training that a signal ended, with a checkpoint: 75 asks whoever started it to start it again."""
    if process_rank() == 0:
        print(stopped.text, file=sys.stderr, flush=True)
        if stopped.signum == signal.SIGUSR1 and (told := requeue()):
            print(told, file=sys.stderr, flush=True)
    elif not {"TORCHELASTIC_RUN_ID", "SLURM_PROCID"} & set(os.environ):
        leave_after_parent()
    return 130 if stopped.signum == signal.SIGINT else int(ExitCode.REQUEUE)


def interrupted(folder: Path | None) -> int:
    """Ctrl-C is no error; 130 is what shells expect. Says what is left of a training run."""
    told = "interrupted"
    if folder is not None and folder.joinpath("last.ckpt").is_file():
        told += f"; {folder / 'last.ckpt'} holds its latest checkpoint: the same command goes on from it"
    elif folder is not None:
        told += f" before the first checkpoint of {folder}"
    print(told, file=sys.stderr)
    return 130


def split(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options of the command line itself, and what remains for the command."""
    front = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    front.add_argument("--debug", action="store_true")
    front.add_argument("--allow-import", action="append", default=[])
    front.add_argument("--out", default="checkpoints/preview.png")
    try:
        options, rest = front.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError(error.argument_name, error.message, "Write the option and then its value") from None
    options.allow_import += [name for name in os.environ.get("MASKVLM_ALLOW_IMPORT", "").split(",") if name]
    return options, rest


def tool(name: str) -> Callable[[list[str]], int]:
    """The `main` of `tasks/TASK/TOOL.py`."""
    task, _, module = name.partition(".")
    found = sorted(f"{path.parent.name}.{path.stem}" for path in Path("tasks").glob("*/*.py") if has_main(path))
    if name not in found:
        near = nearest(name, found, 0.5)
        what = "no such tool" + (f" (did you mean {near}?)" if near else "")
        raise UserError(cut(name), what, f"There are: {', '.join(found)}" if found else "Run it where tasks/ is")
    main: Callable[[list[str]], int] = importlib.import_module(f"tasks.{task}.{module}").main
    return main


def has_main(path: Path) -> bool:
    """Whether a file of a task is a tool."""
    return "\ndef main(" in path.read_text(encoding="utf-8")


def where(names: list[str]) -> Path:
    """The folder of a task in an installed package, which holds its YAML files; nothing of it is imported but its
    parent packages."""
    name = names[0] if names else ""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None:
        todo = "Install the package that holds it (pip install), or correct the name"
        raise UserError(f"TASK={name}", "no such package", todo, ExitCode.MISSING_INPUT)
    return Path(spec.origin).parent


def check(arguments: list[str]) -> None:
    """What needs no import: the command's name, and files that are there and are plain YAML."""
    if arguments[0] in ("where", "convert"):
        return
    if arguments[0] not in COMMANDS:
        every = [*COMMANDS, *OWN, *VERBS]
        near = nearest(arguments[0], every, 0.5)
        what = "no such command" + (f" (did you mean {near}?)" if near else "")
        raise UserError(
            cut(arguments[0]), what, f"There are: {', '.join(every)}; verbs of tasks need --from CHECKPOINT"
        )
    places(arguments[1:])


def dispatch(arguments: list[str], options: argparse.Namespace) -> int:
    """Import what the command needs, and run it."""
    name, rest = arguments[0], arguments[1:]
    if name == "where":
        print(where(rest))
    elif name == "convert":
        from maskvlm.cli.convert import convert

        print(convert(rest, options.allow_import))
    elif name == "preview":
        from maskvlm.cli.slurm import preview

        print(preview(rest, Path(options.out), options.allow_import))
    elif name == "submit":
        from maskvlm.cli.slurm import submit

        print(submit(rest, options.allow_import))
    elif name == "bench":
        from maskvlm.cli.bench import bench

        if line := bench(rest, options.allow_import):
            print(line)
    else:
        from maskvlm.cli.lightning import Command, run

        run(Command, arguments, options.allow_import)
    return 0


def run_folder(arguments: list[str]) -> Path | None:
    """The value of --folder (--run), for the traceback of a bug."""
    given = [option.value for option in settings(arguments) if option.key == "run"]
    return Path(given[-1]) if given else None
