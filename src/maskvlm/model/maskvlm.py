"""MaskVLM: two encoders and two parallel cross-modality encoders, the paper's figure 2.

Shapes: B rows, L image positions (class token and patches), T tokens, D width.
"""

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maskvlm.checkpoint.provenance import Provenance
from maskvlm.checkpoint.warm_start import LineageEntry, Start, read_start
from maskvlm.checkpoint.weights import load_pretrained, load_state
from maskvlm.data.batch import InputSpec
from maskvlm.model.cross_attention import CrossEncoder
from maskvlm.model.encoders import ImageEncoder, TextEncoder
from maskvlm.model.init import init_normal, init_positions, init_xavier
from maskvlm.utils.constructor import given_arguments
from maskvlm.utils.errors import ExitCode, UserError, check_counts, check_shares

log = logging.getLogger(__name__)
CROSS_HEADS = 12
"""Attention heads of a cross encoder, if not given (paper: ViT-B)."""


class Fused(NamedTuple):
    """Class tokens after the cross encoders: image_MD and text_MD."""

    image_MD: Tensor
    text_MD: Tensor

    @property
    def product_MD(self) -> Tensor:
        """Product of the two class tokens, [M, D], the input of matching."""
        return self.image_MD * self.text_MD

    @property
    def joined_MX(self) -> Tensor:
        """Both class tokens and their product, [M, 3 * D], the input of classifiers."""
        return torch.cat([self.image_MD, self.text_MD, self.product_MD], 1)


