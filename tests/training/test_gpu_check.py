"""`make gpu-check`: the plain step that ours is held against, and the report, tried on a CPU."""

from typing import Any

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from slow_step import build, eventful_batch, gradients
from torch import Tensor
from toys import take

from bench import albef_step, gpu_check
from bench.albef_step import PlainStep
from maskvlm.data.batch import Batch
from maskvlm.utils.distributed import Draw

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
def test_the_plain_step_has_our_losses_and_gradients(
    device: torch.device, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison would be of two different things otherwise."""
    backbone, task, batch = ready(device, monkeypatch, pixel_loss="squared", pixel_norm=True)
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


@pytest.mark.gpu
@pytest.mark.parametrize("case", [case for case in gpu_check.CARD if case.simulated], ids=lambda case: case.name)
def test_a_step_takes_the_memory_that_was_simulated(case: gpu_check.Case) -> None:
    """Within a tenth: fragments are not counted on either side."""
    setup = albef_step.built([*case.words, f"--data.batch_size={case.pairs}"])
    batch = move_data_to_device(albef_step.noise_batch(case.pairs, setup.model.backbone), torch.device("cuda"))
    one = albef_step.Trained(setup, torch.device("cuda"))
    assert gpu_check.step_memory(one, "ours", batch) == pytest.approx(gpu_check.simulated_gib(case), rel=0.1)
