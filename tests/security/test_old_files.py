"""What commit 89274c0 wrote still loads: a run that was stopped, and a folder of the hub's format."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoProcessor

from maskvlm.checkpoint.io import load
from maskvlm.checkpoint.warm_start import read_content
from maskvlm.cli.main import main
from maskvlm.inference.pretrained import PretrainedMaskVLM

OLD = Path(__file__).resolve().parents[1] / "fixtures" / "89274c0"


def test_the_folder_and_the_checkpoint_are_the_same_model() -> None:
    ours = PretrainedMaskVLM.from_pretrained(OLD / "run" / "last.ckpt")
    hub, auto = PretrainedMaskVLM.from_pretrained(OLD / "hub"), AutoModel.from_pretrained(OLD / "hub")
    for other in (hub, auto):
        state = other.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())
        assert other.score(torch.zeros(3, 48, 48), "a red circle") == ours.score(torch.zeros(3, 48, 48), "a red circle")
    stored = load(OLD / "run" / "last.ckpt")["state_dict"]
    assert torch.equal(stored["backbone.image.mask_token"], ours.backbone.image.mask_token)
    assert read_content(OLD / "hub")["tokenizer"] == load(OLD / "run" / "last.ckpt")["tokenizer"]


def test_the_processor_of_the_folder_does_what_its_model_expects() -> None:
    processor = AutoProcessor.from_pretrained(OLD / "hub")
    assert type(processor).__name__ == "MaskVLMProcessor"
    inputs = processor(text=["a red circle"], return_tensors="pt")
    model = PretrainedMaskVLM.from_pretrained(OLD / "hub")
    assert inputs["input_ids"].tolist() == model.tokens(["a red circle"]).token_CT.tolist()
    assert (processor.image_processor.size["height"], processor.tokenizer.model_max_length) == (48, 28)


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps were made by that commit, three are made here."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(OLD / "run", "run")
    assert main(["fit", "-c", "run/config-fit.yaml", "--run", "run"]) == 0
    assert json.loads((tmp_path / "run" / "versions.json").read_text())["finished"]["step"] == 6
    was, now = load(OLD / "run" / "last.ckpt"), load("run/last.ckpt")
    assert (was["global_step"], now["global_step"]) == (3, 6)
    assert [entry["steps"] for entry in now["lineage"]] == [6]
