"""Contrast that starts from canonical directions: their defining equations, and what a run does with them."""

import copy
from collections.abc import Iterator
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import eigh
from toys import SIZE, WIDTH, toy_backbone

from maskvlm.data.module import PairData
from maskvlm.data.scenes.source import Scenes
from maskvlm.model.heads import Projection
from maskvlm.objectives import canonical
from maskvlm.objectives.canonical import CAPTIONS, IMAGES, RIDGE, SPREAD, PairMoments, start_from_pairs, whitening
from maskvlm.objectives.pretraining import MaskedPretraining
from maskvlm.training.lit import LitModel
from maskvlm.utils.errors import UserError


def pairs_of(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of images [count, 5] and of texts [count, 4] that share two hidden numbers."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, 2, generator=generator)
    image = hidden @ torch.randn(2, 5, generator=generator) + 0.3 * torch.randn(count, 5, generator=generator) + 3
    text = hidden @ torch.randn(2, 4, generator=generator) + 0.3 * torch.randn(count, 4, generator=generator) - 1
    return image, text


def moments_of(image: torch.Tensor, text: torch.Tensor, part: int = 7) -> PairMoments:
    moments = PairMoments(image.shape[1], text.shape[1])
    for rows in torch.arange(len(image)).split(part):
        moments.add(image[rows], text[rows])
    return moments


@given(st.integers(3, 200), st.integers(0, 99))
def test_directions_satisfy_their_definition(count: int, seed: int) -> None:
    """Whitened by the covariances with the ridge, each direction of the one meets one of the other alone; the squared
    correlations are the eigenvalues that scipy finds."""
    image, text = pairs_of(count, seed)
    found = moments_of(image, text).directions(3)
    covariance = np.cov(torch.cat([image, text], 1).double().numpy().T, bias=True)
    xx, yy, xy = covariance[:5, :5], covariance[5:, 5:], covariance[:5, 5:]
    xx, yy = (part + RIDGE * part.diagonal().mean() * np.eye(len(part)) for part in (xx, yy))
    squared = eigh(xy @ np.linalg.solve(yy, xy.T), xx, eigvals_only=True)[::-1][:3]
    np.testing.assert_allclose(found.correlation_E.numpy() ** 2, squared, atol=1e-8)
    # The maps without their scales: whitened, then each times its correlation.
    own, other = (weight / found.correlation_E[:, None] for weight in (found.image_EX, found.text_EY))
    scale, other_scale = (own @ torch.tensor(xx) @ own.T).diagonal().mean(), (other @ torch.tensor(yy) @ other.T)[0, 0]
    torch.testing.assert_close(own @ torch.tensor(xx) @ own.T / scale, torch.eye(3).double(), atol=1e-6, rtol=0)
    cross = own @ torch.tensor(xy) @ other.T / (scale * other_scale).sqrt()
    torch.testing.assert_close(cross, torch.diag(found.correlation_E), atol=1e-6, rtol=0)


def test_vectors_are_centred_and_of_the_stated_spread() -> None:
    image, text = pairs_of(300)
    found = moments_of(image, text).directions(2)
    for inputs, weight, bias in (
        (image, found.image_EX, found.image_bias_E),
        (text, found.text_EY, found.text_bias_E),
    ):
        mean = (inputs.double() @ weight.T + bias).mean(0)
        torch.testing.assert_close(mean, torch.zeros(2).double(), atol=1e-6, rtol=0)
        assert weight.square().mean().sqrt().item() == pytest.approx(SPREAD)


def test_pairs_may_come_in_any_parts() -> None:
    image, text = pairs_of(50)
    once, often = moments_of(image, text, 50).directions(3), moments_of(image, text, 1).directions(3)
    torch.testing.assert_close(once.image_EX.abs(), often.image_EX.abs())
    torch.testing.assert_close(once.correlation_E, often.correlation_E)


def test_whitening_survives_fewer_pairs_than_features() -> None:
    flat = torch.tensor([[1.0, 1.0], [1.0, 1.0]]).double()  # of rank 1
    white = whitening(flat)
    ridged = flat + RIDGE * torch.eye(2).double()
    torch.testing.assert_close(white @ ridged @ white, torch.eye(2).double())


def test_what_cannot_be_correlated_is_one_line() -> None:
    image, text = pairs_of(20)
    with pytest.raises(UserError, match="contrast_dim 5 is larger than the 4 features"):
        moments_of(image, text).directions(5)
    with pytest.raises(UserError, match="the features of 20 training pairs do not differ"):
        moments_of(torch.ones(20, 5), text).directions(2)
    with pytest.raises(UserError, match="the features of 0 training pairs do not differ"):
        PairMoments(5, 4).directions(2)


# ---------------------------------------------------------------------- in a run


def make(start: str, reads: str = "class_and_mean", **settings: Any) -> tuple[LitModel, PairData]:
    backbone = toy_backbone(length=24, vocab=150)
    backbone.text.tokenizer = None
    world = Scenes(train=60, val=6, test=5, size=SIZE)
    data = PairData(world, backbone.input_spec, batch_size=30, steps=1, eval_batch_size=16, randaugment=None)
    task = MaskedPretraining(
        mask_block=16,
        decoder_layers=1,
        contrast_dim=8,
        contrast_start=start,
        contrast_reads=reads,
        **settings,  # type: ignore[arg-type]
    )
    return LitModel(backbone, task, lr=1e-3, warmup=1, seed=0), data


class First(L.Callback):
    """The state before the first step, and its contrast."""

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        self.state = copy.deepcopy(module.state_dict())
        self.modes = [part.training for part in module.modules()]

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *rest: Any) -> None:
        self.itc = trainer.callback_metrics["train/itc"].item()


