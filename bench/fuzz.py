"""Fuzzing of untrusted files: images, annotations, checkpoints, Hugging Face folders, configurations, command lines.

    python bench/fuzz.py --count 20000 --seed 0      # about 20 minutes on two cores
    python bench/fuzz.py --count 500 --kinds checkpoint folder

Each mutant is a pure function of (seed, number): `--only checkpoint:1234` recreates one and shows what it does. A
mutant may load, be counted as a bad row, or end with one line (`UserError`). It must not cause a traceback or a crash,
take more than 10 seconds, leave a file written by its code, or load with other content than was written, if a hash or a
checksum of the format can detect that.

What cannot be detected does not count: a number changed in a file without a checksum (pixels of a JPEG, a caption, a
setting in a Hugging Face folder without `checksums.json`), and a text cut exactly at the end of a line.
"""

import argparse
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Before torch and transformers are imported: one thread per process, and no connection to the hub.
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", MPLBACKEND="Agg")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / name) for name in ("src", ".", "tests", "tests/security")]

import torch  # noqa: E402
from PIL import Image  # noqa: E402

from maskvlm.training.failure import user_line  # noqa: E402
from maskvlm.utils.errors import UserError  # noqa: E402

OLD = ROOT / "tests" / "fixtures" / "89274c0"
LIMIT = 10.0  # seconds per mutant
MEMORY = 12 * 2**30
SHARES = {"image": 7000, "annotation": 6000, "checkpoint": 2500, "folder": 2000, "config": 1500, "line": 1000}
"""Number of mutants of each kind, out of 20,000."""


class Silent(Exception):
    """The loaded content silently differs from what was written."""


