"""Edits of configuration files and command lines, as a stranger or a slip of the hand makes them.

Pure functions of a text and a `random.Random`, so that the same seed gives the same mutant in a short test and in a
long run. FOREIGN is the name of a module that must not be imported.
"""

import random
from collections.abc import Callable
from typing import Any

import yaml

FOREIGN = "foreign_module_of_a_stranger"
DANGEROUS = (
    "os.system",
    "subprocess.Popen",
    "builtins.exec",
    "builtins.eval",
    "builtins.open",
    "shutil.rmtree",
    "importlib.import_module",
    "functools.partial",
    "torch.load",
    "torch.hub.load",
    "torch.utils.collect_env.run",
    "torch.utils.cpp_extension.load",
    "torch.distributed.elastic.multiprocessing.subprocess_handler.SubprocessHandler",
    "lightning.pytorch.callbacks.LambdaCallback",
    "lightning.pytorch.cli.instantiate_class",
    "lightning.fabric.utilities.cloud_io.get_filesystem",
    "maskvlm.utils.whole_files.write_text",
    "maskvlm.cli.slurm.submit",
    "maskvlm.config.parser.LightningArgumentParser",
    "maskvlm.model.maskvlm.MaskVLM.load_state_dict",
    "tasks.vqa.score.main",
    "jsonargparse.set_parsing_settings",
    f"{FOREIGN}.Run",
    f"{FOREIGN}.deep.Run",
    "LambdaCallback",
    "WandbLogger",
)
VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    2**63,
    -(2**70),
    10**30,
    1e308,
    float("inf"),
    float("nan"),
    "",
    " ",
    "x" * 5_000,
    "1" * 4_000,
    "ja\u0308\u202e\U0001f415",
    "\ud800",
    "\x00",
    "\x1b[2J",
    "{run}",
    "${oc.env:HOME}",
    "${oc.env:NO_SUCH_VARIABLE}",
    "${oc.env:NO_SUCH_VARIABLE,${oc.env:HOME,x}}",
    "${oc.decode:os.system}",
    "${oc.create:{a: 1}}",
    "${model.lr}",
    "${",
    "/dev/zero",
    "/dev/stdin",
    "/",
    "https://example.invalid/x.yaml",
    "s3://bucket/x",
    [],
    {},
    [[]],
    {"a": {"b": 1}},
    {1: 2},
    [1, "x", None, {}],
)
KEYS = ("__init__", "__class__", "__path__", "_target_", "class_path", "init_args", "dict_kwargs", "config", "$schema")
MORE_KEYS = ("", ".", "a.b.c", "model.lr", "trainer", "callbacks+", "x" * 300, "run", "from", "1", "on", "ä")
LINES = (
    "x: !!python/object/apply:os.system ['touch marker']",
    "x: !!python/name:os.system",
    "x: !!int abc",
    "x: !!timestamp foo",
    "x: !!binary aGVsbG8=",
    "x: !foo bar",
    "x: [0.9, 0.9:]",
    "x: " + "9" * 5_000,
    "x: 1:1:1:1.",
    "x: 0b_",
    "<<: {a: 1}",
    "=: 1",
    "? [a, b]\n: c",
    "x: &a [*a]",
    "x: *nothing",
    "a0: &a0 [x, x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)),
    "x: " + "[" * 3_000,
    "x: " + "{a: " * 60 + "1" + "}" * 60,
    "%YAML 99999999999.1",
    "--- x",
    "x: '",
    "x: \t\t- y",
    'x: "\\UFFFFFFFF"',
    'x: "\\ud800"',
    "trainer: 5",
    "model: [1]",
    "data:",
    "\ufeff",
)


def mutate(text: str, draw: random.Random) -> bytes:
    """One mutant of a configuration file: one to three edits of its content, or of its bytes."""
    edits: list[Callable[[str, random.Random], str | bytes]] = [a_value, a_key, a_class, a_line, a_spec, a_doubled_key]
    mutant: str | bytes = text
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        edit = draw.choice(edits)
        mutant = edit(mutant, draw) if isinstance(mutant, str) else mutant
    if draw.random() < 0.25:
        return some_bytes(mutant, draw)
    return mutant.encode("utf-8", "surrogatepass") if isinstance(mutant, str) else mutant


def _loaded(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, OverflowError, KeyError, AttributeError, RecursionError, TypeError):
        return None


def _spots(value: Any) -> list[tuple[Any, Any]]:
    """Every container with every key or index in it; each container once, as aliases may multiply."""
    spots: list[tuple[Any, Any]] = []
    seen_ids, todo = {id(value)}, [value]
    while todo:
        one = todo.pop()
        for key, part in one.items() if isinstance(one, dict) else enumerate(one) if isinstance(one, list) else ():
            spots.append((one, key))
            if id(part) not in seen_ids:
                seen_ids.add(id(part))
                todo.append(part)
    return spots


def _edited(text: str, draw: random.Random, edit: Callable[[Any, Any], None]) -> str:
    tree = _loaded(text)
    spots = _spots(tree)
    if not spots:
        return text
    edit(*draw.choice(spots))
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def a_value(text: str, draw: random.Random) -> str:
    """Another value somewhere, of any type."""
    return _edited(text, draw, lambda container, key: container.__setitem__(key, draw.choice(VALUES)))


