"""VQA: answer a question about an image, by generating the answer or choosing from a vocabulary (paper sec. 4).

Shapes: B questions, A answers in total, S answer tokens, L image positions, T tokens, D width, K labels.
"""

import json
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskvlm.config.plain_schema import describe_value
from maskvlm.data.examples import AnswerTokens, ExampleBatch
from maskvlm.data.text import Captioner, no_words
from maskvlm.model.cross_attention import Context
from maskvlm.model.maskvlm import MaskVLM
from maskvlm.model.text_decoder import heads_to_start_from
from maskvlm.objectives.answers import ScoredExample
from maskvlm.objectives.classification import EVAL_SEED, Classification, LabelPrediction, predict_labels, top_labels
from maskvlm.objectives.loss_functions import mean_over
from maskvlm.objectives.masking import Uniform
from maskvlm.objectives.methods import Method
from maskvlm.utils.distributed import Draw, rank, shared_count
from maskvlm.utils.errors import check_choices, check_counts
from tasks.vqa.decoder import AnswerDecoder
from tasks.vqa.metric import accuracy, normalise

log = logging.getLogger(__name__)

SHOWN = 3  # groups of labels shown in a log line, and labels per group


class Vqa(Classification):
    """The generative head of the paper, or a classifier over the answer vocabulary (METER's).

    Args:
        labels: the answer vocabulary; linked from the data, not set by hand.
        head: `generate` (paper; R) or `classify` (C).
        decode: decoding of the generative head: `rank` chooses the likeliest answer of the vocabulary (ALBEF's rule,
            C), `free` generates word by word, greedily.
        candidates: number of answers, by likeliest first word, that `rank` compares in full (128, C).
        answer_length: maximum answer length in tokens, including start and end.
        hidden: width between the two layers of the `classify` head; None: the backbone's width.
        dropout: dropout rate in the `classify` head, 0 to 1.
        image_ablation: control experiment: replace every image by noise.
    """

    name = "vqa"
    methods = MappingProxyType(
        {"answer": Method(predict_labels, 1, "question", "the answer to a question about an image")}
    )

    def __init__(
        self,
        labels: Sequence[str] | None = None,
        head: Literal["generate", "classify"] = "generate",
        decode: Literal["rank", "free"] = "rank",
        candidates: int = 128,
        answer_length: int = 10,
        hidden: int | None = None,
        dropout: float = 0.0,
        image_ablation: bool = False,
    ) -> None:
        super().__init__(labels, 1, hidden, dropout, image_ablation)
        check_choices(
            {"model.task.head": (head, ("generate", "classify")), "model.task.decode": (decode, ("rank", "free"))}
        )
        check_counts(1, {"model.task.candidates": candidates})
        check_counts(3, {"model.task.answer_length": answer_length})
        self.generates, self.decode = head == "generate", decode
        self.candidates, self.answer_length = candidates, answer_length
        self.table: tuple[Tensor, Tensor] | None = None
        self.alike: list[list[str]] = []  # labels with the same tokens

    def build(self, backbone: MaskVLM) -> None:
        if not self.generates:
            super().build(backbone)
            # One of K answers is true. If each starts at even odds, the first hundred steps learn nothing else.
            nn.init.constant_(self.head.last.bias, -math.log(max(1, len(self.labels) - 1)))
            return
        self.answer = AnswerDecoder(backbone, self.answer_length)
        backbone.freeze_for_task(backbone.image.mask_token)

    def heads_of_labels(self) -> tuple[str, ...]:
        # The generative head does not depend on the vocabulary.
        return () if self.generates else super().heads_of_labels()

    def warm_start(self, heads: Mapping[str, Tensor]) -> set[str]:
        """Load the token head of pre-training into the generative head, whose decoder already has its weights."""
        if not self.generates:
            return super().warm_start(heads)
        own_heads, copied = heads_to_start_from("answer", heads, self.state_dict())
        return super().warm_start(own_heads) | copied

    # ------------------------------------------------------------------ training

    def forward(self, backbone: MaskVLM, batch: ExampleBatch) -> dict[str, Tensor]:
        if not self.generates:
            return super().forward(backbone, batch)
        question = self.read(backbone, batch, self.uniform)
        token_AS, attention_AS, owner_A, weight_A = shortened(batch.answers, self.answer_length)
        likelihood_A = self.answer.log_likelihood(backbone, question, token_AS, attention_AS, owner_A)
        valid_B = batch.valid_B.float()
        # Weights of a question's answers sum to 1, so that each question counts equally.
        share_A = weight_A / torch.zeros_like(valid_B).index_add(0, owner_A, weight_A)[owner_A].clamp(min=1e-6)
        loss = -(likelihood_A * share_A * valid_B[owner_A]).sum()
        return {self.name: mean_over(shared_count(valid_B.sum()), loss)}

    def loss(self, logits_BK: Tensor, target_BK: Tensor) -> Tensor:
        """Binary cross-entropy of every answer with its soft target, summed (C, Teney et al. 2018 and METER)."""
        return F.binary_cross_entropy_with_logits(logits_BK, target_BK, reduction="none").sum(1)

    def read(self, backbone: MaskVLM, batch: ExampleBatch, uniform: Uniform) -> Context:
        """Images and questions through the encoders, the cross encoders and the fusion block."""
        # (B, 1, 3, H, W) -> (B, 3, H, W); noise is not cached (-1).
        image_BCHW, row_B = batch.image_BPCHW[:, 0], batch.feature_row_B
        if self.blind is not None:
            image_BCHW, row_B = self.blind(image_BCHW, uniform), row_B.new_full(row_B.shape, -1)
        text_BTD = backbone.text(batch.token_BT, batch.attention_BT)
        return self.answer.read(backbone, backbone.image(image_BCHW, None, row_B), text_BTD, batch.attention_BT)

    # ------------------------------------------------------------------ evaluation

    @torch.no_grad()
    def update(self, backbone: MaskVLM, batch: ExampleBatch) -> None:
        if not self.generates:
            return super().update(backbone, batch)
        predicted = self.answers(backbone, batch)
        correct = [
            self.correct(word, example["answers"]) for word, example in zip(predicted, batch.examples, strict=True)
        ]
        self.scored.add(batch, predicted, correct)

    def answers(self, backbone: MaskVLM, batch: ExampleBatch) -> list[str]:
        """The generative head's answer to each question."""
        device = batch.image_BPCHW.device
        question = self.read(backbone, batch, Draw(EVAL_SEED, int(batch.index_B[0]), device).local)
        rows = len(batch.valid_B)
        if self.decode == "rank":
            token_KS, attention_KS = (part.to(device) for part in self.vocabulary(backbone))
            best_B = self.answer.rank(backbone, question, token_KS, attention_KS, rows, self.candidates)
            return [self.labels[number] for number in best_B.tolist()]
        return self.spelt_out(backbone, self.written(backbone, question, rows))

    def written(self, backbone: MaskVLM, question: Context, rows: int) -> Tensor:
        """Tokens of freely decoded answers, [B, S]."""
        tokenizer: Any = backbone.text.tokenizer
        start, end = self.ends(backbone)
        # The end token ends the answer; no other special token may occur.
        forbidden = [token for token in no_words(tokenizer, backbone.text.vocab_size) if token != end]
        return self.answer.search(backbone, question, rows, start, end, forbidden).token_BS

    def spelt_out(self, backbone: MaskVLM, token_BS: Tensor) -> list[str]:
        """The texts of generated answers."""
        _, end = self.ends(backbone)
        return [self.words(row, end, backbone.text.tokenizer) for row in token_BS.tolist()]

    def ends(self, backbone: MaskVLM) -> tuple[int, int]:
        """Ids of the start and end tokens, with which every label begins and ends."""
        token_KS, attention_KS = self.vocabulary(backbone)
        return int(token_KS[0, 0]), int(token_KS[0, int(attention_KS[0].sum()) - 1])

    def decisions(self, backbone: MaskVLM, batch: ExampleBatch) -> list[LabelPrediction]:
        """Answers of the vocabulary with their probabilities; with free decoding, the generated answer with its own."""
        if not self.generates:
            return super().decisions(backbone, batch)
        device, rows = batch.image_BPCHW.device, len(batch.valid_B)
        question = self.read(backbone, batch, Draw(EVAL_SEED, 0, device).local)
        if self.decode == "free":
            token_BS = self.written(backbone, question, rows)
            # Up to and including the first end token: (B, S)
            ends_BS = token_BS == self.ends(backbone)[1]
            attention_BS = ends_BS.cumsum(1) - ends_BS.long() == 0
            own = torch.arange(rows, device=device)
            likelihood = self.answer.log_likelihood(backbone, question, token_BS, attention_BS, own).exp().tolist()
            predicted = self.spelt_out(backbone, token_BS)
            return [LabelPrediction(word, p, {word: p}) for word, p in zip(predicted, likelihood, strict=True)]
        token_KS, attention_KS = (part.to(device) for part in self.vocabulary(backbone))
        comparison = self.answer.compare(backbone, question, token_KS, attention_KS, rows, self.candidates)
        chosen_BM, likelihood_BM = comparison
        # (B, M) -> (B, K): candidates that were not compared get 0.
        probability_BK = likelihood_BM.new_zeros(rows, len(self.labels)).scatter(1, chosen_BM, likelihood_BM.exp())
        return top_labels(probability_BK, self.labels)

    def probability(self, logits_BK: Tensor) -> Tensor:
        """Independent probability of each answer (sigmoid), [B, K]."""
        return logits_BK.sigmoid()

    def words(self, tokens: list[int], end: int, tokenizer: Any) -> str:
        """The label with these tokens, otherwise the decoded tokens: decoding need not restore a label's spaces."""
        # Without the start token, and up to the end token if there is one.
        inner = tokens[1 : tokens.index(end, 1)] if end in tokens[1:] else tokens[1:]
        assert self.table is not None
        label = self.spelt.get(tuple(inner))
        return label if label is not None else str(tokenizer.decode(inner)).strip()

    def vocabulary(self, backbone: MaskVLM) -> tuple[Tensor, Tensor]:
        """Tokens of every label and their padding mask, [K, S] each; computed once. Labels with the same tokens, which
        no answer can distinguish, are logged and counted."""
        if self.table is None:
            label_tokens = Captioner(backbone.text.tokenizer, self.answer_length)(list(self.labels))  # type: ignore[arg-type]
            self.table = label_tokens.token_CT, label_tokens.attention_CT
            rows = zip(label_tokens.token_CT.tolist(), label_tokens.special_CT.tolist(), self.labels, strict=True)
            labels_of: dict[tuple[int, ...], list[str]] = {}
            for tokens, specials, label in rows:
                inner = tuple(t for t, special in zip(tokens, specials, strict=True) if not special)
                labels_of.setdefault(inner, []).append(label)
            self.spelt = {inner: labels[0] for inner, labels in labels_of.items()}
            self.alike = [labels for labels in labels_of.values() if len(labels) > 1]
            if self.alike and rank() == 0:
                log.warning("warning: %s", alike_line(self.alike, len(self.labels)))
        return self.table

    def correct(self, prediction: str, answers: list[str]) -> float | None:
        """The official accuracy (`metric.py`)."""
        return accuracy(prediction, answers) if answers else None

    def extra_metrics(self, scored: list[ScoredExample]) -> dict[str, float]:
        """`accuracy_prior`: of always giving the most frequent answer. `accuracy_ceiling`: of always choosing the best
        answer in the vocabulary."""
        known = [one for one in scored if one.example["answers"]]
        if not known:
            return {}
        usual = Counter(one.truth for one in known).most_common(1)[0][0]
        # Ceiling: the best that the vocabulary allows. Prior: the same answer to all questions.
        all_answers = [one.example["answers"] for one in known]
        # A vocabulary may write an answer in its own way: what counts is the normalised form.
        labels_of: dict[str, set[str]] = defaultdict(set)
        for label in self.labels:
            labels_of[normalise(label)].add(label)
        named = [{label for each in answers for label in labels_of[normalise(each)]} for answers in all_answers]
        best = [
            max((accuracy(one, answers) for one in choices), default=0.0)
            for choices, answers in zip(named, all_answers, strict=True)
        ]
        prior = [accuracy(usual, answers) for answers in all_answers]
        return {"accuracy_prior": 100 * sum(prior) / len(known), "accuracy_ceiling": 100 * sum(best) / len(known)}

    def files(self) -> dict[str, str]:
        """A submission for the VQA server, if ids are its numbers; and the answer vocabulary."""
        contents = {"answers.json": json.dumps(list(self.labels), ensure_ascii=False, indent=0) + "\n"}
        if all(one["id"].isdecimal() for one in self.predictions):
            results = [{"question_id": int(one["id"]), "answer": one["prediction"]} for one in self.predictions]
            contents["submission.json"] = json.dumps(results, ensure_ascii=False) + "\n"
        return contents

    def card(self) -> dict[str, Any]:
        if not self.generates:
            return super().card() | {"head": "classify"}
        candidates = min(self.candidates, len(self.labels))
        settings: dict[str, Any] = {"head": "generate", "decode": self.decode, "candidates": candidates}
        if self.alike:
            settings["labels with the tokens of another"] = sum(map(len, self.alike))
        return super().card() | settings

    def chance_levels(self, batch_size: int) -> dict[str, float]:
        """Classes: one of K equally likely answers is true. Generated answers have no chance level: their length
        varies."""
        others = len(self.labels) - 1
        # K sigmoids at 1 / K, one of them true: log K + (K - 1) log(K / (K - 1)).
        return {} if self.generates else {self.name: math.log1p(others) + others * math.log1p(1 / max(1, others))}


