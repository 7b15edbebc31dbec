"""Sets with annotations read from their prepared form as they are read from their files."""

import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maskvlm.data.images import safe_open
from maskvlm.data.prepare.finish import Plan
from maskvlm.data.prepare.prepare import prepare
from maskvlm.data.prepare.rows import Settings
from maskvlm.data.raw import open_raw
from maskvlm.utils.errors import UserError
from tasks.nlvr.data import Nlvr2
from tasks.vqa.data import VqaV2


def toy_image(path: Path, seed: int) -> None:
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize((80, 60), Image.Resampling.BICUBIC).save(path)


def nlvr(raw: Path) -> None:
    lines = [{"identifier": f"dev-{n}-0-0", "sentence": f"Pair {n}.", "label": "True"} for n in range(3)]
    (raw / "dev.json").write_text("\n".join(map(json.dumps, lines)))
    for n in range(3):
        for side in (0, 1):
            toy_image(raw / "images" / "dev" / f"dev-{n}-0-img{side}.png", 2 * n + side)


def vqa(raw: Path) -> None:
    part = "mscoco_val2014"
    questions = [{"question_id": n, "image_id": n + 5, "question": f"What is {n}?"} for n in range(3)]
    (raw / f"v2_OpenEnded_{part}_questions.json").write_text(json.dumps({"questions": questions}))
    answers = [{"answer": "yes", "answer_confidence": "yes", "answer_id": i + 1} for i in range(10)]
    shared = {"question_type": "what is", "answer_type": "other", "multiple_choice_answer": "yes", "answers": answers}
    annotations = [{"question_id": n, "image_id": n + 5, **shared} for n in range(3)]
    (raw / f"v2_{part}_annotations.json").write_text(json.dumps({"annotations": annotations}))
    for n in range(3):
        toy_image(raw / "val2014" / f"COCO_val2014_{n + 5:012}.jpg", n)


CASES: dict[str, tuple[Callable[[Path], None], Callable[[str, str], Any]]] = {
    "nlvr2": (nlvr, lambda root, cache: Nlvr2(root, cache=cache)),
    "vqav2": (vqa, lambda root, cache: VqaV2(root, cache=cache)),
}


@pytest.mark.parametrize("name", ["vqav2", pytest.param("nlvr2", marks=pytest.mark.slow)])
def test_examples_are_the_same_with_bytes_for_paths(name: str, tmp_path: Path) -> None:
    write, reader = CASES[name]
    raw, root, cache = tmp_path / "raw", tmp_path / name, str(tmp_path / "cache")
    raw.mkdir()
    write(raw)
    plan = Plan(name, str(raw), Settings(name, 48), {}, 2)
    manifest = prepare(open_raw(name, str(raw), None, name), plan, root, 1, lambda line: None)
    assert [*manifest["splits"]] == ["pictures"]
    of_files, of_set = reader(str(raw), cache).split("val"), reader(str(root), cache).split("val")
    assert len(of_files) == len(of_set) == 3
    for index in range(3):
        one, other = of_files[index], of_set[index]
        assert {**one, "images": []} == {**other, "images": []}
        for path, data in zip(one["images"], other["images"], strict=True):
            large, small = safe_open(path, "x"), safe_open(data, "x")
            assert small.size == (64, 48)
            assert np.abs(np.asarray(large.resize(small.size), float) - np.asarray(small, float)).mean() < 6
            assert Image.open(BytesIO(data)).format == "JPEG"
    ids = {*of_set.image_ids()}
    assert ids == {*of_files.image_ids()}


@pytest.mark.slow
def test_an_image_that_was_left_out_is_told(tmp_path: Path) -> None:
    raw, root = tmp_path / "raw", tmp_path / "nlvr2"
    raw.mkdir()
    nlvr(raw)
    (raw / "images" / "dev" / "dev-1-0-img1.png").write_bytes(b"no image")
    prepare(open_raw("nlvr2", str(raw)), Plan("nlvr2", "", Settings("nlvr2", 48), {}), root, 1, lambda line: None)
    with pytest.raises(UserError, match=r"1 of 3 examples of split 'val' lacks an image .*: nlvr2 dev-1-0-img1"):
        Nlvr2(str(root), cache=str(tmp_path / "cache")).split("val")
