"""Records in a run's folder that inform: damaged, they stop nothing; the one that decides is one line.

And what an older version recorded stays the same run.
"""

from pathlib import Path

import pytest

from maskvlm.training.resume import finished, newest_of
from maskvlm.training.run_record import finish_run
from maskvlm.utils.errors import ExitCode, UserError


@pytest.mark.parametrize("content", [b"\xff{[", b"[]", b"[" * 5000, b'{"finished": {"step": 1e999}}'])
def test_a_damaged_record_stops_neither_beginning_nor_end(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "versions.json").write_bytes(content)
    assert finished(tmp_path) is None
    finish_run(tmp_path, 7, 9)
    assert finished(tmp_path) == 7


@pytest.mark.parametrize(
    "content", [b"\x00\xff" * 50, b"a: [", b"a: !!python/name:os.system x", b"x: " + b"[" * 500, b"a: &a {b: *a}"]
)
def test_damaged_settings_are_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config-fit.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"config-fit\.yaml.*--ckpt_path last") as caught:
        newest_of(tmp_path, "a: 1\n", print)
    assert caught.value.code == ExitCode.BAD_DATA
