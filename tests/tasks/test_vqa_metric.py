"""The official VQA accuracy: rows worked out by hand, and an independent reading of the original, step by step."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.vqa.metric import CONTRACTIONS, Mean, VqaAccuracy, accuracy, credit, normalise, vqa_accuracy

# The whole table of the original, misspelt word:form, with the entries that never meet a word in lower case.
TABLE = """
    aint:ain't arent:aren't cant:can't couldve:could've couldnt:couldn't couldn'tve:couldn't've
    couldnt've:couldn't've didnt:didn't doesnt:doesn't dont:don't hadnt:hadn't hadnt've:hadn't've hadn'tve:hadn't've
    hasnt:hasn't havent:haven't hed:he'd hed've:he'd've he'dve:he'd've hes:he's howd:how'd howll:how'll hows:how's
    Id've:I'd've I'dve:I'd've Im:I'm Ive:I've isnt:isn't itd:it'd itd've:it'd've it'dve:it'd've itll:it'll
    let's:let's maam:ma'am mightnt:mightn't mightnt've:mightn't've mightn'tve:mightn't've mightve:might've
    mustnt:mustn't mustve:must've neednt:needn't notve:not've oclock:o'clock oughtnt:oughtn't ow's'at:'ow's'at
    'ows'at:'ow's'at 'ow'sat:'ow's'at shant:shan't shed've:she'd've she'dve:she'd've she's:she's shouldve:should've
    shouldnt:shouldn't shouldnt've:shouldn't've shouldn'tve:shouldn't've somebody'd:somebodyd
    somebodyd've:somebody'd've somebody'dve:somebody'd've somebodyll:somebody'll somebodys:somebody's
    someoned:someone'd someoned've:someone'd've someone'dve:someone'd've someonell:someone'll someones:someone's
    somethingd:something'd somethingd've:something'd've something'dve:something'd've somethingll:something'll
    thats:that's thered:there'd thered've:there'd've there'dve:there'd've therere:there're theres:there's
    theyd:they'd theyd've:they'd've they'dve:they'd've theyll:they'll theyre:they're theyve:they've twas:'twas
    wasnt:wasn't wed've:we'd've we'dve:we'd've weve:we've werent:weren't whatll:what'll whatre:what're whats:what's
    whatve:what've whens:when's whered:where'd wheres:where's whereve:where've whod:who'd whod've:who'd've
    who'dve:who'd've wholl:who'll whos:who's whove:who've whyll:why'll whyre:why're whys:why's wont:won't
    wouldve:would've wouldnt:wouldn't wouldnt've:wouldn't've wouldn'tve:wouldn't've yall:y'all yall'll:y'all'll
    y'allll:y'all'll yall'd've:y'all'd've y'alld've:y'all'd've y'all'dve:y'all'd've youd:you'd youd've:you'd've
    you'dve:you'd've youll:you'll youre:you're youve:you've
