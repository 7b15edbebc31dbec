"""Configuration and processor, stored next to the weights in a hub folder; the card is in `model_card.py`.

`hf_folder.py` reads such a folder; this module has the classes that transformers needs.
"""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from PIL import Image
from safetensors.torch import save_file
from transformers import PreTrainedConfig, ProcessorMixin, ViTImageProcessorPil

from maskvlm.checkpoint.hf_folder import AGAIN, KNOWN, LINEAGE, PROCESSOR, check_links, check_sums
from maskvlm.checkpoint.hub_client import folder_of_hub
from maskvlm.checkpoint.model_spec import ModelSpec
from maskvlm.checkpoint.tokenizer_files import file_text, read_tokenizer
from maskvlm.checkpoint.warm_start import Start
from maskvlm.config.plain_schema import Listed, Real, Record, Tree, Whole
from maskvlm.data.batch import InputSpec
from maskvlm.data.files import load_json
from maskvlm.data.inputs import as_list, open_image
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.whole_files import check_inside

BICUBIC = 3  # Pillow's constant


class MaskVLMConfig(PreTrainedConfig):
    """`config.json`.

    Attributes:
        backbone, task: class_path and init_args.
        labels: the classes of the task's head; None for pre-training.
        lineage: the data that the weights were trained on, first to last, without ids.
        evaluation: card and metrics of the run, as in `card.json` and `metrics.json`.
        step: optimiser step.
    """

    model_type = "maskvlm"

    backbone: dict[str, Any] | None = None
    task: dict[str, Any] | None = None
    labels: list[str] | None = None
    lineage: list[dict[str, Any]] | None = None
    evaluation: dict[str, Any] | None = None
    step: int = 0


class MaskVLMImageProcessor(ViTImageProcessorPil):
    """Prepares images as in evaluation. It has its own name because, for a ViT's, Auto classes would choose
    torchvision's resizing, which differs."""

    def preprocess(self, images: Any, *args: Any, **kwargs: Any) -> Any:
        """Prepare images as transformers does. Pillow images and files are first converted to upright 8-bit RGB, as
        photos are often stored rotated. Arrays are left to transformers."""
        image_list, single = as_list(images)
        opened = [
            open_image(each) if isinstance(each, str | Path | bytes | Image.Image) else each for each in image_list
        ]
        return super().preprocess(opened[0] if single else opened, *args, **kwargs)


SIDE = Whole(1, 4096)
TRIPLE = Listed(Real(-10, 10), 3, 3)


class Size:
    """Height and width, which are equal: images are square here."""

    def says(self) -> str:
        return f"height and width, each {SIDE.says()}"

    def fits(self, value: Any) -> bool:
        right = type(value) is dict and value.keys() == {"height", "width"} and all(map(SIDE.fits, value.values()))
        return bool(right and value["height"] == value["width"])


IMAGES = Record({"size": Size(), "image_mean": TRIPLE, "image_std": Listed(Real(1e-3, 10), 3, 3)})
"""The part of `processor_config.json` that is read."""


class MaskVLMProcessor(ProcessorMixin):
    """Converts images and texts to model inputs: `processor(images=..., text=..., return_tensors="pt", padding=True)`.

    Images are prepared as in evaluation (bicubic resizing with Pillow, the whole image).
    """

    # transformers finds the parts of a processor by the names of these arguments.
    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **more: Any) -> None:
        super().__init__(image_processor, tokenizer, **more)

    @classmethod
    def from_pretrained(cls, path: str | Path, **hub: Any) -> Self:  # type: ignore[override]
        """Load the processor from a folder that this project wrote, or by a name on the hub. Unlike transformers' own
        method, this one does not take class names from the files. It reads only the size, mean and standard deviation
        of images, and the tokenizer.

        Raises:
            UserError: as `hf_folder.read_folder`.
        """
        place = folder_of_hub(str(path), hub)
        # Check links and checksums before parsing anything.
        check_links(place)
        check_sums(place)
        file = place / PROCESSOR
        content = load_json(file_text(file).encode(), file)
        images = content.get("image_processor") if isinstance(content, dict) else None
        # Other settings, such as another resizing method, are ignored. The schema rejects anything but a mapping.
        read = {key: images[key] for key in IMAGES.needed if key in images} if isinstance(images, dict) else images
        settings = IMAGES.read(read, str(file), AGAIN)
        tokenizer: Any = read_tokenizer(place)
        if tokenizer is None:
            raise UserError(place, "holds no tokenizer.json", "Get the whole folder", ExitCode.MISSING_INPUT)
        named = place / "tokenizer_config.json"
        length = load_json(file_text(named).encode(), named).get("model_max_length") if named.is_file() else None
        # A tokenizer without a limit has 1e30 here, which does not fit.
        if Whole(1, 100_000).fits(length):
            tokenizer.model_max_length = length
        # As in training and in the model's own methods, no text has special tokens, such as [MASK], in it.
        tokenizer.split_special_tokens = True
        return cls(MaskVLMImageProcessor(resample=BICUBIC, do_convert_rgb=True, **settings), tokenizer)


