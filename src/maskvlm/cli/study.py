"""`maskvlm study FILE`: makes the runs of a study that are missing, and writes its page (`study/`)."""

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from maskvlm.cli.commands import COMMANDS
from maskvlm.cli.slurm import submit_array
from maskvlm.config.arguments import OptionParser
from maskvlm.config.compose import home
from maskvlm.study.definition import Study, read_study
from maskvlm.study.runs import Ended, Runner, StudyRun, check_same_run, root_of, runs_of, step_of
from maskvlm.utils.errors import ExitCode, UserError, check_least

STUDIES = "studies"


def main(arguments: list[str], allowed: list[str]) -> int:
    """Make a study; arguments as in the shell."""
    parser = OptionParser("maskvlm study", description="Make the runs of a study that are missing, and write its page.")
    parser.add_argument("file", metavar="FILE", help="a study (docs/studies.md), or its name in studies/")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once on this machine (1)")
    parser.add_argument("--only", nargs="+", default=[], metavar="CELL", help="only the runs of these cells")
    parser.add_argument("--seeds", nargs="+", type=int, default=[], help="only the runs of these seeds")
    parser.add_argument("--page", type=Path, help="folder of the page (checkpoints/NAME)")
    parser.add_argument("--list", action="store_true", help="list the runs and their commands, and make none")
    parser.add_argument("--submit", action="store_true", help="as a SLURM array, a run a task, --jobs of them at once")
    parser.add_argument("--run", type=int, metavar="N", help="only the N-th run of --list, as a task of the array does")
    options = parser.parse_args(arguments)
    check_installed()
    check_least(1, {"--jobs": options.jobs})
    file = study_file(options.file)
    study = read_study(file)
    root = root_of(study)
    every = runs_of(study, root)
    chosen = chosen_runs(study, every, options.only, options.seeds)
    for run in every:
        check_same_run(run)
    if options.list:
        for number, run in enumerate(chosen):
            print(f"{number}  {'finished' if run.finished else f'step {step_of(run)}'}  {' '.join(run.command[2:])}")
        return ExitCode.DONE
    if options.submit:
        words = ["study", file, *_again(options.only, "--only"), *_again(options.seeds, "--seeds")]
        name, *rest = chosen[0].command[3:]
        fit = COMMANDS[name].full(rest)
        print(submit_array(root, fit, words, len(chosen), options.jobs, allowed), flush=True)
        return ExitCode.DONE
    if options.run is not None:
        if not 0 <= options.run < len(chosen):
            raise UserError("--run", f"there is no run {options.run}", f"Give 0 to {len(chosen) - 1}")
        os.execv(sys.executable, chosen[options.run].command)
    failed = make_runs(chosen, options.jobs)
    from maskvlm.study.page import write_page  # with packages that only a study needs

    told = f"maskvlm study {options.file}"
    page = write_page(study, every, options.page or root, told)
    print(f"wrote {page} ({sum(run.finished for run in every)} of {len(every)} runs)", flush=True)
    return failed


def check_installed() -> None:
    """Before hours of runs. Raises UserError (69) where a package is missing that writes the page."""
    missing = [name for name in ("pandas", "scipy") if importlib.util.find_spec(name) is None]
    if missing:
        todo = "Run `make study`, or pip install 'maskvlm[study]'"
        raise UserError("study", f"{' and '.join(missing)} not installed", todo, ExitCode.UNAVAILABLE)


def study_file(name: str) -> str:
    """A file by its path, or by its name in studies/.

    Raises:
        UserError: there is none (66).
    """
    folder = home() / STUDIES
    for path in (Path(name), folder / f"{name}.yaml"):
        if path.is_file():
            return str(path)
    known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml"))) or "none"
    raise UserError(name, "no such study", f"Give a YAML file, or one of {known}", ExitCode.MISSING_INPUT)


def chosen_runs(study: Study, runs: Sequence[StudyRun], cells: Sequence[str], seeds: Sequence[int]) -> list[StudyRun]:
    """Those of these cells and seeds; empty: all.

    Raises:
        UserError: there is no such cell, or no run of them.
    """
    names = [cell.name for cell in study.cells]
    for name in cells:
        if name not in names:
            raise UserError("--only", f"there is no {name}", f"There are: {', '.join(names)}")
    found = [run for run in runs if (not cells or run.cell.name in cells) and (not seeds or run.seed in seeds)]
    if not found:
        raise UserError("--seeds", "no run has these", "Give seeds of the study")
    return found


def make_runs(runs: Sequence[StudyRun], jobs: int) -> int:
    """Make what is missing, with a line for each run that ends; returns the exit status of the first that failed."""
    console = Console()
    missing = [run for run in runs if not run.finished]
    console.print(f"{len(runs)} runs, {len(missing)} to make, {jobs} at once", highlight=False)
    worst, spent = 0, 0.0
    runner = Runner(jobs)
    for done, ended in enumerate(runner.make(missing), 1):
        spent += ended.seconds
        console.print(line_of(ended, done, len(missing), spent, jobs), highlight=False, markup=False, soft_wrap=True)
        worst = worst or ended.code
    if runner.stopping.is_set():
        console.print("stopped; the same command goes on", highlight=False)
        return ExitCode.REQUEUE
    return worst


def line_of(ended: Ended, done: int, count: int, spent: float, jobs: int) -> str:
    """`[3/40] all-s1: 11.2 min, 4.1 h left`, or how it failed."""
    run, minutes = ended.run, ended.seconds / 60
    if ended.code:
        return f"[{done}/{count}] {run.name}: exit status {ended.code} after {minutes:.1f} min: {ended.said}"
    hours = spent / done * (count - done) / jobs / 3600
    return f"[{done}/{count}] {run.name}: {minutes:.1f} min; about {hours:.1f} h left"


def _again(values: Sequence[object], option: str) -> list[str]:
    return [option, *map(str, values)] if values else []
