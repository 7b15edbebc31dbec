"""What is built without the command line: the how-to page runs as it stands, and its checkpoint is one of ours."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from toys import toy_backbone

from maskvlm import MaskVLM
from maskvlm.checkpoint.model_spec import spec_of_modules
from maskvlm.model.encoders import ImageEncoder
from maskvlm.objectives.masking import RandomBlocks
from maskvlm.objectives.pretraining import MaskedPretraining
from maskvlm.utils.constructor import given_arguments

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/how-to/in-python.md"
SIZES = ["--data.steps=1", "--data.batch_size=4", "--data.source.train=8", "--data.source.val=4"]


def maskvlm(*words: str, folder: Path) -> None:
    """Run a command in a folder."""
    subprocess.run([sys.executable, "-m", "maskvlm", *words], cwd=folder, check=True, capture_output=True)


def test_the_page_runs_and_its_checkpoint_is_one_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    maskvlm("scene", "3", folder=tmp_path)
    known: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), known)
    assert known["terms"].keys() == {"itc", "itm", "mlm", "mim"}
    # The checkpoint of the second block says what it is of.
    asked, content = MaskVLM.from_pretrained("mine.ckpt"), torch.load("mine.ckpt", weights_only=True)
    trained: dict[str, Tensor] = content["state_dict"]
    for name, value in asked.backbone.state_dict().items():
        torch.testing.assert_close(value, trained[f"backbone.{name}"], rtol=0, atol=0)
    assert asked.task.arguments["contrast_dim"] == 32
    assert "data.source" not in content["model"]  # nor where anything lay
    assert content["lineage"][0]["steps"] == 20
    maskvlm("finetune", "vqa", "from=mine.ckpt", "run=vqa", "where=cpu", *SIZES, folder=tmp_path)
    assert (tmp_path / "checkpoints/vqa/card.json").is_file()


class Narrow(ImageEncoder):
    """An encoder of one's own, which no checkpoint may name."""


def test_what_a_checkpoint_cannot_say_it_does_not_say() -> None:
    backbone, task = toy_backbone(), MaskedPretraining(contrast_dim=8, temperature=0.1)
    spec = spec_of_modules(backbone, task)
    assert spec is not None
    assert spec.task is not None
    assert spec.task["init_args"]["contrast_dim"] == 8
    assert spec.task["init_args"]["mask_block"] == 32  # a default, too
    assert yaml.safe_load(yaml.safe_dump(spec.backbone)) == spec.backbone
    spec = spec_of_modules(backbone, MaskedPretraining(image_masking=RandomBlocks(0.5, 16, 0.0)))
    assert spec is not None
    assert spec.task is None
    backbone.image.__class__ = Narrow
    assert spec_of_modules(backbone, task) is None


class Base:
    """Notes what its most specific class was built with."""

    def __init__(self, number: int) -> None:
        self.number, self.given = number, given_arguments(self)


class Middle(Base):
    def __init__(self, name: str = "none") -> None:
        super().__init__(7)
        self.name = name


class Whole(Middle):
    """Builds another one within its own constructor."""

    def __init__(self, *, size: float, **more: int) -> None:
        self.part = Middle("part")
        super().__init__()
        self.size = size


def test_a_base_class_sees_what_the_most_specific_class_was_given() -> None:
    made = Whole(size=0.5, extra=2)
    assert made.given == {"size": 0.5, "extra": 2}
    assert made.part.given == {"name": "part"}
    assert Base(number=3).given == {"number": 3}
