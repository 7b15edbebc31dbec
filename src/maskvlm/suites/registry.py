"""The available suites: each file of this package with a `Suite`, and classes of your own packages."""

import importlib
from pathlib import Path

from maskvlm.suites.suite import Suite
from maskvlm.utils.errors import ExitCode, UserError

HERE = Path(__file__).parent


def suite_names() -> list[str]:
    """Names of this project's suites, sorted."""
    # Found by their text: importing them all would take time.
    return sorted(path.stem for path in HERE.glob("*.py") if "(Suite):\n" in path.read_text(encoding="utf-8"))


def suite_class(name: str) -> type[Suite]:
    """A suite by its name, or your own by its class path, such as `acme.birds.BirdPairs`.

    Raises:
        UserError: it does not exist or lacks a part (2), or cannot be imported (66).
    """
    if name in suite_names():
        module = importlib.import_module(f"{__package__}.{name}")
        return next(each for each in vars(module).values() if _is_suite(each) and each.__module__ == module.__name__)
    if "." not in name:
        todo = f"Available: {', '.join(suite_names())}, and the path of a class, such as acme.birds.BirdPairs"
        raise UserError(f"suite {name[:80]}", "no such suite", todo)
    module_name, _, kind = name.rpartition(".")
    try:
        candidate = getattr(importlib.import_module(module_name), kind)
    except (ImportError, AttributeError, ValueError) as error:
        todo = "Install the package that it is in, or correct the name"
        raise UserError(f"suite {name[:80]}", f"cannot be imported ({error})", todo, ExitCode.MISSING_INPUT) from error
    if not _is_suite(candidate):
        raise UserError(f"suite {name[:80]}", "is not a suite", "Name a class of maskvlm.suites.suite.Suite")
    suite: type[Suite] = candidate
    if missing := sorted(suite.__abstractmethods__):
        todo = f"Define {'them' if len(missing) > 1 else 'it'} in the class, see docs/suites.md"
        raise UserError(f"suite {name[:80]}", f"has no {', '.join(missing)}", todo)
    return suite


def _is_suite(candidate: object) -> bool:
    return isinstance(candidate, type) and issubclass(candidate, Suite) and candidate is not Suite
