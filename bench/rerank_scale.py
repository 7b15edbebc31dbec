r"""CPU seconds for ranking at the size of COCO's test split: 5,000 images, 25,000 captions, k = 128.

    OMP_NUM_THREADS=1 PYTHONPATH=src python bench/rerank_scale.py

Vectors and matching scores are random; the cross encoders, which run on a GPU, are left out. The ranks of some queries
are compared with those of a loop that sorts one query at a time, whose total time is extrapolated from them.
"""

import argparse
import resource
import time

import torch
from torch.nn import functional as F

from maskvlm.objectives.retrieval_metrics import (
    Scores,
    best_items,
    candidates,
    contrast_scores,
    rankings,
    retrieval_metrics,
)


def loop_rank(contrast_G: torch.Tensor, match_G: torch.Tensor, relevant: set[int], k: int) -> int:
    """Rank of the best relevant item of a query: the k best items by contrast re-ranked by matching, then the rest."""
    order = contrast_G.argsort(descending=True).tolist()
    match = match_G.tolist()
    order[:k] = sorted(order[:k], key=lambda item: -match[item])
    return next(place for place, item in enumerate(order) if item in relevant)


def main() -> None:
    """Time each part, compare the ranks with the loop's, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--captions", type=int, default=5, help="of an image")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--k", type=int, default=128)
    parser.add_argument("--queries", type=int, default=200, help="of each direction that the loop ranks, too")
    options = parser.parse_args()
    torch.manual_seed(0)
    images, k = options.images, options.k
    owner_C = torch.arange(images * options.captions) // options.captions
    image_BE = F.normalize(torch.randn(images, options.width), dim=1)
    text_CE = F.normalize(image_BE[owner_C] + torch.randn(len(owner_C), options.width) / 6, dim=1)

    def timed(name: str, started: float) -> float:
        spent = time.process_time() - started
        print(f"{name:<28}{spent:6.2f} s")
        return spent

    started = time.process_time()
    contrast_BC = contrast_scores(image_BE, text_CE)
    total = timed("contrast", started)
    started = time.process_time()
    best = best_items(contrast_BC, k)
    wanted_BC = candidates(best)
    total += timed("candidates", started)
    match_BC = torch.full(contrast_BC.shape, torch.nan)
    match_BC[wanted_BC] = torch.randn(int(wanted_BC.sum())) + 20 * contrast_BC[wanted_BC]
    started = time.process_time()
    scores = Scores(contrast_BC, match_BC, owner_C, best)
    ranks_by_k = rankings(scores, [0, k])
    retrieval_metrics(scores, ranks_by_k, k)
    total += timed("ranks of both stages", started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{int(wanted_BC.sum()):,} pairs to match; the CPU's part {total:.2f} s, {peak:.2f} GiB at most")
    queries = min(options.queries, images)
    of_image = {image: set((owner_C == image).nonzero().flatten().tolist()) for image in range(queries)}
    started = time.process_time()
    ranks = [loop_rank(contrast_BC[b], match_BC[b], of_image[b], k) for b in range(queries)]
    loop = (time.process_time() - started) / queries * images
    assert ranks == ranks_by_k[k].text.rank_Q[:queries].tolist()
    started = time.process_time()
    ranks = [loop_rank(contrast_BC[:, c], match_BC[:, c], {int(owner_C[c])}, k) for c in range(queries)]
    loop += (time.process_time() - started) / queries * len(owner_C)
    assert ranks == ranks_by_k[k].image.rank_Q[:queries].tolist()
    print(f"one query at a time: {loop:.0f} s, {loop / total:.0f} times as long, the same ranks")


if __name__ == "__main__":
    main()
