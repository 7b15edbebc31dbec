"""`maskvlm COMMAND ...`: reports mistakes before slow imports where possible; every error is one line."""

import argparse
import importlib
import importlib.metadata
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from maskvlm.cli.commands import COMMANDS, DATA, ELSEWHERE, LEARN, LIGHTNING, help_of, overview
from maskvlm.config.compose import find_packages, find_tasks, home, own_home, same_command
from maskvlm.config.given_options import given_places, nearest
from maskvlm.config.given_options import options as settings
from maskvlm.config.safe_yaml import cut
from maskvlm.objectives.methods import TASK_METHODS
from maskvlm.training.failure import EARLIER, failed_first, process_rank, report
from maskvlm.training.peers import leave
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.launch import STUDY, Finished, Stopped, end_with_study, leave_after_parent, requeue

CLASS = re.compile(r"(?:[A-Za-z_]\w*\.)+[A-Z]\w*")
"""A dotted class path, as typed by a user."""


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status (see `errors.ExitCode`)."""
    # Commands print what a model knows themselves; in Python `from_pretrained` logs it.
    library = logging.getLogger("maskvlm.inference")
    before = library.level
    library.setLevel(logging.ERROR)
    handlers = {each: signal.getsignal(each) for each in signal.Signals if each.name in ("SIGTERM", "SIGUSR1")}
    try:
        code = end_of(argv)
    finally:
        library.setLevel(before)
    # Tells the other processes of the run, if any, how this one ended.
    leave(code)
    # A caller's script goes on. Our own process ends, and may ignore signals by now (`Caught.restore`).
    if argv is not None and threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            # None stands for a handler set by C code, which Python cannot set again.
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
    return code


def end_of(argv: list[str] | None) -> int:
    """Run a command and turn however it ends into an exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    debug = "--debug" in arguments
    end_with_study()
    try:
        options, arguments = common(arguments)
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(overview(), flush=True)
            return 0
        if arguments[0] == "--version":
            print(version(), flush=True)
            return 0
        name, rest = arguments[0], arguments[1:]
        if name in COMMANDS:
            command = COMMANDS[name]
            if command.words and {"-h", "--help"} & {*rest}:
                print(help_of(command, rest), flush=True)
                if not command.has_own_options:
                    return 0
                print("\nIts options, and what the words stand for:", flush=True)
            # Words become files and options, which may again include common ones.
            also, arguments = common(command.full(rest))
            name, rest = arguments[0], arguments[1:]
            given_places(rest)  # checks that the files exist and are plain YAML
            # Read before this job can write it: any content is from an earlier job.
            EARLIER[:] = [failed_first(run_folder(arguments))]
            allowed = [*options.allow_import, *also.allow_import]
            # Load tasks of the working directory only for training and data: a model's folder may be untrusted.
            find_tasks(command.group in (LEARN, DATA, LIGHTNING) or "tasks" in allowed)
            # From the working directory, load only packages named on the command line itself.
            named = filter(CLASS.fullmatch, (word.rpartition("=")[2] for word in rest))
            find_packages([*allowed, *(named if STUDY not in os.environ else ())])
            done = COMMANDS[name].run(rest, allowed)
        # TASK.TOOL, without the slash of a path.
        elif "." in name and "/" not in name:
            done = tool(name)(rest)
        else:
            find_tasks("tasks" in options.allow_import)
            find_packages(options.allow_import)
            done = ask_task_method(arguments, options.allow_import)
        if isinstance(done, str) and done:
            print(done, flush=True)
        return done if isinstance(done, int) else 0
    except Finished as finished:
        print(finished, flush=True)
        return 0
    except Stopped as stopped:
        return stopped_early(stopped)
    except KeyboardInterrupt:
        return interrupted(run_folder(arguments) if arguments[:1] == ["fit"] else None)
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        # Python flushes stdout again at exit, which would fail once more; 141 is the shells' status for SIGPIPE.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # Lightning turns it into exit(1)
            return interrupted(run_folder(arguments) if arguments[:1] == ["fit"] else None)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception as error:
        return report(error, run_folder(arguments), debug)


def version() -> str:
    """Version line of the installed package."""
    try:
        return f"maskvlm {importlib.metadata.version('maskvlm')}"
    except importlib.metadata.PackageNotFoundError:  # a clone that runs by PYTHONPATH alone
        return "maskvlm, not installed"


