"""The batch script of a run on a cluster."""

from collections.abc import Callable
from pathlib import Path

import pytest

from maskvlm.cli.main import main


def test_the_batch_script_is_the_command_with_a_task_for_every_card(
    stack: Callable[..., list[str]], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    cluster = stack(WHERE="slurm4x8")
    words = [*cluster, "--model.task.image_mask_ratio", "0.7"]
    monkeypatch.setenv("PATH", str(tmp_path))  # no sbatch
    monkeypatch.setenv("DATA_ROOT", "/data/all photos")
    monkeypatch.setenv("STREAM", "s3://bucket/*.tar")
    assert main(["submit", "--run", str(tmp_path / "a %j run"), *words, "--allow-import", "plug"]) == 0
    script = (tmp_path / "a %j run" / "job.sh").read_text()
    wanted = ("nodes=4", "ntasks-per-node=8", "gpus-per-node=8", "cpus-per-task=12")
    assert all(f"#SBATCH --{line}\n" in script for line in wanted)
    assert "export DATA_ROOT='/data/all photos'\nexport STREAM='s3://bucket/*.tar'\n" in script
    assert "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK" in script
    # sbatch splits its lines at spaces, and puts numbers in the place of %j.
    assert f"#SBATCH --output='{tmp_path}/a %%j run/slurm-%j.out'\n" in script
    command = script.splitlines()[-1]
    assert command.startswith("srun --wait=900 ")
    assert command.endswith("--model.task.image_mask_ratio 0.7 --allow-import plug")
    assert "'" + str(tmp_path / "a %j run") + "'" in command
