"""Do DAQUAR's photos help to answer its questions? Asked of frozen encoders, at a size where small things can be seen.

    DATA_ROOT=/data PYTHONPATH=. .venv/bin/python docs/results/downstream/daquar.py \
        --image WEIGHTS.safetensors --text FOLDER

Three answers, of the encoders that `MODEL=compact` starts from (a ViT-S/14 of DINOv2, a six-layer MiniLM):

1. What the features see: for each thing that training answers name in many photos, whether it is named of a photo, told
   by ridge regression from the class token and the mean patch; area under the ROC curve on the validation photos.
2. Kernel ridge regression as in `probe.py`: question alone, question and photo.
3. A head that attends to patches: words of the question choose where it looks (two glimpses, as stacked attention
   networks do), what it finds is joined with the question by a product. Without photo the same head on the question
   alone. Three seeds each.

Shapes: B questions of a batch, K answers, P places of the pooled grid, D width.
"""

import argparse
from collections import Counter
from typing import Any

import numpy as np
import torch
from probe import SOURCES, Rows, choose, grams, right
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import multilabel_auroc

from maskvlm.data.batch import InputSpec
from maskvlm.data.images import safe_open
from maskvlm.data.transforms import eval_transform
from maskvlm.model.encoders import ImageEncoder, TextEncoder

GRID, PARTS = 14, 192  # places down and across after pooling; principal components of a patch
WIDTH, DROPOUT, BATCH, EPOCHS, RATE = 384, 0.5, 64, 16, 1e-3
NAMED = 20  # training photos of which a thing is named, at least
SEEDS = (0, 1, 2)


@torch.no_grad()
def photo_features(encoder: ImageEncoder, photos: dict[str, Any], description: str) -> Tensor:
    """Class token and pooled patches of each photo, [photos, 1 + P, D]."""
    transform = eval_transform(InputSpec(encoder.image_size, encoder.mean, encoder.std, 0, 0))
    features = []
    for data in track(list(photos.values()), description=description):
        image_1LD = encoder(transform(safe_open(data, "a photo"))[None])
        patch_1DHW = image_1LD[:, 1:].transpose(1, 2).unflatten(2, encoder.grid)
        pooled_1DP = F.adaptive_avg_pool2d(patch_1DHW, GRID).flatten(2)
        features.append(torch.cat([image_1LD[:, :1], pooled_1DP.transpose(1, 2)], 1))
    return torch.cat(features)


@torch.no_grad()
def question_features(encoder: TextEncoder, questions: list[str]) -> Tensor:
    """Class token and mean token of each question, [questions, 2 D]."""
    assert encoder.tokenizer is not None
    feature_of = {}
    for text in track(sorted(set(questions)), description="questions"):
        token_1T = torch.tensor([encoder.tokenizer(text)["input_ids"][: encoder.text_length]])
        text_TD = encoder(token_1T, torch.ones_like(token_1T, dtype=torch.bool))[0]
        feature_of[text] = torch.cat([text_TD[0], text_TD.mean(0)])
    return torch.stack([feature_of[text] for text in questions])


class Split:
    """Questions, answers and photos of a split, and the features of both."""

    def __init__(self, name: str, image: ImageEncoder, text: TextEncoder) -> None:
        split = SOURCES["daquar"]().split(name)
        examples = [split[number] for number in range(len(split))]
        photos = {each["image_ids"][0]: each["images"][0] for each in examples}
        place = {photo: number for number, photo in enumerate(photos)}
        self.answers = [Counter(each["answers"]).most_common(1)[0][0] for each in examples]
        self.photo_N = torch.tensor([place[each["image_ids"][0]] for each in examples])
        self.image_MPD = photo_features(image, photos, name)
        self.text_NF = question_features(text, [each["text"] for each in examples])

    @property
    def summary_MF(self) -> Tensor:
        """Class token and mean patch of each photo."""
        return torch.cat([self.image_MPD[:, 0], self.image_MPD[:, 1:].mean(1)], 1)

    @property
    def rows(self) -> Rows:
        """As `probe.py` takes them; there are no scores."""
        image_NF = self.summary_MF[self.photo_N]
        return Rows(self.text_NF, image_NF, image_NF[:, :1], self.answers, self.photo_N.numpy())

    def named(self, answers: list[str]) -> Tensor:
        """Whether each of these is an answer about each photo, [photos, K], 0 or 1."""
        named_MK = torch.zeros(len(self.image_MPD), len(answers), dtype=torch.double)
        for photo, answer in zip(self.photo_N.tolist(), self.answers, strict=True):
            if answer in answers:
                named_MK[photo, answers.index(answer)] = 1
        return named_MK


