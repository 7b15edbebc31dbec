"""A model goes up to a hub and comes down again by the hub's own client, over HTTP."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_hub import TOKEN, FakeHub
from toy_pretrained import saved

from maskvlm.inference.pretrained import PretrainedMaskVLM

SCRIPT = """
import json, sys
from pathlib import Path
import torch
from maskvlm import MaskVLM
from maskvlm.utils.errors import UserError

path, token, folder = sys.argv[1:]
model, report = MaskVLM.from_pretrained(path), {}
report["commit"] = str(model.push_to_hub("acme/toy", token=token))
model.save_pretrained(folder, push_to_hub=True, repo_id="acme/again", token=token)
other = MaskVLM.from_pretrained("acme/toy")
ours, theirs = model.state_dict(), other.state_dict()
report["equal"] = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
for name, ask in (
    ("wrong token", lambda: model.push_to_hub("acme/toy", token="hf_wrong")),
    ("no name", lambda: model.push_to_hub("not a name", token=token)),
    ("unknown", lambda: MaskVLM.from_pretrained("acme/none")),
):
    try:
        ask()
    except UserError as error:
        report[name] = [str(error), int(error.code)]
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("run") / "best.ckpt"
    saved(file)
    file.with_name("metrics.json").write_text('{"step": 7, "retrieval/tr_r1": 12.5, "retrieval/tr_r1_chance": 0.5}')
    return file


def test_what_goes_up_comes_down(path: Path, tmp_path: Path) -> None:
    with FakeHub() as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home")}
        environment |= {"HF_HUB_OFFLINE": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", SCRIPT, str(path), TOKEN, str(tmp_path / "folder")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert report["commit"].startswith(f"{hub.address}/acme/toy/commit/")
    assert report["equal"]
    PretrainedMaskVLM.from_pretrained(path).save_pretrained(tmp_path / "local")
    local = {file.name: file.read_bytes() for file in sorted((tmp_path / "local").iterdir())}
    for name in ("acme/toy", "acme/again"):
        remote = hub.files[name]
        assert remote.keys() == local.keys()
        # The card knows the name, and the sums know the card.
        assert [file for file in local if remote[file] != local[file]] == ["README.md", "checksums.json"]
        assert remote["README.md"].replace(b"# " + name.encode(), b"# MaskVLM") == local["README.md"].replace(
            b"THIS_FOLDER_OR_HUB_NAME", name.encode()
        )
    assert b"| retrieval/tr_r1 | 12.5 | 0.5 |" in local["README.md"]  # the card of this project, not a template
    assert (tmp_path / "folder" / "README.md").read_bytes() == hub.files["acme/again"]["README.md"]
    for name, message, code in (
        ("wrong token", "acme/toy: cannot be uploaded (Client error '401", 69),
        ("no name", "not a name: cannot be uploaded (", 69),
        ("unknown", "acme/none: the hub has no acme/none", 66),
    ):
        line, status = report[name]
        assert line.startswith(message), line
        assert status == code
        assert "\n" not in line
