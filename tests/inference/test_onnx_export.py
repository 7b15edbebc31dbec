"""Exported files give what the training code gives: ONNX in onnxruntime, torch.export in torch."""

import json
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import Tensor
from toy_pretrained import BACKBONE, PRETRAINING, saved
from toys import SIZE
from transformers import AutoProcessor

from maskvlm.inference import onnx_export as export
from maskvlm.inference.pretrained import PretrainedMaskVLM
from maskvlm.model.maskvlm import MaskVLM
from maskvlm.objectives.pretraining import MaskedPretraining
from maskvlm.utils.errors import ExitCode, UserError

LONGEST = BACKBONE["init_args"]["text"]["init_args"]["text_length"]  # type: ignore[index]
NAMES = ("image_encoder", "text_encoder", "fusion_scorer")
BATCHES = [(1, 1), (1, 3), (1, LONGEST), (9, LONGEST), *((1 + n % 7, 2 + n % (LONGEST - 1)) for n in range(46))]
"""Fifty batches of pairs, of every length that the model reads."""
Run = Callable[..., list[Tensor]]

# As docs/how-to/export.md shows it.
EXAMPLE = """
import json

import numpy as np
import onnxruntime
from PIL import Image
from transformers import AutoTokenizer

folder, texts = "exported", ["a blue star and a red square", "two green hearts"]
names = ("image_encoder", "text_encoder", "fusion_scorer")
image, text, fusion = (onnxruntime.InferenceSession(f"{folder}/{name}.onnx") for name in names)

how = json.load(open(f"{folder}/processor_config.json"))["image_processor"]
size = how["size"]["width"], how["size"]["height"]
rgb = np.asarray(Image.open("scene.png").convert("RGB").resize(size, Image.Resampling.BICUBIC), np.float32) / 255
pixels = ((rgb - np.float32(how["image_mean"])) / np.float32(how["image_std"])).transpose(2, 0, 1)[None]
tokens = AutoTokenizer.from_pretrained(folder)(texts, padding=True, truncation=True, return_tensors="np")
words = {name: tokens[name].astype(np.int64) for name in ("input_ids", "attention_mask")}

image_features, image_embeds = image.run(None, {"pixel_values": pixels})
text_features, text_embeds = text.run(None, words)
cosine = image_embeds @ text_embeds.T  # [1, 2]
pairs = {"image_features": image_features.repeat(len(texts), 0), "text_features": text_features}
(log_odds,) = fusion.run(["match_logits"], pairs | {"attention_mask": words["attention_mask"]})
probability = 1 / (1 + np.exp(-log_odds))
print(probability)  # that image and text belong together, [2]
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run") / "best.ckpt"


@pytest.fixture(scope="module")
def parts(path: Path) -> tuple[MaskVLM, MaskedPretraining]:
    """The checkpoint's model as the training code has it."""
    backbone, task = saved(path)
    assert isinstance(task, MaskedPretraining)
    return backbone, task


@pytest.fixture(scope="module")
def model(path: Path, parts: Any) -> PretrainedMaskVLM:
    return PretrainedMaskVLM.from_pretrained(path)


def command(path: Path, folder: Path, *words: str) -> Path:
    """Export a checkpoint by the command."""
    assert export.main(["--from", str(path), str(folder), *words], []) == ExitCode.DONE
    return folder