def things_and_area(train: Split, val: Split) -> tuple[int, float]:
    """How many things are named of at least NAMED training photos, and the mean area under the ROC curve."""
    every = sorted(set(train.answers))
    answers = [name for name, count in zip(every, train.named(every).sum(0).tolist(), strict=True) if count >= NAMED]
    mean_F, std_F = train.summary_MF.mean(0), train.summary_MF.std(0) + 1e-6
    own_MF, other_MF = ((split.summary_MF.double() - mean_F) / std_F for split in (train, val))
    target_MK, truth_MK = train.named(answers), val.named(answers)
    penalty = 10 * own_MF.shape[1] * torch.eye(len(own_MF), dtype=torch.double)
    weight_MK = torch.linalg.solve(own_MF @ own_MF.T + penalty, target_MK - target_MK.mean(0))
    score_MK = other_MF @ own_MF.T @ weight_MK
    there = [k for k in range(len(answers)) if 0 < truth_MK[:, k].sum() < len(truth_MK)]
    return len(there), float(multilabel_auroc(score_MK[:, there], truth_MK[:, there].long(), len(there)))


class AttentionHead(nn.Module):
    """Answers a question from its vector and, unless `blind`, from the patches that the question makes it look at."""

    def __init__(self, text: int, parts: int, answers: int, blind: bool) -> None:
        super().__init__()
        self.blind = blind
        self.question = nn.Sequential(nn.Dropout(0.2), nn.Linear(text, WIDTH), nn.ReLU(), nn.Dropout(DROPOUT))
        self.of_question = nn.Linear(WIDTH, answers)
        self.patch = nn.Sequential(nn.Dropout(0.1), nn.Linear(parts, WIDTH), nn.ReLU())
        self.asks, self.glimpses = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
        self.of_patches, self.of_query = nn.Linear(2 * WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.of_both = nn.Sequential(nn.Dropout(DROPOUT), nn.Linear(WIDTH, answers))
        # It begins as the head of the question alone.
        nn.init.zeros_(self.of_both[1].weight)

    def forward(self, text_BF: Tensor, patch_BPD: Tensor) -> Tensor:
        """Logits of the answers, [B, K]."""
        question_BD = self.question(text_BF)
        logit_BK = self.of_question(question_BD)
        if self.blind:
            return logit_BK
        place_BPD = self.patch(patch_BPD)
        weight_BP2 = self.glimpses(place_BPD * 2 * self.asks(question_BD).sigmoid()[:, None]).softmax(1)
        place_BD = self.of_patches(torch.einsum("bpg,bpd->bgd", weight_BP2, place_BPD).flatten(1))
        return logit_BK + self.of_both(place_BD.tanh() * self.of_query(question_BD).tanh())


def attended(train: Split, val: Split, blind: bool, seed: int) -> np.ndarray:
    """Which validation questions the head answers rightly after EPOCHS passes, [N]."""
    names = [name for name, count in Counter(train.answers).items() if count > 1]
    target_N = torch.tensor([names.index(answer) if answer in names else -1 for answer in train.answers])
    mean_F, std_F = train.text_NF.mean(0), train.text_NF.std(0) + 1e-6
    own_NF, other_NF = ((split.text_NF - mean_F) / std_F for split in (train, val))
    own_MPD, other_MPD = principal_parts(train.image_MPD, val.image_MPD)
    torch.manual_seed(seed)  # behind the principal components, which are drawn from a seed of their own
    head = AttentionHead(own_NF.shape[1], own_MPD.shape[2], len(names), blind)
    optimizer = torch.optim.AdamW(head.parameters(), RATE, weight_decay=0.05)
    known_N = (target_N >= 0).nonzero()[:, 0]
    steps = len(known_N) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=EPOCHS * steps, pct_start=0.1)
    for _ in track(range(EPOCHS), description=f"{'question alone' if blind else 'question and photo'}, seed {seed}"):
        for row_B in known_N[torch.randperm(len(known_N))][: steps * BATCH].split(BATCH):
            logit_BK = head(own_NF[row_B], own_MPD[train.photo_N[row_B]])
            optimizer.zero_grad()
            F.cross_entropy(logit_BK, target_N[row_B]).backward()
            optimizer.step()
            schedule.step()
    head.eval()
    with torch.no_grad():
        rows = torch.arange(len(val.answers)).split(256)
        best_N = torch.cat([head(other_NF[row], other_MPD[val.photo_N[row]]).argmax(1) for row in rows])
    return np.array([names[best] == truth for best, truth in zip(best_N.tolist(), val.answers, strict=True)])


