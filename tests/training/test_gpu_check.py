"""`make gpu-check`: the plain step that ours is held against, and the report, tried on a CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from slow_step import build, eventful_batch, gradients
from torch import Tensor
from toys import take

from bench import albef_step, gpu_check
from bench.albef_step import PlainStep, draw_one_by_one
from maskvlm.cli import bench
from maskvlm.data.batch import Batch
from maskvlm.utils.distributed import Draw
from maskvlm.utils.errors import ExitCode, UserError

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
WHOLE = torch.tensor([0, 1, 2, 3, 5, 6, 7])
"""Rows of the eventful batch without its hole: the plain step knows none."""


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def ready(device: torch.device, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[Any, Any, Batch]:
    """Toys in double precision, so that any difference is an error."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    backbone, task = build(**settings)
    task.set_uniform(Draw(0, 0, device))
    batch = take(eventful_batch(), WHOLE)
    batch = move_data_to_device(batch._replace(image_BCHW=batch.image_BCHW.double()), device)
    return backbone.double().to(device), task.double().to(device), batch


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("settings", [{}, {"pixel_loss": "squared", "pixel_norm": True}])
def test_the_plain_step_has_our_losses_and_gradients(
    device: torch.device, shared: bool, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison would be of two different things otherwise."""
    backbone, task, batch = ready(device, monkeypatch, **settings)
    ours = task(backbone, batch)
    sum(ours.values()).backward()
    expected = {name: grad.clone() for name, grad in gradients(backbone, task).items()}
    backbone.zero_grad()
    task.zero_grad()
    captions, images = (part.index_B.tolist() for part in task.last_negatives)
    terms = PlainStep(backbone, task, shared)(batch, task.masks, (captions, images))
    sum(terms.values()).backward()
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(
        {name: term.item() for name, term in ours.items()}, rel=1e-9
    )
    grads = gradients(backbone, task)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-7, atol=1e-9, msg=name)


def test_the_plain_step_writes_attention_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fused(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("a fused kernel")

    backbone, task, batch = ready(torch.device("cpu"), monkeypatch)
    with monkeypatch.context() as patch:
        for place in ("torch.nn.functional", "maskvlm.model.attention_kernel"):
            patch.setattr(f"{place}.scaled_dot_product_attention", fused)
        terms = PlainStep(backbone, task)(batch)
        assert all(term.isfinite() for term in terms.values())
        # Afterwards both encoders are as before.
        with pytest.raises(AssertionError, match="a fused kernel"):
            backbone.image(batch.image_BCHW)
        with pytest.raises(AssertionError, match="a fused kernel"):
            backbone.text(batch.token_CT, batch.attention_CT)


def test_negatives_are_drawn_one_by_one_by_their_weights() -> None:
    weight_BG = torch.tensor([[0.0, 0.0, 0.2], [0.3, 0.0, 0.0]])
    assert draw_one_by_one(weight_BG) == [2, 0]
    torch.manual_seed(0)
    drawn = [draw_one_by_one(torch.tensor([[0.25, 0.75]]))[0] for _ in range(2000)]
    assert sum(drawn) / 2000 == pytest.approx(0.75, abs=0.04)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """Of a trial the number of steps goes back to what it was."""
    monkeypatch.chdir(root)
    monkeypatch.setattr(bench, "WARMUP", bench.WARMUP)
    monkeypatch.setattr(bench, "STEPS", bench.STEPS)


@pytest.mark.usefixtures("few")
def test_the_whole_report_runs_without_a_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """So that it does on the day there is one: fails where a measurement breaks, or a table has an empty cell."""
    assert gpu_check.main(["--cpu", "--folder", str(tmp_path)]) == 0
    report = capsys.readouterr().out
    title, training, alone = report[report.index("**") :].strip().split("\n\n")
    assert title.startswith("**CPU trial of `make gpu-check`, which says nothing of a card: ")
    first, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in training.splitlines())
    assert [row[0] for row in rows] == ["tiny, 8 pairs, 32-true", "tiny, 8 pairs, 4 at a time, 32-true"]
    for row in rows:
        cells = dict(zip(first, row, strict=True))
        assert float(cells["pairs/s"]) > 0
        assert 0 < float(cells["waits for data"].removesuffix(" %")) < 100
        seconds, _, size = cells["a checkpoint holds it"].partition(" s of ")
        assert float(seconds) > 0
        assert float(size.removesuffix(" GiB")) > 0.01
    first, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in alone.splitlines())
    ours, plain, shared, chunked = (dict(zip(first, row, strict=True)) for row in rows)
    assert ours["ours is faster"] == "-"
    operations = [float(row["GFLOP a pair"]) for row in (ours, shared, plain)]
    assert operations == sorted(operations)
    assert float(chunked["GFLOP a pair"]) == pytest.approx(4 / 3 * operations[0], rel=0.15)
    assert not list(tmp_path.iterdir())


def test_without_a_card_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no GPU was found") as caught:
        gpu_check.main([])
    assert caught.value.code == ExitCode.UNAVAILABLE


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("ways", "error", "message", "status"),
    [
        (("ours",), torch.OutOfMemoryError("CUDA out of memory"), "out of memory", 1),
        (("plain",), torch.OutOfMemoryError("CUDA out of memory"), "out of memory", 0),
        (("plain",), RuntimeError("a kernel\nis missing"), "RuntimeError: a kernel", 1),
    ],
)
def test_what_fails_has_a_row_and_the_rest_is_measured(
    ways: tuple[str, ...], error: Exception, message: str, status: int,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def measured(case: gpu_check.Case, steps: int, repeats: int) -> list[dict[str, str]]:
        if case.name == "large":
            raise error
        return [{"a step alone": case.name, "pairs/s": "1.0"}]

    cases = (gpu_check.Case("large", 8, (), None, ways), gpu_check.Case("small", 8, (), None, ("plain",)))
    monkeypatch.setattr(gpu_check, "TRIAL", cases)
    monkeypatch.setattr(gpu_check, "trained", lambda case, folder: {"training": case.name})
    monkeypatch.setattr(gpu_check, "steps_alone", measured)
    assert gpu_check.main(["--cpu", "--folder", str(tmp_path)]) == status
    report = capsys.readouterr().out
    assert f"| large, a step: {message} | - |" in report
    assert "| small | 1.0 |" in report


@pytest.mark.gpu
@pytest.mark.parametrize("case", [case for case in gpu_check.CARD if case.simulated], ids=lambda case: case.name)
def test_a_step_takes_the_memory_that_was_simulated(case: gpu_check.Case) -> None:
    """Within a tenth: fragments are not counted on either side."""
    setup = albef_step.built([*case.words, f"--data.batch_size={case.pairs}"])
    batch = move_data_to_device(albef_step.noise_batch(case.pairs, setup.model.backbone), torch.device("cuda"))
    one = albef_step.Trained(setup, torch.device("cuda"))
    assert gpu_check.step_memory(one, "ours", batch) == pytest.approx(gpu_check.simulated_gib(case), rel=0.1)
