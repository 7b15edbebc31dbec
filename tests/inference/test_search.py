"""Indexes and search: what NumPy finds is found, matching orders as the model does, what does not fit is refused.

Shapes: N vectors, Q queries, E width.
"""

import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from data.toy_raw import make as make_set
from data.toy_raw import row
from PIL import Image
from test_vector_files import Photos, rows_of, start, toy_checkpoint, vector_of

from maskvlm.cli.search import checkpoint_of_index, main, make
from maskvlm.data.scenes.source import Scenes
from maskvlm.inference import faiss_index as nearest
from maskvlm.inference import search as searching
from maskvlm.inference.faiss_index import Array, build_index, write_index
from maskvlm.inference.pretrained import PretrainedMaskVLM
from maskvlm.inference.search import SearchIndex, index_folder, search_index
from maskvlm.utils.errors import ExitCode, UserError

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
    return toy_checkpoint(tmp_path_factory.mktemp("checkpoint") / "best.ckpt")


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
    assert SearchIndex(index, None, about).search(query_QE[0], 1000)[1].shape == (1, 400)


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
    nearest.turn(index, about["knob"], 1)  # the knob matters: else nothing was tuned
    worse_QK = index.search(query_QE[100:], 10)[1]
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(worse_QK, exact_QK, strict=True)]) < recall - 0.05


