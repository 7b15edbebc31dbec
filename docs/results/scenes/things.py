"""How well masked things are painted, by the kind of caption and by the number of things, and what is best possible.

The best possible painter knows how many things there are and which of them a caption means, sees what is not masked,
and paints the mean of all scenes of which the caption is true. It cannot know what the caption does not say, such as
where exactly a thing sits in its cell. Printed is how much less squared error masked things have with their caption
than with the next image's, in percent: of a checkpoint, and of that painter. Masks are drawn as in evaluation.

.venv/bin/python docs/results/scenes/things.py [CHECKPOINT] [--scenes 480] [--draws 60]
"""

import argparse
import random
from collections import defaultdict
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from maskvlm import MaskVLM
from maskvlm.data.scenes.captions import PHRASINGS, Mention, Statement, describes
from maskvlm.data.scenes.drawing import draw_scene
from maskvlm.data.scenes.source import ScenePairs, Scenes
from maskvlm.data.scenes.world import Scene, Thing, random_thing
from maskvlm.model.heads import patchify
from maskvlm.objectives.masking import RandomBlocks

BATCH, CELLS = 48, range(9)


def redrawn(thing: Thing, mention: Mention | None, cell: int, rng: random.Random) -> Thing:
    """Another thing of which the mention is true; in its cell where the mention says so."""
    traits = {} if mention is None else {name: value for name, value in vars(mention).items() if value is not None}
    placed = traits.pop("place", None) is not None
    return replace(random_thing(rng, thing.cell if placed else cell), **traits)


def one_that_fits(scene: Scene, statement: Statement, masked: list[int], rng: random.Random) -> Scene:
    """A scene of which the statement is true, and which shows the same outside the masked cells."""
    mention_of = {
        thing: next((mention for mention in statement.mentions if mention.fits(thing)), None) for thing in scene.things
    }
    while True:  # ends: the scene itself is among those that can be drawn
        cells = iter(rng.sample(masked, len(masked)))
        things = [
            redrawn(thing, mention_of[thing], next(cells), rng) if thing.cell in masked else thing
            for thing in scene.things
        ]
        drawn = replace(scene, things=tuple(things))
        if len({thing.cell for thing in things}) == len(things) and describes(statement, drawn):
            return drawn


def mean_image(scene: Scene, statement: Statement, masked: list[int], size: int, draws: int) -> np.ndarray:
    """What the best painter paints, [size, size, 3], 0 to 255."""
    rng = random.Random(0)
    images = [np.asarray(draw_scene(one_that_fits(scene, statement, masked, rng), size)) for _ in range(draws)]
    return np.mean(images, axis=0)


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="scenes-tiny")
    parser.add_argument("--scenes", type=int, default=480)
    parser.add_argument("--draws", type=int, default=60)
    options = parser.parse_args()
    model = MaskVLM.from_pretrained(options.checkpoint)
    backbone, task, size = model.backbone, model.task, model.image_size
    patch, grid = backbone.image.patch_size, backbone.image.grid
    pairs: ScenePairs = Scenes(size=size).split("val")
    masking, generator = RandomBlocks(0.6, size // 3), torch.Generator().manual_seed(0)
    # Summed squared errors on masked things: the model's with its caption, with another; the best painter's.
    sums: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
    for kind, phrasing in enumerate(PHRASINGS):
        for rows in torch.arange(options.scenes).split(BATCH):
            numbers = rows.tolist()
            scenes, claims = [pairs.scene(n) for n in numbers], [pairs.captions(n)[kind] for n in numbers]
            drawn = [draw_scene(scene, size) for scene in scenes]
            image_BCHW, words = model.pixels(drawn), model.tokens([claim.text for claim in claims])
            valid_B = torch.ones(len(numbers), dtype=torch.bool)
            mask = masking(valid_B, grid, patch, lambda *shape: torch.rand(*shape, generator=generator), False)
            masked_BLD = backbone.image(image_BCHW, mask.mask_BN, None, mask.visible)
            things_BHW = torch.stack([torch.from_numpy(pairs.object_mask(n, size)) for n in numbers])
            pixels_BCHW = things_BHW[:, None].expand(-1, 3, -1, -1).float()
            mask_BN = mask.mask_BN.float()
            inside_BNP = patchify(pixels_BCHW, patch) * mask_BN[..., None]
            target_BNP = patchify(image_BCHW, patch)
            errors = []
            text_BTD = backbone.text(words.token_CT, words.attention_CT)
            for roll in (0, -1):
                partner_BTD, attention_BT = text_BTD.roll(roll, 0), words.attention_CT.roll(roll, 0)
                crossed = backbone.cross_image(masked_BLD, backbone.cross_image.context(partner_BTD, attention_BT))
                painted_BKP = task.pixels(crossed.full_RLD, partner_BTD, attention_BT, mask.index_BK).float()
                at_BKP = mask.index_BK[..., None].expand(-1, -1, painted_BKP.shape[-1])
                painted_BNP = torch.zeros_like(target_BNP).scatter(1, at_BKP, painted_BKP)
                errors.append(((painted_BNP - target_BNP) ** 2 * inside_BNP).sum((1, 2)))
            # A block is a cell of the scene: the middle patch of each tells whether it is masked.
            cell_BHW = mask_BN.view(-1, *grid).repeat_interleave(patch, 1).repeat_interleave(patch, 2)
            middle = [size // 6 + size // 3 * place for place in range(3)]
            cell_B9 = cell_BHW[:, middle][:, :, middle].flatten(1).bool()
            for turn in (0, 1):
                best = []
                for row in range(len(numbers)):
                    other = (row + turn) % len(numbers)
                    masked = list(CELLS) if turn else cell_B9[row].nonzero().flatten().tolist()
                    best.append(mean_image(scenes[other], claims[other].statement, masked, size, options.draws))
                best_BCHW = model.pixels([np.uint8(np.rint(image)) for image in best])
                errors.append(((patchify(best_BCHW, patch) - target_BNP) ** 2 * inside_BNP).sum((1, 2)))
            error_B4 = torch.stack(errors, 1)
            for row, scene in enumerate(scenes):
                for key in ((phrasing.__name__, str(len(scene.things))), (phrasing.__name__, "any"), ("all", "any")):
                    sums[key].append(error_B4[row])
    print(f"{'caption':<24}things      model      best")
    for (name, count), parts in sorted(sums.items()):
        right, wrong, best_right, best_wrong = torch.stack(parts).sum(0).tolist()
        print(f"{name:<24}{count:<8}{100 * (1 - right / wrong):7.1f} %{100 * (1 - best_right / best_wrong):8.1f} %")


if __name__ == "__main__":
    main()
