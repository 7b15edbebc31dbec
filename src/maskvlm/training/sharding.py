"""Sharded weights (FSDP2): each process keeps a part of every block's weights, gradients and moments, and gathers a
block's weights while it computes with them.

A block of an encoder, a cross encoder or a decoder is one unit; the rest (embeddings, heads, norms) is gathered once
per step. Losses and gradients are those of unsharded weights. So are checkpoints: the weights and moments of all
processes go into the same file that any other run writes, so a run can resume sharded or not.
"""

import re
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import ModelParallelStrategy
from packaging.version import Version
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from maskvlm.model.cross_attention import CrossBlock, CrossEncoder
from maskvlm.training.optim import BLOCK
from maskvlm.utils.distributed import shared_count, world_size
from maskvlm.utils.errors import UserError

TORCH = "2.13"  # the first version known to evaluate with sharded weights on a GPU
PARTS = ("keys_values", "attend_self", "attend_past", "attend_other")
"""Methods of a cross block that are called besides its forward pass."""
PASSES = ("training_step", "validation_step", "test_step", "on_validation_epoch_end", "on_test_epoch_end")
"""Methods of `LitModel` that read weights outside of any block."""


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The units: all cross blocks, and the blocks of both encoders, recognised by name. Outer ones first.

    Args:
        model: has a `backbone` and optionally a `task`.
    """
    named = BLOCK.pattern + "$"
    return [
        part
        for name, part in model.named_modules()
        if isinstance(part, CrossBlock) or (name.startswith("backbone.") and re.search(named, f".{name}."))
    ]


def shard(model: Any, mesh: DeviceMesh, passes: Iterable[str] = PASSES) -> None:
    """Shard the weights over the processes; call it before the optimiser is created.

    Args:
        model: a `LitModel`, whole and with the same values in every process.
        mesh: mesh of all processes.
        passes: its methods that read weights outside any block, besides `forward`.

    Raises:
        UserError: the mesh does not cover all processes; torch is too old to evaluate with sharded weights on a GPU;
            or features are to be cached, in which case processes would use a block different numbers of times and wait
            for each other forever.
    """
    if mesh.size() != world_size():
        what = f"shares weights among {mesh.size()} of {world_size()} processes"
        raise UserError("trainer.strategy", what, "Use maskvlm.training.sharding.ShardedStrategy (where=sharded8)")
    if mesh.device_type == "cuda" and Version(torch.__version__) < Version(TORCH):
        # There FSDP2 fails on a hook without arguments (the evaluation's end), but only on a GPU.
        what = f"torch {torch.__version__} cannot evaluate with sharded weights on a GPU"
        raise UserError("trainer.strategy", what, f"Install torch {TORCH} or newer, or use a `where` without shards")
    if model.backbone.image.feature_cache is not None:
        what = "features cannot be cached while weights are sharded"
        raise UserError("model.backbone.image.feature_cache", what, "Set it to null, or use a `where` without shards")
    # With texts grouped by length, the number of times a process uses a block would depend on its own texts.
    for part in model.modules():
        if isinstance(part, CrossEncoder):
            part.groups_texts = False
    # FSDP does not accept scalar parameters (the temperature): every process keeps them whole.
    scalars = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    # From the inside out: what is already a unit is excluded from the one around it.
    for block in reversed(blocks_of(model)):
        fully_shard(block, mesh=mesh, ignored_params=scalars)
        for method in PARTS if isinstance(block, CrossBlock) else ():
            register_fsdp_forward_method(block, method)
    fully_shard(model, mesh=mesh, ignored_params=scalars)
    for name in passes:
        register_fsdp_forward_method(model, name)
    for parameter in scalars:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_average_gradient)


def _average_gradient(parameter: Tensor) -> None:
    """Average the gradient of a parameter that FSDP does not shard over all processes."""
    assert parameter.grad is not None
    parameter.grad = shared_count(parameter.grad)


def gather_weights(model: nn.Module) -> None:
    """Gather all weights in every process: in an evaluation the processes have different numbers of batches, so they
    cannot gather block by block. Does nothing if weights are not sharded."""
    # Tensors created in inference mode could not have gradients afterwards.
    with torch.inference_mode(False), torch.no_grad():
        for unit in _units(model):
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()


def release_weights(model: nn.Module) -> None:
    """Undo `gather_weights`: each process keeps only its part of the weights again."""
    for unit in _units(model):
        unit.reshard()
        # Weights outside the blocks are needed again right away, in the backward pass.
        unit.set_reshard_after_forward(id(unit) != id(model), recurse=False)


def _units(model: nn.Module) -> list[FSDPModule]:
    return [part for part in model.modules() if isinstance(part, FSDPModule)]


def unsharded(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, for which all processes must call this; any other tensor is returned as is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is sharded, so that this process holds at most a part of it."""
    return isinstance(tensor, DTensor)


def own_part(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, which may be empty; any other tensor is returned as is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def cut_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, if `like` is sharded."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:  # the caller reports a mismatch of shapes
        return tensor
    # Every process has the whole tensor and cuts its own part.
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


class ShardedStrategy(ModelParallelStrategy):
    """Shards the weights over all processes. Checkpoints are single files of whole tensors, written and read by the
    trainer's `CheckpointIO`, as with other strategies.

    Args:
        process_group_backend: nccl or gloo; None: by device.
        timeout: timeout of a collective operation.
    """

    def __init__(
        self, process_group_backend: str | None = None, timeout: timedelta | None = default_pg_timeout
    ) -> None:
        settings: dict[str, Any] = {"process_group_backend": process_group_backend, "timeout": timeout}
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **settings)

    def setup_environment(self) -> None:
        # Lightning's default only shards weights between machines.
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True  # after the checkpoint has been checked against the run (`resume_check.py`), as with any strategy

    # The methods below behave as in unsharded strategies, unlike those of Lightning's own class.

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self._on_first(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state: dict[str, Any] = super(ModelParallelStrategy, self).optimizer_state(optimizer)
        return {**state, "state": {number: self._on_first(moments) for number, moments in state["state"].items()}}

    def _on_first(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Whole tensors in the first process's host memory; gathered one by one, as a device may not hold all."""
        whole_tensors = {}
        for name, value in tensors.items():
            value = unsharded(value)
            if self.is_global_zero:
                whole_tensors[name] = value.cpu()
        return whole_tensors

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        super(ModelParallelStrategy, self).save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return super(ModelParallelStrategy, self).load_checkpoint(checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        own, state = self.lightning_module.state_dict(), checkpoint["state_dict"]
        cut = {name: cut_like(value, own[name]) if name in own else value for name, value in state.items()}
        self.lightning_module.load_state_dict(cut, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            # As torch matches them: the k-th number of the groups belongs to the optimiser's k-th parameter.
            numbers = [number for group in state["param_groups"] for number in group["params"]]
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            cut = {
                number: {name: cut_like(value, parameter) for name, value in state["state"][number].items()}
                for number, parameter in zip(numbers, parameters, strict=True)
                if number in state["state"]
            }
            optimizer.load_state_dict({**state, "state": cut})