def test_what_was_tuned_holds_after_loading(index_dir: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = index_folder(index_dir / "vectors", copy, "ivf", 1.1)  # never enough: the last value
    assert (about["kind"], about["factory"], about["knob"], about["value"]) == ("ivf", "IVF8,Flat", "nprobe", 1)
    about = json.loads((copy / "index.json").read_text()) | {"value": 5}
    (copy / "index.json").write_text(json.dumps(about))
    assert faiss.extract_index_ivf(SearchIndex.load(copy).index).nprobe == 5


# ---------------------------------------------------------------------- images


def test_the_folder_says_what_the_index_is(index_dir: Path, model: PretrainedMaskVLM) -> None:
    about = json.loads((index_dir / "index.json").read_text())
    wanted = {"kind": "flat", "count": 12, "width": 8, "data": "photos", "split": "val", "asked": "captions"}
    assert wanted.items() <= about.items()
    assert about["weights"] == searching.identity(model)
    assert (about["share_of_exact_10"], about["queries"]) == (1.0, 24)
    assert about["median_ms"] > 0


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


def test_re_ranking_orders_as_the_model_does(index_dir: Path, model: PretrainedMaskVLM, photos: Photos) -> None:
    index, text = SearchIndex.load(index_dir, photos.path(0).parent), "a red square over a green circle"
    ranked: Any = model.rank(text, [photos.path(n) for n in range(12)], 6)
    hits = search_index(index, model, text, 6, rerank=True)
    assert [each.row for each in hits] == [each.place for each in ranked[:6]]
    assert np.allclose([each.match for each in hits], [each.match for each in ranked[:6]], atol=1e-5)  # type: ignore[misc]
    assert [each.row for each in hits] != [each.row for each in search_index(index, model, text, 6)]


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


def test_a_search_keeps_no_graph(
    index_dir: Path, model: PretrainedMaskVLM, photos: Photos, recwarn: pytest.WarningsRecorder
) -> None:
    grad_states: list[bool] = []
    hook = model.backbone.text.register_forward_hook(lambda *_: grad_states.append(torch.is_grad_enabled()))
    search_index(SearchIndex.load(index_dir, photos.path(0).parent), model, "a blue circle", 4, rerank=True)
    hook.remove()
    assert grad_states
    assert not any(grad_states)
    assert not [each for each in recwarn if "requires_grad" in str(each.message)]


def test_what_is_no_single_query_is_refused(index_dir: Path, model: PretrainedMaskVLM) -> None:
    index = SearchIndex.load(index_dir)
    for several in (["a red square", "b"], np.zeros((2, 40, 40, 3), np.uint8)):
        with pytest.raises(UserError, match="search: several queries"):
            search_index(index, model, several)  # type: ignore[arg-type]
    for k in ("3", 2.5):
        with pytest.raises(UserError, match="search: k is"):
            search_index(index, model, "a circle", k)  # type: ignore[arg-type]


def test_vectors_of_nothing_make_no_index(index_dir: Path, tmp_path: Path) -> None:
    facts = json.loads((index_dir / "vectors" / "vectors.json").read_text()) | {"pictures": 0, "shards": 0}
    (tmp_path / "vectors.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match="holds no vectors") as caught:
        index_folder(tmp_path, tmp_path / "out")
    assert caught.value.code == ExitCode.BAD_DATA


def test_an_image_finds_itself_and_is_re_ranked_by_captions(
    index_dir: Path, model: PretrainedMaskVLM, photos: Photos
) -> None:
    index, path = SearchIndex.load(index_dir), photos.path(7)
    hits = search_index(index, model, path, 4)
    assert hits[0].row == 7
    assert hits[0].similarity == pytest.approx(1, abs=1e-5)
    ranked = search_index(index, model, path, 4, rerank=True)
    rows = [each.row for each in hits for _ in each.captions]
    order: Any = model.rank(path, [caption for each in hits for caption in each.captions], len(rows))
    best: dict[int, float] = {}
    for each in order:
        best.setdefault(rows[each.place], each.match)
    # Numbers are unknown words here: the best captions of these images are equal, and rounding orders them.
    assert {each.row: each.match for each in ranked} == pytest.approx(best, abs=1e-5)
    assert [each.match for each in ranked] == pytest.approx(list(best.values()), abs=1e-5)


# ---------------------------------------------------------------------- what does not fit


def refused(ask: Callable[[], Any], code: ExitCode, message: str) -> None:
    with pytest.raises(UserError) as caught:
        ask()
    assert caught.value.code == code
    assert message in str(caught.value)


def test_another_checkpoint_is_refused(index_dir: Path, checkpoint: Path) -> None:
    other, index = PretrainedMaskVLM.from_pretrained(checkpoint), SearchIndex.load(index_dir)
    assert search_index(index, other, "a circle", 1)
    other = PretrainedMaskVLM.from_pretrained(checkpoint)
    with torch.no_grad():
        other.backbone.text.model.embeddings.word_embeddings.weight[3, 3] += 1e-3
    refused(
        lambda: search_index(index, other, "a circle", 1),
        ExitCode.BAD_DATA,
        "is not the checkpoint of the index. Give c,",
    )


@pytest.mark.parametrize("name", ["index.faiss", "ids.parquet"])
def test_a_damaged_file_is_refused_before_it_is_read(copy: Path, name: str) -> None:
    whole = bytearray((copy / name).read_bytes())
    whole[len(whole) // 2] ^= 1
    (copy / name).write_bytes(whole)
    refused(lambda: SearchIndex.load(copy), ExitCode.BAD_DATA, "a file does not match index.json")


def test_what_is_no_index_is_refused(copy: Path, index_dir: Path) -> None:
    (copy / "index.json").write_text("[]")
    refused(lambda: SearchIndex.load(copy), ExitCode.BAD_DATA, "index.json: expected a mapping")
    (copy / "index.json").unlink()
    refused(lambda: SearchIndex.load(copy), ExitCode.MISSING_INPUT, "holds no index.json")
    wrong = index_dir.parent / "no"
    refused(lambda: SearchIndex.load(wrong), ExitCode.MISSING_INPUT, f"{wrong}: no such folder; there are: ")
    refused(lambda: SearchIndex.load(wrong), ExitCode.MISSING_INPUT, str(index_dir))
    index = SearchIndex.load(index_dir)
    refused(lambda: index.search(np.zeros((1, 9), np.float32)), ExitCode.USAGE, "vectors of width 9, the index has 8")
    refused(lambda: index.search(np.zeros((1, 8), np.float32), 0), ExitCode.USAGE, "k is 0")


def test_missing_and_damaged_shards_are_refused(copy: Path) -> None:
    shard = copy / "vectors" / "pictures-00001-of-00003.parquet"
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(lambda: index_folder(copy / "vectors", copy), ExitCode.BAD_DATA, f"{shard}: missing or damaged (")
    shard.unlink()
    refused(lambda: index_folder(copy / "vectors", copy), ExitCode.BAD_DATA, f"{shard}: missing or damaged (")
    assert SearchIndex.load(copy).index.ntotal == 12  # the old one stays


def test_images_that_are_gone_are_one_line(model: PretrainedMaskVLM, tmp_path: Path) -> None:
    photos = Photos(tmp_path / "photos", 3)
    start(model, photos, tmp_path / "vectors")
    index_folder(tmp_path / "vectors", tmp_path)
    photos.path(1).unlink()
    index = SearchIndex.load(tmp_path, tmp_path / "photos")
    assert len(search_index(index, model, "a circle", 3)) == 3
    message = f"{photos.path(1)}: the images are not on disk. Restore it, or search without --rerank and --show."
    refused(lambda: search_index(index, model, "a circle", 3, rerank=True), ExitCode.MISSING_INPUT, message)


@pytest.mark.parametrize("name", ["nowhere", "file"])
def test_a_folder_of_images_that_is_not_there_is_refused_before_the_search(
    name: str, index_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    message = f"{tmp_path / name}: no such folder. Name the folder that holds the images, or the prepared set."
    refused(lambda: SearchIndex.load(index_dir, tmp_path / name), ExitCode.MISSING_INPUT, message)


def test_without_faiss_it_is_one_line(index_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    refused(lambda: SearchIndex.load(index_dir), ExitCode.UNAVAILABLE, "Install it: python -m pip install faiss-cpu.")


# ---------------------------------------------------------------------- the commands


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
    assert f"{out}: 7 images, Flat, built in " in capsys.readouterr().out
    assert main([*named, "--index", str(out), "a red circle", "--k", "3", "--rerank", "--json"], []) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    model, pairs = PretrainedMaskVLM.from_pretrained(checkpoint), Scenes(val=7).split("val")
    ranked: Any = model.rank("a red circle", [pairs[n]["image"] for n in range(7)], 3)
    assert [line["id"] for line in lines] == [pairs[each.place]["image_id"] for each in ranked[:3]]
    assert [line["match"] for line in lines] == pytest.approx([each.match for each in ranked[:3]], abs=1e-5)
    assert [line["row"] for line in lines] == [each.place for each in ranked[:3]]
    assert {(line["path"], line["origin"].rpartition(" ")[0]) for line in lines} == {
        (None, "scenes (seed 0) val image")
    }
    assert main([*named, "--index", str(out), "a red giraffe", "--k", "2", "--json"], []) == 0
    unknown_words = [json.loads(line)["unknown_words"] for line in capsys.readouterr().out.splitlines()]
    assert unknown_words == [["giraffe"], ["giraffe"]]
    # a line has the beginning of the caption, which may be long
    caption = max(lines, key=lambda line: line["similarity"])["caption"]
    assert len(caption) > 12
    monkeypatch.setattr("maskvlm.cli.search.CAPTION_WIDTH", 12)
    assert main([*named, "--index", str(out), "a red circle", "--k", "1"], []) == 0
    shown = capsys.readouterr().out
    assert caption.split()[0] in shown
    assert " ..." in shown
    assert caption not in shown
    assert main([*named, "--index", str(out), "a red circle", "--k", "1", "--json"], []) == 0
    assert json.loads(capsys.readouterr().out)["caption"] == caption
    content = io.BytesIO()
    pairs[4]["image"].save(content, "PNG")
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: False, buffer=io.BytesIO(content.getvalue())))
    assert main([*named, "--index", str(out), "-", "--k", "1", "--json"], []) == 0
    (found,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (found["row"], found["similarity"]) == (4, pytest.approx(1))
    sheet = str(tmp_path / "found.png")
    assert main([*named, "--index", str(out), "a red circle", "--k", "1", "--show", sheet], []) == 0
    nearest = max(lines, key=lambda line: line["similarity"])
    assert f"{nearest['id']}, scenes (seed 0) val image" in capsys.readouterr().out  # an id may be a file's name
    with Image.open(sheet) as page:
        colours = {colour for _, colour in page.convert("RGB").getcolors(1 << 24) or []}
    best = pairs[next(n for n in range(7) if pairs[n]["image_id"] == nearest["id"])]["image"]
    assert max(best.getcolors(1 << 24))[1] in colours  # the ground of the drawn scene
    refused(
        lambda: main([*named, "--index", str(out), "a red circle", "--show", str(out)], []),
        ExitCode.CANNOT_CREATE,
        f"{out}: ",
    )

    (tmp_path / "stranger.py").write_text(
        "from maskvlm.data.scenes.source import Scenes\n\n\nclass Mine(Scenes): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    about = json.loads((out / "index.json").read_text())
    for spoilt, code, message in (
        ({"data": "other"}, ExitCode.BAD_DATA, "the data set is not the one of the index"),
        ({"source": {"class_path": "stranger.Mine"}}, ExitCode.REFUSED, "is not opened without your consent"),
        ({"source": None}, ExitCode.REFUSED, "is not opened without your consent"),
    ):
        (out / "index.json").write_text(json.dumps(about | spoilt))
        refused(lambda: search_index(SearchIndex.load(out), model, "a red circle", 2, rerank=True), code, message)

    assert "stranger" not in sys.modules  # a file names no class that is not allowed
    refused(lambda: main([*named, "gone.jpg"], []), ExitCode.MISSING_INPUT, "gone.jpg: no such file")
    refused(lambda: main([], []), ExitCode.USAGE, "maskvlm search: the following arguments are required")
    beside = ["--vectors", str(out / "vectors"), "--out", str(out), "--data.source.val", "8"]
    refused(lambda: make(beside, []), ExitCode.USAGE, "--data.source.val: has no effect with --vectors")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(lambda: make([*named, *data], []), ExitCode.USAGE, "index: several processes")


def test_of_several_indexes_the_newest_is_searched_and_named(
    index_dir: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--from", str(checkpoint), "a red circle", "--k", "1"]
    for age, name in enumerate(("index-new", "index-old")):
        folder = shutil.copytree(index_dir, tmp_path / "checkpoints" / name)
        when = (folder / "index.json").stat().st_mtime - 100 * age
        os.utime(folder / "index.json", (when, when))
        assert main(words, []) == 0
        notes = [] if age == 0 else ["no --index: searching checkpoints/index-new, the newest of 2"]
        # A word of the query that the toy does not know is told, too.
        assert [line for line in capsys.readouterr().err.splitlines() if "index" in line] == notes
    assert main([*words, "--index", "checkpoints/index-old"], []) == 0
    assert "searched" not in capsys.readouterr().err


def test_all_images_of_a_set_without_splits_are_indexed(
    checkpoint: Path,
    root: Path,
    tmp_path: Path,
    stack: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And the index is asked by the checkpoint that it was made with, where no other is named."""
    make_set(tmp_path / "mine", [row(number) for number in range(40)])
    monkeypatch.chdir(root)
    world, prepared = (
        [str(root / word) if word.endswith(".yaml") else word for word in stack(WHERE="cpu", DATA=data)]
        for data in ("scenes", "prepared")
    )
    files = [*prepared, "--data.source.root", str(tmp_path / "mine")]
    (tmp_path / "checkpoints" / "mine").mkdir(parents=True)
    shutil.copy(checkpoint, tmp_path / "checkpoints" / "mine" / "best.ckpt")
    named = ["--from", "checkpoints/mine/best.ckpt", "--device", "cpu"]
    monkeypatch.chdir(tmp_path)
    for split, count in (("train", 38), ("val", 2), ("all", 40)):
        out = tmp_path / split
        assert make([*named, "--out", str(out), "--split", split, *files], []) == 0
        printed = capsys.readouterr()
        assert f"{out}: {count} images" in printed.out
        assert (f"note: {40 - count} images of {tmp_path / 'mine'} are in split=" in printed.err) == (split != "all")
    assert main(["--index", str(tmp_path / "all"), "a dog", "--rerank", "--images", str(tmp_path / "mine")], []) == 0
    of_files = ["--index", str(tmp_path / "all"), "a dog", "--rerank", "--images", str(tmp_path)]
    refused(lambda: main(of_files, []), ExitCode.USAGE, "--images: is a folder of files, but the index names rows of")
    printed = capsys.readouterr()
    assert printed.err.startswith(
        "no checkpoint named: using checkpoints/mine/best.ckpt, the checkpoint that the index was built with\n"
    )
    assert len(printed.out.splitlines()) == 10
    refused(
        lambda: make([*named, "--split", "all", *world], []),
        ExitCode.USAGE,
        "all applies only to a prepared set that has",
    )


@pytest.mark.parametrize("named", ["someone/model", "ELSEWHERE", "checkpoints/../elsewhere.ckpt", "checkpoints"])
def test_no_place_that_an_index_names_is_opened_but_a_run_of_one_s_own(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "elsewhere.ckpt").touch()
    named = named.replace("ELSEWHERE", str(tmp_path / "elsewhere.ckpt"))
    about = json.loads((copy / "index.json").read_text())
    (copy / "index.json").write_text(json.dumps(about | {"checkpoint": named}))
    assert checkpoint_of_index(SearchIndex.load(copy)) == "scenes-tiny"
    assert capsys.readouterr().err.startswith("no checkpoint named: the bundled model scenes-tiny is used")


def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, place = build_index(unit(50, 8, 0), unit(5, 8, 1))[0], tmp_path / "index.faiss"
    write_index(index, place)
    whole = place.read_bytes()

    def full(_: Any, path: str) -> None:
        Path(path).write_bytes(whole[:9])
        raise RuntimeError(
            f"Error: 'ret == (size * 4)' failed: write error in {path}: 5 != 9 (No space left on device)"
        )

    monkeypatch.setattr(faiss, "write_index", full)
    with pytest.raises(UserError, match=r"cannot be written \(disk full\)") as caught:
        write_index(index, place)
    assert caught.value.code == ExitCode.IO_ERROR
    assert [path.name for path in tmp_path.iterdir()] == ["index.faiss"]
    assert place.read_bytes() == whole
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be written") as caught:
        write_index(index, tmp_path / "file" / "index.faiss")
    assert caught.value.code == ExitCode.CANNOT_CREATE
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--split", "train"], "--split: has no effect with --vectors"),
        (["--no-captions"], "--no-captions: has no effect with --vectors"),
        (["--from", "a.ckpt"], "--from: has no effect with --vectors"),
        (["--exact-share", "7"], "--exact-share: 7.0 is out of range"),
    ],
)
def test_what_embedding_was_told_is_not_asked_again(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(["--vectors", str(tmp_path), *words], [])
