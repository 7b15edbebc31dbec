"""What a step on a GPU would do, operation by operation, told by fake CUDA tensors.

Limits: attention is a stub that takes the kernel which CUDA would (flash without a mask, memory-efficient with one);
the CUDA context, the allocator's fragments and the workspaces of matrix products are not in the memory.
"""

import collections
import traceback
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
VIEWS = frozenset(
    {
        *("view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze"),
        *("detach", "alias", "as_strided", "split", "split_with_sizes", "chunk", "unbind", "_reshape_alias"),
        *("diagonal", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "unflatten"),
        *("lift_fresh", "sym_size", "resize_", "set_"),
    }
)
"""Operations that launch no kernel."""
ANSWERED = frozenset({"_local_scalar_dense", "is_nonzero", "equal"})
"""The host reads a number: it waits until the device has it."""
SIZED = frozenset({"nonzero", "masked_select", "unique", "_unique2", "unique_dim", "unique_consecutive", "bincount"})
"""The shape of the result is a number of the device: the host waits for it, too."""
MATMULS = frozenset({"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"})
PACKAGES = ("maskvlm", "transformers", "timm", "lightning", "torch/optim", "clip_grad")
BLOCK = 512  # bytes; the allocator hands out multiples of them


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Stands in for scaled_dot_product_attention: the CPU's own choice of a kernel would be that of a CPU."""
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, key, value))
    with torch.autocast("cuda", enabled=False):
        if attn_mask is None and query.dtype in (torch.bfloat16, torch.float16):
            out: Tensor = aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, False, scale=scale
            )[0]
            return out
        bias = attn_mask
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            bias = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
        if bias is not None:
            bias = bias.expand(*query.shape[:3], key.shape[2])
        out = aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, dropout_p, is_causal, scale=scale
        )[0]
        return out


def site() -> str:
    """The line of a package of interest that the current operation comes from."""
    for frame in reversed(traceback.extract_stack()[:-3]):
        if any(package in frame.filename for package in PACKAGES):
            name = frame.filename.split("site-packages/")[-1].split("/src/")[-1]
            return f"{name}:{frame.lineno}"
    return "?"


class Recorder(TorchDispatchMode):
    """Counts host waits, copies between host and device, kernels, matrix products by type, collectives by bytes, and
    the peak of the memory.

    Attributes:
        waits, copies: "what at where" -> how often; `copied`: bytes that the copies give.
        kernels: launched, by the phase that `phase` names.
        matmuls: (operation, dtype) -> how often.
        sent: (collective, phase) -> bytes that this process gets or hands over, whichever is more.
        peak: bytes of all storages that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = "forward"
        self.waits: collections.Counter[str] = collections.Counter()
        self.copies: collections.Counter[str] = collections.Counter()
        self.copied = 0
        self.kernels: collections.Counter[str] = collections.Counter()
        self.matmuls: collections.Counter[tuple[str, str]] = collections.Counter()
        self.sent: collections.Counter[tuple[str, str]] = collections.Counter()
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        space, name = func._schema.name.split("::")
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        devices = {x.device.type for x in inputs}
        if self._waits(name, func, inputs) and "cuda" in devices:
            self.waits[f"{name} at {site()}"] += 1
            if name in ANSWERED:
                return False  # a fake tensor holds no number
        out = func(*args, **kwargs)
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        touched = devices | {x.device.type for x in outputs}
        # A number of the host (0-dim) may meet a device tensor without a copy of its own.
        if len(touched) > 1 and not (name not in ("_to_copy", "copy_") and self._only_numbers(inputs)):
            self.copies[f"{name} at {site()}"] += 1
            self.copied += sum(x.numel() * x.element_size() for x in outputs)
        if space in ("c10d", "_c10d_functional"):
            self.sent[name, self.phase] += sum(x.numel() * x.element_size() for x in self._handed_over(name, inputs))
        elif "cuda" in touched and name not in VIEWS and space != "prim":
            self.kernels[self.phase] += 1
            if name in MATMULS:
                self.matmuls[name, str(inputs[-1].dtype).removeprefix("torch.")] += 1
        for x in outputs:
            self.count(x)
        return out

    @staticmethod
    def _waits(name: str, func: Any, inputs: list[Tensor]) -> bool:
        if name in ANSWERED or name in SIZED:
            return True
        if name == "repeat_interleave":
            return func._overloadname == "Tensor"
        by_bool = name in ("index", "index_put", "index_put_", "_index_put_impl_")
        return by_bool and any(x.dtype == torch.bool for x in inputs[1:])

    @staticmethod
    def _only_numbers(inputs: list[Tensor]) -> bool:
        return all(x.ndim == 0 for x in inputs if x.device.type == "cpu")

    @staticmethod
    def _handed_over(name: str, inputs: list[Tensor]) -> list[Tensor]:
        # The larger side of the exchange: what all_gather gives, what reduce_scatter takes, one of two equal sides of
        # all_to_all. Arguments are outputs and then inputs.
        if "gather" in name:
            return inputs[:-1]
        return inputs[1:] if "scatter" in name else inputs[:1] if "alltoall" in name else inputs

    def count(self, x: Tensor) -> None:
        """Note the storage of a tensor on the device until nothing holds it any more."""
        if x.device.type != "cuda":
            return
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self.alive:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self.alive[key] = size
        self.now += size
        weakref.finalize(storage, self._freed, key)
        self.peak = max(self.peak, self.now)

    def _freed(self, key: int) -> None:
        self.now -= self.alive.pop(key, 0)
