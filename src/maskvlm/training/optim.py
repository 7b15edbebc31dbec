"""AdamW with the paper's two learning rates, and a schedule by step: warm-up, peak, cosine."""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from maskvlm.utils.errors import UserError


def parameter_groups(
    backbone: nn.Module,
    encoders: Iterable[nn.Module],
    heads: nn.Module,
    lr: float,
    lr_encoders: float,
    decay: float,
    lr_cross: float | None = None,
    layer_decay: float = 1.0,
    late: Iterable[nn.Parameter] = (),
    stopping: Iterable[nn.Parameter] = (),
) -> list[dict[str, Any]]:
    """Parameter groups of the encoders, the cross encoders (part of the rest unless they have their own rate) and the
    rest, each with and without weight decay.

    With `layer_decay` below 1 the rate of each encoder block is that share of the rate of the block above it. Layers
    below the first block (patches, words, positions) get that share of the first block's rate, the last norm the full
    rate (ELECTRA's rule, used to fine-tune BEiT and MAE). An adapter after an encoder is new and is trained like the
    cross encoders. timm's `param_groups_layer_decay` has one rate for one model, which must list its blocks; text
    encoders of transformers do not.

    Parameters in `late` and `stopping` get groups of their own, marked as such for `schedule`.

    Not decayed (C): biases, norms, class and mask tokens, positions of encoders, word embeddings and the temperature,
    that is, parameters with at most one dimension, or whose name shows that they are not weight matrices. (Positions of
    a text decoder are decayed: a group of their own would break the resuming of runs started with an older version.)

    Raises:
        UserError: `layer_decay` is below 1, and an encoder's blocks are not numbered in the names of its parameters.
    """
    if layer_decay < 1:
        for encoder in encoders:
            check_blocks(encoder)
    below = {id(p): number for encoder in encoders for p, number in blocks_above(encoder)}
    rates = {"cross": lr if lr_cross is None else lr_cross, "rest": lr}
    marks = {id(parameter): "late" for parameter in late} | {id(parameter): "stopping" for parameter in stopping}
    # In the order of their first parameters: the state in a checkpoint is matched by position.
    groups: dict[tuple[str, bool, str | None], list[nn.Parameter]] = {}
    for module in (backbone, heads):
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                # Class, mask and register tokens; positions; embeddings of words, positions and types.
                decayed = parameter.ndim >= 2 and not name.endswith(("token", "pos_embed", "embeddings.weight"))
                cross = module is backbone and lr_cross is not None
                kind = "cross" if cross else "rest"
                if id(parameter) in below:
                    # Without layer decay all blocks share a group.
                    number = below[id(parameter)] if layer_decay < 1 else 0
                    kind = f"encoders, {number} from the top" if number else "encoders"
                    rates[kind] = lr_encoders * layer_decay**number
                groups.setdefault((kind, decayed, marks.get(id(parameter))), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": rates[kind],
            "weight_decay": decay if decayed else 0.0,
            "name": f"{kind}{f', {mark}' if mark else ''}{'' if decayed else ' (no decay)'}",
            **({mark: True} if mark else {}),  # groups of older checkpoints do not have it
        }
        for (kind, decayed, mark), parameters in groups.items()
    ]


# timm: blocks.N; BERT and RoBERTa: layer.N; ModernBERT: layers.N.
BLOCK = re.compile(r"\.(?:blocks|layers?|h)\.(\d+)\.")


def first_step(share: float, total: int) -> int:
    """The first step with `step / total >= share`, which is how tasks compare `run_progress`. Because of rounding, the
    product alone may give the step after it."""
    step = math.ceil(share * total)
    return step - 1 if step and (step - 1) / total >= share else step


def check_blocks(encoder: nn.Module) -> None:
    """Raises UserError if no name of a parameter has the number of a block: ALBERT shares one block, XLM has none."""
    if not any(BLOCK.search(f".{name}") for name, _ in encoder.named_parameters()):
        inner = getattr(encoder, "vit", None) or getattr(encoder, "model", encoder)
        what = f"the blocks of {type(inner).__name__} are not numbered, so their rates cannot differ"
        raise UserError("model.layer_decay", what, "Set it to 1")