"""
FORMS = dict(pair.split(":") for pair in TABLE.split())
DIGITS = "none:0 zero:0 one:1 two:2 three:3 four:4 five:5 six:6 seven:7 eight:8 nine:9 ten:10"
NUMBERS = dict(pair.split(":") for pair in DIGITS.split())
MARKS = [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!"]


# Ten answers as {answer: people}; of ten, 0, 1, 2, 3 and 4 equal ones are worth 0, 0.3, 0.6, 0.9 and 1.
ROWS: list[tuple[str, dict[str, int], float]] = [
    # real answers
    ("net", {"net": 6, "netting": 1, "mesh": 1, "pitcher": 1, "orange": 1}, 1),
    ("mesh", {"net": 6, "netting": 1, "mesh": 1, "pitcher": 1, "orange": 1}, 0.3),
    # all the same: compared as written, but for the space around it
    ("yes.", {"yes": 10}, 0),
    ("1", {"one": 10}, 0),
    ("the end", {"the end": 10}, 1),
    (" yes\n", {"yes": 10}, 1),
    ("stop sign", {"stop\nsign": 10}, 1),
    ("Yes", {"yes": 5, "yes ": 5}, 0),  # the same once trimmed
    # different as written, the same in normal form
    ("YES!", {"yes": 5, "Yes": 5}, 1),
    ("hot dog", {"hot  dog": 3, "dog": 7}, 0.9),
    # articles
    ("cat", {"a cat": 1, "the cat": 1, "an cat": 1, "dog": 7}, 0.9),
    ("theatre", {"the atre": 9, "atre": 1}, 0),
    ("a", {"the": 2, "an": 1, "dog": 7}, 0.9),  # all are empty
    # numbers and contractions
    ("none", {"0": 1, "zero": 1, "x": 8}, 0.6),
    ("eleven", {"11": 9, "x": 1}, 0),
    ("dont know", {"don't know": 2, "no": 8}, 0.6),
    ("couldntve", {"couldn't've": 9, "no": 1}, 0),  # one apostrophe is forgiven, not two
    ("Im", {"i'm": 9, "im": 1}, 0.3),  # the table has these with a capital only
    # punctuation
    ("red, blue", {"red blue": 4, "red": 6}, 1),
    ("red- blue-green", {"red bluegreen": 2, "red blue green": 8}, 0.6),  # once beside a space: never a space
    ("red- blue/green", {"red blue green": 4, "red": 6}, 1),  # each mark by itself
    ("1,000-2,000", {"10002000": 1, "1000 2000": 9}, 0.3),  # a number with a comma: no mark leaves a space
    ("10:30", {"10:30": 2, "10 30": 8}, 0.6),
    # points
    ("u.s.", {"us": 2, "u s": 8}, 0.6),
    ("v.2", {"v.2": 2, "v2": 8}, 0.6),  # a digit after it saves a point,
    ("2.v", {"2v": 2, "2.5": 8}, 0.6),  # one before it does not
    # lines
    ("red-\nblue-white", {"red bluewhite": 2, "red": 8}, 0.6),  # a line break is a space beside the mark
    ("The dog's toys, two.", {"dog's toys 2": 4, "x": 6}, 1),
]


@pytest.mark.parametrize(("prediction", "counts", "expected"), ROWS)
def test_rows_worked_out_by_hand(prediction: str, counts: dict[str, int], expected: float) -> None:
    answers = [answer for answer, count in counts.items() for _ in range(count)]
    assert len(answers) == 10
    assert accuracy(prediction, answers) == accuracy(prediction, answers[::-1]) == expected


def test_credit_of_some_of_the_people() -> None:
    """With ten the official one; with fewer than four all others must agree, and one person decides alone."""
    assert [credit(matches, 10) for matches in range(11)] == [0, 0.3, 0.6, 0.9, 1, 1, 1, 1, 1, 1, 1]
    table = {(0, 1): 0, (1, 1): 1, (1, 2): 1 / 2, (2, 2): 1, (1, 3): 1 / 3, (2, 3): 2 / 3, (3, 3): 1}
    table |= {(1, 4): 1 / 4, (3, 4): 3 / 4, (4, 4): 1, (3, 5): 4 / 5, (4, 5): 1, (3, 1000): 0.999}
    assert {case: credit(*case) for case in table} == pytest.approx(table, abs=1e-15)
    assert [accuracy(text, ["red"]) for text in ("red", "Red")] == [1, 0]  # compared as written
    with pytest.raises(ValueError, match="at least one answer"):
        accuracy("x", [])


# ------------------------------------------------------------------ the original, step by step


def original_words(text: str) -> str:
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(FORMS.get(word, word) for word in words if word not in ("a", "an", "the"))


def original_punctuation(text: str) -> str:
    changed = text
    for mark in MARKS:
        if mark + " " in text or " " + mark in text or re.search(r"(\d)(,)(\d)", text):
            changed = changed.replace(mark, "")
        else:
            changed = changed.replace(mark, " ")
    return re.sub(r"(?!<=\d)(\.)(?!\d)", "", changed, count=int(re.UNICODE))


def original_accuracy(prediction: str, answers: list[str]) -> float:
    prediction = prediction.replace("\n", " ").replace("\t", " ").strip()
    people: list[dict[str, Any]] = []
    for number, answer in enumerate(answers):
        people.append({"id": number, "answer": answer.replace("\n", " ").replace("\t", " ").strip()})
    if len({person["answer"] for person in people}) > 1:
        for person in people:
            person["answer"] = original_words(original_punctuation(person["answer"]))
        prediction = original_words(original_punctuation(prediction))
    scores = []
    for left_out in people:
        others = [person for person in people if person != left_out]
        scores.append(min(1, sum(person["answer"] == prediction for person in others) / 3))
    return sum(scores) / len(scores)


def original(answer: str) -> str:
    return original_words(original_punctuation(answer.replace("\n", " ").replace("\t", " ").strip()))


def test_every_word_and_mark_is_treated_as_in_the_original() -> None:
    assert {word: form for word, form in FORMS.items() if word == word.lower() and word != form} == CONTRACTIONS
    words = [form for word in [*FORMS, *NUMBERS, "a", "an", "the"] for form in (word, f"x {word.upper()}", f"{word}.")]
    signs = [*MARKS, *":'%$&*#~^|", ".", "...", "." * 32, "." * 33]
    forms = ("x{}y", "x{} y{}z", "x {}y{}z", "x{}y 1,5", "{}x{}", "2{}5 {}5 2{}", "x{}\ny")
    texts = [form.replace("{}", sign) for sign in signs for form in forms]
    for text in [*words, *texts, "a one the dont", "İ ٣\xa0"]:
        assert normalise(text) == original(text), text
    assert normalise("." * 32 + "x") == "x"  # the original passes re.UNICODE, which is 32, as the count
    assert normalise("." * 33 + "x") == ".x"


PIECES = st.lists(
    st.sampled_from([*FORMS, *NUMBERS, *MARKS, "a", "The", "1,000", "2.5", ".", "x", " ", "\n"]), max_size=6
)
ANSWER = st.one_of(st.text(max_size=12), PIECES.map("".join), PIECES.map(" ".join))


@given(
    st.lists(ANSWER, min_size=1, max_size=4), st.lists(st.integers(0, 3), min_size=4, max_size=12), st.integers(0, 3)
)
def test_accuracy_equals_the_original(distinct: list[str], chosen: list[int], predicted: int) -> None:
    """From four people on; with fewer the original gives no answer 1."""
    answers = [distinct[index % len(distinct)] for index in chosen]
    prediction = distinct[predicted % len(distinct)]
    for text in (prediction, prediction.upper(), normalise(prediction)):
        assert accuracy(text, answers) == pytest.approx(original_accuracy(text, answers), abs=1e-12)


def test_means_over_all_and_by_type() -> None:
    """Nothing is rounded, and the type "" is not listed."""
    measured = vqa_accuracy(
        ["yes", "2", "cat", "dog"],
        [["yes"] * 10, ["two"] * 1 + ["3"] * 9, ["cat"] * 2 + ["cow"] * 8, ["bird"] * 10],
        ["is the", "how many", "what is", ""],
        ["yes/no", "number", "other", "other"],
    )
    near = {percent: pytest.approx(percent, abs=1e-12) for percent in (30, 47.5, 60)}
    assert measured == VqaAccuracy(
        Mean(near[47.5], 4),  # (100 + 30 + 60 + 0) / 4
        {"how many": Mean(near[30], 1), "is the": Mean(100, 1), "what is": Mean(near[60], 1)},
        {"number": Mean(near[30], 1), "other": Mean(near[30], 2), "yes/no": Mean(100, 1)},
    )
    assert list(measured.by_answer_type) == ["number", "other", "yes/no"]
    third = vqa_accuracy(["x", "y", "z"], [["x"] * 10] * 3, [""] * 3, [""] * 3)
    assert third == (Mean(pytest.approx(100 / 3, abs=1e-12), 3), {}, {})
    with pytest.raises(ValueError, match="at least one question"):
        vqa_accuracy([], [], [], [])
    with pytest.raises(ValueError, match="zip"):
        vqa_accuracy(["x"], [["x"]], ["", ""], [""])