@pytest.fixture(scope="module")
def onnx_folder(path: Path, parts: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return command(path, tmp_path_factory.mktemp("onnx") / "not" / "there yet")


@pytest.fixture(scope="module")
def torch_folder(path: Path, parts: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return command(path, tmp_path_factory.mktemp("torch"), "--format", "torch")


def sessions(folder: Path) -> list[Run]:
    """The three files in onnxruntime, without the code that exported them."""

    def opened(name: str) -> Run:
        session = onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_inputs()]

        def run(*arguments: Tensor) -> list[Tensor]:
            return [torch.from_numpy(each) for each in session.run(None, _named(names, arguments))]

        return run

    return [opened(name) for name in NAMES]


def _named(names: Sequence[str], tensors: Sequence[Tensor]) -> dict[str, Any]:
    return {name: each.numpy() for name, each in zip(names, tensors, strict=True)}


def modules(folder: Path) -> list[Run]:
    """The three files in torch, which must not need gradients."""
    return [torch.export.load(folder / f"{name}.pt2").module() for name in NAMES]


def pairs(rows: int, length: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noise images, random words and their attention: lengths by lot, one of them the longest."""
    generator = torch.Generator().manual_seed(seed)
    tokens_B = torch.randint(1, length + 1, (rows,), generator=generator)
    tokens_B[int(torch.randint(rows, (), generator=generator))] = length
    attention_BT = torch.arange(length) < tokens_B[:, None]
    token_BT = torch.randint(5, 256, (rows, length), generator=generator) * attention_BT
    return torch.randn(rows, 3, SIZE, SIZE, generator=generator), token_BT, attention_BT.long()


@torch.no_grad()
def expected(parts: tuple[MaskVLM, MaskedPretraining], batch: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """All outputs of the three parts, by the training code."""
    (backbone, task), (image_BCHW, token_BT, attention_BT) = parts, batch
    image_BLD, text_BTD = backbone.image(image_BCHW), backbone.text(token_BT, attention_BT.bool())
    fused = backbone.fuse(image_BLD, text_BTD, attention_BT.bool())
    logits_B2 = task.matching(fused.product_MD)
    vectors = task.projection.embed_image(image_BLD), task.projection.embed_text(text_BTD, attention_BT.bool())
    return [image_BLD, vectors[0], text_BTD, vectors[1], fused.joined_MX, logits_B2[:, 1] - logits_B2[:, 0]]


@torch.no_grad()
def exported_outputs(runs: Sequence[Run], batch: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """The same by exported files, one after the other."""
    (image, text, fusion), (image_BCHW, token_BT, attention_BT) = runs, batch
    image_BLD, image_BE = image(image_BCHW)
    text_BTD, text_BE = text(token_BT, attention_BT)
    return [image_BLD, image_BE, text_BTD, text_BE, *fusion(image_BLD, text_BTD, attention_BT)]


# ---------------------------------------------------------------------- what the files compute


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_fifty_batches_of_pairs_are_as_in_training(
    kind: str, parts: tuple[MaskVLM, MaskedPretraining], request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"{kind}_folder")
    runs = sessions(folder) if kind == "onnx" else modules(folder)
    assert len(BATCHES) == 50
    assert {length for _, length in BATCHES} == set(range(1, LONGEST + 1))
    scores = []
    for seed, (rows, length) in enumerate(BATCHES):
        batch = pairs(rows, length, seed)
        for ours, theirs in zip(exported_outputs(runs, batch), expected(parts, batch), strict=True):
            assert ours.shape == theirs.shape
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
        scores.append(ours)
    assert torch.cat(scores).std() > 0.1  # pairs differ, or agreement would say little


def test_padding_changes_nothing(onnx_folder: Path) -> None:
    runs = sessions(onnx_folder)
    image_BCHW, token_BT, attention_BT = pairs(1, 6, 0)
    alone = exported_outputs(runs, (image_BCHW, token_BT, attention_BT))
    wider = torch.nn.functional.pad(token_BT, (0, 9), value=7), torch.nn.functional.pad(attention_BT, (0, 9))
    padded = exported_outputs(runs, (image_BCHW, *wider))
    padded[2] = padded[2][:, :6]
    for ours, theirs in zip(padded, alone, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_the_example_needs_no_torch_and_agrees_with_the_methods(
    onnx_folder: Path, model: PretrainedMaskVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8))
    image.save(tmp_path / "scene.png")
    (tmp_path / "exported").symlink_to(onnx_folder)
    script = tmp_path / "example.py"
    assert EXAMPLE.strip() in (Path(__file__).resolve().parents[2] / "docs" / "how-to" / "export.md").read_text()
    script.write_text(EXAMPLE)
    monkeypatch.chdir(tmp_path)
    variables = runpy.run_path(str(script))
    assert not {"torch", "maskvlm"} & {line.split()[1] for line in EXAMPLE.splitlines() if "import " in line}
    cosine = model.encode_image(image) @ model.encode_text(variables["texts"]).T
    np.testing.assert_allclose(variables["cosine"][0], cosine, atol=1e-4)
    np.testing.assert_allclose(variables["probability"], model.match(image, variables["texts"]), atol=1e-4)
    assert np.ptp(variables["probability"]) > 1e-2


# ---------------------------------------------------------------------- what lies beside them


def test_shapes_are_named_and_told(onnx_folder: Path, torch_folder: Path) -> None:
    report = json.loads((onnx_folder / "export.json").read_text())
    width, patches, contrast = 16, 16, PRETRAINING["contrast_dim"]
    words, pixels = ["batch", "length"], ["batch", 3, SIZE, SIZE]
    image, text = ["batch", 1 + patches, width], ["batch", "length", width]
    assert [(part["inputs"], part["outputs"]) for part in report["files"].values()] == [
        ({"pixel_values": pixels}, {"image_features": image, "image_embeds": ["batch", contrast]}),
        (
            {"input_ids": words, "attention_mask": words},
            {"text_features": text, "text_embeds": ["batch", contrast]},
        ),
        (
            {"image_features": image, "text_features": text, "attention_mask": words},
            {"fused": ["batch", 3 * width], "match_logits": ["batch"]},
        ),
    ]
    for name, part in report["files"].items():
        assert part["file"] == f"{name}.onnx"
        assert 0 <= part["max_difference"] <= 1e-4
        session = onnxruntime.InferenceSession(onnx_folder / part["file"])
        assert {each.name: each.shape for each in session.get_inputs()} == part["inputs"]
        assert {each.name: each.shape for each in session.get_outputs()} == part["outputs"]
    assert {each.version for each in onnx.load(onnx_folder / "text_encoder.onnx").opset_import} == {report["opset"]}
    assert (report["format"], report["opset"], report["precision"], report["longest_text"]) == (
        "onnx",
        18,
        "float32",
        LONGEST,
    )
    assert (report["task"], report["step"]) == ("MaskedPretraining", 7)
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["onnxruntime"] == onnxruntime.__version__
    other = json.loads((torch_folder / "export.json").read_text())
    assert (other["format"], other["opset"]) == ("torch", None)
    for name, part in other["files"].items():
        assert part == {**report["files"][name], "file": f"{name}.pt2", "max_difference": part["max_difference"]}
        assert 0 <= part["max_difference"] <= 1e-6


def test_the_processor_lies_beside_them(torch_folder: Path, model: PretrainedMaskVLM) -> None:
    assert sorted(each.name for each in torch_folder.iterdir()) == [
        "export.json", "fusion_scorer.pt2", "image_encoder.pt2", "processor_config.json", "text_encoder.pt2",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    processor = AutoProcessor.from_pretrained(torch_folder)
    image = Image.new("RGB", (40, 50), "green")
    both = processor(images=image, text=["two red circles"], return_tensors="pt")
    torch.testing.assert_close(both["pixel_values"], model.pixels([image]))
    assert both["input_ids"].tolist() == model.tokens(["two red circles"]).token_CT.tolist()


def test_a_part_holds_its_own_weights_alone(torch_folder: Path, parts: tuple[MaskVLM, MaskedPretraining]) -> None:
    backbone, task = parts
    own: list[list[Any]] = [
        [backbone.image, task.projection],
        [backbone.text, task.projection],
        [backbone.cross_image, backbone.cross_text, task.matching],
    ]
    for name, modules_of in zip(NAMES, own, strict=True):
        stored = torch.export.load(torch_folder / f"{name}.pt2").state_dict
        assert sum(each.numel() for each in stored.values()) == sum(
            each.numel() for module in modules_of for each in module.state_dict().values()
        )


# ---------------------------------------------------------------------- what is refused


def refused(code: ExitCode, message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(UserError) as caught:
        call()
    assert str(caught.value) == message
    assert caught.value.code == code
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_that_computes_something_else_is_measured(
    onnx_folder: Path, model: PretrainedMaskVLM, tmp_path: Path
) -> None:
    part = export.parts_of(model)[2]
    inputs = [export.random_inputs(model, *size) for size in export.sizes(LONGEST)]
    assert {"batch 1", f"length {LONGEST}", "length 3"} <= {
        word for rows, length in export.sizes(LONGEST) for word in (f"batch {rows}", f"length {length}")
    }
    whole = export.difference(onnx_folder / "fusion_scorer.onnx", part, inputs)
    assert whole is not None
    assert whole <= 1e-5
    graph = onnx.load(onnx_folder / "fusion_scorer.onnx")
    (bias,) = [each for each in graph.graph.initializer if each.name == "matching.classify.bias"]
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32([0, 0.5]), bias.name))
    onnx.save(graph, tmp_path / "other.onnx")
    assert export.difference(tmp_path / "other.onnx", part, inputs) == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize("wrong", [float("nan"), 2e-4])
def test_a_difference_leaves_nothing(
    wrong: float, model: PretrainedMaskVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "save_program", lambda part, example, longest, path, *_: path.write_text("half"))
    monkeypatch.setattr(export, "difference", lambda *_: wrong)
    message = (
        f"image_encoder.onnx: differs from torch by {wrong:.1e}, more than 1e-04; nothing was written. "
        "Try another --format or --opset."
    )
    refused(ExitCode.CANNOT_CREATE, message, lambda: export.export(model, tmp_path / "new"))
    assert list(tmp_path.iterdir()) == []


def test_what_the_libraries_cannot_do_is_one_line(
    model: PretrainedMaskVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no such operator\nand a long story")

    monkeypatch.setattr(export, "save_program", fail)
    message = "image_encoder.pt2: fails (no such operator). Try another --format or --opset."
    refused(ExitCode.CANNOT_CREATE, message, lambda: export.export(model, tmp_path / "new", "torch"))
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_without_these_heads(tmp_path: Path) -> None:
    saved(tmp_path / "tuned.ckpt", "entailment")
    message = (
        f"{tmp_path / 'tuned.ckpt'}: this checkpoint, of Entailment, has heads neither for contrast nor for matching. "
        "Use one of pre-training or of retrieval."
    )
    refused(ExitCode.BAD_DATA, message, lambda: command(tmp_path / "tuned.ckpt", tmp_path / "new"))
    assert [each.name for each in tmp_path.iterdir() if each.suffix != ".sha256"] == ["tuned.ckpt"]


def test_heads_that_are_not_there_are_left_out(tmp_path: Path) -> None:
    for weight, outputs in (("weight_itm", ["fused"]), ("weight_itc", ["fused", "match_logits"])):
        saved(tmp_path / "x.ckpt", **{weight: 0.0})
        export_parts = export.parts_of(PretrainedMaskVLM.from_pretrained(tmp_path / "x.ckpt"))
        assert list(export_parts[2].outputs) == outputs
        has = weight == "weight_itm"
        assert [f"{side}_embeds" in export_parts[n].outputs for n, side in enumerate(("image", "text"))] == [has, has]
        inputs = export.random_inputs(PretrainedMaskVLM.from_pretrained(tmp_path / "x.ckpt"), 2, 3)
        for part in export_parts:
            assert len(part.module(*(inputs[name] for name in part.inputs))) == len(part.outputs)


def test_a_folder_with_something_in_it_is_left_alone(path: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    message = "already exists. Name another one."
    refused(ExitCode.CANNOT_CREATE, f"{tmp_path}: {message}", lambda: command(path, tmp_path))
    file = tmp_path / "notes.txt"
    refused(ExitCode.CANNOT_CREATE, f"{file}: {message}", lambda: command(path, file))
    assert file.read_text() == "mine"


def test_a_place_that_is_no_folder(model: PretrainedMaskVLM, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"cannot be written \(Not a directory\)\. Make it writable, or choose another folder"
    ) as caught:
        export.export(model, tmp_path / "file" / "new", "torch")
    assert caught.value.code == ExitCode.CANNOT_CREATE


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_packages_that_are_not_installed(
    missing: str, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    message = f"export: {missing} not installed. pip install 'maskvlm[export]', or give --format torch."
    refused(ExitCode.UNAVAILABLE, message, lambda: command(path, tmp_path / "new"))


def test_without_onnxruntime_it_says_that_nothing_was_measured(
    onnx_folder: Path, model: PretrainedMaskVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = json.loads((onnx_folder / "export.json").read_text())
    assert all(" from torch" in line for line in export.export_lines(onnx_folder, report))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    part = export.parts_of(model)[0]
    difference = export.difference(onnx_folder / "image_encoder.onnx", part, [export.random_inputs(model, 2, 3)])
    assert difference is None
    report["files"]["image_encoder"]["max_difference"] = difference
    first, *_ = export.export_lines(onnx_folder, report)
    assert first == (
        f"{onnx_folder / 'image_encoder.onnx'}: not compared with torch, because onnxruntime is not installed "
        "(pip install onnxruntime)"
    )


def test_another_precision(path: Path, parts: Any, tmp_path: Path) -> None:
    half = PretrainedMaskVLM.from_pretrained(path, dtype=torch.bfloat16)
    message = (
        "export: torch.bfloat16 on cpu, but only float32 on the CPU can be exported. "
        "Load the model without dtype and device."
    )
    refused(ExitCode.USAGE, message, lambda: export.export(half, tmp_path / "new"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--opset 17", "--opset: 17 is not supported. Give 18 to 22."),
        ("--opset 23", "--opset: 23 is not supported. Give 18 to 22."),
        ("--opset 18 --format torch", "--opset: torch.export has none. Leave it out, or give --format onnx."),
        ("--format tflite", "maskvlm export: argument --format: invalid choice: 'tflite'"),
        ("--half", "maskvlm export: unrecognized arguments: --half. See maskvlm export --help."),
    ],
)
def test_options_that_do_not_fit(words: str, message: str, path: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        command(path, tmp_path / "new", *words.split())
    assert str(caught.value).startswith(message)
    assert caught.value.code == ExitCode.USAGE


def test_what_must_be_named() -> None:
    message = "maskvlm export: the following arguments are required: FOLDER. See maskvlm export --help."
    refused(ExitCode.USAGE, message, lambda: export.main([], []))


def test_the_model_that_comes_along_is_exported_where_none_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export.main([str(tmp_path / "new"), "--format", "torch"], []) == 0
    assert capsys.readouterr().err.startswith("no checkpoint named: the bundled model scenes-tiny is exported")
    assert {path.stem for path in (tmp_path / "new").glob("*.pt2")} >= {"image_encoder", "text_encoder"}
