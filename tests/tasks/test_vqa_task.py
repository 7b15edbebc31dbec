"""VQA's two heads: the decoder against slow loops, ranking against brute force, and what is handed in.

Shapes: A answers, S answer tokens, K candidates, V vocabulary.
"""

import json
import math
from typing import Any

import pytest
import slow_step
import torch
from torch import Tensor
from toy_examples import LABELS, example, example_batch, matters, take_examples
from toys import CLS, LENGTH, SEP, VOCAB, WIDTH, slow_causal_block, slow_cross, tokens, toy_backbone

from maskvlm.data.examples import AnswerTokens, ExampleBatch
from maskvlm.data.text import train_tokenizer
from maskvlm.model.cross_attention import Context
from maskvlm.model.encoders import TextEncoder
from maskvlm.model.maskvlm import MaskVLM
from maskvlm.objectives.answers import ScoredExample
from maskvlm.objectives.task import Prediction
from maskvlm.utils.distributed import Draw
from maskvlm.utils.errors import UserError
from tasks.vqa.task import Vqa, shortened

ANSWERS = [[7], [8, 9], [7, 9, 11], [30], [8], [31, 32]]
"""Six answers by their tokens: some begin alike, some are the beginning of others."""


def build(labels: Any = LABELS, **settings: Any) -> tuple[MaskVLM, Vqa]:
    backbone, task = toy_backbone(), Vqa(labels, **settings)
    task.build(backbone)
    matters(backbone, task)
    task.set_uniform(Draw(7, 0, "cpu"))
    return backbone.double(), task.double()


def noise(rows: int = 4, **settings: Any) -> ExampleBatch:
    batch = example_batch(rows, **settings)
    return batch._replace(image_BPCHW=batch.image_BPCHW.double(), target_BK=batch.target_BK.double())


def question_context(backbone: MaskVLM, task: Vqa, batch: ExampleBatch) -> Context:
    return task.read(backbone, batch, task.uniform)


def slow_logits(backbone: MaskVLM, task: Vqa, batch: ExampleBatch, row: int, prefix: list[int]) -> Tensor:
    """Logits [V] of what follows the tokens `prefix` in answer to one question, in torch's own attention, without
    padding and without a causal mask: later tokens do not exist."""
    head = task.answer
    token_1T = batch.token_BT[row, batch.attention_BT[row]][None]
    text_TD = backbone.text(token_1T, torch.ones_like(token_1T, dtype=torch.bool))[0]
    image_LD = backbone.image(batch.image_BPCHW[row])[0]
    image = slow_cross(backbone.cross_image, image_LD, text_TD)
    text = slow_cross(backbone.cross_text, text_TD, image_LD)
    fused_TD = slow_cross(head.fusion, text, image)
    words = head.words(backbone.text.model.get_input_embeddings()(torch.tensor(prefix)))
    x = head.norm(words + head.position_SD[: len(prefix)])
    for number in range(len(head.decoder.blocks)):
        x = slow_causal_block(head.decoder.blocks[number], x, fused_TD)
    return head.tokens(x[-1])


def test_a_later_token_does_not_move_an_earlier_logit() -> None:
    backbone, task = build()
    batch = noise(1)
    question, owner = question_context(backbone, task, batch), torch.zeros(1, dtype=torch.long)
    one, other = torch.tensor([[CLS, 7, 8, 9]]), torch.tensor([[CLS, 7, 30, 31]])
    first_SV, second_SV = (task.answer(backbone, question, each, owner)[0] for each in (one, other))
    torch.testing.assert_close(first_SV[:2], second_SV[:2], atol=1e-12, rtol=1e-12)
    assert not torch.allclose(first_SV[2:], second_SV[2:])
    alone_SV = task.answer(backbone, question, one[:, :2], owner)[0]
    torch.testing.assert_close(alone_SV, first_SV[:2], atol=1e-12, rtol=1e-12)


def likelihood_by_loop(backbone: MaskVLM, task: Vqa, batch: ExampleBatch, row: int, answer: list[int]) -> float:
    """The same, token by token."""
    whole, total = [CLS, *answer, SEP], 0.0
    for at in range(1, len(whole)):
        total += slow_logits(backbone, task, batch, row, whole[:at]).log_softmax(0)[whole[at]].item()
    return total


