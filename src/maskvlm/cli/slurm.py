"""`maskvlm submit`: submits a run as a SLURM job."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from jsonargparse import Namespace

from maskvlm.checkpoint.integrity import newest_valid
from maskvlm.cli.lightning import Parsed, built_source, run_command
from maskvlm.data.streaming.source import Stream
from maskvlm.training.resume import may_go_on
from maskvlm.training.run_record import foreign_origin
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.whole_files import write_text

SCRIPT = """#!/usr/bin/env bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={devices}
{gpus}#SBATCH --cpus-per-task={cpus}
#SBATCH --output={output}
#SBATCH --open-mode=append{array}
#SBATCH --requeue
#SBATCH --signal=USR1@120
# Two minutes before the time limit it saves, and is queued again.
# Partition, account and time limit: SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT in your environment.
set -euo pipefail
cd {here}
{places}export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun does not inherit it since SLURM 22.05
# A process that is left alone ends the others itself; where it cannot, they are ended 15 minutes after the first.
srun --wait=900 {command}
"""

READERS = 10  # data workers of a task whose configuration does not set their number
PLACES = ("DATA_ROOT", "STREAM")  # environment variables that files in conf/data read


def surroundings(more: Sequence[str] = ()) -> dict[str, str]:
    """Environment variables to pass on from this command to the job. more: names of those that its files read."""
    # The job changes to this folder, so a relative path finds the package of a git clone.
    paths = [*(["src"] if Path("src/maskvlm").is_dir() else []), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    variables = {"PYTHONPATH": os.pathsep.join(dict.fromkeys(filter(None, paths)))}
    variables |= {name: os.environ.get(name, "") for name in (*PLACES, *more)}
    return {name: value for name, value in variables.items() if value}


def submit(arguments: list[str], allowed: Iterable[str] = ()) -> str:
    """Write the batch script of a run into its folder, and submit it with sbatch if that is installed.

    Raises:
        UserError: the data are missing or damaged; the folder holds another run, for which the job would fail (73);
            sbatch rejected the script (69).
        Finished: the folder's run is finished.
    """
    command = run_command(Parsed, ["fit", *arguments], allowed)
    settings = command.settings
    folder, source = Path(settings.run), built_source(settings)
    if not isinstance(source, Stream):  # looking at a stream would start it
        source.split("train")
    named = settings.get("ckpt_path")
    origin = None if named in (None, "last", "best") else foreign_origin(named, folder)
    if named is None or origin is not None:
        may_go_on(folder, command.composed(), origin)
    goes_on, waits = newest_valid(folder), (folder / "job.sh").exists()
    message = hand_over(folder / "job.sh", batch_script(settings, ["fit", *arguments], allowed))
    if goes_on:
        return f"{message}\n{folder} already holds a run: the job resumes from {goes_on}"
    if waits:
        name = shlex.quote(folder.name)
        line = "was submitted before but has not started: if that job is still queued, scancel one of the two"
        return f"{message}\n{folder} {line} (squeue --name {name})"
    return message


def submit_array(
    folder: Path,
    run: list[str],
    words: list[str],
    numbers: Sequence[int],
    at_once: int,
    allowed: list[str],
    variables: Sequence[str],
) -> str:
    """Like `submit`, for many runs that need the same kind of machine, as a job array.

    Args:
        folder: where the script is written.
        run: the subcommand and options of one of them, which determine the machine.
        words: the command of every task, to which the task's number is appended.
        numbers: task numbers, at least one. at_once: maximum number of tasks that run at the same time.
        variables: names of environment variables to pass on to the tasks.

    Raises:
        UserError: as `submit`.
    """
    settings = run_command(Parsed, run, allowed).settings
    settings.run = str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    script = batch_script(settings, words, allowed, f"{ranges(numbers)}%{at_once}", variables)
    return hand_over(folder / "job.sh", script)


def ranges(numbers: Sequence[int]) -> str:
    """Integers in the format of sbatch: `0-3,7`."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def hand_over(path: Path, script: str) -> str:
    """Write a batch script, and submit it with sbatch if that is installed; returns a line that says what was done.

    Raises:
        UserError: sbatch rejected the script (69).
    """
    write_text(path, script)
    how = shlex.join(["sbatch", str(path)])
    if shutil.which("sbatch") is None:
        return f"{path}: written; sbatch was not found here; submit it where SLURM is installed: {how}"
    done = subprocess.run(["sbatch", str(path)], capture_output=True, text=True)
    if done.returncode:
        raise UserError("sbatch", " ".join(done.stderr.split()), f"Fix {path}", ExitCode.UNAVAILABLE)
    return f"{path}: {done.stdout.strip()}"


def batch_script(
    settings: Namespace,
    arguments: list[str],
    allowed: Iterable[str] = (),
    array: str | None = None,
    variables: Sequence[str] = (),
) -> str:
    """The batch script, with one task per GPU as Lightning expects under srun.

    Args:
        arguments: arguments of `python -m maskvlm`.
        array: sbatch's array specification: the task numbers, each of which becomes the command's last argument.
        variables: names of further environment variables that the job needs.
    """
    devices, workers = settings.trainer.devices, settings.data.init_args.get("workers")
    if workers is None:  # as the run will choose: none on a CPU
        workers = 0 if settings.trainer.accelerator == "cpu" else READERS
    if not str(devices).isdigit():
        what = f"a batch job needs a number of devices per node, not {devices}"
        raise UserError("trainer.devices", what, "Choose where=slurm4x8 or give --trainer.devices 8")
    task = ' --task "$SLURM_ARRAY_TASK_ID"' if array else ""
    allow = [word for name in allowed for word in ("--allow-import", name)]
    return SCRIPT.format(
        name=shlex.quote(Path(settings.run).name),
        nodes=settings.trainer.num_nodes,
        devices=devices,
        gpus="" if settings.trainer.accelerator == "cpu" else f"#SBATCH --gpus-per-node={devices}\n",
        # Two cores besides the data workers, for the training itself.
        cpus=workers + 2,
        # sbatch splits words as a shell does, and takes %j for the job's number.
        output=shlex.quote(f"{str(settings.run).replace('%', '%%')}/slurm-%j.out"),
        array=f"\n#SBATCH --array={array}" if array else "",
        places="".join(f"export {name}={shlex.quote(value)}\n" for name, value in surroundings(variables).items()),
        here=shlex.quote(str(Path.cwd())),
        # This very Python: the job's PATH may find another one.
        command=shlex.join([sys.executable, "-m", "maskvlm", *arguments, *allow]) + task,
    )
