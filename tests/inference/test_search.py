"""Indexes and search: what NumPy finds is found, matching orders as the model does, what does not fit is refused.

Shapes: N vectors, Q queries, E width.
"""

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_vector_files import Photos, rows_of, start, vector_of
from toy_pretrained import saved

from maskvlm.cli.search import checkpoint_of_index, main, make
from maskvlm.data.scenes.source import Scenes
from maskvlm.inference import faiss_index as nearest
from maskvlm.inference.faiss_index import Array, build_index
from maskvlm.inference.pretrained import PretrainedMaskVLM
from maskvlm.inference.search import SearchIndex, index_folder, search_index
from maskvlm.utils.errors import UserError

faiss = pytest.importorskip("faiss", reason="needs faiss-cpu (the extra `search`)")


def unit(count: int, width: int, seed: int, centres: int = 0, shift: float = 0.0) -> Array:
    """Even over the sphere, or near some centres."""
    rng = np.random.default_rng(seed)
    x_NE = rng.standard_normal((count, width)).astype(np.float32)
    if centres:
        centre_CE = np.random.default_rng(99).standard_normal((centres, width)).astype(np.float32)
        x_NE = centre_CE[rng.integers(0, centres, count)] + 0.3 * x_NE
        x_NE[:, 0] += shift
    return x_NE / np.linalg.norm(x_NE, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "best.ckpt"
    saved(path)
    return path


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> PretrainedMaskVLM:
    return PretrainedMaskVLM.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Photos:
    return Photos(tmp_path_factory.mktemp("photos"), 12)


@pytest.fixture(scope="module")
def index_dir(model: PretrainedMaskVLM, photos: Photos, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of vectors in it, and their index."""
    folder = tmp_path_factory.mktemp("index")
    start(model, photos, folder / "vectors")
    index_folder(folder / "vectors", folder)
    return folder


@pytest.fixture
def copy(index_dir: Path, tmp_path: Path) -> Path:
    """To be spoilt."""
    return Path(shutil.copytree(index_dir, tmp_path / "copy"))


# ---------------------------------------------------------------------- vectors


def test_a_flat_index_finds_what_numpy_finds() -> None:
    vector_NE, query_QE = unit(400, 16, 0), unit(7, 16, 1)
    index, about = build_index(vector_NE, query_QE)
    assert (about["kind"], about["share_of_exact_10"], about["knob"], about["queries"]) == ("flat", 1.0, None, 7)
    cosine_QN = query_QE @ vector_NE.T
    similarity_QK, position_QK = SearchIndex(index, None, about).search(torch.tensor(query_QE), 5)
    assert position_QK.tolist() == np.argsort(-cosine_QN, axis=1)[:, :5].tolist()
    assert np.allclose(similarity_QK, -np.sort(-cosine_QN, axis=1)[:, :5], atol=1e-6)


@pytest.mark.parametrize(("centres", "kind"), [(60, "ivf"), (0, "pq")])
def test_a_large_one_is_turned_up_until_it_finds_enough(
    centres: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vectors that cluster, asked by such as lie beside them, and vectors that do not."""
    monkeypatch.setattr(nearest, "FLAT_UP_TO", 1000)
    vector_NE, query_QE = unit(6000, 32, 0, centres), unit(300, 32, 1, centres, shift=0.5)
    index, about = build_index(vector_NE, query_QE[:100])
    assert (about["kind"], about["factory"][:2]) == (kind, {"ivf": "IV", "pq": "PQ"}[kind])
    assert about["share_of_exact_10"] >= 0.95
    exact_QK = np.argsort(-query_QE[100:] @ vector_NE.T, axis=1)[:, :10]
    approximate_QK = SearchIndex(index, None, about).search(query_QE[100:])[1]
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(approximate_QK, exact_QK, strict=True)])
    assert recall > 0.9


# ---------------------------------------------------------------------- images


def test_a_text_finds_the_nearest_images(index_dir: Path, model: PretrainedMaskVLM, photos: Photos) -> None:
    index = SearchIndex.load(index_dir)
    cosine_N = vector_of(rows_of(index_dir / "vectors")) @ model.encode_text("a blue circle")
    order = cosine_N.argsort(descending=True).tolist()[:5]
    hits = search_index(index, model, "a blue circle", 5)
    assert [each.row for each in hits] == order
    assert [each.path for each in hits] == [str(photos.path(n)) for n in order]
    assert [each.captions for each in hits] == [photos[n]["captions"] for n in order]
    assert [each.match for each in hits] == [None] * 5
    assert torch.allclose(torch.tensor([each.similarity for each in hits]), cosine_N[order], atol=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.05, 3.0])
