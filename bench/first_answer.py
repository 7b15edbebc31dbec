r"""Seconds from the end of `pip install` of the wheel to the first printed answer, in an empty environment.

    python bench/first_answer.py --trials 3

Builds the wheel once. Each trial makes a new virtual environment in a temporary folder, installs the wheel and what it
depends on from the package index that pip is set to, or from a folder of wheels (`--wheels`), and starts the clock when
pip ends. Then, in an empty folder and with every address that a download would use pointing nowhere, it runs two
commands of the README: `maskvlm scene 6`, which draws an image, and `maskvlm fill`, which is the first to ask the
model. The clock stops when `fill` has printed its first line. Files that pip has just written are still in the
operating system's page cache, as they are for a user. Prints one line per trial, then the range.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOWHERE = "http://127.0.0.1:9"  # the discard port: nothing answers
ASKED = ("fill", "scene.png", "on white, a pink heart at the bottom and a [MASK] star at the [MASK]")


def build(folder: Path, offline: list[str]) -> Path:
    """The project's wheel, built in `folder` from a copy of the sources, as a build leaves files beside them."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "checkpoints", "*.egg-info", "_build")
    sources = shutil.copytree(ROOT, folder / "sources", ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", *offline]
    subprocess.run([*command, "--wheel-dir", str(folder), str(sources)], check=True)
    (wheel,) = folder.glob("maskvlm-*.whl")
    return wheel


def first_line(command: list[str], folder: Path, environment: dict[str, str]) -> tuple[str, float]:
    """The first line that a command prints on stdout, and when it was there; then wait for the command to end."""
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        ended = time.perf_counter()
        _, errors = process.communicate()
    if not line or process.returncode:
        raise SystemExit(f"error: {' '.join(command)} ended with {process.returncode}: {errors.strip()}")
    return line, ended


def trial(wheel: Path, offline: list[str], folder: Path) -> tuple[float, float, str]:
    """Install into a new environment and ask; seconds until `scene` and until `fill` have answered, and the answer."""
    venv.create(folder / "environment", with_pip=True)
    binaries = folder / "environment" / "bin"
    subprocess.run([str(binaries / "python"), "-m", "pip", "install", "--quiet", *offline, str(wheel)], check=True)
    start = time.perf_counter()
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), NOWHERE)
    environment |= {"no_proxy": "", "NO_PROXY": ""}
    (folder / "empty").mkdir()
    command = str(binaries / "maskvlm")
    subprocess.run([command, "scene", "6"], cwd=folder / "empty", env=environment, check=True, capture_output=True)
    drawn = time.perf_counter() - start
    answer, ended = first_line([command, *ASKED], folder / "empty", environment)
    return drawn, ended - start, answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--wheels", type=Path, help="folder with wheels of everything, instead of a package index")
    settings = parser.parse_args()
    if settings.trials < 1:
        parser.error("--trials: give 1 or more")
    seconds = []
    with tempfile.TemporaryDirectory() as temporary:
        offline = ["--no-index", "--find-links", str(settings.wheels)] if settings.wheels else []
        wheel = build(Path(temporary), offline)
        for number in range(settings.trials):
            with tempfile.TemporaryDirectory() as folder:
                drawn, asked, answer = trial(wheel, offline, Path(folder))
            seconds.append(asked)
            print(f"trial {number + 1}: scene after {drawn:.1f} s, fill after {asked:.1f} s: {answer}", flush=True)
    print(f"first answer after {min(seconds):.1f} to {max(seconds):.1f} s, {settings.trials} trials")


if __name__ == "__main__":
    main()
