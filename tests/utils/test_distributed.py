"""Two processes on half the batch each give the losses, gradients and metrics of one on the whole batch.

Each case runs in both processes of one pair, which is started once; what they return is compared here.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from multiprocessing import forkserver
from typing import Any

import pytest
import slow_retrieval
import torch
import torch.distributed as dist
import toy_examples
from hypothesis import given
from hypothesis import strategies as st
from slow_step import build, each_token_a_word, eventful_batch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from toys import take, toy_batch

from maskvlm.data.batch import Batch
from maskvlm.objectives.cross_batch import matching_rows, pad_text
from maskvlm.objectives.evaluation import PretrainingMetrics
from maskvlm.objectives.hard_negatives import Negatives
from maskvlm.training.sharding import blocks_of, gather_weights, release_weights, shard, unsharded
from maskvlm.utils import distributed
from maskvlm.utils.distributed import (
    Draw,
    RowExchange,
    gather,
    gather_objects,
    mix,
    most_rows,
    rank,
    shared_count,
    world_size,
)

WORLD = 2


class Step(nn.Module):
    """One module around backbone and task, as Lightning hands it to DistributedDataParallel."""

    def __init__(self, builder: Callable[..., Any], settings: dict[str, Any]) -> None:
        super().__init__()
        self.backbone, self.task = builder(**settings)

    def forward(self, batch: Any) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = self.task(self.backbone, batch)
        return terms

    def evaluate(self, images: int) -> dict[str, float]:
        """Metrics over batches of three images with two captions each, dealt out whole."""
        measure = PretrainingMetrics(4)
        for first in range(0, images, 3)[rank() :: world_size()]:
            part = take(toy_batch(8, captions=2), torch.arange(first, min(first + 3, images)))
            measure.update(self.task, self.backbone, part)
        return measure.compute(self.task, self.backbone)


ShareOut = Callable[[nn.Module], nn.Module]


def ddp(step: nn.Module) -> nn.Module:
    """Every process has all weights: torch's own DDP."""
    return nn.parallel.DistributedDataParallel(step)


def fsdp(step: nn.Module) -> nn.Module:
    """Every process has a part of each block's."""
    blocks = blocks_of(step)
    shard(step, init_device_mesh("cpu", (WORLD,)), passes=("evaluate",))
    # One of each encoder, two of each cross encoder, one of the pixel decoder, of which pieces are asked for alone.
    assert len(blocks) == 2 + 4 + hasattr(step.task, "pixels")
    assert all(isinstance(p, DTensor) and p.to_local().numel() < p.numel() for p in blocks[-1].parameters())
    return step


def share(batch: Batch) -> Batch:
    """This process's rows, trimmed to their own longest caption."""
    rows = len(batch.image_BCHW) // world_size()
    return take(batch, torch.arange(rank() * rows, (rank() + 1) * rows))


def train_step(settings: dict[str, Any], retrieval: bool = False, share_out: ShareOut = ddp) -> dict[str, Any]:
    """Loss terms and gradients of the eventful batch, averaged over processes; of pre-training, or of retrieval with
    two captions an image."""
    chunk, progress = settings.get("chunk"), settings.get("progress", 1.0)
    settings = {name: value for name, value in settings.items() if name not in ("chunk", "progress")}
    step = Step(slow_retrieval.build if retrieval else build, settings)
    step.task.run_progress = progress
    if chunk:
        step.task.compute_in_chunks(chunk)
    batch = slow_retrieval.eventful_batch() if retrieval else eventful_batch()
    exchanges = bool(settings.get("exchanged_share"))
    batch = each_token_a_word(batch) if exchanges else batch
    done = backward(step, share(batch._replace(image_BCHW=batch.image_BCHW.double())), share_out)
    assert not exchanges or step.task.exchanged.changed_C.any()
    return done


