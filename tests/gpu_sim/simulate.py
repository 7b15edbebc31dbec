"""One training step of a model in conf/model on a GPU that is not there; prints what it did as JSON.

PYTHONPATH=src:. python -m tests.gpu_sim.simulate --model base --pairs 64 --world 8
"""

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from tests.gpu_sim import fake_cuda

fake_cuda.install()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import yaml  # noqa: E402
from lightning.pytorch.utilities import move_data_to_device  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from maskvlm.data.batch import Batch  # noqa: E402
from maskvlm.data.module import PairData  # noqa: E402
from maskvlm.model.encoders import ImageEncoder, TextEncoder  # noqa: E402
from maskvlm.model.maskvlm import MaskVLM  # noqa: E402
from maskvlm.objectives.pretraining import MaskedPretraining  # noqa: E402
from tests.gpu_sim.recorder import Recorder, attention  # noqa: E402

ROOT = Path(__file__).parents[2]


class Tokens:
    """Stands for a tokenizer: the two numbers that a step reads."""

    mask_token_id, pad_token_id = 4, 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="base")
    parser.add_argument("--pairs", type=int, default=64, help="of one process")
    parser.add_argument("--world", type=int, default=1)
    parser.add_argument("--chunk", type=int, help="pairs that are computed at once (model.chunk)")
    parser.add_argument("--memory-alone", action="store_true", help="do not count operations")
    return parser.parse_args()


def build(options: argparse.Namespace) -> tuple[MaskVLM, MaskedPretraining]:
    """The model of conf/model with random weights, and the paper's task."""
    path = ROOT / "conf" / "model" / f"{options.model}.yaml"
    settings = yaml.safe_load(path.read_text())["model"]["backbone"]["init_args"]
    image, text = settings.pop("image")["init_args"], settings.pop("text")["init_args"]
    backbone = MaskVLM(ImageEncoder(**image, random_init=True), TextEncoder(**text, random_init=True), **settings)
    task = MaskedPretraining()
    task.build(backbone)
    if options.chunk is not None:
        task.compute_in_chunks(options.chunk)
    return backbone, task


