"""The user-facing model: load it from a checkpoint, a folder or the hub, and use it in plain Python.

    from maskvlm import MaskVLM
    model = MaskVLM.from_pretrained("checkpoints/first/best.ckpt")
    model.fill_mask("dog.jpg", "a [MASK] dog on the grass")

It is also a Hugging Face model: importing `maskvlm.MaskVLM` registers it with `AutoModel` and `AutoProcessor`.

Shapes: B images, C texts, E contrast width, T tokens, D width.
"""

import inspect
import logging
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self, cast

import torch
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, PreTrainedModel
from transformers.utils import ModelOutput

from maskvlm.checkpoint.hf_folder import write_sums
from maskvlm.checkpoint.hub_client import folder_of_hub, upload
from maskvlm.checkpoint.integrity import first_line
from maskvlm.checkpoint.model_spec import model_spec_of, portable, spec_of_modules
from maskvlm.checkpoint.text_files import quiet
from maskvlm.checkpoint.warm_start import Start, read_content, start_of
from maskvlm.config.bundled_models import DEFAULT
from maskvlm.config.given_options import nearest
from maskvlm.config.safe_yaml import cut
from maskvlm.data.caption_text import clean_caption
from maskvlm.data.inputs import MASK, ImageInput, as_list, open_image
from maskvlm.data.text import CaptionTokens
from maskvlm.inference.api import ModelMethods
from maskvlm.inference.hf_config import (
    MaskVLMConfig,
    MaskVLMImageProcessor,
    MaskVLMProcessor,
    configuration,
    evaluation_beside,
    write_beside,
)
from maskvlm.inference.model_card import UNNAMED, KnownSet, limits, model_card
from maskvlm.inference.rebuild import build_model
from maskvlm.model.maskvlm import MaskVLM as Backbone
from maskvlm.objectives.loaded_model import numbered
from maskvlm.objectives.methods import TASK_METHODS
from maskvlm.objectives.novelty import FarFromTraining, KnownRange, distance_to, far_line, fit_range, mean_patch
from maskvlm.objectives.task import Task
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.whole_files import write_text
from maskvlm.utils.write_errors import cannot_write

log = logging.getLogger(__name__)
WATCHED = 16  # images or texts checked per call, evenly spaced over it
KEYWORDS = ("device", "dtype", "allow_import", "revision", "token", "cache_dir", "local_files_only")
OF_TRANSFORMERS = (
    "device_map", "torch_dtype", "config", "trust_remote_code", "adapter_kwargs", "force_download", "proxies",
    "subfolder", "use_safetensors", "weights_only", "low_cpu_mem_usage", "attn_implementation",
)  # fmt: skip
"""Further arguments that `AutoModel` and common scripts pass on; the first two are read, the others change nothing."""
DESCRIBED_MODELS: set[str] = set()  # models whose training data has already been logged
MOST_WARNINGS = 1_000  # warnings and unknown words to remember
MOST_NAMED = 20  # unknown words in a warning
NO_RANGE = "It does not warn about images unlike these, as its checkpoint has no sample of validation images."
MESSAGE = "Upload a MaskVLM model"
TO_HUB = ("repo_id", "commit_message", "private", "token", "revision", "create_pr")


class UnknownWords(UserWarning):
    """Words that the model's tokenizer does not know: it was not trained on texts with them."""


class TruncatedText(UserWarning):
    """A text with more tokens than the model reads; the rest of it is ignored."""


class UnusedMask(UserWarning):
    """A [MASK] in a text of a method other than `fill_mask`: it is read as plain text, and nothing is filled in."""


INPUT_WARNINGS = (FarFromTraining, UnknownWords, TruncatedText, UnusedMask)
"""What a model warns about in its inputs."""


@dataclass
class MaskVLMOutput(ModelOutput):
    """What `MaskVLM.forward` returns; None for what the inputs or the checkpoint's heads cannot give.

    Attributes:
        image_embeds: [B, E] unit vectors, if the checkpoint has contrast heads.
        text_embeds: [C, E] unit vectors, if the checkpoint has contrast heads.
        fused: [B, 3 * D] class tokens of row-by-row pairs and their product, if B = C.
        match_logits: [B] log-odds that the pair matches, if the checkpoint has a matching head; the method `match`
            returns the probability.
    """

    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    fused: Tensor | None = None
    match_logits: Tensor | None = None