def queue_step(settings: dict[str, Any]) -> dict[str, Any]:
    """As `train_step`, with the same eight pairs of earlier steps kept in every process."""
    step = Step(build, {"negative_queue": 8, **settings}).double()
    batch = eventful_batch()
    before = pad_text(toy_batch(8, seed=9), step.backbone.text.text_length, step.backbone.text.pad_id)
    before = before._replace(image_BCHW=before.image_BCHW.double(), image_id_B=before.image_id_B + 50)
    masks = step.task.mask(step.backbone, before, Draw(1, 1, "cpu").local)
    with torch.no_grad():
        encoded = step.task.encode(step.backbone, before, masks)
        step.task.queue.push(before, encoded, step.task.contrast(before, encoded))
    done = backward(step, share(batch._replace(image_BCHW=batch.image_BCHW.double())))
    assert max(int(each.index_B.max()) for each in step.task.last_negatives) >= 8  # one of them was drawn
    return done


def example_step(kind: str, settings: dict[str, Any], holes: tuple[int, ...] = (4,)) -> dict[str, Any]:
    """As `train_step`, of a downstream task: six examples with one to three answers; `holes` could not be read."""
    images = settings.get("images_per_example", 1)
    batch = toy_examples.example_batch(6, images, holes=holes)
    answers = batch.answers._replace(weight_A=batch.answers.weight_A.double())
    batch = batch._replace(image_BPCHW=batch.image_BPCHW.double(), target_BK=batch.target_BK.double(), answers=answers)
    rows = 6 // world_size()
    part = toy_examples.take_examples(batch, rank() * rows, (rank() + 1) * rows)
    return backward(Step(toy_examples.build, {"kind": kind, **settings}), part)


