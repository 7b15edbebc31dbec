"""`maskvlm study FILE`: makes the missing runs of a study, and writes its page (`study/`)."""

import importlib.util
import math
import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console

from maskvlm.config.arguments import OptionParser
from maskvlm.config.compose import home
from maskvlm.config.given_options import environment_names, nearest
from maskvlm.study.definition import Metric, Study, read_study
from maskvlm.training.failure import process_rank
from maskvlm.utils.errors import ExitCode, UserError, check_least

if TYPE_CHECKING:
    from maskvlm.study.earlier import Outcome
    from maskvlm.study.runs import Ended, StudyRun

STUDIES = "studies"


def main(arguments: list[str], allowed: list[str]) -> int:
    """Make a study. Takes arguments as in the shell."""
    parser = OptionParser("maskvlm study", description="make the missing runs of a study and write its page")
    parser.add_argument("file", metavar="FILE", help="YAML file of a study (docs/studies.md), or its name in studies/")
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at the same time on this machine (default: %(default)s)"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="CELL", help="only the runs of these cells")
    parser.add_argument("--seeds", nargs="+", type=int, default=[], help="only the runs of these seeds")
    parser.add_argument("--where", help="machine, instead of the study's own where=")
    parser.add_argument("--page", type=Path, help="folder for the page (default: checkpoints/NAME)")
    parser.add_argument("--page-only", action="store_true", help="write the page from the runs that exist; start none")
    parser.add_argument("--list", action="store_true", help="list the runs and their progress; start none")
    parser.add_argument(
        "--submit", action="store_true", help="submit a SLURM array, one task per run, --jobs at the same time"
    )
    parser.add_argument("--task", type=int, metavar="N", help="only the N-th run of --list, as a task of the array")
    options = parser.parse_args(arguments)
    check_least(1, {"--jobs": options.jobs})
    check_installed()
    study = read_study(study_file(options.file), options.where)
    # Imports torch, so only now: mistakes in the file have been reported.
    from maskvlm.study.earlier import check_page, earlier_runs
    from maskvlm.study.runs import check_same_run, holds_another, of_study, root_of, runs_of, step_of

    # Options from a study's file do not count as typed, neither when they are parsed or counted here, nor in the runs.
    os.environ |= of_study(allowed, 0)
    root = root_of(study)
    listed = runs_of(study, root, counted=())
    chosen = chosen_runs(study, listed, options.only, options.seeds)
    if options.list:
        for number, run in enumerate(chosen):
            steps = (
                "" if not run.cell.flops_of else f"  (and as many steps as cost the operations of {run.cell.flops_of})"
            )
            # For a list, the steps that match another arm's operations are not computed.
            other = not run.cell.flops_of and holds_another(run)
            state = "other options" if other else "finished" if run.finished else run.lost or f"step {step_of(run)}"
            print(f"{number}  {state}  {shlex.join(run.command[2:])}{steps}")
        return ExitCode.DONE
    if options.task is not None:
        if not 0 <= options.task < len(chosen):
            raise UserError("--task", f"there is no run {options.task}", f"Give 0 to {len(chosen) - 1}")
        become(study, chosen[options.task], root, allowed)
    if options.page:
        check_page(options.page)
    check_cells(chosen, allowed)
    # A page made elsewhere has runs that need not be made again.
    earlier = earlier_runs(options.page, listed) if options.page else {}
    # The command of a run that does not exist and will not be made is not needed.
    needed = [run for run in listed if run.folder.is_dir()]
    needed += [] if options.page_only else without(chosen, earlier)
    every = runs_of(study, root, {run.cell.name for run in needed})
    chosen = chosen_runs(study, every, options.only, options.seeds)
    # Their numbers of steps are known only now: an interval or a warm-up may be longer.
    check_cells([run for run in chosen if run.spent is not None], allowed)
    for run in every:
        check_same_run(run)
    if options.submit:
        words = ["study", options.file, *_again(options.only, "--only"), *_again(options.seeds, "--seeds")]
        words += ["--where", options.where] if options.where else []
        from maskvlm.cli.slurm import submit_array

        unfinished = [run for run in without(chosen, earlier) if not run.over]
        if not unfinished:
            print(f"nothing to submit: {len(chosen)} runs are finished, or have diverged")
            return ExitCode.DONE
        # The tasks of an array start in any order, so first submit only those that the others start from.
        ready = [run for run in unfinished if run.waits_for is None]
        numbers = [chosen.index(run) for run in ready]
        variables = environment_names(Path(study_file(options.file)).read_text("utf-8-sig"))
        told = submit_array(root, composed_run(ready[0]), words, numbers, options.jobs, allowed, variables)
        print(told, flush=True)
        if len(ready) < len(unfinished):
            print(f"the other {len(unfinished) - len(ready)} start from these: submit again when they are finished")
        return ExitCode.DONE
    if options.page_only:  # also works while the study is running
        tell_page(study, every, options.page or root, options.file, allowed, earlier)
        return ExitCode.DONE
    from maskvlm.utils.lock import RunLock

    lock = RunLock()
    lock.take(root)
    try:
        failed = make_runs(study, without(chosen, earlier), options.jobs, allowed)
        tell_page(study, every, options.page or root, options.file, allowed, earlier)
    finally:
        lock.release()
    return failed