class PretrainedMaskVLM(ModelMethods, PreTrainedModel):
    """A backbone with the heads of its task. `from maskvlm import MaskVLM` is this class.

    Its methods are those of `ModelMethods`, plus those of a fine-tuned task (`model.answer` with a VQA checkpoint).
    It warns about images that are unlike its training data (`FarFromTraining`), if the checkpoint has a sample of it.

    Args:
        config: the checkpoint's settings, as in its `config.json`.
        backbone: encoders and cross encoders.
        task: the objective or downstream task with its heads.
        origin: where the weights come from, and which data they have seen.

    Attributes:
        known: range of the features of validation images; None if the checkpoint has no sample of them, or too few.
        far_warnings: the latest of these warnings, each once; at most 1,000.
        warned_words: the latest unknown words in inputs, at most 1,000; each was warned about once (`UnknownWords`).
        truncated_warnings: the latest of these warnings, each once; at most 1,000 (`TruncatedText`).
        mask_warnings: the latest of these warnings, each once; at most 1,000 (`UnusedMask`).
    """

    config_class = MaskVLMConfig
    main_input_name = "pixel_values"

    def __init__(self, config: MaskVLMConfig, backbone: Backbone, task: Task, origin: Start) -> None:
        super().__init__(config)
        self.backbone, self.task, self.origin = backbone, task, origin
        self.known = known_of(backbone, origin)
        self.far_warnings: deque[str] = deque(maxlen=MOST_WARNINGS)
        self.warned_words: deque[str] = deque(maxlen=MOST_WARNINGS)
        self.truncated_warnings: deque[str] = deque(maxlen=MOST_WARNINGS)
        self.mask_warnings: deque[str] = deque(maxlen=MOST_WARNINGS)
        self.most_far = 0.0  # highest share warned about so far, among the images checked in calls with many
        # Sets what save_pretrained reads; would initialise weights with `_init_weights`, which does nothing here.
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Weights come from the checkpoint."""

    @classmethod
    @torch.inference_mode(False)  # in this mode, weights could never be part of a gradient, which `explain` needs
    def from_pretrained(  # type: ignore[override]
        cls,
        path: str | Path = DEFAULT,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        allow_import: Iterable[str] | None = None,
        **hub: Any,
    ) -> Self:
        """Load a model, in evaluation mode. The first time a model is loaded, a log line says what it was trained on.

        Args:
            path: a run's checkpoint, a folder written by `save_pretrained`, a name on the hub, or `scenes-tiny`, the
                bundled model of the built-in world.
            device, dtype: device and precision; None for the CPU and float32.
            allow_import: one or several packages besides this project's that its task may come from.
            hub: revision, token, cache_dir, local_files_only, as elsewhere in transformers.

        Raises:
            UserError: not found (66), damaged or not a MaskVLM model (65), cannot be read (74), it would run code (77),
                no such device (69), no such precision or an unknown argument (2).
        """
        for name in hub:
            # transformers marks its own internal arguments with an underscore.
            if name not in (*KEYWORDS, *OF_TRANSFORMERS) and not name.startswith("_"):
                near = nearest(name, KEYWORDS, 0.6)
                what = f"there is no argument {name}" + (f" (did you mean {near}?)" if near else "")
                raise UserError("from_pretrained", what, f"Correct or remove it; available: {', '.join(KEYWORDS)}")
        # transformers' own names for device and dtype also work.
        device = hub.get("device_map") if device is None and isinstance(hub.get("device_map"), str) else device
        allowed = [allow_import] if isinstance(allow_import, str) else list(allow_import or ())
        device, dtype = usable_device(device), check_dtype(hub.get("torch_dtype") if dtype is None else dtype)
        if not str(path).strip():
            raise UserError("from_pretrained", "no name", "Give a checkpoint, a folder or a name on the hub")
        place = folder_of_hub(str(path), hub)
        # Content, then its spec, then modules: each step rejects what the previous one let through.
        content = read_content(place)
        origin, spec = start_of(content, str(place)), model_spec_of(content, place)
        backbone, task = build_model(spec, origin, allowed)
        # A folder contains its card and metrics; those of a checkpoint are next to the file.
        evaluation = content.get("evaluation") or (None if place.is_dir() else evaluation_beside(place))
        config = configuration(portable(spec, backbone.text.config), origin, evaluation, content.get("global_step", 0))
        # The modules hold the tensors now: only the history of the origin is kept.
        model = cls(config, backbone, task, origin._replace(backbone={}, heads={})).eval()
        if str(path) not in DESCRIBED_MODELS:
            DESCRIBED_MODELS.add(str(path))
            log.warning("%s: %s", cut(str(path), 300), model.knows)
        return model.to(device=device, dtype=dtype)

    @classmethod
    def from_modules(cls, backbone: Backbone, task: Task) -> Self:
        """A model from modules that a script has built and trained, in evaluation mode. The modules are shared.

        Raises:
            UserError: they cannot be described in a configuration (a custom class as backbone or encoder, or an object
                among the task's arguments), or the task has no heads.
        """
        spec = spec_of_modules(backbone, task)
        if spec is None or spec.task is None:
            what = f"{type(backbone).__name__} with {type(task).__name__} cannot be told in a configuration"
            todo = "Take this project's backbone and encoders, and a task whose arguments are plain values"
            raise UserError("MaskVLM.from_modules", what, todo)
        if not task.built:
            raise UserError(
                "MaskVLM.from_modules", f"{type(task).__name__} has no heads yet", "Call task.build_once(backbone)"
            )
        labels, measure = getattr(task, "labels", None), getattr(task, "measure", None)
        history = backbone.trained_on or (() if backbone.origin is None else backbone.origin.history)
        known = getattr(measure, "known_images", None)
        origin = Start("", {}, {}, backbone.text.tokenizer, None if labels is None else tuple(labels), history, known)
        return cls(configuration(spec, origin, None, 0), backbone, task, origin).eval()

    @property
    def knows(self) -> str:
        """What it was trained on and so knows, as far as the checkpoint records it, and whether it can warn about
        images unlike its training data, in one or two sentences."""
        known = limits(self.config.lineage or [])
        return known if self.known is not None else f"{known} {NO_RANGE}"

    def notice_images(self, images: list[Any]) -> list[Any]:
        """See `ModelMethods.notice_images`. For a few images, warn about each that is unlike the training data, by its
        name if it has one; this runs the encoder once more. Of many images, only a few are checked."""
        if self.known is None:
            return images
        if len(images) > WATCHED:
            self._notice_some(images)
            return images
        # Each image is opened once, even if it is passed several times.
        opened = {
            id(each): open_image(each, f"image {number}") for number, each in enumerate(images, 1) if each is not None
        }
        far = dict(zip(opened, self.far([*opened.values()]), strict=True))
        for number, image in enumerate(images, 1):
            if (line := far.get(id(image))) is None:
                continue
            # File names are untrusted.
            message = f"{cut(str(image), 300)}: {line}" if isinstance(image, str | Path) else line
            if message not in self.far_warnings:
                self.far_warnings.append(message)
            # For several images without names, the warning says which one.
            which = f"image {number}: " if message == line and len(images) > 1 else ""
            warnings.warn(which + message, FarFromTraining, stacklevel=calls_within())
        return [opened.get(id(each)) for each in images]

    def _notice_some(self, images: list[Any]) -> None:
        """Warn if some of many images are unlike the training data; in later calls, only if the share is larger."""
        if self.most_far == 1:
            return
        sample = [image for image in some_of(images) if image is not None]
        with suppress(UserError):  # an unreadable image is reported by name when it is encoded
            far = sum(line is not None for line in self.far(sample))
            message = f"{far} of {len(sample)} images that were looked at, of {len(images):,}, are unlike those that"
            message += " the model was trained on; take the answers with care"
            if far > self.most_far * len(sample):
                self.most_far = far / len(sample)
                self.far_warnings.append(message)
                warnings.warn(message, FarFromTraining, stacklevel=calls_within())

    def notice_texts(self, texts: list[Any]) -> None:
        """See `ModelMethods.notice_texts`. Warn about words that the tokenizer does not know, and texts longer than the
        model reads; of many texts, only a few are checked."""
        new = [word for word in self.unknown_words(some_of(texts)) if word not in self.warned_words]
        if new:
            self.warned_words += new
            warnings.warn(unknown_line(new), UnknownWords, stacklevel=calls_within())
        for line in self.truncated(some_of(texts)):
            if line not in self.truncated_warnings:
                self.truncated_warnings.append(line)
                warnings.warn(line, TruncatedText, stacklevel=calls_within())

    def truncated(self, texts: str | Sequence[Any]) -> list[str]:
        """A line for each text of which the model reads only the beginning."""
        lines = []
        for text in only_texts(texts):
            # A token has at least one byte: most texts need not be counted.
            if (
                len(text.encode(errors="replace")) + 2 > self.words.text_length
                and (count := self.words.count(text)) > self.words.text_length
            ):
                read = self.words.text_length - 2
                # Of a very long text, only the part that is left by cleaning is counted.
                its = "more than" if clean_caption(text)[1] == "cut" else "its"
                lines.append(f"text '{cut(text, 60)}': only the first {read} of {its} {count - 2:,} tokens are read")
        return lines

    def tokens(self, texts: str | Sequence[str]) -> CaptionTokens:
        """See `ModelMethods.tokens`. Warn about texts with [MASK]; of many texts, only a few are checked."""
        # Every method but `fill_mask` gets its tokens here.
        for line in self.unused_masks(some_of(as_list(texts)[0])):
            if line not in self.mask_warnings:
                self.mask_warnings.append(line)
                warnings.warn(line, UnusedMask, stacklevel=calls_within())
        return super().tokens(texts)

    def unused_masks(self, texts: str | Sequence[Any]) -> list[str]:
        """A line for each text with [MASK], which only `fill_mask` fills in."""
        masked = [text for text in only_texts(texts) if len(self.words.between_masks(text)) > 1]
        todo = "only fill_mask (maskvlm fill) fills it in"
        return [f"text '{cut(text, 60)}': {MASK} is read as plain text; {todo}" for text in masked]

    def unknown_words(self, texts: str | Sequence[Any]) -> list[str]:
        """The words and signs in these texts that the tokenizer does not know, or only as single letters; each once. Of
        a text longer than the model's maximum, only the first words count."""
        return list(dict.fromkeys(word for text in only_texts(texts) for word in self.words.unknown_words(text)))

    @torch.no_grad()
    def far(self, images: ImageInput | Sequence[ImageInput]) -> list[str | None]:
        """For each image, a line that says how unlike the training data it is; None if it is similar, or if the model
        has no sample of its training data."""
        image_list, lines = as_list(images)[0], list[str | None]()
        for part in numbered(image_list, self.batch_size):
            lines += self._far(self.pixels(*part))
        return lines

    @torch.no_grad()
    def _far(self, image_BCHW: Tensor) -> list[str | None]:
        if self.known is None:
            return [None] * len(image_BCHW)
        distance_B = distance_to(mean_patch(self.backbone.image(image_BCHW)), self.known).tolist()
        return [far_line(measured, self.known) if measured > self.known.most else None for measured in distance_B]

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        push_to_hub: bool = False,
        *,
        name: str = UNNAMED,
        sets: Mapping[str, KnownSet] | None = None,
        **to_hub: Any,
    ) -> None:
        """Write the hub's format: safetensors, config.json, tokenizer, image processing, model card; no pickle. A model
        in the folder is replaced.

        Args:
            push_to_hub: upload the folder, under its own name or as `repo_id`.
            name: the name that the card uses to load the model; the hub name if it is uploaded.
            sets: titles and licences for the card of training sets that the history does not name, by their hash.
            to_hub: repo_id, commit_message, private, token, revision, create_pr, as for `push_to_hub`. No other
                arguments of transformers: weights are stored in one file.

        Raises:
            UserError: an unknown argument, an empty name or none, a file instead of a folder, or no tokenizer (2); the
                folder or the card cannot be written (73, 74); the hub rejects the upload or cannot be reached (69).
        """
        if not isinstance(save_directory, str | os.PathLike):
            what = f"{type(save_directory).__name__} is not the name of a folder"
            raise UserError("save_pretrained", what, "Name a folder, . for the current one")
        if not str(save_directory):
            raise UserError("save_pretrained", "the folder's name is empty", "Name a folder, . for the current one")
        folder = Path(save_directory)
        if other := next((key for key in to_hub if key not in TO_HUB), None):
            raise UserError("save_pretrained", f"there is no argument {other}", f"Available: {', '.join(TO_HUB)}")
        if "\0" in str(folder):
            raise UserError("save_pretrained", "the folder's name has a zero byte", "Name a folder")
        if os.path.isfile(folder):  # unlike Path.is_file, it takes a name that is too long
            raise UserError(folder, "is a file", "Name a folder")
        # Checked before writing: a model without tokenizer could not be loaded again.
        _ = self.words
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            refused = UserError(
                folder, f"the folder cannot be made ({error.strerror})", "Name another", ExitCode.CANNOT_CREATE
            )
            raise cannot_write(error, folder) or refused from error
        repository = (to_hub.pop("repo_id", None) or folder.resolve().name) if push_to_hub else None
        config, spec = cast(MaskVLMConfig, self.config), self.backbone.input_spec
        write_beside(folder, self.origin, spec)
        write_text(folder / "README.md", model_card(config, spec, repository or name, sets or {}))
        with quiet():
            super().save_pretrained(folder)
        # Last, as the checksums cover all other files in the folder.
        write_sums(folder)
        if repository is not None:
            message = to_hub.pop("commit_message", None) or MESSAGE
            upload(folder, repository, message, to_hub)

    def push_to_hub(self, repo_id: str, *, commit_message: str = MESSAGE, **settings: Any) -> str:  # type: ignore[override]
        """Upload what `save_pretrained` writes, including the model card; returns the commit's URL.

        Args:
            repo_id: `owner/name`; created if it does not exist.
            settings: private, token, revision (a branch), create_pr.

        Raises:
            UserError: not logged in, no such name, or the hub cannot be reached (69).
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, name=repo_id)
            return upload(Path(folder), repo_id, commit_message, settings)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> MaskVLMOutput:
        """Run on row-by-row pairs from `AutoProcessor`, or on one modality alone; if the numbers of images and texts
        differ, only unit vectors are returned.

        Args:
            pixel_values: normalised, [B, 3, H, W], with the model's image size. input_ids, attention_mask: [B, T].

        Raises:
            UserError: a tensor of the wrong shape or type, token ids outside the vocabulary, or more tokens than the
                model's maximum.
        """
        self._check_inputs(pixel_values, input_ids, attention_mask)
        out, image_BLD, text_BTD = MaskVLMOutput(), None, None
        projection = getattr(self.task, "projection", None)
        if pixel_values is not None:
            image_BLD = self.backbone.image(pixel_values)
            out.image_embeds = projection.embed_image(image_BLD) if projection else None
        if input_ids is not None:
            attention = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            text_BTD = self.backbone.text(input_ids, attention.bool())
            out.text_embeds = projection.embed_text(text_BTD, attention.bool()) if projection else None
        # Equal numbers of images and texts are pairs; otherwise only unit vectors are returned.
        if image_BLD is not None and text_BTD is not None and len(image_BLD) == len(text_BTD):
            fused = self.backbone.fuse(image_BLD, text_BTD, attention.bool())
            out.fused = fused.joined_MX
            if (matching := getattr(self.task, "matching", None)) is not None:
                logits_B2 = matching(fused.product_MD).float()
                out.match_logits = logits_B2[:, 1] - logits_B2[:, 0]
        return out

    def _check_inputs(
        self, pixel_values: Tensor | None, input_ids: Tensor | None, attention_mask: Tensor | None
    ) -> None:
        todo = "Give the output of AutoProcessor"
        size, text = self.backbone.image.image_size, self.backbone.text
        given = {"pixel_values": pixel_values, "input_ids": input_ids, "attention_mask": attention_mask}
        for name, each in given.items():
            if each is not None and not isinstance(each, Tensor):
                raise UserError(name, f"{type(each).__name__} is not a tensor", f"{todo}, with return_tensors='pt'")
        if pixel_values is not None:
            shape = ", ".join(map(str, pixel_values.shape))
            if pixel_values.shape[1:] != (3, size, size):
                raise UserError("pixel_values", f"[{shape}] where [B, 3, {size}, {size}] is read", todo)
            mixed = pixel_values.is_floating_point() and torch.is_autocast_enabled(pixel_values.device.type)
            if pixel_values.dtype != self.dtype and not mixed:
                what = f"{pixel_values.dtype}, the model's weights are {self.dtype}"
                raise UserError("pixel_values", what, f"{todo}, and turn it to that: pixel_values.to(model.dtype)")
        if input_ids is not None:
            shape = ", ".join(map(str, input_ids.shape))
            if input_ids.dim() != 2 or input_ids.dtype not in (torch.int32, torch.int64):
                what = f"{input_ids.dtype} [{shape}] where whole numbers [B, T] are read"
                raise UserError("input_ids", what, todo)
            if input_ids.shape[1] > text.text_length:
                what = f"{input_ids.shape[1]} tokens, the model reads {text.text_length}"
                raise UserError("input_ids", what, f"{todo}, with truncation=True")
            # Only on a CPU: on a GPU, the host would have to wait for the values.
            on_cpu = input_ids.device.type == "cpu" and input_ids.numel()
            if on_cpu and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < text.vocab_size:
                what = f"ids {int(input_ids.min())} to {int(input_ids.max())}, the model has 0 to {text.vocab_size - 1}"
                raise UserError("input_ids", what, todo)
        if input_ids is not None and attention_mask is not None and attention_mask.shape != input_ids.shape:
            what = f"{list(attention_mask.shape)} beside input_ids of {list(input_ids.shape)}"
            raise UserError("attention_mask", what, todo)

    def __getattr__(self, name: str) -> Any:
        """Methods of the task: `model.answer(image, question)`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Through __dict__: while there is no task yet, `self.task` would recurse into this method.
            task = self.__dict__.get("_modules", {}).get("task")
            if task is None:
                raise
            if name not in task.methods:
                message = f"no attribute '{name}'"
                # Also tools ask for attributes that nobody typed, such as `_repr_html_`.
                if not name.startswith("_"):
                    message += advice_on(name, task)
                raise AttributeError(message, name=name, obj=self) from None
        return asking(self, name)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self.task.methods]