def backward(step: Step, batch: Any, share_out: ShareOut = ddp) -> dict[str, Any]:
    """Terms, gradients and the blind control's statistics of one step of this process's share of the batch."""
    step.double()
    module = step if world_size() == 1 else share_out(step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", Tensor.double)  # the losses too, so that any difference is an error
        terms = module(batch)
        sum(terms.values()).backward()
    return results(step, terms)


def results(step: Step, terms: dict[str, Tensor]) -> dict[str, Any]:
    mean = {name: sum(gather(term.detach()[None])) / world_size() for name, term in terms.items()}
    grads = {name: unsharded(torch.zeros_like(p) if p.grad is None else p.grad) for name, p in step.named_parameters()}
    buffers = {name: value for name, value in step.task.named_buffers() if name.startswith("blind.")}
    return {"terms": mean, "gradients": grads, "buffers": buffers}


def evaluate(images: int, sharded: bool = False) -> dict[str, float]:
    """Metrics, with sharded weights gathered for the evaluation: processes measure different numbers of batches."""
    step = Step(build, {})
    if not sharded:
        return step.evaluate(images)
    step = fsdp(step)
    gather_weights(step)
    metrics = step.evaluate(images)
    assert not any(isinstance(value, DTensor) for value in step.parameters())
    release_weights(step)
    assert all(isinstance(value, DTensor) for value in step.parameters() if value.ndim)
    return metrics


def retrieve(images: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Metrics and predictions of the retrieval task over batches of three images, dealt out whole."""
    backbone, task = slow_retrieval.build(**settings)
    for first in range(0, images, 3)[rank() :: world_size()]:
        part = take(toy_batch(8, captions=2), torch.arange(first, min(first + 3, images)))
        task.update(backbone, part._replace(texts=tuple(f"{first} {n}" for n in range(len(part.owner_C)))))
    held = [part.image_BLD.shape[0] for part in task.encodings]
    return {"metrics": task.compute(backbone), "predictions": task.predictions, "held": held}


def gather_everything() -> dict[str, Any]:
    x_B = (torch.arange(3.0) + 10 * rank()).requires_grad_()
    everyone = gather(x_B)
    (everyone * torch.arange(1.0, 7.0) * (rank() + 1)).sum().backward()
    return {
        "rows": everyone.tolist(),
        "gradient": x_B.grad.tolist(),
        "words": gather(torch.tensor([[rank(), 5]])).tolist(),
        "flags": gather(torch.tensor([rank() == 0, True])).tolist(),
        "half": gather(torch.tensor([float(rank())], dtype=torch.bfloat16)).tolist(),
        "count": shared_count(torch.tensor(3.0 + rank())).item(),
        "objects": gather_objects({"rank": rank()}),
        "draws": [Draw(1, 2, "cpu")(2, 3), Draw(1, 2, "cpu")(2)],
        "local": Draw(1, 2, "cpu").local(4, 3),
    }


def exchange_rows(wanted: list[list[int]]) -> dict[str, Any]:
    """Of four rows a process, which hold their number in the global batch, those that `wanted` names for this one."""
    own_BD = (torch.arange(4.0).double() + 4 * rank())[:, None].expand(-1, 3).clone().requires_grad_()
    exchange = RowExchange(torch.tensor(wanted[rank()]), 4)
    rows_MD = exchange(own_BD)
    (rows_MD.sum(1) * exchange.arrived_M * (1 + 9 * rank())).sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = exchange(torch.full((4, 1), 1.001))
    return {
        "rows": rows_MD[:, 0].tolist(),
        "arrived": exchange.arrived_M.tolist(),
        "gradient": own_BD.grad[:, 0].tolist(),
        "flags": exchange(torch.arange(4) % 2 == rank()).tolist(),
        "rounded": (str(rounded.dtype), rounded.unique().tolist()),
    }


def starved_rows() -> dict[str, Any]:
    """Negatives that are all of the other process, of which one row crosses."""
    number = torch.arange(3) + 3 * (1 - rank())
    rows_BLD = (torch.arange(3.0) + 3 * rank())[:, None, None].expand(-1, 2, 4).contiguous()
    negatives = Negatives(number, torch.ones(3)), Negatives(number, torch.tensor([1.0, 1.0, 0.0]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "most_rows", lambda wanted, world: 1)
        rows, (texts, images) = matching_rows(rows_BLD, rows_BLD, torch.ones(3, 2, dtype=torch.bool), negatives)
    first = rows.image_ULD[rows.hard_image_C][0, 0, 0].item()
    return {"texts": texts.weight_B.tolist(), "images": images.weight_B.tolist(), "first": first}


def _join(place: str, number: Any) -> None:
    torch.set_num_threads(1)
    with number.get_lock():
        own, number.value = number.value, number.value + 1
    patience = timedelta(seconds=60)  # where one fails, the other must not wait for it for ever
    dist.init_process_group("gloo", f"file://{place}", patience, rank=own, world_size=WORLD)


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[int, Any]:
    """Waits for the other process: a pool may hand both calls to one worker otherwise."""
    result = function(*arguments)
    dist.barrier()
    return rank(), result


class Pair:
    """Two processes that have met."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self.pool = pool

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Results of both, in rank order."""
        calls = [self.pool.submit(_call, function, arguments) for _ in range(WORLD)]
        return [result for _, result in sorted((call.result(180) for call in calls), key=lambda pair: pair[0])]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    # A server process imports everything once; forking this one would copy autograd's threads half alive.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    place = tmp_path_factory.mktemp("pair") / "meeting"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # Python 3.11 hands the server no sys.path
        forkserver.ensure_running()
    with ProcessPoolExecutor(WORLD, context, _join, (str(place), context.Value("i", 0))) as pool:
        yield Pair(pool)


VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "both masked": {"mask_both": True, "whole_word": True, "keep_and_swap": True},
    "no contrast": {"weight_itc": 0.0, "pixel_loss": "squared"},
    "all six": {"weight_words": 0.5, "weight_spread": 2.0},
    "captions with words exchanged": {"exchanged_share": 1.0},
    "in chunks": {"chunk": 3, "exchanged_share": 1.0, "weight_spread": 2.0},
    "texts masked twice": {"masks_per_text": 2},
    "contrast first, of some patches": {"contrast_first": 0.5, "contrast_patches": 0.5, "progress": 0.2},
    "encoders stand still": {"contrast_first": 0.5, "freeze_aligned": True},
    "images stand still": {"contrast_first": 0.5, "freeze_aligned": "image"},
    "images have been learned": {"image_learns": 0.5},
}
DEFAULT = ("paper", "all six", "in chunks", "captions with words exchanged")
OTHERS = sorted({*VARIANTS} - {*DEFAULT})


@pytest.mark.parametrize("variant", [*DEFAULT, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_losses_and_gradients_are_those_of_one_process(pair: Pair, variant: str) -> None:
    """The batch holds duplicates across the two halves and a hole in one of them."""
    compare(pair, VARIANTS[variant])


def test_losses_and_gradients_with_a_queue_are_those_of_one_process(pair: Pair) -> None:
    """A negative is out of the own half, the other half, or the queue, whose places come after both."""
    compare(pair, {"mask_both": True}, step=queue_step)


def test_losses_and_gradients_of_retrieval_are_those_of_one_process(pair: Pair) -> None:
    """Two captions an image: a negative caption stands in another place than a negative image."""
    compare(pair, {}, True)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("classes", {"images_per_example": 2, "image_ablation": True}), ("generate", {}), ("classify", {})],
    ids=str,
)
def test_losses_and_gradients_of_examples_are_those_of_one_process(
    pair: Pair, kind: str, settings: dict[str, Any]
) -> None:
    """Of six examples one, or five, could not be read: half an example in each of the two processes."""
    compare(pair, kind, settings, step=example_step)
    compare(pair, kind, settings, (0, 1, 2, 4, 5), step=example_step)


def compare(
    pair: Pair,
    *arguments: Any,
    step: Callable[..., dict[str, Any]] = train_step,
    relative: float = 1e-6,
) -> None:
    """To 1e-9 of 1 in losses, of the largest gradient in gradients."""
    expected = step(*arguments)
    largest = max(grad.abs().max().item() for grad in expected["gradients"].values())
    for actual in pair(step, *arguments):
        for kind, scale in (("terms", 1.0), ("gradients", largest), ("buffers", 1.0)):
            assert actual[kind].keys() == expected[kind].keys()
            for name, value in expected[kind].items():
                torch.testing.assert_close(actual[kind][name], value, atol=1e-9 * scale, rtol=relative)


# ---------------------------------------------------------------------- sharded weights


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["paper", "all six", "in chunks", "images stand still", "encoders stand still"])
def test_losses_and_gradients_of_sharded_weights_are_those_of_one_process(pair: Pair, variant: str) -> None:
    """Two processes on three pairs of a chunk have two chunks each, the second of one pair."""
    compare(pair, VARIANTS[variant], False, fsdp, relative=0.0)


@pytest.mark.parametrize("images", [8, 3])
def test_metrics_are_those_of_one_process_to_the_bit(pair: Pair, images: int) -> None:
    """Also of sharded weights. Eight images are three batches; three leave one process without any."""
    expected = evaluate(images)
    assert {"mlm/accuracy_wrong_image", "mim/l1_no_text", "retrieval/ir_r5"} < expected.keys()
    assert pair(evaluate, images) == [expected, expected]
    assert pair(evaluate, images, True) == [expected, expected]


@pytest.mark.parametrize(("images", "settings"), [(8, {"chunk": 5}), (3, {"sweep": True, "chunk": 7})], ids=str)
def test_retrieval_is_that_of_one_process_to_the_bit(pair: Pair, images: int, settings: dict[str, Any]) -> None:
    """Each process holds the features of its own images alone."""
    expected = retrieve(images, settings)
    assert len(expected["predictions"]) == 3 * images
    parts = pair(retrieve, images, settings)
    assert [part["held"] for part in parts] == ([[3, 2], [3]] if images == 8 else [[3], []])
    for part in parts:
        assert part["metrics"] == expected["metrics"]
        assert part["predictions"] == expected["predictions"]


def test_gathering(pair: Pair) -> None:
    first, second = pair(gather_everything)
    for result in (first, second):
        assert result["rows"] == [0, 1, 2, 10, 11, 12]
        assert result["words"] == [[0, 5], [1, 5]]
        assert result["flags"] == [True, True, False, True]
        assert result["half"] == [0.0, 1.0]
        assert result["count"] == 3.5
        assert result["objects"] == [{"rank": 0}, {"rank": 1}]
    assert first["gradient"] == [3 * 1, 3 * 2, 3 * 3]  # from both processes: weights 1 and 2
    assert second["gradient"] == [3 * 4, 3 * 5, 3 * 6]


def test_each_process_gets_the_rows_it_asks_for(pair: Pair) -> None:
    wanted = [[7, 0, 5, 7], [1, 1, 6, 2]]
    for number, result in enumerate(pair(exchange_rows, wanted)):
        assert result["rows"] == wanted[number]
        assert result["arrived"] == [True] * 4
        # Odd rows of the first process are False, even ones of the second: as `flags` asks.
        assert result["flags"] == [(row % 2 == 0) if row < 4 else (row % 2 == 1) for row in wanted[number]]
        assert result["rounded"] == ("torch.float32", [1.0])  # 1.001 in bfloat16
    # Of the first process row 0 by itself, rows 1 (twice) and 2 by the second, whose loss weighs ten times as much.
    assert [result["gradient"] for result in pair(exchange_rows, wanted)] == [[1, 20, 10, 0], [0, 1, 10, 2]]


def test_what_is_asked_of_one_process_beyond_its_share_does_not_arrive(pair: Pair) -> None:
    """All 64 of the other process's row 3; and numbers behind the global batch, which ask for nothing."""
    most = most_rows(64, 2)
    assert 32 < most < 64
    for result in pair(exchange_rows, [[7] * 64, [3] * 64]):
        assert result["arrived"] == [True] * most + [False] * (64 - most)
        assert len(set(result["rows"][:most])) == 1
        assert result["gradient"][3] in (most, 10 * most)
    for result in pair(exchange_rows, [[8, 1, 9, 8]] * 2):
        assert result["arrived"] == [False, True, False, False]
        assert result["rows"][1] == 1


def test_a_negative_that_does_not_arrive_counts_nothing(pair: Pair) -> None:
    for number, result in enumerate(pair(starved_rows)):
        assert result["texts"] == result["images"] == [1.0, 0.0, 0.0]
        assert result["first"] == 3 * (1 - number)


@given(st.integers(1, 4096), st.integers(1, 256))
def test_a_process_gets_no_more_from_one_other_than_it_wants(wanted: int, world: int) -> None:
    most = most_rows(wanted, world)
    assert wanted / world <= most <= wanted


def test_draws_of_both_processes_are_the_draws_of_one(pair: Pair) -> None:
    first, second = pair(gather_everything)
    for number, shape in enumerate([(4, 3), (4,)]):
        whole = torch.cat([first["draws"][number], second["draws"][number]])
        assert torch.equal(whole, Draw(1, 2, "cpu")(*shape))
    assert torch.equal(first["local"], second["local"])


# ---------------------------------------------------------------------- one process


def test_one_process_is_all_there_is() -> None:
    x = torch.ones(2, requires_grad=True)
    assert (world_size(), rank()) == (1, 0)
    assert gather(x) is x
    assert shared_count(x) is x
    assert gather_objects(5) == [5]


def test_draws_follow_from_seed_and_step() -> None:
    same, again = Draw(3, 4, "cpu"), Draw(3, 4, "cpu")
    first = same(5, 2)
    assert torch.equal(first, again(5, 2))
    assert not torch.equal(first, same(5, 2))  # it goes on
    for other in (Draw(3, 5, "cpu"), Draw(4, 4, "cpu"), Draw(4, 3, "cpu")):
        assert not torch.equal(first, other(5, 2))
    assert ((first >= 0) & (first < 1)).all()


def test_mixed_seeds_of_near_numbers_are_unrelated() -> None:
    seeds = {mix(seed, step, third) for seed in range(20) for step in range(20) for third in range(5)}
    assert len(seeds) == 2000
    assert all(0 <= seed < 2**63 for seed in seeds)
    bits = torch.tensor([[seed >> bit & 1 for bit in range(63)] for seed in seeds]).float().mean(0)
    torch.testing.assert_close(bits, torch.full((63,), 0.5), atol=0.06, rtol=0)