def processor_of(spec: InputSpec) -> MaskVLMProcessor:
    """The processor that matches the encoders."""
    side = {"height": spec.image_size, "width": spec.image_size}
    images = MaskVLMImageProcessor(
        size=side, resample=BICUBIC, image_mean=list(spec.mean), image_std=list(spec.std), do_convert_rgb=True
    )
    tokenizer: Any = spec.tokenizer
    # So that `truncation=True` cuts where training did.
    tokenizer.model_max_length = spec.text_length
    return MaskVLMProcessor(images, tokenizer)


def configuration(spec: ModelSpec, origin: Start, evaluation: Mapping[str, Any] | None, step: int) -> MaskVLMConfig:
    """The configuration of a model with this (portable) spec and history. It is meant to be shared: absolute paths are
    reduced to their last component."""
    return MaskVLMConfig(
        backbone=spec.backbone,
        task=spec.task,
        labels=None if origin.labels is None else list(origin.labels),
        lineage=[entry.words() for entry in origin.history],
        evaluation=without_folders(dict(evaluation)) if isinstance(evaluation, Mapping) and evaluation else None,
        step=step,
    )


def without_folders(value: Any) -> Any:
    """Plain data with each absolute path in its strings cut to its last component: `data=/home/me/mine` becomes
    `data=mine`."""
    if isinstance(value, dict):
        return {key: without_folders(each) for key, each in value.items()}
    if isinstance(value, list):
        return [*map(without_folders, value)]
    # Not within a URL (https://...), nor within a relative path.
    return re.sub(r"(?<![\w.~:/-])/(?:[^/\s]+/)+(?=[^/\s])", "", value) if isinstance(value, str) else value


def evaluation_beside(path: Path) -> dict[str, Any] | None:
    """`card.json` and `metrics.json` of a checkpoint's run, if they exist.

    They are only informative: a damaged one gives a warning, and the model still loads.
    """
    evaluation = {}
    for name in ("card", "metrics"):
        file = path.parent / f"{name}.json"
        if file.is_file():
            try:
                evaluation[name] = _read_mapping(file)
            except UserError as error:
                warnings.warn(str(error), stacklevel=2)
    return evaluation or None


def _read_mapping(file: Path) -> dict[str, Any]:
    check_inside(file)
    content = load_json(file_text(file).encode(), file)
    if not isinstance(content, dict) or not Tree().fits(content):
        raise UserError(file, f"expected {Tree().says()}", "The model loads without it", ExitCode.BAD_DATA)
    return content


def write_beside(folder: Path, origin: Start, spec: InputSpec) -> None:
    """Write tokenizer, image processing, ids of the training images, and features of a sample of known images."""
    processor_of(spec).save_pretrained(folder)
    # The folder may have those of another model, which would be taken for this one's.
    for name in (LINEAGE, KNOWN):
        (folder / name).unlink(missing_ok=True)
    # By index in the history: an entry without ids is skipped.
    ids = {str(n): entry.ids for n, entry in enumerate(origin.history) if entry.ids is not None}
    if ids:
        save_file(ids, folder / LINEAGE)
    if origin.known_images is not None:
        save_file({"features": origin.known_images.contiguous()}, folder / KNOWN)