def test_likelihood_is_that_of_a_loop_over_tokens() -> None:
    backbone, task = build()
    batch, owners, answers = noise(3), [0, 2, 1, 0, 2, 2], tokens(ANSWERS)
    question, owner_A = question_context(backbone, task, batch), torch.tensor(owners)
    pair = answers["token_CT"], answers["attention_CT"]
    likelihood_A = task.answer.log_likelihood(backbone, question, *pair, owner_A)
    expected = [likelihood_by_loop(backbone, task, batch, *each) for each in zip(owners, ANSWERS, strict=True)]
    assert likelihood_A.tolist() == pytest.approx(expected, rel=1e-6)  # summed in single precision
    # Checkpoints from before there was a layer for embeddings of another width load.
    parts = {name.partition(".")[0] for name in task.answer.state_dict()}
    assert parts == {"fusion", "decoder", "position_SD", "norm", "tokens"}


def test_word_embeddings_may_be_narrower_than_the_backbone() -> None:
    """As ELECTRA's."""
    config = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config["embedding_size"] = 8
    text = TextEncoder("electra", LENGTH, random_init=True, vocab_size=VOCAB, config=config)
    whole, task = MaskVLM(toy_backbone().image, text, cross_layers=2, cross_heads=2, width=WIDTH), Vqa(LABELS)
    task.build(whole)
    matters(whole, task)
    task.set_uniform(Draw(7, 0, "cpu"))
    backbone, task = whole.double().eval(), task.double()
    batch, answers = noise(1), tokens([[7, 9, 11]])
    pair = answers["token_CT"], answers["attention_CT"]
    likelihood = task.answer.log_likelihood(backbone, question_context(backbone, task, batch), *pair, torch.tensor([0]))
    assert likelihood.item() == pytest.approx(likelihood_by_loop(backbone, task, batch, 0, [7, 9, 11]), rel=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(("most", "chunk"), [(1, 512), (2, 512), (100, 5)])
def test_ranking_compares_in_full_those_with_the_likeliest_first_word(most: int, chunk: int) -> None:
    """All of them, by brute force, where there are no more than that."""
    backbone, task = build()
    distinct = [[7], [8, 9], [30], [31, 32]] if most < 100 else ANSWERS  # no two first words are the same
    batch, answers = noise(7, seed=1), tokens(distinct)
    question, pair = question_context(backbone, task, batch), (answers["token_CT"], answers["attention_CT"])
    best_B = task.answer.rank(backbone, question, *pair, 7, most, chunk)
    for row in range(7):
        first = slow_logits(backbone, task, batch, row, [CLS])
        chosen = sorted(range(len(distinct)), key=lambda k: -first[distinct[k][0]].item())[:most]
        assert best_B[row] == max(chosen, key=lambda k: likelihood_by_loop(backbone, task, batch, row, distinct[k]))
    assert most < 100 or len({*best_B.tolist()}) > 1, "choose another seed"


def test_heads_come_from_pre_training_or_its_own_checkpoint() -> None:
    _, pretrained = slow_step.build()
    backbone, task = toy_backbone(), Vqa(LABELS)
    task.build(backbone)
    names = task.warm_start(pretrained.state_dict())
    head = {f"answer.tokens.vocabulary.{end}" for end in ("weight", "bias")}
    assert names == head | {name for name in task.state_dict() if name.startswith("answer.decoder.")}
    assert all(torch.equal(task.state_dict()[name], pretrained.state_dict()[name[7:]]) for name in head)
    own = task.answer.decoder.state_dict()
    for name, value in backbone.cross_text.state_dict().items():
        assert torch.equal(own[name], value)
        assert own[name].data_ptr() != value.data_ptr()  # a copy that goes its own way
    _, before = build()
    theirs = {name: value.float() for name, value in before.state_dict().items()}
    assert task.warm_start(theirs) == set(task.state_dict())
    assert all(torch.equal(task.state_dict()[name], value) for name, value in theirs.items())
    classes = Vqa(LABELS, head="classify")
    classes.build(backbone)
    assert classes.warm_start(theirs) == set()  # the other head's are none of its own


@pytest.mark.parametrize("holes", [(), (0, 2)])
def test_the_loss_weighs_answers_by_their_share(holes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean over questions of the weighted mean over each one's answers; what could not be read weighs nothing."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    backbone, task = build()
    batch = noise(4, holes=holes)
    answers = batch.answers._replace(weight_A=batch.answers.weight_A.double())
    loss = task(backbone, batch._replace(answers=answers))["vqa"]
    terms = []
    for row in (row for row in range(4) if row not in holes):
        mine = (answers.owner_A == row).nonzero().flatten()
        part = take_examples(batch, row, row + 1)
        likelihood_A = task.answer.log_likelihood(
            backbone, question_context(backbone, task, part), answers.token_AT[mine], answers.attention_AT[mine],
            torch.zeros(len(mine), dtype=torch.long),
        )  # fmt: skip
        weight_A = answers.weight_A[mine]
        terms.append(-(likelihood_A * weight_A).sum() / weight_A.sum())
    assert loss.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-9)
    loss.backward()
    parameters = [*backbone.named_parameters(), *task.named_parameters()]  # DDP waits for ever for one without
    assert [name for name, p in parameters if p.requires_grad != (p.grad is not None)] == []


def test_answer_classes_are_binary_each() -> None:
    """0.6 for the first, 1 for the third: the soft targets of VQA v2."""
    task = Vqa(LABELS, head="classify")
    logits, target = torch.tensor([[0.3, -2.0, 1.5]]), torch.tensor([[0.6, 0.0, 1.0]])
    p = logits.sigmoid()[0]
    by_hand = -(0.6 * p[0].log() + 0.4 * (1 - p[0]).log() + (1 - p[1]).log() + p[2].log())
    assert task.loss(logits, target).item() == pytest.approx(by_hand.item(), rel=1e-6)
    knowing_nothing = task.loss(torch.tensor([[1 / 3, 1 / 3, 1 / 3]]).logit(), torch.tensor([[0.0, 1.0, 0.0]]))
    assert task.chance_levels(4)["vqa"] == pytest.approx(knowing_nothing.item(), rel=1e-5)
    assert Vqa(LABELS).chance_levels(4) == {}
    task.build(toy_backbone())  # each starts as likely as one of them is
    assert task.head.last.bias.sigmoid().tolist() == pytest.approx([1 / len(LABELS)] * len(LABELS))


def test_long_answers_lose_their_last_words_and_keep_their_end() -> None:
    """As `Captioner` cuts the answers of the vocabulary."""
    token_AT = torch.tensor([[2, 5, 6, 7, 3], [2, 5, 6, 3, 1], [2, 5, 3, 1, 1]])
    answers = AnswerTokens(token_AT, token_AT != 1, torch.arange(3), torch.ones(3))
    cut = shortened(answers, 4)
    assert cut.token_AT.tolist() == [[2, 5, 6, 3], [2, 5, 6, 3], [2, 5, 3, 1]]
    assert cut.attention_AT.tolist() == (cut.token_AT != 1).tolist()
    for length in (5, 99):
        assert torch.equal(shortened(answers, length).token_AT, token_AT)
    none = AnswerTokens(token_AT[:0], token_AT[:0] != 1, torch.arange(0), torch.ones(0))
    assert shortened(none, 3).token_AT.shape == (0, 3)


SPELT = ("red", "new york's", "t-shirt", "two words")


def speaking(**settings: Any) -> tuple[MaskVLM, Vqa, Any]:
    """With a tokenizer of real text, which gives neither apostrophe nor hyphen back as they were."""
    tokenizer = train_tokenizer([*SPELT, "blue is not there"], 120)
    backbone, task = toy_backbone(vocab=120), Vqa(SPELT, **settings)
    backbone.text.tokenizer = tokenizer
    task.build(backbone)
    return backbone.eval(), task.eval(), tokenizer


def test_written_tokens_become_the_label_they_spell() -> None:
    backbone, task, tokenizer = speaking()
    token_KS, attention_KS = task.vocabulary(backbone)
    end = tokenizer.sep_token_id
    for row, label in enumerate(SPELT):
        spelt = token_KS[row][attention_KS[row]].tolist()
        assert task.words(spelt, end, tokenizer) == label
        assert task.words([*spelt, end, end], end, tokenizer) == label
    assert tokenizer.decode(token_KS[1], skip_special_tokens=True) != "new york's"  # why labels are looked up
    stranger = tokenizer("blue")["input_ids"]
    assert task.words(stranger, end, tokenizer) == "blue"
    assert task.words(stranger[:-1], end, tokenizer) == "blue"  # the length was used up before the end
    assert task.words([stranger[0], end, end], end, tokenizer) == ""


def test_labels_with_the_same_tokens_are_named_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    """The tokenizer writes in small letters, and has one token for all that it does not know."""
    backbone, _, tokenizer = speaking()
    task = Vqa(("red", "blue", "Red", "二", "☃"))
    task.build(backbone)
    token_KS, _ = task.vocabulary(backbone)
    task.vocabulary(backbone)
    (record,) = caplog.records
    assert "4 of 5 answers" in record.getMessage()
    assert task.card()["labels with the tokens of another"] == 4
    assert task.words(token_KS[2].tolist(), tokenizer.sep_token_id, tokenizer) == "red"


def always_says(task: Vqa, written: list[int], height: float) -> None:
    """Make the head give each token of `written` this logit at its place, all others 0, whatever the question."""

    def fixed_logits(backbone: MaskVLM, question: Context, token_AS: Tensor, owner_A: Tensor) -> Tensor:
        logits_ASV = torch.zeros(*token_AS.shape, 120)
        for at in range(token_AS.shape[1]):
            logits_ASV[:, at, written[min(at + 1, len(written) - 1)]] = height
        return logits_ASV

    def goes_on(_: MaskVLM, __: Context, token_A: Tensor, place: int, past: Any) -> tuple[Tensor, list[Any]]:
        return fixed_logits(_, __, token_A[:, None].expand(-1, place + 1), token_A)[:, -1], []

    task.answer.forward = fixed_logits  # type: ignore[method-assign]
    task.answer.follow = goes_on  # type: ignore[method-assign]


@pytest.mark.parametrize("decode", ["rank", "free"])
def test_an_answer_that_was_learned_is_given_both_ways(decode: Any) -> None:
    backbone, task, _tokenizer = speaking(decode=decode)
    always_says(task, task.vocabulary(backbone)[0][1].tolist(), 9.0)
    batch = example_batch(3)._replace(examples=tuple(example(n, answers=["new york's"] * 10) for n in range(3)))
    assert task.answers(backbone, batch) == ["new york's"] * 3
    task.update(backbone, batch)
    assert task.compute(backbone)["vqa/accuracy"] == 100
    decision = task.decisions(backbone, batch)[2]
    assert decision.answer == "new york's"
    assert decision.probability > 0.9


def test_the_probability_of_a_written_answer_is_that_of_its_tokens() -> None:
    """Three pieces of words, which no text spells so: made tokens again they would be others."""
    backbone, task, tokenizer = speaking(decode="free")
    start, end = task.ends(backbone)
    piece = next(number for word, number in tokenizer.get_vocab().items() if word.startswith("##"))
    always_says(task, [start, piece, piece, piece, end], 3.0)
    (decision, _) = task.decisions(backbone, example_batch(2))
    share = math.exp(3) / (math.exp(3) + 119)
    assert decision.probability == pytest.approx(share**4, rel=1e-4)


def test_metrics_by_hand() -> None:
    """Official accuracy: of ten people, 2 said `red` (0.6 on average over the subsets of nine), 8 said `blue`."""
    task = Vqa(("red", "green"))
    people = ["red"] * 2 + ["blue"] * 8
    assert task.correct("red", people) == pytest.approx(0.6)
    assert task.correct("blue", people) == 1.0
    assert task.correct("cat", people) == 0.0
    assert task.correct("red", []) is None
    rows = [
        ScoredExample(0, example(0, answers=people), "red", 0.6),
        ScoredExample(1, example(1, answers=["green"] * 10), "red", 0.0),
        ScoredExample(2, example(2, answers=["blue"] * 10), "green", 0.0),
        ScoredExample(3, example(3, answers=[]), "green", None),
    ]
    metrics = task.extra_metrics(rows)
    assert metrics["accuracy_prior"] == pytest.approx(100 * (1 + 0 + 1) / 3)  # always `blue`
    assert metrics["accuracy_ceiling"] == pytest.approx(100 * (0.6 + 1 + 0) / 3)  # `blue` is not in the vocabulary
    assert task.extra_metrics(rows[3:]) == {}
    # The metric compares normalised answers: so does the best choice.
    numbers = Vqa(("2", "dog")).extra_metrics(
        [ScoredExample(0, example(0, answers=["two"] * 6 + ["three"] * 4), "2", 1.0)]
    )
    assert numbers["accuracy_ceiling"] == 100
    # A vocabulary of a user's own may write answers as it likes.
    written = Vqa(("Yes", "No")).extra_metrics([ScoredExample(0, example(0, answers=["yes"] * 9 + ["no"]), "Yes", 1.0)])
    assert written["accuracy_ceiling"] == 100


@pytest.mark.parametrize(("ids", "there"), [(["7", "12"], True), (["7", "x1"], False), (["7", "²"], False)])
def test_the_servers_file_is_for_its_own_numbers(ids: list[str], there: bool) -> None:
    task = Vqa(("yes", "café"))
    task.predictions = [
        Prediction(id=name, text="", truth="", prediction="café", right=None, index=[0], kind="") for name in ids
    ]
    files = {name: json.loads(text) for name, text in task.files().items()}
    submission = {"submission.json": [{"question_id": int(name), "answer": "café"} for name in ids]} if there else {}
    assert files == {"answers.json": ["yes", "café"]} | submission


def test_wrong_settings_are_named() -> None:
    assert Vqa(LABELS).card().items() >= {"head": "generate", "decode": "rank", "candidates": 3}.items()
    for name, value in {"candidates": 0, "answer_length": 2, "head": "generative", "decode": "ranked"}.items():
        with pytest.raises(UserError, match=f"model.task.{name}"):
            Vqa(LABELS, **{name: value})  # type: ignore[arg-type]