class Kinds:
    """Makes and opens mutants; there is a method for each kind, which returns the outcome."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = folder / "marker"

    # ------------------------------------------------------------------ images

    def start_image(self) -> None:
        from raw_toys import IMAGES

        self.images: dict[str, bytes] = {f"{number}.jpg": data for number, data in enumerate(IMAGES)}
        for kind, mode in (
            ("png", "RGB"),
            ("png", "RGBA"),
            ("webp", "RGB"),
            ("gif", "P"),
            ("bmp", "RGB"),
            ("png", "I;16"),
        ):
            buffer = io.BytesIO()
            Image.effect_noise((24, 16), 90).convert("RGB").convert(mode if mode != "I;16" else "L").save(buffer, kind)
            self.images[f"{mode.replace(';', '')}.{kind}"] = buffer.getvalue()

    def image(self, rng: random.Random) -> str:
        from mutators import images

        from maskvlm.data.images import BadImage, safe_open

        name = rng.choice(sorted(self.images))
        data = images(self.images[name], rng)
        try:
            opened = safe_open(data, name)
        except BadImage as error:
            return error.reason if "\n" not in str(error) else "several lines"
        # Whatever passes must be in the form that the model reads.
        assert opened.mode == "RGB"
        return "ok"

    # ------------------------------------------------------------------ annotations

    def start_annotation(self) -> None:
        from test_data_readers import IN_PROCESS, toy

        self.toys = list(IN_PROCESS)
        for name in self.toys:
            toy(name)

    def annotation(self, rng: random.Random) -> str:
        from raw_toys import TOYS, write
        from test_data_readers import damaged, read, toy

        name = rng.choice(self.toys)
        folder = self.folder / "raw"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        _, bad, message = read(TOYS[name][0], write(folder, damaged(toy(name), rng.randrange(2**32))))
        return "one line" if message else "bad rows" if bad else "ok"

    # ------------------------------------------------------------------ models

    def start_checkpoint(self) -> None:
        self.content: dict[str, Any] = torch.load(OLD / "run" / "last.ckpt", weights_only=True)
        self.bytes = (OLD / "run" / "last.ckpt").read_bytes()
        self.good = {name: value.clone() for name, value in self.content["state_dict"].items()}

    def checkpoint(self, rng: random.Random) -> str:
        import model_mutators

        path = self.folder / "x.ckpt"
        # Two in five have bytes changed anywhere; in the others the content itself is edited.
        if rng.random() < 0.4:
            path.write_bytes(model_mutators.raw(self.bytes, rng))
            return self.model(path, written=True)
        buffer = io.BytesIO()
        try:
            torch.save(model_mutators.checkpoint(self.content, rng, str(self.mark)), buffer)
        except Exception:  # torch itself cannot write all of them
            return "not writable"
        path.write_bytes(buffer.getvalue())
        return self.model(path, written=False)

    start_folder = start_checkpoint

    def folder_(self, rng: random.Random) -> str:
        import model_mutators

        from maskvlm.checkpoint.hf_folder import write_sums

        whole, copy = self.folder / "whole", self.folder / "hub"
        if not whole.exists():
            shutil.copytree(OLD / "hub", whole)
            write_sums(whole)
        shutil.rmtree(copy, ignore_errors=True)
        model_mutators.folder(whole, copy, rng, str(self.mark))
        # Without checksums the original content cannot be known.
        return self.model(copy, written=(copy / "checksums.json").exists())

    def model(self, source: Path, written: bool) -> str:
        """Load a model. written: whether checksums can detect content that differs from what was written."""
        from maskvlm.inference.pretrained import PretrainedMaskVLM

        model = PretrainedMaskVLM.from_pretrained(source)
        state = model.state_dict()
        # A missing name is not a wrong value; an existing one must have the value that was written.
        if written and any(not torch.equal(value, state[name]) for name, value in self.good.items() if name in state):
            raise Silent("other weights")
        if written and model.backbone.cross_image.blocks[0].self_attention.heads != 2:
            raise Silent("other settings")
        return "ok"

    # ------------------------------------------------------------------ configurations and command lines

    def start_config(self) -> None:
        import yaml
        from config_mutators import FOREIGN

        from maskvlm.cli.lightning import Parsed, run_command
        from maskvlm.config.parser import option_names

        os.chdir(ROOT)
        names = ("base", "model/tiny", "pretrain", "pretrain-tiny", "data/scenes", "where/cpu")
        stack = [word for name in names for word in ("-c", f"conf/{name}.yaml")]
        parsed = run_command(Parsed, ["fit", "--run", "x", *stack])
        whole = yaml.safe_load(parsed._parser("fit").dump(parsed.settings, skip_unset=False))
        trainer_keys = (
            "max_steps",
            "accelerator",
            "devices",
            "precision",
            "logger",
            "callbacks",
            "plugins",
            "log_every_n_steps",
        )
        whole["trainer"] = {key: whole["trainer"][key] for key in trainer_keys}
        self.text = yaml.safe_dump({key: whole[key] for key in ("seed_everything", "model", "data", "run", "trainer")})
        self.keys = sorted(option_names(parsed._subcommand_parsers["fit"]))
        # A foreign module that leaves a marker file as soon as it is imported.
        (self.folder / f"{FOREIGN}.py").write_text(f"open({str(self.mark)!r}, 'w')\nclass Run: ...\n")
        sys.path.insert(0, str(self.folder))
        # From here on, relative paths in mutants resolve to the scratch folder.
        os.chdir(self.folder)

    start_line = start_config

    def config(self, rng: random.Random) -> str:
        from config_mutators import mutate

        (self.folder / "mutant.yaml").write_bytes(mutate(self.text, rng))
        return self.parsed(["fit", "-c", "mutant.yaml"])

    def line(self, rng: random.Random) -> str:
        from config_mutators import words

        (self.folder / "mutant.yaml").write_text(self.text)
        return self.parsed(["fit", "-c", "mutant.yaml", *words(self.keys, rng)])

    def parsed(self, arguments: list[str]) -> str:
        from maskvlm.cli.lightning import Parsed, run_command

        try:
            run_command(Parsed, arguments)
        except SystemExit as end:
            # Help and printed configurations exit this way.
            if end.code not in (0, None):
                raise
        return "ok"


@contextmanager
def limited() -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError(f"more than {LIMIT} s")

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def outcome(kinds: Kinds, kind: str, seed: int, number: int, show: bool = False) -> tuple[str, str]:
    """The outcome of a mutant: ok, a reason, an exit status; or traceback, hang, silent, marker, with a line."""
    # A pure function of these three, so that --only finds the same mutant.
    rng = random.Random(f"{kind} {seed} {number}")
    make: Callable[[random.Random], str] = getattr(kinds, "folder_" if kind == "folder" else kind)
    began = time.monotonic()
    try:
        with warnings.catch_warnings(), limited():
            warnings.simplefilter("ignore")
            verdict = make(rng), ""
    except UserError as error:
        if show:
            print(error)
        verdict = (f"exit {int(error.code)}", "") if "\n" not in str(error) else ("several lines", str(error)[:300])
    except TimeoutError as error:
        verdict = "hang", str(error)
    except Silent as error:
        verdict = "silent", str(error)
    except BaseException as error:
        user_error = user_line(error)  # as the command would report it
        if show and user_error is None:
            traceback.print_exc()
        verdict = ("traceback", repr(error)[:300]) if user_error is None else (f"exit {int(user_error.code)}", "")
    # A library may swallow the alarm's exception, so check the clock, too.
    if time.monotonic() - began > LIMIT + 1 and verdict[0] != "hang":
        verdict = "hang", f"{time.monotonic() - began:.0f} s"
    if kinds.mark.exists():
        kinds.mark.unlink()
        verdict = "marker", "its code ran"
    return verdict


def worker(kind: str, seed: int, numbers: range, place: Path) -> None:
    """Write the outcomes of some mutants as they come, one per line; runs in its own process."""
    # A mutant that asks for too much memory causes a MemoryError, and does not bring down the machine.
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    scratch = Path(tempfile.mkdtemp(dir=place))
    kinds = Kinds(scratch)
    with (place / f"{kind}-{numbers.start}.txt").open("a") as file:
        try:
            getattr(kinds, f"start_{kind}")()
            for number in numbers:
                print(json.dumps([number, *outcome(kinds, kind, seed, number)]), file=file, flush=True)
        except BaseException as error:
            print(json.dumps([numbers.start, "traceback", f"at the start: {error!r}"[:300]]), file=file, flush=True)


BAD = ("traceback", "hang", "silent", "marker", "crash", "several lines")


def run(options: argparse.Namespace, place: Path) -> dict[str, Counter[str]]:
    """Run all mutants, in parts of 100, in `--jobs` processes at a time."""
    parts = [
        (kind, range(first, min(first + 100, count)))
        for kind, count in options.counts.items()
        for first in range(0, count, 100)
    ]
    # Kinds are mixed, as their speeds differ and the time left is computed from the mean.
    random.Random(0).shuffle(parts)
    outcomes: dict[str, Counter[str]] = {kind: Counter() for kind in options.counts}
    running: dict[int, tuple[str, range, float]] = {}
    began = reported = time.monotonic()
    total, done = sum(options.counts.values()), 0
    while parts or running:
        while parts and len(running) < options.jobs:
            kind, numbers = parts.pop()
            child = os.fork()
            if child == 0:
                worker(kind, options.seed, numbers, place)
                os._exit(0)
            running[child] = kind, numbers, time.monotonic()
        child, status = os.waitpid(-1, os.WNOHANG)
        # The alarm does not interrupt C code of a library.
        late = [
            pid for pid, (_, numbers, start) in running.items() if time.monotonic() - start > len(numbers) * LIMIT + 60
        ]
        for pid in late:
            os.kill(pid, signal.SIGKILL)
        if child == 0:
            time.sleep(0.05)
        else:
            kind, numbers, _ = running.pop(child)
            lines = (place / f"{kind}-{numbers.start}.txt").read_text().splitlines()
            for number, what, why in map(json.loads, lines):
                outcomes[kind][what] += 1
                if what in BAD:
                    print(f"{kind}:{number}: {what}: {why}", flush=True)
            done += len(lines)
            next_one = numbers.start + len(lines)
            if status and next_one < numbers.stop:  # the process crashed on a mutant: continue after it
                outcomes[kind]["crash"] += 1
                done += 1
                print(f"{kind}:{next_one}: crash: signal {status & 127}", flush=True)
                parts.append((kind, range(next_one + 1, numbers.stop)))
            if time.monotonic() - reported > 30:
                reported = time.monotonic()
                remaining = (reported - began) / max(done, 1) * (total - done)
                print(
                    f"{done:,} of {total:,}  {done / (reported - began):.1f} a second  {remaining / 60:.0f} min left",
                    flush=True,
                )
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000, help="mutants of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=list(SHARES), choices=SHARES)
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--only", help="one mutant again, such as checkpoint:1234")
    options = parser.parse_args()
    whole = sum(SHARES[kind] for kind in options.kinds)
    options.counts = {kind: max(1, options.count * SHARES[kind] // whole) for kind in options.kinds}
    with tempfile.TemporaryDirectory() as scratch:
        if options.only:
            kind, _, number = options.only.partition(":")
            kinds = Kinds(Path(scratch))
            getattr(kinds, f"start_{kind}")()
            print(*outcome(kinds, kind, options.seed, int(number), show=True))
            return 0
        # Imported once, before the processes are forked.
        import maskvlm.cli.lightning
        import maskvlm.data.raw
        import maskvlm.inference.pretrained  # noqa: F401
        import tasks.entailment.task  # noqa: F401

        began = time.monotonic()
        outcomes = run(options, Path(scratch))
    every: Counter[str] = sum(outcomes.values(), Counter())
    for kind, counts in outcomes.items():
        print(f"{kind:11} {sum(counts.values()):6,}  " + ", ".join(f"{what} {n:,}" for what, n in counts.most_common()))
    bad = {what: every[what] for what in BAD}
    print(f"{sum(every.values()):,} mutants, seed {options.seed}, {time.monotonic() - began:.0f} s: {bad}")
    return int(any(bad.values()))


if __name__ == "__main__":
    sys.exit(main())
