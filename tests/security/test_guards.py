"""The tests of guards themselves: a guard that is taken away is gone everywhere, and comes back."""

import subprocess

import pytest
from guards import Build, without

from maskvlm.config import safe_yaml as config
from maskvlm.config.safe_yaml import check_yaml
from maskvlm.utils.errors import UserError, check_least


def test_a_guard_is_taken_away_wherever_it_was_imported_to_and_comes_back() -> None:
    with without("maskvlm.config.safe_yaml:check_yaml"):
        assert check_yaml("a: !!python/name:os.system", "x") is None
        assert config.check_yaml("a: !!python/name:os.system", "x") is None
    with pytest.raises(UserError):
        check_yaml("a: !!python/name:os.system", "x")


@pytest.mark.guard("maskvlm.utils.errors:check_least")
def test_a_marked_test_runs_with_the_guard_and_without_it(build: Build) -> None:
    with pytest.raises(UserError):
        check_least(1, {"k": 0})


def test_a_process_of_its_own_runs_without_the_guard() -> None:
    whole, broken = Build(), Build("maskvlm.cli.main:tool", "lambda words: 7")
    codes = [subprocess.run(b.command("no.such"), capture_output=True).returncode for b in (whole, broken)]
    assert codes == [2, 7]
