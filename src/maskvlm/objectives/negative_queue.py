"""Hard negatives from earlier steps.

Shapes: B pairs of this process, G of all processes, Q pairs in the queue, L image positions, T tokens, D width,
E contrast width, m captions per image.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from maskvlm.data.batch import Batch
from maskvlm.objectives.cross_batch import Contrast, Encoded, QueuedPairs, same_pairs


class NegativeQueue:
    """The latest `size` pairs of this process's earlier steps, as additional candidates for hard negatives.

    A batch of a few dozen pairs rarely has negatives as hard as the top candidates that matching re-ranks (MoCo's
    queue, He et al. 2020; here of features, for the cross encoders). A checkpoint stores the first process's queue.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.pairs: QueuedPairs | None = None

    def push(self, batch: Batch, encoded: Encoded, contrast: Contrast) -> None:
        """Add this step's pairs; all texts are padded to the same length."""
        new = QueuedPairs(
            encoded.image_BLD, encoded.text_BTD, batch.attention_CT, contrast.image_BE, contrast.text_BE,
            batch.image_id_B, contrast.text_id_Bm, batch.valid_B,
        )  # fmt: skip
        # Without the graph, which would keep each step's activations alive.
        new = QueuedPairs(*(part.detach()[-self.size :] for part in invalidate_nonfinite(new)))
        old = self.pairs
        if old is not None:  # from a run with another `data.captions`, or a version that kept only the first caption
            most = max(old.text_id_Qm.shape[1], new.text_id_Qm.shape[1])
            old, new = (part._replace(text_id_Qm=widened(part.text_id_Qm, most)) for part in (old, new))
        # Newest last; the oldest are dropped from the front.
        self.pairs = (
            new if old is None else QueuedPairs(*(torch.cat(x)[-self.size :] for x in zip(old, new, strict=True)))
        )

    def state(self) -> dict[str, Tensor]:
        """State for a checkpoint, by the names of `QueuedPairs`; copies, as saving a view writes its whole storage."""
        return {} if self.pairs is None else {name: part.clone() for name, part in self.pairs._asdict().items()}

    def restore(self, state: Mapping[str, Tensor], positions: int, length: int, width: int, dim: int) -> None:
        """Restore the state from a checkpoint, by the names of `QueuedPairs`.

        Args:
            positions: L of the image encoder. length: T. width: D. dim: E.

        Raises:
            ValueError: a tensor is missing or has the wrong shape or type.
        """
        first_Q = state.get("text_id_Q")
        if first_Q is not None and first_Q.dim() == 1:  # an earlier version's name for the first captions
            state = {name: part for name, part in state.items() if name != "text_id_Q"}
            state["text_id_Qm"] = first_Q[:, None]
        ids = state.get("text_id_Qm", torch.empty(0))
        captions = ids.shape[1] if ids.dim() == 2 and ids.shape[1] else 1
        # One entry per field of QueuedPairs, in order: shape without the rows, and kind of number.
        sizes = ((positions, width), (length, width), (length,), (dim,), (dim,), (), (captions,), ())
        kinds = ("float", "float", "bool", "float", "float", "int", "int", "bool")
        # Checkpoints are untrusted: check every tensor before using any.
        if set(state) != set(QueuedPairs._fields):
            raise ValueError(
                f"expected the tensors {', '.join(QueuedPairs._fields)}, found {len(state)}, some of other names"
            )
        rows = len(state["valid_Q"]) if state["valid_Q"].dim() else 0
        for name, size, kind in zip(QueuedPairs._fields, sizes, kinds, strict=True):
            value = state[name]
            actual_kind = (
                "float" if value.is_floating_point() else {torch.bool: "bool", torch.int64: "int"}.get(value.dtype)
            )
            if value.shape != (rows, *size) or actual_kind != kind or not 0 < rows <= self.size:
                want = f"{[f'1 to {self.size}', *size]} of {kind}".replace("'", "")
                raise ValueError(f"{name} is {list(value.shape)} of {value.dtype}, expected {want}")
        self.pairs = invalidate_nonfinite(QueuedPairs(**{name: value.clone() for name, value in state.items()}))

    def append_to(self, contrast: Contrast, batch: Batch) -> Contrast:
        """Append the queue's vectors to those of all processes."""
        if self.pairs is None:
            return contrast
        pairs = self.pairs = QueuedPairs(
            *(part.to(contrast.scale.device) for part in self.pairs)
        )  # those from a checkpoint are on the CPU
        same_BQ = same_pairs(batch.image_id_B, contrast.text_id_Bm, pairs.image_id_Q, pairs.text_id_Qm)
        # Columns of the queue come after those of the batch, so own_B stays valid.
        return contrast._replace(
            image_GE=torch.cat([contrast.image_GE, pairs.image_QE]),
            text_GE=torch.cat([contrast.text_GE, pairs.text_QE]),
            excluded_BG=torch.cat([contrast.excluded_BG, same_BQ | ~pairs.valid_Q], 1),
        )


def widened(text_id_Qm: Tensor, captions: int) -> Tensor:
    """Caption ids [Q, captions], padded by repeating the first id of each image, which adds no caption."""
    return torch.cat([text_id_Qm, text_id_Qm[:, :1].expand(-1, captions - text_id_Qm.shape[1])], 1)


def invalidate_nonfinite(pairs: QueuedPairs) -> QueuedPairs:
    """Mark pairs with non-finite features as invalid, so that they are never drawn: the step guard skips a step that
    overflowed, but its features would stay in the queue."""
    numbers = (pairs.image_QLD, pairs.text_QTD, pairs.image_QE, pairs.text_QE)
    finite_Q = torch.stack([part.isfinite().flatten(1).all(1) for part in numbers]).all(0)
    return pairs._replace(valid_Q=pairs.valid_Q & finite_Q)
