"""What lies beside the weights in a folder of the hub: configuration, processor, and the model card.

`hf_folder.py` reads such a folder; here are the classes that transformers needs to know.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from safetensors.torch import save_file
from transformers import PreTrainedConfig, ProcessorMixin, ViTImageProcessorPil

from maskvlm.checkpoint.hf_folder import AGAIN, KNOWN, PROCESSOR, SEEN, check_links, check_sums
from maskvlm.checkpoint.hub_client import folder_of_hub
from maskvlm.checkpoint.model_spec import ModelSpec
from maskvlm.checkpoint.tokenizer_files import file_text, read_tokenizer
from maskvlm.checkpoint.warm_start import Start
from maskvlm.config.plain_schema import Listed, Real, Record, Tree, Whole
from maskvlm.data.batch import InputSpec
from maskvlm.data.files import load_json
from maskvlm.training.run_record import write_text
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.whole_files import check_inside

BICUBIC = 3  # Pillow's number


class MaskVLMConfig(PreTrainedConfig):
    """`config.json`.

    Attributes:
        backbone, task: class_path and init_args.
        labels: what the task's head decides among; None for pre-training.
        lineage: the data that the weights have seen, first to last, without ids.
        evaluation: card and metrics of the run, as `card.json` and `metrics.json` hold them.
        step: of the optimiser.
    """

    model_type = "maskvlm"

    backbone: dict[str, Any] | None = None
    task: dict[str, Any] | None = None
    labels: list[str] | None = None
    lineage: list[dict[str, Any]] | None = None
    evaluation: dict[str, Any] | None = None
    step: int = 0


class MaskVLMImageProcessor(ViTImageProcessorPil):
    """Images as evaluation prepares them. With a name of its own, because Auto classes would choose torchvision's
    resizing for a ViT's, which differs."""


SIDE = Whole(1, 4096)
TRIPLE = Listed(Real(-10, 10), 3, 3)


class Size:
    """Height and width, the same: images are square here."""

    def says(self) -> str:
        return f"height and width, each {SIDE.says()}"

    def fits(self, value: Any) -> bool:
        right = type(value) is dict and value.keys() == {"height", "width"} and all(map(SIDE.fits, value.values()))
        return bool(right and value["height"] == value["width"])


IMAGES = Record({"size": Size(), "image_mean": TRIPLE, "image_std": Listed(Real(1e-3, 10), 3, 3)})
"""What is read of `processor_config.json`."""


class MaskVLMProcessor(ProcessorMixin):
    """Images and texts to the model's inputs: `processor(images=..., text=..., return_tensors="pt", padding=True)`.

    Images come out as evaluation prepares them (bicubic by Pillow, the whole image).
    """

    # transformers finds the parts of a processor by the names of these arguments.
    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **more: Any) -> None:
        super().__init__(image_processor, tokenizer, **more)

    @classmethod
    def from_pretrained(cls, path: str | Path, **hub: Any) -> Self:  # type: ignore[override]
        """Of a folder that this project wrote, or a name on the hub. transformers' own takes classes from the files.

        Raises:
            UserError: as `hf_folder.read_folder`; only size, mean and deviation of images are read, and the tokenizer.
        """
        place = folder_of_hub(str(path), hub)
        # Links and sums before anything is parsed.
        check_links(place)
        check_sums(place)
        file = place / PROCESSOR
        told = load_json(file_text(file).encode(), file)
        images = told.get("image_processor") if isinstance(told, dict) else None
        # Other settings, such as another way of resizing, are not taken over. What is no mapping the schema refuses.
        read = {key: images[key] for key in IMAGES.needed if key in images} if isinstance(images, dict) else images
        kept = IMAGES.read(read, str(file), AGAIN)
        tokenizer: Any = read_tokenizer(place)
        if tokenizer is None:
            raise UserError(place, "holds no tokenizer.json", "Get the whole folder", ExitCode.MISSING_INPUT)
        named = place / "tokenizer_config.json"
        length = load_json(file_text(named).encode(), named).get("model_max_length") if named.is_file() else None
        # A tokenizer without a limit has 1e30 there, which does not fit.
        if Whole(1, 100_000).fits(length):
            tokenizer.model_max_length = length
        return cls(MaskVLMImageProcessor(resample=BICUBIC, do_convert_rgb=True, **kept), tokenizer)


def processor_of(spec: InputSpec) -> MaskVLMProcessor:
    """The processor that does what the encoders expect."""
    side = {"height": spec.image_size, "width": spec.image_size}
    images = MaskVLMImageProcessor(
        size=side, resample=BICUBIC, image_mean=list(spec.mean), image_std=list(spec.std), do_convert_rgb=True
    )
    tokenizer: Any = spec.tokenizer
    # `truncation=True` then cuts where training did.
    tokenizer.model_max_length = spec.text_length
    return MaskVLMProcessor(images, tokenizer)


def configuration(spec: ModelSpec, origin: Start, evaluation: Mapping[str, Any] | None, step: int) -> MaskVLMConfig:
    """The configuration of a model with this spec (a portable one) and history."""
    return MaskVLMConfig(
        backbone=spec.backbone,
        task=spec.task,
        labels=None if origin.labels is None else list(origin.labels),
        lineage=[seen.words() for seen in origin.history],
        evaluation=dict(evaluation) if evaluation else None,
        step=step,
    )


