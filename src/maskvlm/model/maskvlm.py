"""MaskVLM: two encoders and two cross-modality encoders in parallel, the paper's figure 2.

Shapes: B rows, L image positions (class token and patches), T tokens, D width.
"""

from typing import NamedTuple

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
from maskvlm.utils.errors import ExitCode, UserError, check_least, check_shares


class Fused(NamedTuple):
    """Class tokens after the cross encoders: image_MD and text_MD."""

    image_MD: Tensor
    text_MD: Tensor

    @property
    def product_MD(self) -> Tensor:
        """Product of the two class tokens, [M, D], which matching reads."""
        return self.image_MD * self.text_MD

    @property
    def joined_MX(self) -> Tensor:
        """Both class tokens and their product, [M, 3 * D], which classifiers read."""
        return torch.cat([self.image_MD, self.text_MD, self.product_MD], 1)


class MaskVLM(nn.Module):
    """The backbone that every task shares; heads belong to the tasks.

    Args:
        image: f_im, any timm ViT.
        text: f_txt, any Hugging Face encoder.
        cross_layers: blocks of each cross encoder (paper: 3).
        cross_heads: attention heads (12, C).
        dropout: in the cross encoders and the blocks of heads.
        checkpointing: recompute the cross encoders' activations in the backward pass.
        start: a checkpoint of an earlier run, whose backbone is taken over whole, tokenizer included, with positions
            resized where the image size differs; the encoders' own pretrained weights are then not looked for.
        query_positions: the image cross encoder's queries know their places (see `CrossEncoder`).
        width: D of the cross encoders and heads; None takes the text encoder's. An encoder of another width gets a
            linear layer behind it.

    Attributes:
        provenance: where the weights come from.
        origin: what the checkpoint `start` handed on; None without one.
        trained_on: the data of all trainings so far, as the last one in this process has left it; None before one.

    Raises:
        UserError: the heads do not divide the width, or an encoder's weights are wanted and cannot be had.
    """

    def __init__(
        self,
        image: ImageEncoder,
        text: TextEncoder,
        cross_layers: int = 3,
        cross_heads: int = 12,
        dropout: float = 0.0,
        checkpointing: bool = False,
        start: str | None = None,
        width: int | None = None,
        query_positions: bool = False,
    ) -> None:
        super().__init__()
        # Encoders say theirs themselves.
        self.arguments = {k: value for k, value in given_arguments(self).items() if k not in ("image", "text")}
        check_least(1, {"model.backbone.cross_layers": cross_layers, "model.backbone.cross_heads": cross_heads})
        check_least(1, {"model.backbone.width": width})
        check_shares({"model.backbone.dropout": dropout})
        width = text.width if width is None else width
        if width % cross_heads:
            todo = f"give a divisor of {width}"
            raise UserError("model.backbone.cross_heads", f"{cross_heads} do not divide width {width}", todo)
        self.image, self.text = image, text
        self._frozen_for_task: list[nn.Parameter] = []
        self.trained_on: tuple[LineageEntry, ...] | None = None
        self.width, self.cross_heads = width, cross_heads
        self.dropout, self.checkpointing = dropout, checkpointing
        # Only patches have places on a grid: texts know theirs from the text encoder.
        self.cross_image = self.new_cross(cross_layers, image.grid if query_positions else None)
        self.cross_text = self.new_cross(cross_layers)
        # Initialise what no checkpoint brings; `init.py` has the table.
        for encoder in (image, text):
            if encoder.random_init:
                init_xavier(encoder)
            encoder.adapt(width)
        # init_xavier does not reach positions, which are a bare parameter.
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
        """Weights and tokenizer of a checkpoint; raises UserError (65) where they do not fit."""
        if origin.tokenizer is not None:
            try:
                self.text.set_tokenizer(origin.tokenizer)
            except UserError as error:
                # The checkpoint is at fault here, not an option.
                raise UserError(origin.path, f"tokenizer: {error.what}", error.todo, ExitCode.BAD_DATA) from error
        provenance = load_state(self, origin.backbone, origin.path)
        self.origin = origin._replace(backbone={})  # its tensors are not needed twice
        return provenance

    @property
    def input_spec(self) -> InputSpec:
        """What the data module must know about the inputs."""
        return InputSpec(
            self.image.image_size,
            self.image.mean,
            self.image.std,
            self.text.text_length,
            self.text.vocab_size,
            self.text.tokenizer,
        )

    def freeze_for_task(self, *parts: nn.Module | nn.Parameter) -> None:
        """Freeze what no loss of a task reaches: it gets no gradient, and DDP would wait for it for ever. The next task
        that is built on this backbone finds it as it was before."""
        for part in parts:
            for parameter in (part,) if isinstance(part, nn.Parameter) else part.parameters():
                if parameter.requires_grad:
                    parameter.requires_grad_(False)
                    self._frozen_for_task.append(parameter)

    def unfreeze_for_task(self) -> None:
        """Undo what `freeze_for_task` did; what was frozen by an option, or by hand, stays so."""
        for parameter in self._frozen_for_task:
            parameter.requires_grad_(True)
        self._frozen_for_task = []

    def new_cross(self, layers: int, grid: tuple[int, int] | None = None) -> CrossEncoder:
        """Cross-attention blocks that fit this backbone and share its settings; for heads that need some, too."""
        # Both sides have this width: `Encoder.adapt` has seen to it.
        return CrossEncoder(self.width, self.width, layers, self.cross_heads, self.dropout, self.checkpointing, grid)

    def fuse(self, image_BLD: Tensor, text_BTD: Tensor, attention_BT: Tensor) -> Fused:
        """Class tokens of row-by-row pairs (image, caption) after both cross encoders."""
        # num_full=0: the last block computes class tokens alone, (B, D) of each side.
        image = self.cross_image(image_BLD, self.cross_image.context(text_BTD, attention_BT), num_full=0)
        text = self.cross_text(text_BTD, self.cross_text.context(image_BLD), attention_BT, num_full=0)
        return Fused(image.cls_BD, text.cls_BD)