def advice_on(name: str, task: Task) -> str:
    """The rest of the message about an attribute that a model of this task does not have."""
    public = [each for each in vars(ModelMethods) if not each.startswith("_")]
    if name not in TASK_METHODS and (near := nearest(name, [*public, *task.methods], 0.6)):
        return f" (did you mean {near}?)"
    brings = ", ".join(task.methods) or "no method of its own"
    which = TASK_METHODS.get(name, "TASK")
    return (
        f"; the checkpoint's task, {type(task).__name__}, brings {brings}; "
        f"fine-tuned models have {'it' if name in TASK_METHODS else 'more'}: maskvlm finetune {which}"
    )


def calls_within() -> int:
    """The `stacklevel` at which a warning in the calling function points to the user's line: the first frame outside
    this project and torch, whose decorators are in between."""
    frame, calls = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("maskvlm", "tasks", "torch"):
        frame, calls = frame.f_back, calls + 1
    return calls


def some_of(items: list[Any]) -> list[Any]:
    """All items if there are few, otherwise WATCHED evenly spaced ones."""
    count = min(len(items), WATCHED)
    return [items[place * len(items) // count] for place in range(count)]


def only_texts(texts: str | Sequence[Any]) -> list[str]:
    """The texts among the inputs, or a single one; what is not text is reported when it is encoded."""
    return [texts] if isinstance(texts, str) else [text for text in texts if isinstance(text, str)]


def named_words(words: Sequence[str], most: int = MOST_NAMED) -> str:
    """At most `most` of the words in one line, and how many more there are. Signs are quoted: a comma would be read as
    part of the line."""
    named = ", ".join(word if any(map(str.isalnum, word)) else f"'{word}'" for word in [*words][:most])
    return f"{named} and {len(words) - most} more" if len(words) > most else named


def unknown_line(words: Sequence[str]) -> str:
    """The warning message; it names at most MOST_NAMED of the words."""
    return f"words that the model's tokenizer does not know: {named_words(words)}; take the answers with care"


def known_of(backbone: Backbone, origin: Start) -> KnownRange | None:
    """Range of the features of validation images in a checkpoint; None if it has none, or fewer than 50. Raises
    UserError: the features do not fit its image encoder (65)."""
    if origin.known_images is None:
        return None
    width, its = origin.known_images.shape[1], backbone.image.width
    if width != its:
        what = f"features of width {width}, its image encoder has {its}"
        raise UserError(f"{origin.path}: known_images", what, "Get the checkpoint again", ExitCode.BAD_DATA)
    return fit_range(origin.known_images)


def asking(model: PretrainedMaskVLM, name: str) -> Callable[..., Any]:
    """A task's method as a regular Python method, with its name, signature and docstring."""
    method = model.task.methods[name]
    images = ["image"] if method.images == 1 else [f"image_{number}" for number in range(1, method.images + 1)]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    named = [*images, *([method.text] if method.text else [])]
    parameters = [inspect.Parameter(each.replace(" ", "_"), kind) for each in named]
    signature = inspect.Signature(parameters)

    def call(*inputs: Any, **by_name: Any) -> Any:
        if by_name:  # without names, `ask` counts them
            try:
                inputs = signature.bind(*inputs, **by_name).args
            except TypeError as error:
                raise UserError(name, str(error), f"Give {', '.join(signature.parameters)}") from error
        return ask(model, name, *inputs)

    call.__name__ = call.__qualname__ = name
    note = "Each input is a single one or a list; a single one goes with every row of the others."
    call.__doc__ = f"{method.description[0].upper()}{method.description[1:]}.\n\n{note}"
    call.__signature__ = signature  # type: ignore[attr-defined]
    return call


def ask(model: PretrainedMaskVLM, name: str, *inputs: Any) -> Any:
    """Call a task's method with its images and its text, each a single one or a list."""
    method = model.task.methods[name]
    if len(inputs) != method.inputs:
        raise UserError(name, f"{len(inputs)} inputs", f"Give {method.form}")
    lists = [as_list(value) for value in inputs]
    for place in range(method.images):
        rows, single = lists[place]
        lists[place] = model.notice_images(rows), single
    for rows, _ in lists[method.images :]:
        model.notice_texts(rows)
    size = max(len(rows) for rows, _ in lists)
    if not all(rows for rows, _ in lists):
        return []
    if any(len(rows) not in (1, size) for rows, _ in lists):
        raise UserError(name, f"lists of {', '.join(str(len(rows)) for rows, _ in lists)}", "Give lists of one length")
    # A single image or text is used with every row of the others.
    columns = [rows * (size if len(rows) == 1 else 1) for rows, _ in lists]
    with torch.no_grad():
        answers = method.run(model.task, model, list(zip(*columns, strict=True)))
    return answers[0] if all(single for _, single in lists) else answers


def usable_device(device: str | torch.device | None) -> torch.device | None:
    """The device, if this machine has it; None and "auto" are the CPU. Raises UserError (69)."""
    if device is None or device == "auto":
        return None
    if str(device) == "meta":
        raise UserError(
            "device meta", "holds no numbers", "Give cpu, or cuda where there is a GPU", ExitCode.UNAVAILABLE
        )
    try:
        # torch.device accepts "cuda" even without a GPU; creating an empty tensor does not.
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:  # AssertionError: no CUDA build
        what, todo = f"cannot be used here ({first_line(error)})", "Give cpu, or cuda where there is a GPU"
        raise UserError(f"device {device}", what, todo, ExitCode.UNAVAILABLE) from None


def check_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A supported dtype; None and "auto" leave it at float32. Raises UserError."""
    precision = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if precision is None and dtype in (None, "auto"):
        return None
    if precision not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise UserError(f"dtype {dtype}", "is not a supported precision", "Give float32, bfloat16 or float16")
    return precision


def register() -> None:
    """Register this model with transformers' Auto classes."""
    AutoConfig.register(MaskVLMConfig.model_type, MaskVLMConfig, exist_ok=True)
    AutoModel.register(MaskVLMConfig, PretrainedMaskVLM, exist_ok=True)
    # The same class under both names, as torchvision's resizing differs from Pillow's.
    names: dict[str, type] = {"pil": MaskVLMImageProcessor, "torchvision": MaskVLMImageProcessor}
    AutoImageProcessor.register(MaskVLMConfig, image_processor_classes=names, exist_ok=True)
    AutoProcessor.register(MaskVLMConfig, MaskVLMProcessor, exist_ok=True)


register()