def principal_parts(own_MPD: Tensor, other_MPD: Tensor) -> tuple[Tensor, Tensor]:
    """The PARTS strongest directions of the training patches, beside each place's sines and cosines."""
    mean_D, std_D = own_MPD.mean((0, 1)), own_MPD.std((0, 1)) + 1e-6
    torch.manual_seed(0)
    axes_DQ = torch.pca_lowrank(((own_MPD - mean_D) / std_D).flatten(0, 1)[::7], PARTS)[2]
    side_G = torch.linspace(-1, 1, GRID) * torch.pi / 2
    place_P2 = torch.cartesian_prod(side_G, side_G)
    place_PX = torch.cat([turn(times * place_P2) for times in (1, 2, 4) for turn in (torch.sin, torch.cos)], 1)
    place_PX = F.pad(place_PX, (0, 0, 1, 0))  # the class token has none
    scale = ((own_MPD - mean_D) / std_D @ axes_DQ).std()
    own, other = (((each - mean_D) / std_D) @ axes_DQ / scale for each in (own_MPD, other_MPD))
    own, other = (torch.cat([each, place_PX.expand(len(each), -1, -1)], 2) for each in (own, other))
    return own, other


def difference(full_N: np.ndarray, alone_N: np.ndarray) -> str:
    """In points, with its 95 % interval (1.96 standard errors over the questions)."""
    each_N = 100 * (full_N.astype(float) - alone_N)
    half = 1.96 * each_N.std(ddof=1) / len(each_N) ** 0.5
    return f"{each_N.mean():+.1f} ({each_N.mean() - half:+.1f} to {each_N.mean() + half:+.1f})"


def main() -> None:
    """Print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", required=True, help="weights of the ViT-S/14")
    parser.add_argument("--text", required=True, help="folder of the text encoder")
    parser.add_argument("--image-size", type=int, default=392, help="pixels, a multiple of 14")
    parser.add_argument("--blocks", type=int, help="of the ViT, from the first on (all)")
    options = parser.parse_args()
    image = ImageEncoder("vit_small_patch14_dinov2", options.image_size, options.image, frozen="all")
    text = TextEncoder(options.text)
    image.load_pretrained()
    image.vit.blocks = image.vit.blocks[: options.blocks]
    text.load_pretrained()
    train, val = (Split(name, image.eval(), text.eval()) for name in ("train", "val"))
    things, area = things_and_area(train, val)
    print(f"{things} things: area under the ROC curve {area:.2f}", flush=True)
    rows = [split.rows for split in (train, val)]
    scores = {}
    for way in ("text", "text and photo"):
        own, other = grams(way, rows[0], rows[0]), grams(way, rows[1], rows[0])
        width, penalty = choose(own, rows[0])
        scores[way] = right(other[width], own[width], penalty, val.answers, train.answers)
        print(f"kernel ridge regression, {way}: {100 * scores[way].mean():.1f} %", flush=True)
    print(f"the photo adds {difference(scores['text and photo'], scores['text'])}", flush=True)
    runs = {blind: np.stack([attended(train, val, blind, seed) for seed in SEEDS]) for blind in (True, False)}
    for blind, right_SN in runs.items():
        each = ", ".join(f"{100 * right_N.mean():.1f}" for right_N in right_SN)
        print(f"attention, {'question alone' if blind else 'question and photo'}: {each} %", flush=True)
    print(f"the photo adds {difference(runs[False].mean(0), runs[True].mean(0))}", flush=True)


if __name__ == "__main__":
    main()