def blocks_above(encoder: nn.Module) -> Iterator[tuple[nn.Parameter, int]]:
    """Each parameter of an encoder, without its adapter, and the number of blocks above it: 0 in the last block and the
    norm after it, the total number of blocks for what lies below the first one."""
    names = [(f".{name}", parameter) for name, parameter in encoder.named_parameters() if "adapter." not in name]
    # Names come in the order in which the model was built: those before the first block lie below all of them.
    first = next((at for at, (name, _) in enumerate(names) if BLOCK.search(name)), len(names))
    depth = 1 + max((int(match[1]) for name, _ in names if (match := BLOCK.search(name))), default=-1)
    for at, (name, parameter) in enumerate(names):
        match = BLOCK.search(name)
        yield parameter, depth - 1 - int(match[1]) if match else depth if at < first else 0


def build_adamw(groups: list[dict[str, Any]], betas: tuple[float, float], fused: bool) -> AdamW:
    """AdamW over the groups. fused: use torch's fused kernel, which the device must support."""
    return AdamW(groups, betas=betas, fused=fused)


def keep_settings(
    states: list[dict[str, Any]], schedules: list[dict[str, Any]], optimizer: Optimizer, scheduler: LambdaLR
) -> None:
    """Give a resumed run the learning rates, weight decays and betas of its own configuration, which with `--ckpt_path`
    may differ from the checkpoint's. Adam's averages and step count are the checkpoint's.

    Args:
        states, schedules: `optimizer_states` and `lr_schedulers` of a checkpoint, of one optimiser; changed in place.
        optimizer, scheduler: newly created by the run.
    """
    step = schedules[0]["last_epoch"]
    peaks = [group["initial_lr"] for group in optimizer.param_groups]
    # As LambdaLR computes them, so that a run with the checkpoint's settings resumes bit for bit.
    rates = [peak * factor(step) for peak, factor in zip(peaks, scheduler.lr_lambdas, strict=True)]
    for group, own, rate in zip(states[0]["param_groups"], optimizer.param_groups, rates, strict=True):
        group.update({key: value for key, value in own.items() if key != "params"} | {"lr": rate})
    schedules[0].update(base_lrs=peaks, _last_lr=rates)


def begin_late(optimizer: Optimizer) -> None:
    """Let the groups marked `late` start as if this were the optimiser's first step. While they waited their gradients
    were 0: Adam's averages stayed 0 while its step count rose. It would take their first step for, say, the thousandth,
    skip the bias correction, and make the step several times too large (betas of 0.9 and 0.999)."""
    for group in optimizer.param_groups:
        if group.get("late"):
            for parameter in group["params"]:
                optimizer.state.pop(parameter, None)


def warmup_cosine(total: int, warmup: int, floor: float, stable: int = 0) -> Callable[[int], float]:
    """Factor of the learning rate at a step: linear from 0 to 1, then 1, then cosine down to `floor`.

    Args:
        total: steps of the run.
        warmup: steps of the linear rise; the factor of the first step is already above 0.
        floor: final factor, 0 to 1.
        stable: steps at 1 between the rise and the cosine.
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        down = warmup + stable
        done = min(1.0, max(0, step - down) / max(1, total - down))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))

    return factor


def schedule(
    optimizer: AdamW, total: int, warmup: float, min_lr: float, start: int = 0, stable: float = 0.0
) -> LambdaLR:
    """Warm-up, peak and cosine to `min_lr`; a group with a lower peak stays at its peak (the paper's encoders: 1e-5,
    below the final 3e-5).

    Args:
        total: steps of the run.
        warmup: share of the steps in which a group is trained, or, from 1 on, a number of steps.
        start: step at which groups marked `late` start; before it their rate is 0. The cosine of groups marked
            `stopping` ends there; from then on their rate is 0.
        stable: share of the steps after warm-up in which a group stays at its peak, 0 to below 1.
    """

    def factor(group: dict[str, Any]) -> Callable[[int], float]:
        first = start if group.get("late") else 0
        end = start if group.get("stopping") else None
        steps = (total if end is None else end) - first
        # LambdaLR multiplies each group's own peak, so the same minimum rate is a different factor for each.
        floor = min(1.0, min_lr / group["lr"]) if group["lr"] else 1.0
        rise = int(warmup if warmup >= 1 else warmup * steps)
        of_step = warmup_cosine(steps, rise, floor, int(stable * max(0, steps - rise)))
        return lambda step: of_step(step - first) if first <= step and (end is None or step < end) else 0.0

    return LambdaLR(optimizer, [factor(group) for group in optimizer.param_groups])