def a_key(text: str, draw: random.Random) -> str:
    """A key that is not known there, or a known one somewhere else, or one misspelt."""

    def edit(container: Any, key: Any) -> None:
        if isinstance(container, list):
            container.append({draw.choice(KEYS): draw.choice(VALUES)})
            return
        value = container[key]
        if draw.random() < 0.5:
            del container[key]
        name = str(key)
        at = draw.randrange(len(name) + 1)
        wrong = name[:at] + draw.choice("abcxyz._+ -") + name[at + 1 :]
        container[draw.choice((*KEYS, *MORE_KEYS, wrong, wrong, wrong))] = value

    return _edited(text, draw, edit)


def _spec(draw: random.Random) -> Any:
    path = draw.choice(DANGEROUS)
    args = draw.choice(({}, {"command": "touch marker"}, {"args": ["touch", "marker"]}, {"x": {"class_path": path}}))
    key = draw.choice(("init_args", "init_args", "dict_kwargs"))
    return draw.choice((path, {"class_path": path}, {"class_path": path, key: args}, [{"class_path": path, key: args}]))


def a_spec(text: str, draw: random.Random) -> str:
    """The path of something dangerous, alone or with arguments, in the place of a value."""
    return _edited(text, draw, lambda container, key: container.__setitem__(key, _spec(draw)))


def a_class(text: str, draw: random.Random) -> str:
    """Something dangerous where a class is named already, or where callables are taken."""
    tree = _loaded(text)
    spots = [spot for spot in _spots(tree) if spot[1] == "class_path"]
    if not isinstance(tree, dict) or (spots and draw.random() < 0.5):
        if not spots:
            return text
        container, key = draw.choice(spots)
        container[key] = draw.choice(DANGEROUS)
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    trainer = tree.setdefault("trainer", {})
    path = draw.choice(DANGEROUS)
    if isinstance(trainer, dict):
        lightning = "lightning.pytorch"
        key, value = draw.choice(
            (
                (
                    "strategy",
                    {"class_path": f"{lightning}.strategies.DDPStrategy", "init_args": {"ddp_comm_hook": path}},
                ),
                ("callbacks", [{"class_path": "LambdaCallback", "init_args": {"setup": path}}]),
                ("callbacks", [{"class_path": f"{lightning}.callbacks.LambdaCallback", "init_args": {"setup": path}}]),
                ("callbacks+", {"class_path": path}),
                ("profiler", {"class_path": "PyTorchProfiler", "dict_kwargs": {"schedule": {"class_path": path}}}),
                ("logger", _spec(draw)),
                ("plugins", [_spec(draw)]),
                ("accelerator", _spec(draw)),
            )
        )
        trainer[key] = value
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def a_line(text: str, draw: random.Random) -> str:
    """A line of YAML that is odd, hostile or broken, indented as its neighbour or not at all."""
    lines = text.splitlines()
    at = draw.randrange(len(lines) + 1)
    margin = ""
    if lines and draw.random() < 0.7:
        neighbour = lines[min(at, len(lines) - 1)]
        margin = neighbour[: len(neighbour) - len(neighbour.lstrip(" -"))].replace("-", " ")
    new = draw.choice(LINES)
    return "\n".join([*lines[:at], *(margin + line for line in new.splitlines()), *lines[at:]]) + "\n"


def a_doubled_key(text: str, draw: random.Random) -> str:
    """A line twice, taken out, or moved."""
    lines = text.splitlines()
    if not lines:
        return text
    line = lines.pop(draw.randrange(len(lines))) if draw.random() < 0.5 else draw.choice(lines)
    for _ in range(draw.randrange(3)):
        lines.insert(draw.randrange(len(lines) + 1), line)
    return "\n".join(lines) + "\n"


def some_bytes(text: str | bytes, draw: random.Random) -> bytes:
    """Flipped, cut, doubled or foreign bytes."""
    content = bytearray(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
    for _ in range(draw.randint(1, 8)):
        at = draw.randrange(len(content) + 1)
        kind = draw.randrange(5)
        if kind == 0 and at < len(content):
            content[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            content[at:at] = bytes(
                draw.choice(b"\x00\xff\xfe:&*!|>%@`{}[]\"'#\t\n-") for _ in range(draw.randint(1, 4))
            )
        elif kind == 2:
            del content[at : at + draw.randint(1, 40)]
        elif kind == 3:
            content[at:at] = content[at : at + draw.randint(1, 200)]
        elif draw.random() < 0.3:
            return (
                bytes(content)
                .decode("utf-8", "replace")
                .encode(draw.choice(("utf-16", "latin-1", "utf-32")), "replace")
            )
    return bytes(content)


def words(known: list[str], draw: random.Random) -> list[str]:
    """The options of a command line: known keys with odd values, unknown ones, and words that are no options."""
    options: list[str] = []
    for _ in range(draw.randint(1, 4)):
        key = draw.choice(known)
        if draw.random() < 0.3:
            at = draw.randrange(len(key))
            key = key[:at] + draw.choice("abcxyz.+-=") + key[at + draw.randrange(2) :]
        value = draw.choice(VALUES) if draw.random() < 0.6 else _spec(draw)
        written = (
            value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=10**9).strip()
        )
        written = written.removesuffix("...").strip()
        options += draw.choice(
            (
                [f"--{key}", written],
                [f"--{key}={written}"],
                [f"--{key}"],
                [f"--{key}", written, f"--{key}", written],
                [written],
                [f"--{key}+", written],
                [f"--{key}.class_path", written],
                [f"--{key}.help", written],
                ["-c", written],
                ["-c"],
                ["--", written],
                [f"-{key}"],
                [f"--{key}", draw.choice(LINES)],
                [draw.choice(("x", "--x", "--x=")) * 400_000],
            )
        )
    return options