def alike_line(alike: Sequence[Sequence[str]], labels: int) -> str:
    """A log line that says which labels have the same tokens.

    Args:
        alike: groups of two or more labels with the same tokens.
        labels: total number of labels.
    """
    shown = "; ".join(" = ".join(map(describe_value, group[:SHOWN])) for group in alike[:SHOWN])
    more = ", ..." if len(alike) > SHOWN or any(len(group) > SHOWN for group in alike) else ""
    count = sum(map(len, alike))
    return (
        f"{count} of {labels} answers have the same tokens as another one, so they cannot be told apart: {shown}{more}"
    )


def shortened(answers: AnswerTokens, length: int) -> AnswerTokens:
    """Cut answers to at most `length` tokens; like the answers of the vocabulary, a longer one loses its last words but
    keeps its end token."""
    token_AT, attention_AT = answers.token_AT[:, :length], answers.attention_AT[:, :length]
    size_A = answers.attention_AT.sum(1)
    # (A, T) -> (A, 1): the end token is the last one of an answer.
    end_A1 = answers.token_AT.gather(1, (size_A - 1).clamp(min=0)[:, None])
    last_T = torch.arange(token_AT.shape[1], device=token_AT.device) == length - 1
    token_AT = torch.where((size_A > length)[:, None] & last_T, end_A1, token_AT)
    return answers._replace(token_AT=token_AT, attention_AT=attention_AT)
