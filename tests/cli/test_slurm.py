"""The batch script of a run on a cluster."""

from collections.abc import Callable
from pathlib import Path

import pytest
from toy_pretrained import saved

from maskvlm.cli.lightning import Parsed, run_command
from maskvlm.cli.main import main
from maskvlm.utils.errors import ExitCode


@pytest.fixture
def cluster(stack: Callable[..., list[str]], root: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files of `make submit WHERE=slurm4x8`, from the repository's root."""
    monkeypatch.chdir(root)
    return stack(WHERE="slurm4x8")


def test_the_batch_script_is_the_command_with_a_task_for_every_card(
    cluster: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*cluster, "--model.task.image_mask_ratio", "0.7"]
    monkeypatch.setenv("PATH", str(tmp_path))  # no sbatch
    monkeypatch.setenv("DATA_ROOT", "/data/all photos")
    monkeypatch.setenv("STREAM", "s3://bucket/*.tar")
    assert main(["submit", "--run", str(tmp_path / "a run"), *words, "--allow-import", "plug"]) == 0
    script = (tmp_path / "a run" / "job.sh").read_text()
    assert "written; sbatch was not found here" in capsys.readouterr().out
    wanted = ("nodes=4", "ntasks-per-node=8", "gpus-per-node=8", "cpus-per-task=12")
    assert all(f"#SBATCH --{line}\n" in script for line in wanted)
    assert "export DATA_ROOT='/data/all photos'\nexport STREAM='s3://bucket/*.tar'\n" in script
    assert "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK" in script
    command = script.splitlines()[-1]
    assert command.startswith("srun --wait=900 ")
    assert command.endswith("--model.task.image_mask_ratio 0.7 --allow-import plug")
    assert "'" + str(tmp_path / "a run") + "'" in command


def test_the_name_of_a_folder_is_one_word_and_no_pattern(
    cluster: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """sbatch splits its lines at spaces, and puts numbers in the place of %j."""
    monkeypatch.setenv("PATH", str(tmp_path))  # no sbatch
    assert main(["submit", "--run", str(tmp_path / "a %j b"), *cluster]) == 0
    script = (tmp_path / "a %j b" / "job.sh").read_text()
    assert "#SBATCH --job-name='a %j b'\n" in script
    assert f"#SBATCH --output='{tmp_path}/a %%j b/slurm-%j.out'\n" in script
    assert f"sbatch '{tmp_path}/a %j b/job.sh'" in capsys.readouterr().out


def test_a_run_on_processors_asks_for_no_cards(
    cluster: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no sbatch
    words = [*cluster, "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    assert main(["submit", "--run", str(tmp_path / "run"), *words]) == 0
    script = (tmp_path / "run" / "job.sh").read_text()
    assert "gpus-per-node" not in script
    assert "#SBATCH --ntasks-per-node=1\n#SBATCH --cpus-per-task=" in script


def test_a_run_that_chooses_its_data_workers_has_cores_for_them(
    stack: Callable[..., list[str]], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`where=auto` leaves their number to the run: on a card ten, and two cores for the training itself."""
    monkeypatch.chdir(root)
    monkeypatch.setenv("PATH", str(tmp_path))  # no sbatch
    for accelerator, cores in (("gpu", 12), ("cpu", 2)):
        words = [*stack(WHERE="auto"), "--trainer.devices", "8", "--trainer.accelerator", accelerator]
        assert main(["submit", "--run", str(tmp_path / accelerator), *words]) == 0
        assert f"#SBATCH --cpus-per-task={cores}\n" in (tmp_path / accelerator / "job.sh").read_text()


def test_a_second_submission_says_that_the_run_goes_on_and_the_data_are_looked_at(
    cluster: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no sbatch
    run = tmp_path / "run"
    assert main(["submit", "--run", str(run), *cluster]) == 0
    assert "submitted before" not in capsys.readouterr().out
    assert main(["submit", "--run", str(run), *cluster]) == 0  # it may wait still
    assert f"{run} was submitted before but has not started" in capsys.readouterr().out
    saved(run / "last.ckpt")
    config = run_command(Parsed, ["fit", "--run", str(run), *cluster]).composed()
    (run / "config-fit.yaml").write_text(config)
    assert main(["submit", "--run", str(run), *cluster]) == 0
    message = f"{tmp_path / 'run'} already holds a run: the job resumes from {tmp_path / 'run' / 'last.ckpt'}"
    assert message in capsys.readouterr().out
    prepared = ["--data.source", "maskvlm.data.prepared.source.Prepared", "--data.source.root", str(tmp_path / "none")]
    assert main(["submit", "--run", str(tmp_path / "other"), *cluster, *prepared]) == ExitCode.MISSING_INPUT
    assert "none" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_job_that_its_folder_would_refuse_is_not_submitted(
    cluster: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no sbatch
    run = tmp_path / "run"
    saved(run / "last.ckpt")
    (run / "config-fit.yaml").write_text(run_command(Parsed, ["fit", "--run", str(run), *cluster]).composed())
    words = ["submit", "--run", str(run), *cluster, "--model.task.image_mask_ratio", "0.7"]
    assert main(words) == ExitCode.CANNOT_CREATE
    assert "already holds a run with other settings (model.task.image_mask_ratio" in capsys.readouterr().err
    assert not (run / "job.sh").exists()
    assert main([*words, "--ckpt_path", str(tmp_path / "other" / "last.ckpt")]) == ExitCode.CANNOT_CREATE
    assert "already holds a run, which did not start from " in capsys.readouterr().err
    assert main([*words, "--ckpt_path", "last"]) == 0  # asked for


def test_a_refusal_of_sbatch_is_one_line(
    cluster: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 'invalid partition' >&2\nexit 1\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert main(["submit", "--run", str(tmp_path / "run"), *cluster]) == ExitCode.UNAVAILABLE
    assert "sbatch: invalid partition. Fix " in capsys.readouterr().err