def trained(model: LitModel, data: PairData, **settings: Any) -> First:
    first = First()
    L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        limit_val_batches=0, callbacks=[first], enable_model_summary=False, **settings,
    ).fit(model, data)  # fmt: skip
    return first


def test_a_run_starts_with_a_lower_contrast(capsys: pytest.CaptureFixture[str]) -> None:
    random = trained(*make("random")).itc
    assert "canonical" not in capsys.readouterr().out
    aligned = trained(*make("cca")).itc
    assert "contrast starts from the canonical directions of 300 pairs (60 images)" in capsys.readouterr().out
    assert aligned < random - 0.3


def test_the_rest_of_the_model_starts_as_it_would() -> None:
    """Nothing else changes: no random number is drawn, and modes are as before."""
    random, aligned = (trained(*make(start)) for start in ("random", "cca"))
    changed = {name for name, value in random.state.items() if not torch.equal(value, aligned.state[name])}
    assert changed == {f"task.projection.{side}.{part}" for side in ("image", "text") for part in ("weight", "bias")}
    assert random.modes == aligned.modes


def batches(data: PairData, images: int = IMAGES) -> Iterator[Any]:
    data.setup("fit")
    return map(data.normalised, data.training_pairs(images, CAPTIONS))


def test_unreadable_images_do_not_count() -> None:
    model, data = make("cca")
    results = []
    for count in (2, 3):  # the third row is a placeholder in the one, and left out in the other
        model, data = make("cca")
        (batch,) = batches(data, count)
        batch.valid_B[2:] = False
        results.append(start_from_pairs(model.task.projection, model.backbone, [batch]))
    assert results[0] == results[1]
    assert "10 pairs (2 images)" in results[0]


def test_rows_are_drawn_by_the_seed_and_bounded() -> None:
    _, data = make("cca")
    drawn = [batch.index_B.tolist() for batch in batches(data, 20)]
    assert [len(part) for part in drawn] == [16, 4]
    assert len({row for part in drawn for row in part}) == 20
    data.seed = 1
    assert [batch.index_B.tolist() for batch in batches(data, 20)] != drawn


def test_trained_projections_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a checkpoint, and those of a model that is trained once more."""
    model, data = make("cca")
    trained(model, data)
    monkeypatch.setattr("maskvlm.objectives.pretraining.start_from_pairs", None)  # a call would raise
    trained(model, make("cca")[1])
    later, data = make("cca")
    later.task.warm_start(model.task.state_dict())
    assert later.task.projection_loaded  # type: ignore[union-attr]
    trained(later, data)


def test_a_resumed_run_does_not_start_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskvlm.objectives.pretraining.start_from_pairs", None)
    model, data = make("cca")
    model.goes_on = True
    trained(model, data)


def test_without_contrast_or_rows_there_is_nothing_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = make("cca", weight_itc=0.0)
    monkeypatch.setattr("maskvlm.objectives.pretraining.start_from_pairs", None)
    model.task.use_pairs(model.backbone, None)  # type: ignore[arg-type]
    data.setup("fit")
    data.splits["train"] = []
    with pytest.raises(UserError, match=r"data\.source: is streamed: its rows cannot be read before the run"):
        data.training_pairs(5, 1)


def test_frozen_features_are_read_from_their_cache(tmp_path: Any) -> None:
    """The first pass fills the cache that the run's steps read."""
    model, data = make("cca")
    model.backbone.image.frozen_blocks.__init__(model.backbone.image.vit, 1, str(tmp_path))  # type: ignore[misc]
    model.backbone.image.frozen_blocks.open_cache("test", 60)
    before = copy.deepcopy(model.task.projection.state_dict())
    start_from_pairs(model.task.projection, model.backbone, batches(data))
    cache = model.backbone.image.frozen_blocks.cache
    assert cache is not None
    assert cache.written_R.all()
    assert not torch.equal(before["image.weight"], model.task.projection.image.weight)


def test_a_projection_reads_what_it_embeds() -> None:
    projection = Projection(WIDTH, WIDTH, 8, mean=True)
    image, text, there = torch.randn(3, 5, WIDTH), torch.randn(3, 4, WIDTH), torch.ones(3, 4, dtype=torch.bool)
    for read, embed, linear in (
        (projection.read_image(image), projection.embed_image(image), projection.image),
        (projection.read_text(text, there), projection.embed_text(text, there), projection.text),
    ):
        torch.testing.assert_close(torch.nn.functional.normalize(linear(read), dim=-1), embed)
    assert canonical.WHERE == "model.task.contrast_start"
