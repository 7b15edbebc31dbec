"""`maskvlm publish` against a hub on this machine, over HTTP: what it tells, what arrives, what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_hub import TOKEN
from toy_pretrained import content_of, saved, toy_model

from maskvlm.checkpoint import io as checkpoint
from maskvlm.cli.convert import convert
from maskvlm.cli.publish import DTYPES, compared, outputs
from maskvlm.inference.hf_config import without_folders
from maskvlm.inference.pretrained import MaskVLMOutput, PretrainedMaskVLM
from maskvlm.utils.errors import UserError

SCRIPT = """
import contextlib, io, json, os, sys
from fake_hub import FakeHub

folder, token, outcomes = sys.argv[1], sys.argv[2], {}
with FakeHub() as hub:
    os.environ["HF_ENDPOINT"] = hub.address  # read when the client is imported
    import torch
    from maskvlm import MaskVLM
    from maskvlm.cli.main import main

    def publish(name, *words, token=token, source="best.ckpt"):
        os.environ.pop("HF_TOKEN", None)
        if token:
            os.environ["HF_TOKEN"] = token
        out, err, before = io.StringIO(), io.StringIO(), len(hub.requests)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(["publish", f"from={folder}/{source}", *words])
        wrote = [line for line in hub.requests[before:] if line.startswith("POST")]
        outcomes[name] = [code, out.getvalue(), err.getvalue(), sorted(hub.files), wrote]

    hub.files["other/toy"] = {}
    publish("dry", "to=acme/toy", "--dry-run", "--folder", folder + "/kept")
    publish("no token", "to=acme/toy", "--dry-run", token="")
    publish("theirs", "to=other/toy")
    publish("too large", "to=acme/toy", source="large.ckpt")
    publish("folder there", "to=acme/toy", "--folder", folder)
    publish("up", "to=acme/toy")
    publish("tuned", "to=ann/vqa", "--private", source="vqa.ckpt")
    outcomes["created"] = hub.created
    loaded, ours = MaskVLM.from_pretrained("ann/vqa"), MaskVLM.from_pretrained(f"{folder}/vqa.ckpt")
    theirs, mine = loaded.state_dict(), ours.state_dict()
    outcomes["equal"] = all(torch.equal(theirs[key], mine[key].half().float()) if mine[key].is_floating_point()
                        else torch.equal(theirs[key], mine[key]) for key in mine)
    outcomes["card"] = hub.files["acme/toy"]["README.md"].decode()
    outcomes["files"] = sorted(hub.files["acme/toy"])
print(json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    saved(run / "best.ckpt")
    (run / "metrics.json").write_text('{"step": 6, "retrieval/tr_r10": 12.5, "retrieval/tr_r5": 7}')
    (run / "card.json").write_text('{"data": {"settings": {"root": "/home/ann/sets/mine"}}}')
    saved(run / "vqa.ckpt", "vqa")
    backbone, task, spec = toy_model("pretrain")
    content = content_of(backbone, task, spec)
    # More than float16 holds.
    content["state_dict"] = {
        key: value * 1e6 if key.startswith("backbone.text") and value.ndim == 2 else value
        for key, value in content["state_dict"].items()
    }
    checkpoint.save(content, run / "large.ckpt")
    return run


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, Any]:
    environment = {key: value for key, value in os.environ.items() if key != "HF_TOKEN"}
    environment |= {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SCRIPT, str(folder), TOKEN]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return record


@pytest.mark.slow
def test_a_dry_run_uploads_nothing_and_shows_what_convert_writes(
    outcomes: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    """Asking the models for the comparison leaves nothing behind in the files."""
    code, out, _, there, wrote = outcomes["dry"]
    assert (code, there, wrote) == (0, ["other/toy"], [])
    assert "acme/toy: is free; the token is of ann\n" in out
    assert "missing: the card's figures are from step 6, these weights from step 7\n" in out
    convert([str(folder / "best.ckpt"), str(tmp_path / "half"), "--dtype", DTYPES[0]])
    for file in (tmp_path / "half").iterdir():
        if file.name not in ("README.md", "checksums.json"):
            assert file.read_bytes() == (folder / "kept" / file.name).read_bytes(), file.name
    assert "/home" not in (folder / "kept" / "config.json").read_text()


@pytest.mark.slow
def test_what_is_uploaded_arrives_and_comes_down_the_same(outcomes: dict[str, Any], folder: Path) -> None:
    code, _, _, there, wrote = outcomes["up"]
    assert code == outcomes["tuned"][0] == 0
    assert "acme/toy" in there
    assert wrote
    assert outcomes["files"] == sorted(file.name for file in (folder / "kept").iterdir())
    assert 'MaskVLM.from_pretrained("acme/toy")' in outcomes["card"]
    assert not outcomes["created"]["acme/toy"].get("private")
    assert outcomes["created"]["ann/vqa"]["visibility"] == "private"
    assert outcomes["equal"]


@pytest.mark.slow
def test_a_mistake_is_one_line_and_nothing_is_written(outcomes: dict[str, Any]) -> None:
    for name, status in (("no token", 69), ("theirs", 69), ("too large", 73), ("folder there", 73)):
        code, _, err, there, wrote = outcomes[name]
        assert (name, code, len(err.splitlines())) == (name, status, 1)
        assert (there, wrote) == (["other/toy"], [])


def test_worse_weights_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "best.ckpt")
    before = outputs(PretrainedMaskVLM.from_pretrained(tmp_path / "best.ckpt"))
    assert "images 1.0000000 (largest difference 0.0e+00)" in compared(before, before, tmp_path)
    assert before.text_embeds is not None
    turned = MaskVLMOutput(**{**before, "text_embeds": before.text_embeds.flip(0)})
    with pytest.raises(UserError, match="vectors of texts have a cosine of"):
        compared(before, turned, tmp_path)


def test_folders_of_this_machine_stay_here() -> None:
    told = {
        "data=/home/me/mine": "data=mine",
        "/a/b/best.ckpt": "best.ckpt",
        "checkpoints/a/best.ckpt": "checkpoints/a/best.ckpt",
        "https://x.org/a/b": "https://x.org/a/b",
    }
    assert without_folders({"a": [*told, 1, None]}) == {"a": [*told.values(), 1, None]}