def test_re_ranking_counts_the_cosine_as_the_model_does(
    index_dir: Path, model: PretrainedMaskVLM, photos: Photos, weight: float
) -> None:
    """Also where matches are so unlikely that their probabilities hardly differ."""
    model = deepcopy(model)
    model.task.rerank_contrast = weight  # type: ignore[assignment]
    with torch.no_grad():
        model.head("matching", "match").classify.bias[1] -= 30
    index = SearchIndex.load(index_dir, photos.path(0).parent)
    index.model = model  # its weights are others than those that the index knows
    for text in ("a red square over a green circle", "a blue circle"):
        ranked: Any = model.rank(text, [photos.path(n) for n in range(12)], 12)
        hits = search_index(index, model, text, 12, rerank=True)
        assert [each.row for each in hits] == [each.place for each in ranked]


def test_an_image_finds_itself_and_is_re_ranked_by_captions(
    index_dir: Path, model: PretrainedMaskVLM, photos: Photos
) -> None:
    index, path = SearchIndex.load(index_dir), photos.path(7)
    hits = search_index(index, model, path, 4)
    assert hits[0].row == 7
    assert hits[0].similarity == pytest.approx(1, abs=1e-5)
    ranked = search_index(index, model, path, 4, rerank=True)
    assert {each.row for each in ranked} == {each.row for each in hits}
    assert [each.match for each in ranked] == sorted((each.match for each in ranked), reverse=True)


# ---------------------------------------------------------------------- what does not fit


def test_another_checkpoint_is_refused(index_dir: Path, checkpoint: Path) -> None:
    other, index = PretrainedMaskVLM.from_pretrained(checkpoint), SearchIndex.load(index_dir)
    with torch.no_grad():
        other.backbone.text.model.embeddings.word_embeddings.weight[3, 3] += 1e-3
    with pytest.raises(UserError, match="is not the checkpoint of the index"):
        search_index(index, other, "a circle", 1)


@pytest.mark.parametrize("name", ["index.faiss", "ids.parquet"])
def test_a_damaged_file_is_refused_before_it_is_read(copy: Path, name: str) -> None:
    whole = bytearray((copy / name).read_bytes())
    whole[len(whole) // 2] ^= 1
    (copy / name).write_bytes(whole)
    with pytest.raises(UserError, match="a file does not match"):
        SearchIndex.load(copy)


@pytest.mark.slow
def test_the_commands_index_and_search_a_configured_set(
    checkpoint: Path,
    root: Path,
    tmp_path: Path,
    stack: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The built-in world, whose images lie nowhere: they are drawn again to be matched."""
    monkeypatch.chdir(root)
    out, named = tmp_path / "index", ["--from", str(checkpoint)]
    data = [*stack(WHERE="cpu"), "--data.source.val", "7"]
    assert make([*named, "--out", str(out), "--device", "cpu", *data], []) == 0
    capsys.readouterr()
    assert main([*named, "--index", str(out), "a red circle", "--k", "3", "--rerank", "--json"], []) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    model, pairs = PretrainedMaskVLM.from_pretrained(checkpoint), Scenes(val=7).split("val")
    ranked: Any = model.rank("a red circle", [pairs[n]["image"] for n in range(7)], 3)
    assert [line["row"] for line in lines] == [each.place for each in ranked[:3]]
    assert [line["match"] for line in lines] == pytest.approx([each.match for each in ranked[:3]], abs=1e-5)


@pytest.mark.parametrize("named", ["someone/model", "checkpoints/../elsewhere.ckpt"])
def test_no_place_that_an_index_names_is_opened_but_a_run_of_one_s_own(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "elsewhere.ckpt").touch()
    about = json.loads((copy / "index.json").read_text())
    (copy / "index.json").write_text(json.dumps(about | {"checkpoint": named}))
    assert checkpoint_of_index(SearchIndex.load(copy)) == "scenes-tiny"
