"""The provenance report: every tensor in it, once, with the right origin."""

import io
import json
from pathlib import Path

from rich.console import Console
from torch import nn

from maskvlm.checkpoint.provenance import Origin, Provenance, part_of
from maskvlm.checkpoint.weights import load_pretrained
from maskvlm.model.encoders import TextEncoder
from maskvlm.model.maskvlm import MaskVLM
from tests.formats import image_encoder, save_bert, save_vit


def test_the_report_counts_every_tensor(tmp_path: Path) -> None:
    vit_file = save_vit(tmp_path)
    save_bert(tmp_path)
    image, text = image_encoder(vit_file, 96), TextEncoder(str(tmp_path), 12)
    loaded = load_pretrained(image, text)
    model = nn.ModuleDict(
        {"backbone": MaskVLM(image, text, 1, 2), "task": nn.ModuleDict({"tokens": nn.Linear(32, 60)})}
    )
    provenance = loaded.under("backbone").complete(model)
    assert list(provenance.tensors) == list(model.state_dict())
    assert list(provenance.parts()) == ["image", "text", "cross_image", "cross_text", "tokens"]
    provenance.save(tmp_path / "provenance.json")
    stored = json.loads((tmp_path / "provenance.json").read_text())
    numbers = {name: value.numel() for name, value in model.state_dict().items()}
    counts = stored["parts"]["image"]
    position = 37 * 32
    assert counts["resized"] == {"tensors": 1, "parameters": position}
    assert counts["random"] == {"tensors": 1, "parameters": 32}  # the mask token
    assert counts["loaded"]["parameters"] == sum(p.numel() for p in image.parameters()) - position - 32
    assert stored["parts"]["tokens"]["random"] == {"tensors": 2, "parameters": 33 * 60}
    assert stored["parts"]["text"]["random"]["tensors"] == 0
    assert sum(c["parameters"] for part in stored["parts"].values() for c in part.values()) == sum(numbers.values())
    assert stored["tensors"]["backbone.image.vit.pos_embed"] == {
        "how": "resized", "shape": [1, 37, 32], "was": [1, 17, 32], "source": str(vit_file)
    }  # fmt: skip
    console = Console(width=500, record=True, file=io.StringIO())
    console.print(provenance.table())
    lines = {line.split()[1]: line for line in console.export_text().splitlines() if line.count("│") > 5}
    assert "vit.pos_embed [1, 17, 32] -> [1, 37, 32]; random: mask_token" in lines["image"]
    tensors = len(model["backbone"].cross_text.state_dict())
    assert lines["cross_text"].split()[3:8:2] == ["-", "-", str(tensors)]


def test_a_start_from_nothing_is_one_line() -> None:
    provenance = Provenance({"a": Origin("random", (2, 3)), "b": Origin("random", (2,))})
    assert provenance.table() == "weights: all random, 2 tensors, 8 parameters"
    assert not isinstance((provenance | Provenance({"b": Origin("loaded", (2,), "x")})).table(), str)


def test_what_is_loaded_later_counts() -> None:
    first = Provenance({"a": Origin("loaded", (2,), "old"), "b": Origin("loaded", (2,), "old")})
    later = Provenance({"b": Origin("loaded", (2,), "new")})
    assert [origin.source for origin in (first | later).tensors.values()] == ["old", "new"]
    assert list(first.under("x").tensors) == ["x.a", "x.b"]
    assert [part_of(n) for n in ("backbone.image.vit.norm.bias", "task.tokens.weight", "image.a", "a")] == [
        "image", "tokens", "image", "a"
    ]  # fmt: skip