def evaluation_beside(path: Path) -> dict[str, Any] | None:
    """`card.json` and `metrics.json` of a checkpoint's run, where they are.

    They are for people: a damaged one is told, and the model loads.
    """
    found = {}
    for name in ("card", "metrics"):
        file = path.parent / f"{name}.json"
        if file.is_file():
            try:
                found[name] = _shown(file)
            except UserError as error:
                warnings.warn(str(error), stacklevel=2)
    return found or None


def _shown(file: Path) -> dict[str, Any]:
    check_inside(file)
    content = load_json(file_text(file).encode(), file)
    if not isinstance(content, dict) or not Tree().fits(content):
        raise UserError(file, f"expected {Tree().says()}", "The model loads without it", ExitCode.BAD_DATA)
    return content


def write_beside(folder: Path, config: MaskVLMConfig, origin: Start, spec: InputSpec) -> None:
    """Tokenizer, image processing, ids of the images seen, features of known ones, model card."""
    processor_of(spec).save_pretrained(folder)
    # By place in the history: an entry without ids leaves its number out.
    ids = {str(n): seen.ids for n, seen in enumerate(origin.history) if seen.ids is not None}
    if ids:
        save_file(ids, folder / SEEN)
    if origin.known_images is not None:
        save_file({"features": origin.known_images.contiguous()}, folder / KNOWN)
    write_text(folder / "README.md", model_card(config, spec))


def model_card(config: MaskVLMConfig, spec: InputSpec) -> str:
    """The hub's `README.md`: what it is, what it has seen, how it was measured, how to use it."""
    task = str((config.task or {}).get("class_path", "unknown"))
    lines = [
        # What is between the dashes the hub reads as YAML.
        "---",
        "library_name: maskvlm",
        "license: apache-2.0",
        "pipeline_tag: image-text-to-text",
        "tags: [maskvlm, vision-and-language, masked-modelling]",
        "---",
        "",
        "# MaskVLM",
        "",
        "Two encoders and two cross encoders trained by joint masked modelling "
        "([Kwon et al., ICLR 2023](https://arxiv.org/abs/2208.02131)).",
        "",
        f"- task: `{task}`" + (f", {len(config.labels)} labels" if config.labels else ""),
        f"- images: {spec.image_size} x {spec.image_size} px; texts: up to {spec.text_length} tokens of "
        f"{spec.vocab_size}",
        f"- steps: {config.step:,}",
        *_made_by((config.evaluation or {}).get("card", {})),
        "",
        "## Use",
        "",
        "```python",
        "from maskvlm import MaskVLM",
        "",
        'model = MaskVLM.from_pretrained("THIS_FOLDER_OR_HUB_NAME")',
        USES.get(task.rpartition(".")[2], USES["MaskedPretraining"]),
        "```",
        "",
        "## Data seen",
        "",
        *[_told(seen) for seen in config.lineage or []],
        "",
        "## Evaluation",
        "",
        *_evaluation(config),
    ]
    return "\n".join(lines) + "\n"


USES = {
    "MaskedPretraining": 'model.fill_mask("image.jpg", "a [MASK] dog")',
    "Retrieval": 'model.rank("image.jpg", ["a dog", "a cat"])',
}


def _made_by(card: Mapping[str, Any]) -> list[str]:
    """The command and the versions that a run's card tells."""
    versions = card.get("versions") or {}
    if not isinstance(versions, dict) or not versions.get("command"):
        return []
    torch = (versions.get("packages") or {}).get("torch")
    return [f"- made by: `maskvlm {' '.join(versions['command'])}`, commit {versions.get('commit')}, torch {torch}"]


def _told(seen: Mapping[str, Any]) -> str:
    images = f", {seen['pictures']:,} images" if seen.get("pictures") else ""
    return f"- `{seen['source']}` (`{seen['task']}`{images}, {seen['steps']:,} steps, data hash `{seen['sha'][:16]}`)"


def _evaluation(config: MaskVLMConfig) -> list[str]:
    """A table of the run's metrics, each beside its chance level, and what they were measured on."""
    found = config.evaluation or {}
    metrics: dict[str, Any] = found.get("metrics", {})
    if not metrics:
        return ["None came with this checkpoint."]
    card, step = found.get("card", {}), metrics.get("step")
    where = [f"- {key}: {card[key]}" for key in ("data", "split", "sha", "examples", "pictures") if card.get(key)]
    # metrics.json is of the run's last weights; those of best.ckpt may be of an earlier step.
    if step is not None and step != config.step:
        where.append(f"- measured at step {step:,} of the same run; these weights are of step {config.step:,}")
    # A level stands in its metric's row, not in a row of its own.
    ends = ("_chance", "_majority")
    rows = []
    for key, value in metrics.items():
        if isinstance(value, int | float) and "/" in key and not key.endswith(ends):
            level = next((metrics[key + end] for end in ends if metrics.get(key + end) is not None), None)
            rows.append(f"| {key} | {value:.4g} | {'' if level is None else f'{level:.4g}'} |")
    return [*where, "", "| metric | value | chance level |", "|---|---|---|", *rows]