def become(study: Study, run: "StudyRun", root: Path, allowed: list[str]) -> NoReturn:
    """Replace this process by a run of the study, as a task of an array does.

    Raises:
        UserError: its options are wrong, its folder holds another run (73), the run it starts from is not finished (2).
    """
    from maskvlm.study.runs import check_same_run, runs_of

    check_cells([run], allowed)
    if run.spent is not None:  # operations are counted for such cells only
        run = next(each for each in runs_of(study, root, {run.cell.name}) if each.name == run.name)
        check_cells([run], allowed)
    check_same_run(run)
    if run.waits_for is not None:
        todo = "Submit the study again once it is"
        raise UserError(run.name, f"{run.waits_for}, which it starts from, is not finished", todo)
    if process_rank() == 0:  # a task may have several processes
        run.note(math.nan)  # it is not timed
    os.execv(sys.executable, run.command)


def without(runs: Sequence["StudyRun"], earlier: Mapping[str, "Outcome"]) -> list["StudyRun"]:
    """The runs that are not in `earlier`, and those that they start from."""
    starts = {run.start for run in runs}
    remaining = [run for run in runs if run.name not in earlier and run not in starts]
    needed = {run.start for run in remaining if not run.over}
    return [run for run in runs if run in remaining or run in needed]


def tell_page(
    study: Study,
    runs: Sequence["StudyRun"],
    folder: Path,
    file: str,
    allowed: Sequence[str],
    earlier: Mapping[str, "Outcome"],
) -> None:
    """Write the page and print where it is. allowed: packages that the study may import, shown in its command."""
    from maskvlm.study.page import write_page  # imports packages that only a study needs

    trusted = chain.from_iterable(("--allow-import", name) for name in allowed)
    page = write_page(study, runs, folder, shlex.join(["maskvlm", "study", file, *trusted]), earlier)
    reached = [each for run in runs if (each := run.metrics)] + [each.metrics for each in earlier.values()]
    silent = [metric for metric in study.metrics.values() if all(math.isnan(metric.of(each)) for each in reached)]
    if reached:
        for line in unknown_keys(silent, dict(chain.from_iterable(each.items() for each in reached)), "no run"):
            print(f"warning: {line}", file=sys.stderr, flush=True)
    there = sum(run.over or run.name in earlier for run in runs)
    print(f"wrote {page} ({there} of {len(runs)} runs)", flush=True)


def check_installed() -> None:
    """Raises UserError (69), before hours of runs, if a package needed to write the page is missing."""
    missing = [name for name in ("pandas", "scipy") if importlib.util.find_spec(name) is None]
    if missing:
        todo = "Run `make study`, or pip install 'maskvlm[study]'"
        raise UserError("study", f"{' and '.join(missing)} not installed", todo, ExitCode.UNAVAILABLE)


def study_file(name: str) -> str:
    """The file of a study, given by its path or its name in studies/.

    Raises:
        UserError: there is no such file (66).
    """
    folder = home() / STUDIES
    for path in (Path(name), folder / f"{name}.yaml"):
        if path.is_file():
            return str(path)
    known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml"))) or "none"
    raise UserError(name, "no such study", f"Give a YAML file, or one of {known}", ExitCode.MISSING_INPUT)


