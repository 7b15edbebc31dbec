"""`maskvlm publish` against a hub on this machine, over HTTP: what it tells, what arrives, what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_hub import TOKEN
from toy_pretrained import LINEAGE_ENTRY, content_of, saved, toy_model

from maskvlm.checkpoint import io as checkpoint
from maskvlm.cli.convert import convert
from maskvlm.cli.publish import DTYPES, compared, data_lines, known_sets, missing, outputs
from maskvlm.inference.hf_config import MaskVLMConfig, without_folders
from maskvlm.inference.model_card import KnownSet, limits
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
    publish("wrong token", "to=acme/toy", token="hf_wrong")
    publish("theirs", "to=other/toy")
    publish("free, not yours", "to=other/new")
    hub.account["auth"]["accessToken"]["role"] = "read"
    publish("may only read", "to=acme/toy")
    hub.account["auth"]["accessToken"]["role"] = "write"
    publish("too large", "to=acme/toy", source="large.ckpt")
    publish("no owner", "to=toy")
    publish("no name", "to=a b/toy")
    publish("no target")
    publish("no such file", "to=acme/toy", source="none.ckpt")
    publish("no such dtype", "to=acme/toy", "--dtype", "int8")
    publish("folder there", "to=acme/toy", "--folder", folder)
    publish("up", "to=acme/toy")
    publish("again", "to=acme/toy", "--dtype", "bfloat16")
    publish("tuned", "to=ann/vqa", "--private", source="vqa.ckpt")
    outcomes["created"] = hub.created
    loaded, ours = MaskVLM.from_pretrained("ann/vqa"), MaskVLM.from_pretrained(f"{folder}/vqa.ckpt")
    inputs = torch.zeros(20, 20, 3, dtype=torch.uint8).numpy(), "is it red"
    outcomes["answers"] = [str(model.answer(*inputs)) for model in (loaded, ours)]
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


def test_a_dry_run_tells_everything_and_uploads_nothing(outcomes: dict[str, Any], folder: Path) -> None:
    code, out, _, there, wrote = outcomes["dry"]
    assert code == 0
    assert there == ["other/toy"]
    assert wrote == []
    sizes = {file.name: file.stat().st_size for file in (folder / "kept").iterdir()}
    lines = [line.split() for line in out.splitlines()]
    assert {line[1]: int(line[0].replace(",", "")) for line in lines[: len(sizes)]} == sizes
    assert "acme/toy: is free; the token is of ann\n" in out
    assert "trained on: drawn scenes (maskvlm.data.scenes.source.Scenes)" in out
    assert "missing: the card's figures are from step 6, these weights from step 7\n" in out
    assert "missing: the command that made it is unknown" in out
    assert "no metrics" not in out
    assert "no metrics" not in outcomes["up"][1]


def test_what_is_published_is_what_convert_writes(outcomes: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    """Asking the models for the comparison leaves nothing behind in the files."""
    assert outcomes["dry"][0] == 0
    convert([str(folder / "best.ckpt"), str(tmp_path / "half"), "--dtype", DTYPES[0]])
    for file in (tmp_path / "half").iterdir():
        if file.name not in ("README.md", "checksums.json"):
            assert file.read_bytes() == (folder / "kept" / file.name).read_bytes(), file.name
    assert "/home" not in (folder / "kept" / "config.json").read_text()


def test_what_is_uploaded_arrives_with_its_name_in_its_card(outcomes: dict[str, Any], folder: Path) -> None:
    code, out, _, there, wrote = outcomes["up"]
    assert code == 0
    assert "acme/toy" in there
    assert wrote
    assert "uploaded: http" in out
    assert outcomes["files"] == sorted(file.name for file in (folder / "kept").iterdir())
    assert 'MaskVLM.from_pretrained("acme/toy")' in outcomes["card"]
    assert outcomes["card"].index("retrieval/tr_r5") < outcomes["card"].index("retrieval/tr_r10")
    assert "knows drawn scenes alone (at most 3 " in outcomes["card"]
    assert not outcomes["created"]["acme/toy"].get("private")
    code, out, _, _, wrote = outcomes["again"]
    assert code == 0
    assert wrote
    assert "acme/toy: already exists; an upload adds a commit to it" in out


def test_a_fine_tuned_model_goes_up_private_and_comes_down_the_same(outcomes: dict[str, Any]) -> None:
    code, out, *_ = outcomes["tuned"]
    assert code == 0
    assert "pairs " in out
    assert "missing: no metrics" not in out  # they lie beside it
    assert outcomes["created"]["ann/vqa"]["visibility"] == "private"
    assert outcomes["equal"]
    assert outcomes["answers"][0].split("(")[0] == outcomes["answers"][1].split("(")[0]


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("no token", 69, "acme/toy: is free; there is no token to upload with. Log in (hf auth login)"),
        ("wrong token", 69, "acme/toy: the hub rejects the token, or cannot be reached ("),
        ("theirs", 69, "other/toy: already exists; the token is of ann, who is neither other nor a member of it."),
        ("free, not yours", 69, "other/new: is free; the token is of ann, who is neither"),
        ("may only read", 69, "acme/toy: is free; the token of ann may only read."),
        ("too large", 73, "large.ckpt: --dtype: float16 cannot hold numbers of backbone.text."),
        ("no owner", 2, "to=toy: names no owner. Give owner/name."),
        ("no name", 2, "to=a b/toy: is not a valid hub name ("),
        ("no target", 2, "the following arguments are required: --to"),
        ("no such file", 66, "none.ckpt"),
        ("no such dtype", 2, "--dtype"),
        ("folder there", 73, "already exists. Name another one."),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    outcomes: dict[str, Any], name: str, status: int, message: str
) -> None:
    code, _, err, there, wrote = outcomes[name]
    assert code == status, err
    assert message in err
    assert len(err.splitlines()) == 1
    assert there == ["other/toy"]
    assert wrote == []


def test_worse_weights_are_refused(folder: Path) -> None:
    model = PretrainedMaskVLM.from_pretrained(folder / "best.ckpt")
    before = outputs(model)
    assert "images 1.0000000 (largest difference 0.0e+00)" in compared(before, before, folder)
    assert before.text_embeds is not None
    turned = MaskVLMOutput(**{**before, "text_embeds": before.text_embeds.flip(0)})
    with pytest.raises(UserError, match="vectors of texts have a cosine of"):
        compared(before, turned, folder)


def test_a_set_is_known_by_its_hash_or_by_the_folder_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text("{")
    entry = LINEAGE_ENTRY._replace(source="maskvlm.data.prepared.source.Prepared", sha="ab" * 8)
    card = {"data": {"settings": {"root": "flickr8k"}}}
    first, second = entry._replace(sha="cd" * 8), entry
    sets = known_sets([first, second], card)
    assert sets.keys() == {second.sha}
    assert sets[second.sha].licence.startswith("non-commercial")
    lines = [*data_lines([first, second, second], sets)]
    assert len(lines) == 2
    assert "a set that the history does not name" in lines[0]
    assert "`flickr8k`" in lines[1]
    split = {"sha256": "cd" * 32}
    manifest = {"title": "Mine", "licence": "CC0", "splits": {"train": split}}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "manifest.json").touch()
    monkeypatch.setattr("maskvlm.cli.publish.read_manifest", lambda _: manifest)
    assert known_sets([first], {}) == {first.sha: KnownSet("Mine", "CC0")}


def test_what_is_not_known_is_said() -> None:
    lines = [*missing(MaskVLMConfig(step=3))]
    assert [line.partition(" ")[0] for line in lines] == ["no", "the", "the", "part"]
    versions = {"command": ["pretrain"], "commit": "abc+"}
    config = MaskVLMConfig(evaluation={"card": {"versions": versions}, "metrics": {"step": 3}}, step=3)
    assert "abc+" in next(missing(config))
    assert limits([LINEAGE_ENTRY.words() | {"source": "unknown"}]).endswith("is unknown.")
    photographs = LINEAGE_ENTRY.words() | {"source": "x.Y"}
    assert "at most 3 different images with their texts: " in limits([photographs] * 2)
    drawn = LINEAGE_ENTRY.words() | {"source": "maskvlm.data.scenes.source.Scenes", "sha": "1"}
    assert "at most 6 different images with their texts, a part of them drawn scenes: " in limits([photographs, drawn])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data=/home/me/mine", "data=mine"),
        ("/a/b/best.ckpt", "best.ckpt"),
        ("checkpoints/a/best.ckpt", "checkpoints/a/best.ckpt"),
        ("https://x.org/a/b", "https://x.org/a/b"),
        ("../a/b", "../a/b"),
        ("1 / 2", "1 / 2"),
    ],
)
def test_folders_of_this_machine_stay_here(text: str, expected: str) -> None:
    assert without_folders({"a": [text, 1, None]}) == {"a": [expected, 1, None]}
