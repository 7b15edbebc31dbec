"""Open every attack with a tree of the program, each in a process of its own that is watched.

    python tests/security/run_attacks.py                       # this tree
    python tests/security/run_attacks.py --tree ../older       # another version

Prints a line for each attack that got through or ended otherwise than in one line, and a count.
"""

import argparse
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
CODES = (0, 2, 65, 66, 69, 73, 77)
SECONDS = 300.0  # of one command


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=HERE.parents[2], help="a clone of the project")
    parser.add_argument("--every", type=int, default=1, help="each N-th of them")
    options = parser.parse_args()
    sys.path[:0] = [str(options.tree.resolve() / "src"), str(options.tree.resolve()), str(HERE.parent)]
    os.environ.update(OMP_NUM_THREADS="1", MPLBACKEND="Agg", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    from attacks import KINDS

    import maskvlm.cli.lightning
    import maskvlm.inference.pretrained  # noqa: F401  imported once: children are forks

    cases = [(kind, name) for kind, table in KINDS.items() for name in table if kind != "encoder"][:: options.every]
    problems = {f"{kind}: {name}": run(kind, name, number) for number, (kind, name) in enumerate(cases)}
    for name, problem in problems.items():
        if problem:
            print(f"{name}: {problem}")
    print(f"{len(cases)} attacks, {sum(map(bool, problems.values()))} got through or did not end in one line")
    return int(any(problems.values()))


def run(kind: str, name: str, number: int) -> str:
    """What an attack reached, or how its command ended otherwise than in one line; empty if all is well."""
    from attacks import Place, write

    with tempfile.TemporaryDirectory() as scratch:
        place = Place(Path(scratch))
        packages, source, target = place.prepare(), str(write(kind, name, place)), str(place.here / "target")
        words = [["convert", source, target], ["export", "--from", source, target, "--format", "torch"]][number % 2]
        out, deeds = place.here / "out.txt", place.here / "deeds.txt"
        child = os.fork()
        if child == 0:
            code = 99
            try:
                sys.path.insert(0, str(packages))
                code = in_child(words, place, out, deeds)
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said = out.read_text(errors="replace").splitlines()
        errors = [line for line in said if line.startswith("error: ")]
        reached = deeds.read_text().splitlines() + ["code ran"] * place.mark.exists()
    if reached or code not in CODES or len(errors) != (code != 0):
        return f"{words[0]} ended with {code}, {reached}: {(errors or said[-1:] or [''])[0][:300]}"
    return ""


def in_child(words: list[str], place: Any, out: Path, deeds: Path) -> int:
    from watching import limited, watched

    from maskvlm.cli.main import main as maskvlm

    os.chdir(place.here)
    file = os.open(out, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    with watched() as seen:
        try:
            with limited(SECONDS):
                code = maskvlm(words)
        except BaseException:
            traceback.print_exc()
            code = 98
    wrong = ("connect", f"read {place.secret}", "run ('touch", "run (b'touch")
    deeds.write_text("\n".join(deed for deed in seen if deed.startswith(wrong)))
    return code


if __name__ == "__main__":
    sys.exit(main())