def chosen_runs(
    study: Study, runs: Sequence["StudyRun"], cells: Sequence[str], seeds: Sequence[int]
) -> list["StudyRun"]:
    """The runs of these cells and seeds (empty: all), with the runs that they start from.

    Raises:
        UserError: there is no such cell or seed, or no run matches.
    """
    names = [cell.name for cell in study.cells]
    for name in cells:
        if name not in names:
            raise UserError("--only", f"there is no {name}", f"Available: {', '.join(names)}")
    known = sorted({run.seed for run in runs})
    for seed in seeds:
        if seed not in known:
            raise UserError("--seeds", f"no run has seed {seed}", f"Available: {', '.join(map(str, known))}")
    matches = [run for run in runs if (not cells or run.cell.name in cells) and (not seeds or run.seed in seeds)]
    if not matches:
        raise UserError("--seeds", "the cells of --only have no run of these seeds", "Leave out --only, or --seeds")
    starts = {run.start for run in matches}
    return [run for run in runs if run in matches or run in starts]


def composed_run(run: "StudyRun") -> list[str]:
    """The command of a run as subcommand, files and options, without the run that it starts from, which may not exist
    yet."""
    from maskvlm.cli.commands import COMMANDS

    start = "" if run.start is None else f"from={run.start.last_weights}"
    name, *rest = [word for word in run.command[3:] if word != start]
    return COMMANDS[name].full(rest)


def check_cells(runs: Sequence["StudyRun"], allowed: list[str]) -> None:
    """Parse one command of each cell that has runs to make, so that a wrong option of the last arm is reported before
    the first one trains.

    Raises:
        UserError: an option is wrong; names the cell.
    """
    from maskvlm.cli.lightning import Parsed, run_command

    for run in {run.cell.name: run for run in runs if not run.over}.values():
        try:
            settings = run_command(Parsed, composed_run(run), allowed).settings
        except UserError as error:
            raise UserError(f"{run.cell.name}: {error.where}", error.what, error.todo, error.code) from error
        if settings.trainer.limit_val_batches == 0:
            what = "0 turns evaluation off, so the run would never count as finished"
            raise UserError(
                f"{run.cell.name}: trainer.limit_val_batches",
                what,
                "Leave it out; the whole split is evaluated at the end",
            )


def make_runs(study: Study, runs: Sequence["StudyRun"], jobs: int, allowed: list[str]) -> int:
    """Make the missing runs and print a line as each ends; returns the exit status of the first that failed."""
    from maskvlm.study.runs import Runner

    console = Console()
    missing = [run for run in runs if not run.over]
    console.print(f"{len(runs)} runs, {len(missing)} to do, {jobs} at a time", highlight=False)
    worst, spent, warned = 0, 0.0, False
    runner = Runner(jobs, allowed)
    for done, ended in enumerate(runner.make(missing), 1):
        spent += ended.seconds
        console.print(line_of(ended, done, len(missing), spent, jobs), highlight=False, markup=False, soft_wrap=True)
        worst = worst or (ended.code if ended.code >= 0 else 128 - ended.code)
        if not warned and ended.run.cell is not study.first and (metrics := ended.run.metrics):
            warned = True
            for line in unknown_keys(study.metrics.values(), metrics):
                print(f"warning: {line}", file=sys.stderr, flush=True)
    if runner.stopping.is_set():
        console.print("stopped; repeat the command to resume", highlight=False)
        return ExitCode.REQUEUE
    return worst


def unknown_keys(
    study_metrics: Iterable[Metric], metrics: Mapping[str, float], who: str = "the first run"
) -> list[str]:
    """A line for each key of a study's metrics that was not measured; it may belong to a head that only other runs
    have. who: the run that was measured, for the message."""
    lines = []
    has = f"{who} has" if who.startswith("no ") else f"{who} has no"
    for metric in study_metrics:
        for key in (*metric.mean, *metric.minus, *metric.otherwise):
            if key not in metrics:
                near = nearest(key, metrics, 0.8)
                lines.append(f"metric {metric.name}: {has} {key}" + (f" (did you mean {near}?)" if near else ""))
    return lines


def line_of(ended: "Ended", done: int, count: int, spent: float, jobs: int) -> str:
    """The line for a run that has ended: `[3/40] all-s1: 11.2 min; about 4.1 h left`, or how it failed."""
    line = f"[{done}/{count}] {ended.run.name}: {ended.seconds / 60:.1f} min"
    if ended.why:
        return f"{line}, {ended.why}"
    rest = spent / done * (count - done) / jobs
    return f"{line}; about {rest / 3600:.1f} h left" if rest >= 3600 else f"{line}; about {rest / 60:.0f} min left"


def _again(values: Sequence[object], option: str) -> list[str]:
    return [option, *map(str, values)] if values else []