def common(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options common to all commands, and the remaining arguments. For a command that takes no words, the first
    `from=X` becomes `--from X`, unless that option is given."""
    # No abbreviations: a command's own option may share a prefix with one of these.
    front = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    front.add_argument("--debug", action="store_true")
    front.add_argument("--allow-import", action="append", default=[])
    try:
        options, rest = front.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError(error.argument_name, error.message, "Write the option, then its value") from None
    options.allow_import += [name for name in os.environ.get("MASKVLM_ALLOW_IMPORT", "").split(",") if name]
    takes_words = bool(rest) and rest[0] in COMMANDS and bool(COMMANDS[rest[0]].words)
    # Everything after -- is text, whatever it looks like.
    front_part = rest[: rest.index("--")] if "--" in rest else rest
    at = next((at for at, word in enumerate(front_part) if word.startswith("from=")), None)
    if at is not None and not takes_words and not any(word.partition("=")[0] == "--from" for word in front_part):
        rest[at : at + 1] = ["--from", rest[at].removeprefix("from=")]
    return options, rest


def ask_task_method(arguments: list[str], allowed: list[str]) -> int:
    """Run a method that a task adds, such as `answer`; the checkpoint's task defines which there are.

    Raises:
        UserError: no checkpoint is named, so it cannot be such a method.
    """
    name = arguments[0]
    if name in ELSEWHERE:
        raise UserError(name, "no such command", ELSEWHERE[name])
    if not any(word == "--from" or word.startswith("--from=") for word in arguments):
        if name in TASK_METHODS and not {"-h", "--help"} & {*arguments}:
            task = TASK_METHODS[name]
            todo = f"Give --from CHECKPOINT; to make one: maskvlm finetune {task} from=scenes-tiny"
            raise UserError(name, f"needs a model fine-tuned on {task}, but no checkpoint was given", todo)
        near = nearest(name, COMMANDS, 0.5)
        if {"-h", "--help"} & {*arguments} and not nearest(name, COMMANDS, 0.7):
            return show_method_help(name)
        what = "no such command" + (f" (did you mean {near}?)" if near else "")
        todo = f"Available: {', '.join(COMMANDS)}; methods of tasks need from=CHECKPOINT"
        raise UserError(cut(name), what, todo)
    from maskvlm.cli.ask import main as answer

    return answer(arguments, allowed)


def show_method_help(method: str) -> int:
    """Print the help of a method that a task may add."""
    from maskvlm.cli.shell_methods import method_parser

    print("A method of the task that the checkpoint was fine-tuned on, if that has one.")
    print(method_parser(method).format_help())
    return 0


def stopped_early(stopped: Stopped) -> int:
    """Exit status of a training run that a signal ended after it saved a checkpoint: 75 asks the caller to restart it,
    130 after Ctrl-C."""
    if process_rank() == 0:
        print(stopped.text, file=sys.stderr, flush=True)
        # SLURM sends USR1 before the time limit (`--signal` in the batch script).
        if stopped.signum == signal.SIGUSR1 and (message := requeue()):
            print(message, file=sys.stderr, flush=True)
    # Started by neither torchrun nor SLURM, so by Lightning, which may itself run within a SLURM step.
    elif "TORCHELASTIC_RUN_ID" not in os.environ and ("LOCAL_RANK" in os.environ or "SLURM_PROCID" not in os.environ):
        leave_after_parent()
    return 130 if stopped.signum == signal.SIGINT else int(ExitCode.REQUEUE)


def interrupted(folder: Path | None) -> int:
    """Print what is left of an interrupted training run; returns 130, as shells expect after Ctrl-C."""
    message = "interrupted"
    if folder is not None and folder.joinpath("last.ckpt").is_file():
        message += f"; {folder / 'last.ckpt'} holds its latest checkpoint: {same_command(folder)} resumes from it"
    elif folder is not None:
        message += f" before the first checkpoint of {folder}"
    print(message, file=sys.stderr)
    return 130


def tool(name: str) -> Callable[[list[str]], int]:
    """The `main` of `tasks/TASK/TOOL.py`."""
    task, _, module = name.partition(".")
    own, here = tools_of(own_home()), tools_of(home())
    # A tool of the same name in the working directory does not replace one of this project.
    find_tasks(name not in own)
    names = sorted(own | here)
    if name not in names:
        near = nearest(name, names, 0.5)
        what = "no such tool" + (f" (did you mean {near}?)" if near else "")
        todo = f"Available: {', '.join(names)}"
        if Path(name).is_file():
            what, todo = "a file, not a command", "Write the command first: maskvlm caption FILE (maskvlm --help)"
        raise UserError(cut(name), what, todo)
    main: Callable[[list[str]], int] = importlib.import_module(f"tasks.{task}.{module}").main
    return main


def tools_of(folder: Path) -> set[str]:
    """`TASK.TOOL` for each tool in the tasks of a folder."""
    files = (folder / "tasks").glob("*/*.py")
    return {f"{path.parent.name}.{path.stem}" for path in files if has_main(path)}


def has_main(path: Path) -> bool:
    """Whether a task's file is a tool."""
    # Decided by its text, as importing it would run it.
    return "\ndef main(" in path.read_text(encoding="utf-8")


def run_folder(arguments: list[str]) -> Path | None:
    """The value of --folder (--run); None if it is not given."""
    # The last one wins, as with all options.
    values = [option.value for option in settings(arguments) if option.key == "run"]
    return Path(values[-1]) if values else None