class MaskVLM(nn.Module):
    """The backbone shared by all tasks; heads belong to the tasks.

    Args:
        image: f_im, any timm ViT.
        text: f_txt, any Hugging Face encoder.
        cross_layers: blocks of each cross encoder (paper: 3).
        cross_heads: attention heads (12, C).
        dropout: in the cross encoders and the blocks of heads.
        checkpointing: recompute the cross encoders' activations in the backward pass.
        start: checkpoint of an earlier run, whose whole backbone is loaded, including the tokenizer, with positions
            resized if the image size differs; the encoders' own pretrained weights are then not loaded.
        query_positions: add position embeddings to the image cross encoder's queries (see `CrossEncoder`).
        width: D of the cross encoders and heads; None: the text encoder's. An encoder of a different width is followed
            by a linear layer.

    Attributes:
        provenance: where the weights come from.
        origin: what was loaded from the checkpoint `start`; None without one.
        trained_on: data of all trainings so far, as recorded by the last one in this process; None before one.

    Raises:
        UserError: the encoders are exchanged or classes, a number is out of range, the number of heads does not divide
            the width, a width is not a multiple of 4 where positions are initialised (`random_init`,
            `query_positions`), or the weights of an encoder or of `start` are not available or do not fit.
    """

    def __init__(
        self,
        image: ImageEncoder,
        text: TextEncoder,
        cross_layers: int = 3,
        cross_heads: int = CROSS_HEADS,
        dropout: float = 0.0,
        checkpointing: bool = False,
        start: str | None = None,
        width: int | None = None,
        query_positions: bool = False,
    ) -> None:
        super().__init__()
        # Encoders record their own arguments.
        self.arguments = {k: value for k, value in given_arguments(self).items() if k not in ("image", "text")}
        if isinstance(image, TextEncoder | type) or isinstance(text, ImageEncoder | type):
            names = [kind.__name__ if isinstance(kind, type) else type(kind).__name__ for kind in (image, text)]
            todo = "Build them, the image's first: MaskVLM(ImageEncoder(...), TextEncoder(...))"
            raise UserError("MaskVLM", f"{names[0]} and {names[1]} were given as image and text", todo)
        check_counts(1, {"model.backbone.cross_layers": cross_layers, "model.backbone.cross_heads": cross_heads})
        check_counts(1, {"model.backbone.width": width})
        check_shares({"model.backbone.dropout": dropout})
        width = text.width if width is None else width
        if width % cross_heads:
            todo = f"give a divisor of {width}"
            raise UserError("model.backbone.cross_heads", f"{cross_heads} does not divide width {width}", todo)
        self.image, self.text = image, text
        self._frozen_for_task: list[nn.Parameter] = []
        self.trained_on: tuple[LineageEntry, ...] | None = None
        self.width, self.cross_heads = width, cross_heads
        self.dropout, self.checkpointing = dropout, checkpointing
        # Only patches have grid positions: texts get theirs from the text encoder.
        self.cross_image = self.new_cross(cross_layers, image.grid if query_positions else None)
        self.cross_text = self.new_cross(cross_layers)
        # Initialise what does not come from a checkpoint; see the table in `init.py`.
        for encoder in (image, text):
            if encoder.random_init:
                init_xavier(encoder)
            encoder.adapt(width)
        # init_xavier does not reach the positions, which are a bare parameter.
        if image.random_init and image.vit.pos_embed is not None:
            init_positions(image.vit.pos_embed, image.grid)
        for part in (self.cross_image, self.cross_text):
            init_normal(part)
        if self.cross_image.pos_embed is not None:
            init_positions(self.cross_image.pos_embed, image.grid)
        # Weights last: they replace what was initialised above.
        self.origin: Start | None = None if start is None else read_start(start)
        self.provenance = load_pretrained(image, text) if self.origin is None else self.take_over(self.origin)

    def take_over(self, origin: Start) -> Provenance:
        """Load weights and tokenizer of a checkpoint; raises UserError (65) if they do not fit."""
        if origin.tokenizer is not None:
            try:
                self.text.set_tokenizer(origin.tokenizer)
            except UserError as error:
                # The fault lies in the checkpoint, not in an option.
                raise UserError(origin.path, f"tokenizer: {error.what}", error.todo, ExitCode.BAD_DATA) from error
        provenance = load_state(self, origin.backbone, origin.path)
        if origin.spec is not None and (others := self.other_than(origin.spec)):
            what = f"{origin.path} was trained with other settings than this model has: {', '.join(others)}"
            log.warning("%s", f"warning: {what}. Its weights may not work with them")
        self.origin = origin._replace(backbone={})  # its tensors are not needed twice
        return provenance

    def other_than(self, spec: Mapping[str, Any]) -> list[str]:
        """Settings that change what the same tensors compute and differ from those of a checkpoint, in words.

        Args:
            spec: class_path and init_args of the checkpoint's backbone.
        """
        args = spec["init_args"]
        image, text = (args[part]["init_args"] for part in ("image", "text"))
        image_heads = self.image.vit.blocks[0].attn.num_heads
        # Some kinds of text encoder have no attention, or give its heads another name.
        text_heads = getattr(self.text.config, "num_attention_heads", None)
        # A number that the checkpoint does not state counts as the same.
        settings = {
            "model.backbone.cross_heads": (self.cross_heads, args.get("cross_heads", CROSS_HEADS)),
            "model.backbone.image.normalisation": (
                self.image.arguments["normalisation"], image.get("normalisation", "model")
            ),
            "attention heads of the image encoder": (
                image_heads, (image.get("config") or {}).get("num_heads", image_heads)
            ),
            "attention heads of the text encoder": (
                text_heads, (text.get("config") or {}).get("num_attention_heads", text_heads)
            ),
        }  # fmt: skip
        return [f"{name} {own} instead of {theirs}" for name, (own, theirs) in settings.items() if own != theirs]

    @property
    def input_spec(self) -> InputSpec:
        """What the data module needs to know about the inputs."""
        return InputSpec(
            self.image.image_size,
            self.image.mean,
            self.image.std,
            self.text.text_length,
            self.text.vocab_size,
            self.text.tokenizer,
        )

    def freeze_for_task(self, *parts: nn.Module | nn.Parameter) -> None:
        """Freeze what no loss of a task reaches: it gets no gradient, and DDP would wait for it forever. Undone before
        the next task is built on this backbone."""
        for part in parts:
            for parameter in (part,) if isinstance(part, nn.Parameter) else part.parameters():
                if parameter.requires_grad:
                    parameter.requires_grad_(False)
                    self._frozen_for_task.append(parameter)

    @property
    def frozen_for_task(self) -> tuple[str, ...]:
        """Names of the parameters that `freeze_for_task` has frozen."""
        frozen = {id(parameter) for parameter in self._frozen_for_task}
        return tuple(name for name, parameter in self.named_parameters() if id(parameter) in frozen)

    def unfreeze_for_task(self) -> None:
        """Undo `freeze_for_task`; parameters frozen by an option, or by hand, stay frozen."""
        for parameter in self._frozen_for_task:
            parameter.requires_grad_(True)
        self._frozen_for_task = []

    def new_cross(self, layers: int, grid: tuple[int, int] | None = None) -> CrossEncoder:
        """Cross-attention blocks with this backbone's widths and settings; also used by heads."""
        # Both modalities have this width, thanks to `Encoder.adapt`.
        return CrossEncoder(self.width, self.width, layers, self.cross_heads, self.dropout, self.checkpointing, grid)

    def fuse(self, image_BLD: Tensor, text_BTD: Tensor, attention_BT: Tensor) -> Fused:
        """Class tokens of row-by-row pairs (image, caption) after both cross encoders."""
        # num_full=0: the last block computes only class tokens, (B, D) for each modality.
        image = self.cross_image(image_BLD, self.cross_image.context(text_BTD, attention_BT), num_full=0)
        text = self.cross_text(text_BTD, self.cross_text.context(image_BLD), attention_BT, num_full=0)
        return Fused(image.cls_BD, text.cls_BD)
