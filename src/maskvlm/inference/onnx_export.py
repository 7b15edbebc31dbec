"""`maskvlm export --from CHECKPOINT FOLDER`: a model as ONNX or torch.export files, compared with torch.

Three files, float32, for any batch size and text length: `image_encoder`, `text_encoder` and `fusion_scorer`, whose
inputs are the features of both. The folder also has the tokenizer, image processing, and `export.json`: inputs,
outputs, versions, and the difference from torch. Running ONNX files needs neither torch nor this project.

Shapes: B images, texts or row-by-row pairs, L image positions, T tokens, D width, E contrast width.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from maskvlm.checkpoint.integrity import first_line
from maskvlm.config.arguments import OptionParser
from maskvlm.config.bundled_models import DEFAULT, default_model
from maskvlm.inference.hf_config import processor_of
from maskvlm.inference.pretrained import PretrainedMaskVLM
from maskvlm.model.heads import Matching, Projection
from maskvlm.model.maskvlm import MaskVLM as Backbone
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.whole_files import write_json
from maskvlm.utils.write_errors import cannot_write

Format = Literal["onnx", "torch"]
Shapes = dict[str, list[str | int]]
"""Shape of each tensor by name, in order; `batch` and `length` are dynamic."""
SUFFIX: dict[Format, str] = {"onnx": ".onnx", "torch": ".pt2"}
OPSET, NEWEST_OPSET = 18, 22
"""The lowest is what torch writes without conversion, and what most runtimes read. From 23, attention is a single node,
for which onnxruntime rejects a mask that is the same for all queries."""
LIMIT = 1e-4
"""Largest allowed difference from torch, in any value of any output."""
PACKAGES = ("maskvlm", "torch", "transformers", "onnx", "onnxscript", "onnxruntime")


class ImagePart(nn.Module):
    """Normalised images [B, 3, H, W] to features [B, L, D] and, with contrast heads, unit vectors [B, E]."""

    def __init__(self, backbone: Backbone, projection: Projection | None) -> None:
        super().__init__()
        self.encoder, self.projection = backbone.image, projection

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """pixel_values: [B, 3, H, W], normalised."""
        image_BLD = self.encoder(pixel_values)
        return (image_BLD,) if self.projection is None else (image_BLD, self.projection.embed_image(image_BLD))


class TextPart(nn.Module):
    """Ids and attention [B, T], int64, to features [B, T, D] (undefined at padding) and, with contrast heads, unit
    vectors [B, E]."""

    def __init__(self, backbone: Backbone, projection: Projection | None) -> None:
        super().__init__()
        self.encoder, self.projection = backbone.text, projection

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """input_ids, attention_mask: [B, T], int64."""
        attention_BT = attention_mask.bool()
        text_BTD = self.encoder(input_ids, attention_BT)
        if self.projection is None:
            return (text_BTD,)
        return text_BTD, self.projection.embed_text(text_BTD, attention_BT)


class FusionPart(nn.Module):
    """Features of row-by-row pairs to fused vectors [B, 3 * D] and, with a matching head, matching log-odds [B]."""

    def __init__(self, backbone: Backbone, matching: Matching | None) -> None:
        super().__init__()
        self.cross_image, self.cross_text, self.matching = backbone.cross_image, backbone.cross_text, matching

    def forward(self, image_features: Tensor, text_features: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Features of both modalities to the outputs listed in the class docstring."""
        # `fuse` uses only the two cross encoders, which have the same names here.
        # If the backbone itself were included, a .pt2 file would also have the encoders' weights.
        fused = Backbone.fuse(self, image_features, text_features, attention_mask.bool())  # type: ignore[arg-type]
        if self.matching is None:
            return (fused.joined_MX,)
        logits_B2 = self.matching(fused.product_MD)
        return fused.joined_MX, logits_B2[:, 1] - logits_B2[:, 0]


