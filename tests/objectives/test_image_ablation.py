"""The blind control: noise that tells nothing of its image, with the statistics of what training has shown."""

from pathlib import Path

import pytest
import torch
from toy_examples import LABELS, Questions, bare_backbone, data_for, example_batch, fit
from toys import toy_backbone

from maskvlm.checkpoint.warm_start import read_start
from maskvlm.objectives.classification import Classification
from maskvlm.objectives.image_ablation import ImageAblation
from maskvlm.training.lit import LitModel
from maskvlm.utils.distributed import Draw
from tasks.entailment.task import Entailment
from tasks.vqa.task import Vqa

MEANS, DEVIATIONS = (0.5, -1.0, 2.0), (0.2, 1.0, 3.0)


def images(rows: int, seed: int, places: int = 2) -> torch.Tensor:
    """Channels of other means and spreads, [B, P, 3, H, W]."""
    noise = torch.randn(rows, places, 3, 24, 24, generator=torch.Generator().manual_seed(seed))
    return noise * torch.tensor(DEVIATIONS)[:, None, None] + torch.tensor(MEANS)[:, None, None]


def test_noise_has_the_statistics_of_all_images_seen_in_training() -> None:
    blind = ImageAblation()
    first, second = images(8, 0), images(8, 1) + 4
    for batch in (first, second):
        blind(batch, Draw(0, 0, "cpu"))
    both = torch.cat([first, second]).transpose(0, 2).flatten(1)
    assert blind.seen == 2
    torch.testing.assert_close(blind.mean_C, both.mean(1))
    torch.testing.assert_close((blind.square_C - blind.mean_C**2).sqrt(), both.std(1), atol=1e-3, rtol=1e-3)
    noise = blind.eval()(torch.zeros(64, 1, 3, 40, 40), Draw(0, 1, "cpu")).transpose(0, 2).flatten(1)
    torch.testing.assert_close(noise.mean(1), both.mean(1), atol=0.05, rtol=0.0)
    torch.testing.assert_close(noise.std(1), both.std(1), atol=0.05, rtol=0.01)
    standard_CN = (noise - noise.mean(1, keepdim=True)) / noise.std(1, keepdim=True)
    assert (standard_CN.abs() < 1).float().mean().item() == pytest.approx(0.6827, abs=0.005)  # a normal distribution
    assert (standard_CN.abs() < 2).float().mean().item() == pytest.approx(0.9545, abs=0.005)
    assert blind.seen == 2  # evaluation adds nothing


def test_before_training_it_is_standard_noise() -> None:
    noise = ImageAblation().eval()(images(16, 0), Draw(0, 0, "cpu"))
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(1, abs=0.02)


def test_noise_follows_from_seed_and_index_alone() -> None:
    blind = ImageAblation().eval()
    first = blind(images(3, 0), Draw(5, 9, "cpu"))
    assert first.shape == (3, 2, 3, 24, 24)
    assert torch.equal(blind(images(3, 1), Draw(5, 9, "cpu")), first)
    for other in (Draw(5, 8, "cpu"), Draw(4, 9, "cpu")):
        assert not torch.equal(blind(images(3, 0), other), first)
    assert len({value.sum().item() for value in first.flatten(0, 1)}) == 6  # every image has its own
    assert blind(images(3, 0)[:, 0], Draw(5, 9, "cpu")).shape == (3, 3, 24, 24)
    assert blind(images(3, 0).bfloat16(), Draw(5, 9, "cpu")).dtype == torch.bfloat16


TASKS = {
    "classes": lambda blind: Classification(LABELS, image_ablation=blind),
    "answers": lambda blind: Vqa(LABELS, image_ablation=blind),
    "answer classes": lambda blind: Vqa(LABELS, head="classify", image_ablation=blind),
}


@pytest.mark.parametrize("kind", sorted(TASKS))
@pytest.mark.parametrize("blind", [True, False])
def test_what_a_task_says_does_not_depend_on_the_image(kind: str, blind: bool) -> None:
    """In training too: statistics of the same images in another order are the same."""
    batch = example_batch(4)
    backbone, task = toy_backbone(), TASKS[kind](blind)
    task.build(backbone)
    task.eval()
    other = batch._replace(image_BPCHW=torch.randn_like(batch.image_BPCHW))
    heard = []
    for one in (batch, other):
        task.set_uniform(Draw(3, 0, "cpu"))
        heard.append(task(backbone, one)[task.name])
    assert torch.equal(heard[0], heard[1]) == blind
    task.train()
    flipped, losses = batch._replace(image_BPCHW=batch.image_BPCHW.flip(0)), []
    for one in (batch, flipped):
        task.set_uniform(Draw(3, 0, "cpu"))
        if task.blind is not None:
            task.blind.load_state_dict(ImageAblation().state_dict())
        losses.append(task(backbone, one)[task.name].item())
    assert (losses[0] == pytest.approx(losses[1], rel=1e-5)) == blind


def test_statistics_are_kept_with_the_checkpoint(tmp_path: Path) -> None:
    backbone, path = bare_backbone(), tmp_path / "x.ckpt"
    model = LitModel(backbone, Entailment(LABELS, image_ablation=True))
    fit(model, data_for(backbone, Questions(), steps=3), path)
    blind = model.task.blind
    assert isinstance(blind, ImageAblation)
    assert blind.seen == 3
    heads = read_start(str(path)).heads
    assert torch.equal(heads["blind.mean_C"], blind.mean_C)
    again = LitModel(bare_backbone(path), Entailment(LABELS, image_ablation=True)).task.blind
    assert isinstance(again, ImageAblation)
    for name, value in blind.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    assert blind.mean_C.abs().min() > 0.01
