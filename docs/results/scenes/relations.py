"""How soon a model learns how two things stand to each other, by what else is masked and whether its image encoder
moves meanwhile.

The text encoder, its cross encoder and the token head go on learning from masked words alone, at one rate, from
captions of the built-in world; the image encoder stands still, or learns at a share of that rate. Printed are the
captions of which the relation alone was masked so far, and how often the true relation word is likelier than its
opposite in 1,500 held-out scenes of two things (chance 50 %).

.venv/bin/python docs/results/scenes/relations.py [CHECKPOINT] [--share 1] [--masked 0.3 0.9] [--weight 1] [--pairs]
    [--images 0]
"""

import argparse
import random
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from maskvlm import MaskVLM
from maskvlm.data.scenes.captions import tell_relations
from maskvlm.data.scenes.drawing import draw_scene
from maskvlm.data.scenes.source import ScenePairs
from maskvlm.data.scenes.world import Scene
from maskvlm.objectives.masking import ChosenPhrases, Texts, Vocabulary

PHRASES = ("left of", "right of", "above", "below", "over", "under")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above", "over": "under", "under": "over"}
SCENES, HELD_OUT, LENGTH = 12_000, 1_500, 28


class Captions(NamedTuple):
    """image_XCHW: images as the encoder reads them. token_XCT, special_XCT: captions of each."""

    image_XCHW: Tensor
    token_XCT: Tensor
    special_XCT: Tensor


def read(model: MaskVLM, scenes: list[Scene], texts: list[list[str]]) -> Captions:
    """Images drawn, captions through the tokenizer."""
    parts = []
    for start in range(0, len(scenes), 250):
        parts.append(model.pixels([draw_scene(scene, model.image_size) for scene in scenes[start : start + 250]]))
    words = model.backbone.text.tokenizer(
        [text for each in texts for text in each], padding="max_length", max_length=LENGTH, truncation=True,
        return_tensors="pt", return_special_tokens_mask=True,
    )  # fmt: skip
    shape = (len(scenes), -1, LENGTH)
    special_XCT = words["special_tokens_mask"].bool().view(shape)
    return Captions(torch.cat(parts), words["input_ids"].view(shape), special_XCT)


def hidden(model: MaskVLM, token_BT: Tensor, image_BCHW: Tensor) -> Tensor:
    """What the token head reads, [B, T, D]."""
    image_BLD = model.backbone.image(image_BCHW)
    attention_BT = token_BT != model.backbone.text.pad_id
    text_BTD, cross = model.backbone.text(token_BT, attention_BT), model.backbone.cross_text
    return cross(text_BTD, cross.context(image_BLD), attention_BT).full_RLD


@torch.no_grad()
def percent_right(model: MaskVLM, held: Captions) -> float:
    """How often the true relation word is likelier than its opposite, each masked alone."""
    id_of = model.backbone.text.tokenizer.convert_tokens_to_ids
    opposite = {id_of(word): id_of(other) for word, other in OPPOSITE.items()}
    right = []
    for rows in torch.arange(HELD_OUT).split(250):
        token_BT = held.token_XCT[rows, 0].clone()
        # The first relation word of each caption, which has one.
        at_B = torch.isin(token_BT, torch.tensor(list(opposite))).int().argmax(1)
        row_B = torch.arange(len(rows))
        true_B = token_BT[row_B, at_B]
        token_BT[row_B, at_B] = model.backbone.text.mask_id
        logits_BV = model.task.tokens(hidden(model, token_BT, held.image_XCHW[rows])[row_B, at_B])
        turned_B = torch.tensor([opposite[word] for word in true_B.tolist()])
        right.append(logits_BV[row_B, true_B] > logits_BV[row_B, turned_B])
    return 100 * float(torch.cat(right).float().mean())


def main() -> None:
    """Learn, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="scenes-tiny")
    parser.add_argument("--share", type=float, default=1.0, help="of the captions with a relation: masked alone there")
    parser.add_argument("--masked", type=float, nargs=2, default=(0.3, 0.9), help="share of the words of others")
    parser.add_argument("--pairs", action="store_true", help="captions of relations alone, of scenes of two things")
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--rate", type=float, default=7e-4)
    parser.add_argument("--weight", type=float, default=1.0, help="of a relation that is masked alone")
    parser.add_argument("--images", type=float, default=0.0, help="rate of the image encoder, as a share of --rate")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = MaskVLM.from_pretrained(options.checkpoint).requires_grad_(False)
    text = model.backbone.text
    # What training shows: five captions and five short ones, four of six of several things telling relations.
    pairs, rng = ScenePairs("train", 10 * SCENES, model.image_size, 0, short=5, relations=4), random.Random(0)
    of_two = (scene for scene in map(pairs.scene, range(len(pairs))) if len(scene.things) == 2)
    if options.pairs:
        scenes = [next(of_two) for _ in range(SCENES)]
        texts = [[tell_relations(scene, rng).text] for scene in scenes]
    else:
        scenes = [pairs.scene(number) for number in range(SCENES)]
        texts = [[caption.text for caption in pairs.captions(number)] for number in range(SCENES)]
    learned = read(model, scenes, texts)
    others = ScenePairs("val", 10 * HELD_OUT, model.image_size, 0)
    scenes = [scene for scene in map(others.scene, range(len(others))) if len(scene.things) == 2][:HELD_OUT]
    held = read(model, scenes, [[tell_relations(scene, rng).text] for scene in scenes])
    masking = ChosenPhrases(PHRASES, options.share, *options.masked)
    vocabulary = Vocabulary(text.mask_id, text.vocab_size, LENGTH, text.ids_of)
    weights = [*text.parameters(), *model.backbone.cross_text.parameters(), *model.task.tokens.parameters()]
    seeing = [*model.backbone.image.parameters()] if options.images else []
    for weight in (*weights, *seeing):
        weight.requires_grad_(True)
    groups = [{"params": weights}, {"params": seeing, "lr": options.images * options.rate}]
    optimizer = torch.optim.AdamW(groups, options.rate, betas=(0.9, 0.98), weight_decay=0.05)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.02, total_iters=50)
    alone = 0
    for step in range(1, options.steps + 1):
        image_B = torch.randint(SCENES, (options.batch,))
        caption_B = torch.randint(learned.token_XCT.shape[1], (options.batch,))
        token_BT, special_BT = learned.token_XCT[image_B, caption_B], learned.special_XCT[image_B, caption_B]
        word_BT = torch.arange(LENGTH).expand_as(token_BT).masked_fill(special_BT, -1)
        masked = masking(Texts(token_BT, special_BT, word_BT, training=True), vocabulary, torch.rand)
        logits_MV = model.task.tokens(hidden(model, masked.token_CT, learned.image_XCHW[image_B])[masked.mask_CT])
        holds_BT = masking.phrases_in(Texts(token_BT, special_BT, word_BT), text.ids_of)
        alone_B = holds_BT.any(1) & (masked.mask_CT == holds_BT).all(1)
        weight_M = torch.where(alone_B[:, None], options.weight, 1.0).expand_as(holds_BT)[masked.mask_CT]
        loss_M = cross_entropy(logits_MV, token_BT[masked.mask_CT], reduction="none")
        optimizer.zero_grad()
        ((loss_M * weight_M).sum() / weight_M.sum()).backward()
        torch.nn.utils.clip_grad_norm_([*weights, *seeing], 1.0)
        optimizer.step()
        warmup.step()
        alone += int(alone_B.sum())
        if step % 200 == 0:
            print(f"step {step}: {alone:6d} relations masked alone, {percent_right(model, held):.1f} % right")


if __name__ == "__main__":
    main()