def put_on_device(*modules: nn.Module) -> None:
    """Replace parameters and buffers by fake ones on the device; `to` would need a copy, for which there is no CUDA."""
    for module in (part for each in modules for part in each.modules()):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cuda")
                module._parameters[name] = nn.Parameter(fake, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")


def batch_of(pairs: int, backbone: MaskVLM) -> Batch:
    """A batch of the longest texts, as a loader gives it."""
    length, size = backbone.text.text_length, backbone.image.image_size
    there = torch.ones(pairs, length, dtype=torch.bool)
    token, numbers = torch.ones(pairs, length, dtype=torch.long), torch.arange(pairs)
    image, valid = torch.zeros(pairs, 3, size, size, dtype=torch.uint8), torch.ones(pairs, dtype=torch.bool)
    return Batch(image, token, there, ~there, torch.zeros_like(token), numbers, numbers, numbers, valid, numbers)


def uniform(world: int) -> Any:
    """Stands for `Draw`, whose generator needs a real device."""

    def draw(rows: int, *shape: int) -> Tensor:
        return torch.rand(rows * world, *shape, device="cuda")[:rows]

    return draw


class Step(nn.Module):
    """Backbone and task in one module."""

    def __init__(self, backbone: MaskVLM, task: MaskedPretraining) -> None:
        super().__init__()
        self.backbone, self.task = backbone, task

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self.task(self.backbone, batch)


@contextlib.contextmanager
def as_on_cuda(world: int) -> Iterator[None]:
    """What asks the machine instead of the tensors is answered as on a GPU."""
    with contextlib.ExitStack() as stack:
        for name, answer in {
            # Fake tensors are taken for a trace, which would not look at its data.
            "transformers.masking_utils.is_tracing": False,
            "torch.cuda.amp.common.amp_definitely_not_available": False,
            "torch.cuda.is_bf16_supported": True,
            "torch.amp.is_autocast_available": True,  # for activations that are computed again
        }.items():
            stack.enter_context(mock.patch(name, return_value=answer))
        for place in ("torch.nn.functional", "maskvlm.model.attention_kernel"):
            stack.enter_context(mock.patch(f"{place}.scaled_dot_product_attention", attention))
        if world > 1:
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
            stack.callback(dist.destroy_process_group)
            # Gathers with gradient take another way for Gloo, and `fake` is no name they know.
            stack.enter_context(mock.patch("torch.distributed.get_backend", return_value=dist.Backend.NCCL))
        yield


def forward(step: Step, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
    """Loss terms and their sum, in bfloat16 as where=gpu1 runs it."""
    with torch.autocast("cuda", dtype=torch.bfloat16):
        terms: dict[str, Tensor] = step(batch)
        return terms, torch.stack(list(terms.values())).sum()


def simulate(options: argparse.Namespace) -> dict[str, Any]:
    """Forward, backward and clipping of one step."""
    # Values do not matter, and to draw them takes most of the time.
    with contextlib.ExitStack() as stack:
        for name in ("trunc_normal_", "xavier_uniform_", "kaiming_uniform_", "normal_", "uniform_"):
            stack.enter_context(mock.patch(f"torch.nn.init.{name}", lambda tensor, *_, **__: tensor))
        backbone, task = build(options)
    recorder, flops = Recorder(), FlopCounterMode(display=False)
    with as_on_cuda(options.world), FakeTensorMode(allow_non_fake_inputs=True):
        put_on_device(backbone, task)
        backbone.text.tokenizer = Tokens()  # type: ignore[assignment]
        task.set_uniform(uniform(options.world))
        step = Step(backbone, task).train()
        for parameter in step.parameters():
            recorder.count(parameter)
        learned = [parameter for parameter in step.parameters() if parameter.requires_grad]
        # The two moments of AdamW are there from the first step on.
        recorder.now += 2 * sum(parameter.numel() * 4 for parameter in learned)
        recorder.peak = recorder.now
        data, arrival = PairData(None, backbone.input_spec, steps=1), Recorder()
        loaded = batch_of(options.pairs, backbone)
        with arrival:
            batch = move_data_to_device(loaded, torch.device("cuda"))
        data.normalised(batch)  # the first batch takes mean and deviation to the device
        with recorder:
            batch = data.normalised(batch)
            terms, loss = forward(step, batch)
            recorder.phase = "backward"
            loss.backward()
            recorder.phase = "update"
            # As torch does it on a GPU by itself; it does not take these for some.
            nn.utils.clip_grad_norm_(learned, 1.0, foreach=True)
        untouched = [name for name, x in step.named_parameters() if x.requires_grad and x.grad is None]
        if not options.memory_alone:
            # Another step: what counts operations also keeps their activations alive.
            with flops:
                _, loss = forward(step, batch)
                loss.backward()
    return {
        "pairs": options.pairs,
        "world": options.world,
        "waits": dict(recorder.waits),
        "copies": dict(recorder.copies),
        "batch_mib": round(arrival.copied / 2**20, 2),
        "kernels": dict(recorder.kernels),
        "matmuls": {" ".join(key): count for key, count in recorder.matmuls.items()},
        "sent": {" ".join(key): size for key, size in recorder.sent.items()},
        "peak_gib": round(recorder.peak / 2**30, 2),
        "gflop_per_pair": round(flops.get_total_flops() / options.pairs / 1e9, 2),
        "losses": {name: f"{term.dtype} {term.device}".removeprefix("torch.") for name, term in terms.items()},
        "devices": sorted({str(x.device) for x in (*step.parameters(), *step.buffers())}),
        "no_gradient": untouched,
    }


if __name__ == "__main__":
    print(json.dumps(simulate(parse()), indent=1))