class ExportPart(NamedTuple):
    """A part of the model that becomes a file."""

    name: str
    module: nn.Module
    inputs: Shapes
    outputs: Shapes


def parts_of(model: PretrainedMaskVLM) -> list[ExportPart]:
    """The three parts, with the model's heads.

    Raises:
        UserError: the model has neither contrast heads nor a matching head (65).
    """
    backbone, image, task = model.backbone, model.backbone.image, model.task
    projection, matching = getattr(task, "projection", None), getattr(task, "matching", None)
    if projection is None and matching is None:
        what = f"this checkpoint, of {type(task).__name__}, has heads neither for contrast nor for matching"
        raise UserError(model.origin.path, what, "Use one of pre-training or of retrieval", ExitCode.BAD_DATA)
    pixels: Shapes = {"pixel_values": ["batch", 3, image.image_size, image.image_size]}
    words: Shapes = {"input_ids": ["batch", "length"], "attention_mask": ["batch", "length"]}
    image_shapes: Shapes = {"image_features": ["batch", 1 + image.num_patches, backbone.width]}
    text_shapes: Shapes = {"text_features": ["batch", "length", backbone.width]}
    # Copied before the unit vectors are added below: the scorer uses only features.
    pair = image_shapes | text_shapes | {"attention_mask": words["attention_mask"]}
    fused: Shapes = {"fused": ["batch", 3 * backbone.width]}
    fused |= {} if matching is None else {"match_logits": ["batch"]}
    if projection is not None:
        image_shapes |= {"image_embeds": ["batch", projection.image.out_features]}
        text_shapes |= {"text_embeds": ["batch", projection.text.out_features]}
    return [
        # A new wrapper is in training mode, whatever the mode of its modules.
        ExportPart("image_encoder", ImagePart(backbone, projection).eval(), pixels, image_shapes),
        ExportPart("text_encoder", TextPart(backbone, projection).eval(), words, text_shapes),
        ExportPart("fusion_scorer", FusionPart(backbone, matching).eval(), pair, fused),
    ]


# ---------------------------------------------------------------------- the command


