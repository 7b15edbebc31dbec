"""The methods of a loaded model, in plain Python; `embeddings`, `infill` and `saliency` implement them.

Shapes: B images, C texts, E contrast width, N patches.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from maskvlm.data.inputs import (
    ImageInput,
    MarkedTexts,
    as_list,
    check_absent,
    check_no_name,
    check_text,
    check_whole,
    is_image,
    listed_hint,
    open_image,
)
from maskvlm.data.text import CaptionTokens
from maskvlm.data.transforms import eval_transform
from maskvlm.inference import embeddings, infill, saliency
from maskvlm.inference.embeddings import Ranked
from maskvlm.inference.infill import STEPS, Guess
from maskvlm.model.maskvlm import MaskVLM
from maskvlm.objectives.loaded_model import numbered
from maskvlm.objectives.reconstructed_examples import to_rgb
from maskvlm.objectives.task import Task
from maskvlm.utils.errors import UserError

Mask = Sequence[Sequence[bool]] | np.ndarray[Any, Any] | Tensor
"""[rows, columns] of patches, true where a patch is masked."""
Map = np.ndarray[Any, np.dtype[np.float32]]
LENGTHS = range(3, 17)
"""Lengths in tokens of the captions that are generated, of which the best is returned."""


class Explained(NamedTuple):
    """Maps over the patches, [rows, columns], each summing to 1 (or 0 everywhere): the word's attention, and Grad-CAM
    on it. image: Grad-CAM as a heat map over the image, at the image's own size."""

    attention: Map
    gradcam: Map
    image: Image.Image


class Part(NamedTuple):
    """A batch of a method's input pairs: images (None: text only), their numbers in the input, counted from 1, and
    texts."""

    images: list[Any]
    numbers: list[int]
    texts: list[str]


