r"""How much contrast should count beside matching when candidates are ranked again: recall for several weights.

    .venv/bin/python docs/results/photographs/rerank_weights.py checkpoints/RUN/last.ckpt --data data/flickr8k

Pairs are matched once; a weight only adds them up otherwise (`objectives/rerank.py`). Choose it on one run, and look at
another one's row for what it is worth.
"""

import argparse

import torch
from torch.utils.data import DataLoader

from maskvlm import MaskVLM
from maskvlm.data.pairs import Collate, EvalPairs
from maskvlm.data.prepared.source import Prepared
from maskvlm.data.text import Captioner
from maskvlm.data.transforms import eval_transform
from maskvlm.objectives.rerank import gather_gallery, match_pairs, offload
from maskvlm.objectives.retrieval_metrics import (
    Scores,
    best_items,
    candidates,
    contrast_scores,
    rankings,
    retrieval_metrics,
)

WEIGHTS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
KEYS = ("tr_r1", "tr_r5", "tr_r10", "ir_r1", "ir_r5", "ir_r10")


@torch.no_grad()
def main() -> None:
    """Match the candidates of a split, and print a row for each weight."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--data", required=True, help="a prepared set")
    parser.add_argument("--split", default="val")
    parser.add_argument("--k", type=int, default=16, help="candidates a query")
    options = parser.parse_args()
    model = MaskVLM.from_pretrained(options.checkpoint)
    backbone, task = model.backbone, model.task
    pairs = EvalPairs(
        Prepared(options.data).split(options.split), eval_transform(backbone.input_spec), backbone.image.image_size
    )
    collate = Collate(Captioner(backbone.text.tokenizer, backbone.text.text_length))
    batches = []
    for batch in DataLoader(pairs, batch_size=32, collate_fn=collate):
        image_BLD = backbone.image(batch.image_BCHW)
        text_CTD = backbone.text(batch.token_CT, batch.attention_CT)
        batches.append(offload(task.projection, batch, image_BLD, text_CTD, True))
    gallery = gather_gallery(batches)
    contrast_BC = contrast_scores(gallery.image_BE, gallery.text_CE)
    match_BC = match_pairs(backbone, task.matching, gallery, candidates(best_items(contrast_BC, options.k)))
    scale = float(task.projection.logit_scale)
    print("| weight | captions of an image, R@1 / 5 / 10 | image of a caption |\n|---|---|---|")
    for weight in (None, *WEIGHTS):
        added_BC = match_BC + (weight or 0.0) * scale * contrast_BC
        scores = Scores(contrast_BC, None if weight is None else added_BC, gallery.owner_C)
        k = 0 if weight is None else options.k
        metrics = retrieval_metrics(scores, rankings(scores, [0, k]), k)
        itc = "itc_" if weight is None else ""
        text, image = (
            " / ".join(f"{metrics[f'retrieval/{itc}{key}']:.1f}" for key in part) for part in (KEYS[:3], KEYS[3:])
        )
        print(f"| {'contrast alone' if weight is None else f'{weight:g}'} | {text} | {image} |")


if __name__ == "__main__":
    main()