def main(arguments: list[str], allowed: list[str]) -> int:
    """Export; arguments: what follows the command's name. `allowed`: packages that a task may come from."""
    parser = OptionParser(
        "maskvlm export", description="export a model as ONNX or torch.export files, float32", allow_abbrev=False
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder to create")
    parser.add_argument(
        "--from",
        dest="source",
        metavar="CHECKPOINT",
        help=f"checkpoint file, Hugging Face folder or hub name (default: {DEFAULT})",
    )
    parser.add_argument(
        "--format", choices=tuple(SUFFIX), default="onnx", help="onnx, or torch for torch.export (default: %(default)s)"
    )
    parser.add_argument("--opset", type=int, help=f"ONNX opset, {OPSET} to {NEWEST_OPSET} (default: {OPSET})")
    options = parser.parse_args(arguments)
    check_export(options.folder, options.format, options.opset)  # before a large model is read
    source = options.source or default_model("exported")
    model = PretrainedMaskVLM.from_pretrained(source, allow_import=allowed)
    report = export(model, options.folder, options.format, options.opset)
    for line in export_lines(options.folder, report):
        print(line, flush=True)
    return 0


def export_lines(folder: Path, report: Mapping[str, Any]) -> Iterator[str]:
    """Summary lines of what was written."""
    for part in report["files"].values():
        largest = part["max_difference"]
        unknown = "not compared with torch, because onnxruntime is not installed (pip install onnxruntime)"
        yield f"{folder / part['file']}: {unknown if largest is None else f'at most {largest:.1e} from torch'}"


def check_export(folder: Path, kind: Format, opset: int | None) -> None:
    """Checks that do not need a model; raises the same errors as `export`."""
    if folder.exists() and (folder.is_file() or any(folder.iterdir())):
        raise UserError(folder, "already exists", "Name another one", ExitCode.CANNOT_CREATE)
    if kind == "torch" and opset is not None:
        raise UserError("--opset", "torch.export has none", "Leave it out, or give --format onnx")
    if opset is not None and not OPSET <= opset <= NEWEST_OPSET:
        raise UserError("--opset", f"{opset} is not supported", f"Give {OPSET} to {NEWEST_OPSET}")
    if missing := [name for name in ("onnx", "onnxscript") if kind == "onnx" and find_spec(name) is None]:
        what, todo = f"{' and '.join(missing)} not installed", "pip install 'maskvlm[export]', or give --format torch"
        raise UserError("export", what, todo, ExitCode.UNAVAILABLE)


def export(
    model: PretrainedMaskVLM, folder: str | Path, kind: Format = "onnx", opset: int | None = None
) -> dict[str, Any]:
    """Write the three parts and the files that they need, all or nothing.

    Args:
        model: float32, on the CPU; it is left in evaluation mode.
        folder: folder to create; may exist if it is empty.
        kind: onnx, or torch for torch.export.
        opset: ONNX opset version, OPSET to NEWEST_OPSET; None: OPSET.

    Returns:
        The content of `export.json`.

    Raises:
        UserError: another precision or device, or an opset that is not supported (2), a model without heads (65), a
            missing package (69), the folder already exists or cannot be written, the model cannot be exported, or its
            difference exceeds LIMIT (73), the disk is full or fails (74).
    """
    folder = Path(folder)
    check_export(folder, kind, opset)
    for parameter in model.parameters():
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            what = f"{parameter.dtype} on {parameter.device.type}, but only float32 on the CPU can be exported"
            raise UserError("export", what, "Load the model without dtype and device")
    parts, longest = parts_of(model.eval()), model.words.text_length
    inputs = [random_inputs(model, *size) for size in sizes(longest)]
    near = next(parent for parent in folder.absolute().parents if parent.exists())  # a rename stays on one file system
    try:
        with TemporaryDirectory(prefix=".export-", dir=near) as temporary:
            # An inner folder, since the temporary one is removed at the end.
            inner = Path(temporary) / "made"
            inner.mkdir()
            report = {
                "format": kind,
                "opset": (opset or OPSET) if kind == "onnx" else None,
                "precision": "float32",
                "files": {part.name: write_part(part, inputs, longest, inner, kind, opset or OPSET) for part in parts},
                "longest_text": longest,
                "task": type(model.task).__name__,
                "step": model.config.step,
                "versions": {name: next((d.version for d in distributions(name=name)), None) for name in PACKAGES},
            }
            write_json(inner / "export.json", report)
            processor_of(model.backbone.input_spec).save_pretrained(inner)
            folder.parent.mkdir(parents=True, exist_ok=True)
            # Replaces an empty folder, never one with content.
            os.replace(inner, folder)
    except OSError as error:
        message = f"cannot be written ({first_line(error)})"
        other = UserError(folder, message, "Choose another folder", ExitCode.CANNOT_CREATE)
        raise (cannot_write(error, folder, "complete files are kept") or other) from error
    return report


def write_part(
    part: ExportPart, inputs: Sequence[Mapping[str, Tensor]], longest: int, folder: Path, kind: Format, opset: int
) -> dict[str, Any]:
    """Write one part, compare it with torch, and return its entry for `export.json`; raises the same errors as
    `export`."""
    path, todo = folder / (part.name + SUFFIX[kind]), "Try another --format or --opset"
    try:
        save_program(part, [inputs[0][name] for name in part.inputs], longest, path, kind, opset)
        largest = difference(path, part, inputs)
    # `export` distinguishes a full disk from a model that cannot be traced.
    except OSError:
        raise
    except Exception as error:  # each library has its own errors, and some encoders cannot be traced
        raise UserError(path.name, f"fails ({first_line(error)})", todo, ExitCode.CANNOT_CREATE) from error
    if largest is not None and not largest <= LIMIT:  # also catches NaN
        what = f"differs from torch by {largest:.1e}, more than {LIMIT:.0e}; nothing was written"
        raise UserError(path.name, what, todo, ExitCode.CANNOT_CREATE)
    return {"file": path.name, "inputs": part.inputs, "outputs": part.outputs, "max_difference": largest}


@torch.no_grad()
def save_program(
    part: ExportPart, example: Sequence[Tensor], longest: int, path: Path, kind: Format, opset: int
) -> None:
    """Trace one part on an example and write it; above 2 GB, ONNX weights are in a second file."""
    # Batch and length are dynamic; all other sizes are constants.
    dims = {"batch": torch.export.Dim("batch"), "length": torch.export.Dim("length", max=longest)}
    vary = {name: {n: dims[d] for n, d in enumerate(shape) if d in dims} for name, shape in part.inputs.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about library internals; the result is compared with torch
        program = torch.export.export(part.module, tuple(example), dynamic_shapes=vary)
        if kind == "torch":
            torch.export.save(program, path)
            return
        torch.onnx.export(
            program, tuple(example), path, dynamo=True, opset_version=opset, external_data=False, verbose=False,
            input_names=list(part.inputs), output_names=list(part.outputs), dynamic_shapes=vary,
        )  # fmt: skip


# ---------------------------------------------------------------------- comparison with torch


def sizes(longest: int) -> list[tuple[int, int]]:
    """Batch sizes and lengths to compare; the first is traced and has no size of 1, which would become a constant."""
    return [(3, max(2, longest - 1)), (1, longest), (2, min(3, longest)), (5, 1 + longest // 2), (1, 1)]


@torch.no_grad()
def random_inputs(model: PretrainedMaskVLM, batch: int, length: int) -> dict[str, Tensor]:
    """Inputs of all parts by name: noise, random words with padding in all rows but the last, and the features of
    both."""
    generator, (image, text) = torch.Generator().manual_seed(batch), (model.backbone.image, model.backbone.text)
    tokens_B = torch.randint(1, length + 1, (batch,), generator=generator)
    tokens_B[-1] = length
    attention_BT = torch.arange(length) < tokens_B[:, None]
    token_BT = torch.randint(text.vocab_size, (batch, length), generator=generator)
    token_BT[~attention_BT] = text.pad_id
    pixels_BCHW = torch.randn(batch, 3, image.image_size, image.image_size, generator=generator)
    words = {"input_ids": token_BT, "attention_mask": attention_BT.long()}
    # The encoders' outputs rather than noise: the scorer is tested on realistic values.
    features = {"image_features": image(pixels_BCHW), "text_features": text(token_BT, attention_BT)}
    return {"pixel_values": pixels_BCHW} | words | features


@torch.no_grad()
def difference(path: Path, part: ExportPart, inputs: Sequence[Mapping[str, Tensor]]) -> float | None:
    """Largest difference between a file and the part it was exported from; None if there is no runtime for it."""
    if (run := runner(path, part)) is None:
        return None
    gaps = []
    for each in inputs:
        values = [each[name] for name in part.inputs]
        gaps += [(ours - theirs).abs().max() for ours, theirs in zip(run(values), part.module(*values), strict=True)]
    return float(torch.stack(gaps).max())


def runner(path: Path, part: ExportPart) -> Callable[[Sequence[Tensor]], Sequence[Tensor]] | None:
    """A function that runs a file; None for ONNX without onnxruntime."""
    if path.suffix == SUFFIX["torch"]:
        # Just written by this process: an untrusted .pt2 file could run code when loaded.
        loaded: Any = torch.export.load(path).module()
        return lambda values: loaded(*values)
    if find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 4  # errors are raised anyway
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(values: Sequence[Tensor]) -> list[Tensor]:
        named = {name: value.numpy() for name, value in zip(part.inputs, values, strict=True)}
        return [torch.from_numpy(value) for value in session.run(list(part.outputs), named)]

    return run
