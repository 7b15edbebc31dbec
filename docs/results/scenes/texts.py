"""What the text encoder's feature of a place word tells of both things' colours: captions of training scenes of two
things, told in full.

A linear probe (ridge regression on the colours' one-hot vectors) is fitted on two thirds of the captions, and asked
about the rest: percent of the colours that are right, of the thing at that place and of the other one (chance 12.5 %).

.venv/bin/python docs/results/scenes/texts.py checkpoints/RUN/last.ckpt [--captions 3000]
"""

import argparse
import random

import torch
from torch import Tensor

from maskvlm import MaskVLM
from maskvlm.data.scenes.captions import tell_all
from maskvlm.data.scenes.source import Scenes
from maskvlm.data.scenes.world import COLOURS, PLACES


def percent_right(feature_CD: Tensor, colour_C: Tensor) -> float:
    """Of the last third of the rows, by a probe that is fitted on the others."""
    x_CE = torch.cat([feature_CD, torch.ones(len(feature_CD), 1)], 1).double()
    y_CK = torch.nn.functional.one_hot(colour_C, len(COLOURS)).double()
    fitted = len(x_CE) * 2 // 3
    gram_EE = x_CE[:fitted].T @ x_CE[:fitted] + 0.1 * torch.eye(x_CE.shape[1])
    weight_EK = torch.linalg.solve(gram_EE, x_CE[:fitted].T @ y_CK[:fitted])
    return 100 * float(((x_CE[fitted:] @ weight_EK).argmax(1) == colour_C[fitted:]).double().mean())


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--captions", type=int, default=3000)
    options = parser.parse_args()
    model, pairs, rng = MaskVLM.from_pretrained(options.checkpoint), Scenes().split("train"), random.Random(0)
    of_two = (scene for scene in map(pairs.scene, range(len(pairs))) if len(scene.things) == 2)
    sentences = [tell_all(scene, rng) for scene, _ in zip(of_two, range(options.captions), strict=False)]
    place_ids = {number for word in " ".join(PLACES).split() for number in model.backbone.text.ids_of(word)}
    colour_CT = torch.tensor(
        [[COLOURS.index(str(mention.colour)) for mention in each.statement.mentions] for each in sentences]
    )
    feature: tuple[list[Tensor], list[Tensor]] = ([], [])
    for part in range(0, len(sentences), 200):
        tokens = model.tokens([each.text for each in sentences[part : part + 200]])
        text_CTD = model.backbone.text(tokens.token_CT, tokens.attention_CT)
        for token_T, text_TD in zip(tokens.token_CT.tolist(), text_CTD, strict=True):
            # The last word of each place ("top left"): a place word that no other one follows.
            at = [p for p, token in enumerate(token_T) if token in place_ids and token_T[p + 1] not in place_ids]
            for number in (0, 1):
                feature[number].append(text_TD[at[number]])
    for number in (0, 1):
        sides = [(number, "its own"), (1 - number, "the other's")]
        shares = [(name, percent_right(torch.stack(feature[number]), colour_CT[:, which])) for which, name in sides]
        print(f"place of thing {number + 1}: " + ", ".join(f"{name} colour {right:.0f} %" for name, right in shares))


if __name__ == "__main__":
    main()
