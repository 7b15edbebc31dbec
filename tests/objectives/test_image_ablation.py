"""The blind control: noise that tells nothing of its image, with the statistics of what training has shown."""

import pytest
import torch
from toy_examples import LABELS, example_batch
from toys import toy_backbone

from maskvlm.objectives.classification import Classification
from maskvlm.objectives.image_ablation import ImageAblation
from maskvlm.utils.distributed import Draw
from tasks.vqa.task import Vqa

MEANS, DEVIATIONS = (0.5, -1.0, 2.0), (0.2, 1.0, 3.0)


def images(rows: int, seed: int, places: int = 2) -> torch.Tensor:
    """Channels of other means and spreads, [B, P, 3, H, W]."""
    noise = torch.randn(rows, places, 3, 24, 24, generator=torch.Generator().manual_seed(seed))
    return noise * torch.tensor(DEVIATIONS)[:, None, None] + torch.tensor(MEANS)[:, None, None]


def test_noise_has_the_statistics_of_all_images_seen_in_training() -> None:
    blind = ImageAblation()
    first, second = images(8, 0), images(8, 1) + 4
    for batch in (first, torch.full_like(first, torch.inf), second):  # what overflowed is not taken in
        blind(batch, Draw(0, 0, "cpu"))
    both = torch.cat([first, second]).transpose(0, 2).flatten(1)
    assert blind.state_dict()["seen"] == 2  # checkpoints hold the statistics
    torch.testing.assert_close(blind.state_dict()["mean_C"], both.mean(1))
    torch.testing.assert_close((blind.square_C - blind.mean_C**2).sqrt(), both.std(1), atol=1e-3, rtol=1e-3)
    noise = blind.eval()(torch.zeros(64, 1, 3, 40, 40), Draw(0, 1, "cpu")).transpose(0, 2).flatten(1)
    torch.testing.assert_close(noise.mean(1), both.mean(1), atol=0.05, rtol=0.0)
    torch.testing.assert_close(noise.std(1), both.std(1), atol=0.05, rtol=0.01)
    assert blind.seen == 2  # evaluation adds nothing


def test_noise_follows_from_seed_and_index_alone() -> None:
    blind = ImageAblation().eval()
    first = blind(images(3, 0), Draw(5, 9, "cpu"))
    assert first.shape == (3, 2, 3, 24, 24)
    assert first.mean().item() == pytest.approx(0, abs=0.03)  # before training: standard noise
    assert first.std().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(blind(images(3, 1), Draw(5, 9, "cpu")), first)
    for other in (Draw(5, 8, "cpu"), Draw(4, 9, "cpu")):
        assert not torch.equal(blind(images(3, 0), other), first)
    assert len({value.sum().item() for value in first.flatten(0, 1)}) == 6  # every image has its own
    assert blind(images(3, 0)[:, 0].bfloat16(), Draw(5, 9, "cpu")).dtype == torch.bfloat16


TASKS = {
    "classes": lambda blind: Classification(LABELS, image_ablation=blind),
    "answer classes": lambda blind: Vqa(LABELS, head="classify", image_ablation=blind),
}


@pytest.mark.parametrize("kind", sorted(TASKS))
@pytest.mark.parametrize("blind", [True, False])
def test_what_a_task_says_does_not_depend_on_the_image(kind: str, blind: bool) -> None:
    """In training too: statistics of the same images in another order are the same."""
    batch = example_batch(4)
    backbone, task = toy_backbone(), TASKS[kind](blind)
    task.build(backbone)
    for train, other_BPCHW in (
        (False, torch.randn_like(batch.image_BPCHW)),
        (True, batch.image_BPCHW.flip(0)),
    ):
        task.train(train)
        heard = []
        for image_BPCHW in (batch.image_BPCHW, other_BPCHW):
            task.set_uniform(Draw(3, 0, "cpu"))
            if task.blind is not None:
                task.blind.load_state_dict(ImageAblation().state_dict())
            heard.append(task(backbone, batch._replace(image_BPCHW=image_BPCHW))[task.name].item())
        assert (heard[0] == pytest.approx(heard[1], rel=1e-5 if train else 0)) == blind