class ModelMethods(nn.Module):
    """The methods of a backbone with the heads of its task.

    A method takes one image or text and returns one result, or takes lists and returns lists. Which methods are
    available depends on the heads: a pre-training checkpoint has all of these, a fine-tuned one those of its task.
    Images are paths, bytes, open files, Pillow images, arrays [H, W, 3] or tensors [3, H, W], greyscale ones [H, W]:
    8-bit integers from 0 to 255, or floats from 0 to 1. An empty list returns an empty list (`encode_image` and
    `encode_text`: a tensor [0, E]), but `rank` needs a query and candidates, and two lists must have the same length.

    Every method raises UserError for an image that is damaged or not an image (65), does not exist (66) or cannot be
    read (74); for an array of another shape or range, a text that has no words, lists of different lengths, and if the
    checkpoint lacks the required head (2).

    Attributes:
        backbone, task: in evaluation mode.
    """

    backbone: MaskVLM
    task: Task
    _batch_size: int = 64
    _words: MarkedTexts | None = None

    @property
    def batch_size(self) -> int:
        """Images, texts or pairs computed at once, 1 or more. Bounds memory, except that `match` and `rank` keep the
        encoders' features of all that they pair. Raises UserError if set to anything else."""
        return self._batch_size

    @batch_size.setter
    def batch_size(self, size: int) -> None:
        check_whole("batch_size", "it", size, 1)
        self._batch_size = size

    # ------------------------------------------------------------------ images and texts compared

    @torch.no_grad()
    def encode_image(self, images: ImageInput | Sequence[ImageInput]) -> Tensor:
        """Unit vectors for contrast (ITC), [B, E], or [E] for a single image, float32. Their product with those of
        `encode_text` is the cosine, -1 to 1."""
        image_list, single = self._images(images)
        vector_BE = embeddings.encode(self, image_list, True).vector_XE
        return vector_BE[0] if single else vector_BE

    @torch.no_grad()
    def encode_text(self, texts: str | Sequence[str]) -> Tensor:
        """Unit vectors for contrast (ITC), [C, E], or [E] for a single text, float32. Texts longer than the model's
        maximum are truncated."""
        text_list, single = self._texts(texts)
        vector_CE = embeddings.encode(self, text_list, False).vector_XE
        return vector_CE[0] if single else vector_CE

    @torch.no_grad()
    def match(self, images: ImageInput | Sequence[ImageInput], texts: str | Sequence[str]) -> float | list[float]:
        """Probability that image and text match (ITM), 0 to 1.

        Two lists are paired row by row; a single image or text is paired with each item of the other list.

        Raises:
            UserError: the lists differ in length, or the checkpoint does not have this head.
        """
        (image_list, one_image), (text_list, one_text) = self._images(images), self._texts(texts)
        pairs = embeddings.pair_up("match", len(image_list), len(text_list))
        # Report a missing head before encoding anything.
        self.head("matching", "match")
        # Encode each image and text once, however many pairs it is in; the cross encoders run for each pair.
        image, text = embeddings.image_features(self, image_list), embeddings.text_features(self, text_list)
        probabilities = embeddings.match(self, [image[i] for i, _ in pairs], [text[t] for _, t in pairs]).tolist()
        return probabilities[0] if one_image and one_text else probabilities

    @torch.no_grad()
    def rank(
        self,
        query: ImageInput | Sequence[ImageInput] | Sequence[str],
        candidates: Sequence[ImageInput] | Sequence[str],
        k: int = 16,
    ) -> list[Ranked] | list[list[Ranked]]:
        """Rank all candidates, best first: by cosine (ITC), with the k best re-ranked by matching (ITM).

        Args:
            query: an image to rank texts, or a text to rank images, or a list of either. Of two strings, the one that
                names a file is the image.
            candidates: a list of texts or of images.
            k: number of candidates to re-rank; 0 for none.

        Returns:
            The ranking of each query; `place` is the candidate's index in the list.

        Raises:
            UserError: candidates that are not a list, an empty list, query and candidates of the same kind, or k above
                0 for a model without matching.
        """
        queries, single = as_list(query)
        gallery, one = as_list(candidates)
        if one:
            todo = f"Give a list of texts or of images{listed_hint(candidates)}"
            raise UserError("rank", f"{type(candidates).__name__} as candidates", todo)
        check_whole("rank", "k", k, 0)
        if k and hasattr(self.task, "projection") and not hasattr(self.task, "matching"):
            raise UserError("rank", "this model has no matching, and ranks by contrast alone", "Give k=0")
        # The first item decides the kind of each side.
        images = bool(queries) and is_image(queries[0])
        if not queries or not gallery or images == is_image(gallery[0]):
            # A misspelt file name looks like a text: report that first.
            check_absent([*queries, *gallery])
            # Whatever is no text counts as an image: open it, which reports what is none.
            for number, each in enumerate([*queries, *gallery] if images else [], 1):
                open_image(each, f"image {number}")
            what = f"{'images' if images else 'texts'} on both sides"
            if not queries or not gallery:
                what = "no candidates" if queries else "no query"
            raise UserError("rank", what, "Give an image and texts, or a text and images")
        self.notice_texts(gallery if images else queries)
        queries, gallery = (self.notice_images(queries), gallery) if images else (queries, self.notice_images(gallery))
        rankings = embeddings.rank_candidates(self, queries, gallery, min(k, len(gallery)), images)
        return rankings[0] if single else rankings

    # ------------------------------------------------------------------ words

    @torch.no_grad()
    def fill_mask(
        self, image: ImageInput | Sequence[ImageInput | None] | None, text: str | Sequence[str], top_k: int = 5
    ) -> list[list[Guess]] | list[list[list[Guess]]]:
        """The likeliest words for each [MASK] in the text, given the whole image (MLM).

        Args:
            image: None for the text alone (uses an image of the mean colour).
            text: text with [MASK] in place of each masked word.
            top_k: guesses per [MASK].

        Returns:
            For each masked word, its guesses, likeliest first; probabilities over all words, 0 to 1.
        """
        check_whole("fill_mask", "top_k", top_k, 1)
        parts, single = self._parts("fill_mask", image, text)
        guesses = [one for part in parts for one in infill.fill_mask(self, *part, top_k)]
        return guesses[0] if single else guesses

    @torch.no_grad()
    def caption(self, image: ImageInput | Sequence[ImageInput], lengths: Sequence[int] = LENGTHS) -> str | list[str]:
        """Caption an image from scratch: start with all words masked, and repeatedly fill in the most certain one.

        Captions of several lengths (in tokens) are generated this way, and the one that matches the image best is
        returned (mask-predict, Ghazvininejad et al. 2019). A checkpoint that was fine-tuned for captioning instead
        generates from left to right with that task's decoder, and ignores `lengths`.

        Args:
            lengths: in tokens, without start and end; those beyond the model's maximum are skipped.

        Raises:
            UserError: an image is None, or none of the lengths is possible.
        """
        image_list, single = self._images(image)
        for number, each in enumerate(image_list, 1):
            if each is None:  # `score` has a meaning for it; a caption of no image would be invented
                todo = "Give a path, encoded bytes, a Pillow image, an array or a tensor"
                raise UserError(f"image {number}", "NoneType is not an image", todo)
        own = self.task.methods.get("caption")
        if own is not None:
            written = [str(answer[0]) for answer in own.run(self.task, self, [(each,) for each in image_list])]
            return written[0] if single else written
        # The start and end tokens take two positions.
        longest = self.backbone.text.text_length - 2
        lengths = list(lengths) if isinstance(lengths, Iterable) else [lengths]
        for length in lengths:
            check_whole("caption", "a length", length, 1)
        sizes = sorted({length for length in lengths if length <= longest})
        if not sizes:
            raise UserError("caption", f"the length is not from 1 to {longest}", "Give one within the model's limit")
        parts = numbered(image_list, self.batch_size)
        captions = [one for part in parts for one in infill.best_captions(self, *part, sizes)]
        return captions[0] if single else captions

    @torch.no_grad()
    def score(
        self, image: ImageInput | Sequence[ImageInput | None] | None, text: str | Sequence[str]
    ) -> float | list[float]:
        """Pseudo-log-likelihood of a text given the image: the sum of log p(token | other tokens, image) over its
        tokens, in nats, at most 0; higher is likelier (Salazar et al. 2020). Use it to compare texts of the same
        length, such as a text and its copy with two words swapped. Texts longer than the model's maximum are truncated.

        Args:
            image: None for the text alone (uses an image of the mean colour).
        """
        parts, single = self._parts("score", image, text)
        scores = [float(one_T.sum()) for part in parts for one_T in infill.log_likelihood(self, *part)]
        return scores[0] if single else scores

    def explain(
        self, image: ImageInput | Sequence[ImageInput], text: str | Sequence[str], word: str | Sequence[str]
    ) -> Explained | list[Explained]:
        """Where the model looks to fill in a word of the text: cross-attention, and Grad-CAM on it (Selvaraju et al.
        2017; on cross-attention as in ALBEF, Li et al. 2021).

        Args:
            word: a word of the text, or several consecutive ones. Give one for all texts, one per text, or several for
                a single text.

        Raises:
            UserError: the number of words fits neither of these; a word is not in its text.
        """
        parts, single = self._parts("explain", image, text)
        rows = [row for part in parts for row in zip(*part, strict=True)]
        words, one_word = as_list(word)
        if len(words) != len(rows) and 1 not in (len(words), len(rows)):
            raise UserError("explain", f"{len(words)} words for {len(rows)} texts", "Give one, or one for each")
        # A single pair is repeated for every word, a single word for every pair.
        size = max(len(rows), len(words)) if rows and words else 0
        rows, words = (each * (size if len(each) == 1 else 1) for each in (rows, words))
        # One pair at a time: each word needs its own backward pass.
        explanations = [
            self._explained(open_image(each, f"image {number}"), text, one)
            for (each, number, text), one in zip(rows, words, strict=True)
        ]
        return explanations[0] if single and one_word else explanations

    def _explained(self, image: Image.Image, text: str, word: str) -> Explained:
        maps = saliency.explain_word(self, image, text, word)
        # (N,) -> (rows, columns)
        attention, gradcam = (map_N.float().cpu().numpy().reshape(self.grid) for map_N in maps)
        return Explained(attention, gradcam, saliency.overlay(image, gradcam))

    # ------------------------------------------------------------------ images

    @torch.no_grad()
    def reconstruct(
        self, image: ImageInput | Sequence[ImageInput], mask: Mask | Sequence[Mask], text: str | Sequence[str]
    ) -> Image.Image | list[Image.Image]:
        """Fill in the masked patches of an image in one pass, from the rest and the whole text (MIM).

        Args:
            mask: [rows, columns] of patches (`model.grid`), true where a patch is masked; a list for several.
            image, mask, text: lists are paired row by row; a single item is used with all others, such as one image
                with several texts.

        Returns:
            The image at the model's resolution (`model.image_size`). A model that was trained with `pixel_norm`
            predicts patches up to their mean and contrast; these are taken from the image, masked or not.
        """
        return self._paint(image, mask, text, None)

    @torch.no_grad()
    def inpaint(
        self,
        image: ImageInput | Sequence[ImageInput],
        mask: Mask | Sequence[Mask],
        text: str | Sequence[str],
        steps: int = STEPS,
    ) -> Image.Image | list[Image.Image]:
        """As `reconstruct`, in rounds: the patches that the model is most certain of are painted first and are visible
        in later rounds.

        Args:
            steps: number of rounds, 1 or more.
        """
        check_whole("inpaint", "steps", steps, 1)
        return self._paint(image, mask, text, steps)

    def _paint(self, image: Any, mask: Any, text: Any, steps: int | None) -> Image.Image | list[Image.Image]:
        (image_list, one_image), (texts, one_text) = self._images(image), self._texts(text)
        masks, one_mask = ([mask], True) if _is_one_mask(mask) else (list(mask), False)
        if not image_list or not texts:
            return []
        counts = len(image_list), len(masks), len(texts)
        total = max(counts)
        if not {*counts} <= {1, total}:
            what = f"{len(image_list)} images, {len(masks)} masks and {len(texts)} texts"
            raise UserError("reconstruct" if steps is None else "inpaint", what, "Give as many of each, or one")
        # (1, N) or (B, N) -> (B, N)
        mask_BN = torch.stack([self.mask(each) for each in masks]).expand(total, -1)
        words = [check_text(each) for each in texts] * (total // len(texts))
        size, single = self.batch_size, one_image and one_mask and one_text
        pixel_parts = (self.pixels(*part) for part in numbered(image_list * (total // len(image_list)), size))
        parts = zip(pixel_parts, mask_BN.split(size), embeddings.in_batches(words, size), strict=True)
        paintings = [one for part in parts for one in self._painted(*part, steps)]
        return paintings[0] if single else paintings

    def _painted(
        self, image_BCHW: Tensor, mask_BN: Tensor, texts: Sequence[str], steps: int | None
    ) -> list[Image.Image]:
        """Paint images in one pass, or in `steps` rounds."""
        # If trained with `pixel_norm`, the pixel head predicts patches without their mean and contrast.
        true_statistics = bool(getattr(getattr(self.task, "masked_pixels", None), "norm", False))
        if steps is None:
            painted_BCHW = infill.reconstruct_images(self, image_BCHW, mask_BN, texts, true_statistics)
        else:
            painted_BCHW = infill.inpaint_images(self, image_BCHW, mask_BN, texts, steps, true_statistics)
        # Pillow expects bytes, channels last: (B, 3, H, W) -> (B, H, W, 3)
        rgb_BHWC = (to_rgb(self.backbone, painted_BCHW) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(each) for each in rgb_BHWC]

    # ------------------------------------------------------------------ building blocks of the methods

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.backbone.image.grid

    @property
    def image_size(self) -> int:
        """Side of the square that images are resized to, in pixels."""
        return self.backbone.image.image_size

    @property
    def words(self) -> MarkedTexts:
        """Tokenizer and text length. Raises UserError if the checkpoint has no tokenizer."""
        tokenizer, text_length = self.backbone.text.tokenizer, self.backbone.text.text_length
        if tokenizer is None:
            raise UserError("tokenizer", "the checkpoint holds none", "Give one that training wrote")
        # Cached: copying a tokenizer of 30,000 words takes a tenth of a second.
        if self._words is None or (self._words.tokenizer, self._words.text_length) != (tokenizer, text_length):
            self._words = MarkedTexts(tokenizer, text_length)
        return self._words

    def _images(self, images: Any) -> tuple[list[Any], bool]:
        """A method's images as a list, and whether a single one was passed."""
        image_list, single = as_list(images)
        return self.notice_images(image_list), single

    def _texts(self, texts: Any) -> tuple[list[Any], bool]:
        """A method's texts as a list, and whether a single one was passed. Raises UserError if one is no text, or the
        only one is the name of an image; among many captions such a name may be one."""
        text_list, single = as_list(texts)
        for number, text in enumerate(text_list, 1):
            check_text(text, "text" if len(text_list) == 1 else f"text {number}")
        if single:
            check_no_name(text_list[0], "text")
        self.notice_texts(text_list)
        return text_list, single

    def notice_texts(self, texts: list[Any]) -> None:
        """Hook that gets the texts of each call before they are encoded; does nothing here."""

    def notice_images(self, images: list[Any]) -> list[Any]:
        """Hook that gets the images of each call before they are encoded, and may open them; does nothing here."""
        return images

    def pixels(self, images: ImageInput | Sequence[ImageInput], numbers: Sequence[int] | None = None) -> Tensor:
        """Normalised images [B, 3, H, W] on the model's device, in its precision, prepared as in evaluation. numbers:
        how error messages refer to images without a name, 1 to B if left out."""
        transform, images = eval_transform(self.backbone.input_spec), as_list(images)[0]
        named = zip(images, numbers or range(1, len(images) + 1), strict=True)
        tensors = [transform(open_image(each, f"image {number}")) for each, number in named]
        return torch.stack(tensors).to(next(self.backbone.parameters()))

    def tokens(self, texts: str | Sequence[str]) -> CaptionTokens:
        """Ids and masks of texts, [C, T] each, on the model's device. [MASK] is plain text here; only `fill_mask` fills
        it in."""
        device = next(self.backbone.parameters()).device
        return CaptionTokens(*(part.to(device) for part in self.words(as_list(texts)[0])))

    def mask(self, mask: Mask) -> Tensor:
        """One mask over the patches, [N], on the model's device. Raises UserError for another shape, values other than
        true and false (or 1 and 0), or if nothing is masked."""
        rows, columns = self.grid
        todo = f"Give [{rows}, {columns}] of true (masked) and false"
        try:
            # The copy matters: torch rejects negative strides (a flipped mask) and warns about read-only arrays.
            tensor = torch.from_numpy(np.array(np.asarray(mask.detach().cpu() if isinstance(mask, Tensor) else mask)))
        except (ValueError, TypeError) as error:
            raise UserError("mask", f"{type(mask).__name__} is not a mask", todo) from error
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise UserError("mask", "contains non-numbers", todo)
        if not bool(((tensor == 0) | (tensor == 1)).all()):
            raise UserError("mask", "contains values other than true and false (1 and 0)", todo)
        mask_RC = tensor.bool()
        if tuple(mask_RC.shape) != (rows, columns):
            what = f"a mask of shape {list(mask_RC.shape)}, the model has {rows} rows of {columns} patches"
            raise UserError("mask", what, todo)
        if not bool(mask_RC.any()):
            raise UserError("mask", "masks no patch, so there is nothing to fill in", todo)
        return mask_RC.flatten().to(next(self.backbone.parameters()).device)

    def head(self, name: str, method: str) -> Any:
        """A head of the task, by name. Raises UserError if the checkpoint does not have it."""
        head = getattr(self.task, name, None)
        if head is None:
            what = f"this checkpoint, of {type(self.task).__name__}, has no head for it ({name})"
            raise UserError(method, what, "Use the checkpoint of pre-training")
        return head

    def _parts(self, method: str, image: Any, text: Any) -> tuple[list[Part], bool]:
        """Images with their texts, at most `batch_size` at a time, and whether a single one of each was passed."""
        (images, one_image), (texts, one_text) = self._images(image), self._texts(text)
        # Paired first and then cut into batches, so that a single image or text is repeated.
        pairs = embeddings.pair_up(method, len(images), len(texts))
        rows = [(images[i], i + 1, check_text(texts[t])) for i, t in pairs]
        parts = [Part(*map(list, zip(*part, strict=True))) for part in embeddings.in_batches(rows, self.batch_size)]
        return parts, one_image and one_text


def _is_one_mask(mask: Any) -> bool:
    """Whether it is a single mask, perhaps of a wrong shape, rather than a list of masks."""
    dimensions = _dimensions(mask)
    return dimensions != 3 and not (dimensions == 0 and isinstance(mask, list | tuple))


def _dimensions(mask: Any) -> int:
    """Number of dimensions: 2 for one mask, 3 for a list of masks, 0 for a list of masks of different shapes."""
    shapes = [tuple(each.shape) for each in mask if isinstance(each, Tensor)] if isinstance(mask, list | tuple) else []
    if shapes:  # numpy cannot read GPU tensors
        return 1 + len(shapes[0]) if len(shapes) == len(mask) and len({*shapes}) == 1 else 0
    try:
        return mask.dim() if isinstance(mask, Tensor) else np.ndim(mask)
    except ValueError:
        return 0
