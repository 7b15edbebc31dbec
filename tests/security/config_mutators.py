"""Edits of configuration files and command lines, as a stranger or a slip of the hand makes them.

Pure functions of a text and a `random.Random`, so that the same seed gives the same mutant in a short test and in a
long run. FOREIGN is the name of a module that must not be imported.
"""

import random
from typing import Any

import yaml
from mutators import any_bytes, edited

FOREIGN = "foreign_module_of_a_stranger"
DANGEROUS = (
    "os.system", "builtins.exec", "shutil.rmtree", "torch.utils.collect_env.run", "LambdaCallback",
    "lightning.pytorch.callbacks.LambdaCallback", "maskvlm.utils.whole_files.write_text", "tasks.vqa.score.main",
    "jsonargparse.set_parsing_settings", f"{FOREIGN}.Run", f"{FOREIGN}.deep.Run",
)  # fmt: skip
SPECS: tuple[Any, ...] = (
    *DANGEROUS,
    *({"class_path": path, "init_args": {"command": "touch marker"}} for path in DANGEROUS),
    *([{"class_path": path, "dict_kwargs": {"x": {"class_path": path}}}] for path in DANGEROUS),
)
VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 2**63, -(2**70), 1e308, float("inf"), float("nan")),
    *("", " ", "x" * 5_000, "1" * 4_000, "ja\u0308\u202e\U0001f415", "\x1b[2J", "{run}", "/dev/zero", "/"),
    *("${oc.env:HOME}", "${oc.env:NO_SUCH_VARIABLE}", "${oc.decode:os.system}", "${oc.create:{a: 1}}", "${"),
    *("https://example.invalid/x.yaml", "s3://bucket/x", [], {}, [[]], {"a": {"b": 1}}, {1: 2}),
)
KEYS = ("__init__", "_target_", "class_path", "init_args", "dict_kwargs", "", "a.b.c", "callbacks+", "ä", "on")
LINES = (
    "x: !!python/object/apply:os.system ['touch marker']", "x: !!int abc", "x: !foo bar", "x: " + "9" * 5_000,
    "<<: {a: 1}", "? [a, b]\n: c", "x: &a [*a]", "x: *nothing", "x: " + "[" * 3_000, "%YAML 99999999999.1", "x: '",
    "a0: &a0 [x, x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)),
    'x: "\\ud800"', "trainer: 5", "model: [1]", "\ufeff",
)  # fmt: skip


def mutate(text: str, draw: random.Random) -> bytes:
    """One mutant of a configuration file: one to three edits of its content, a line of its own, or other bytes."""
    tree = yaml.safe_load(text)
    for _ in range(draw.choice((1, 1, 2, 3))):
        tree = edited(tree, draw, draw.choice((VALUES, SPECS)), KEYS)
    if isinstance(tree, dict) and isinstance(tree.get("trainer"), dict) and draw.random() < 0.3:
        key = draw.choice(("strategy", "callbacks", "callbacks+", "logger", "plugins", "profiler"))
        tree["trainer"][key] = draw.choice(SPECS)
    lines = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).splitlines()
    if draw.random() < 0.3:
        spot = draw.randrange(len(lines) + 1)
        lines[spot:spot] = [draw.choice((*LINES, *lines))]
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    return any_bytes(content, draw) if draw.random() < 0.25 else content


def words(known: list[str], draw: random.Random) -> list[str]:
    """The options of a command line: known keys with odd values, unknown ones, and words that are no options."""
    options: list[str] = []
    for _ in range(draw.randint(1, 4)):
        key, value = draw.choice([*known, *KEYS]), draw.choice((*VALUES, *SPECS, *LINES))
        written = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=10**9)
        written = written.strip().removesuffix("...").strip()
        options += draw.choice(
            [
                *([f"--{key}{more}", written] for more in ("", "+", ".class_path", ".help")),
                *([f"--{key}={written}"], [f"--{key}"], ["-c", written], ["--", written], ["--x" * 400_000]),
            ]
        )
    return options
