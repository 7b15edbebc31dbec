"""The official VQA accuracy: rows worked out by hand, every rule, and an independent reading of the original."""

import re
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import example, given
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


# ------------------------------------------------------------------ worked out by hand

# Ten answers as {answer: people}; of ten, 0, 1, 2, 3 and 4 equal ones are worth 0, 0.3, 0.6, 0.9 and 1.
ROWS: list[tuple[str, dict[str, int], float]] = [
    # real answers
    ("net", {"net": 6, "netting": 1, "mesh": 1, "pitcher": 1, "orange": 1}, 1),
    ("mesh", {"net": 6, "netting": 1, "mesh": 1, "pitcher": 1, "orange": 1}, 0.3),
    # all the same: compared as written, but for the space around it
    ("Yes", {"yes": 10}, 0),
    ("yes.", {"yes": 10}, 0),
    ("a cat", {"cat": 10}, 0),
    ("the end", {"the end": 10}, 1),
    ("1", {"one": 10}, 0),
    ("one", {"one": 10}, 1),
    ("blue white", {"blue, white": 10}, 0),
    ("blue, white", {"blue, white": 10}, 1),
    (" yes\n", {"yes": 10}, 1),
    ("yes", {"\tyes ": 10}, 1),
    ("stop sign", {"stop\tsign": 10}, 1),
    ("stop sign", {"stop\nsign": 10}, 1),
    ("hot dog", {"hot  dog": 10}, 0),
    ("Yes", {"yes": 5, "yes ": 5}, 0),  # the same once trimmed
    # different as written, the same in normal form
    ("YES!", {"yes": 5, "Yes": 5}, 1),
    ("hot dog", {"hot  dog": 3, "dog": 7}, 0.9),
    # articles
    ("cat", {"a cat": 1, "the cat": 1, "an cat": 1, "dog": 7}, 0.9),
    ("The cat", {"cat": 2, "dog": 8}, 0.6),
    ("theatre", {"the atre": 9, "atre": 1}, 0),
    ("a", {"the": 2, "an": 1, "dog": 7}, 0.9),  # all are empty
    ("", {"a": 1, "b": 9}, 0.3),
    # numbers
    ("none", {"0": 1, "zero": 1, "x": 8}, 0.6),
    ("Ten", {"10": 3, "x": 7}, 0.9),
    ("eleven", {"11": 9, "x": 1}, 0),
    ("one on left", {"1 on left": 4, "left": 6}, 1),
    ("two.", {"2": 1, "x": 9}, 0.3),
    ("twos", {"2": 9, "twos": 1}, 0.3),
    # contractions
    ("dont know", {"don't know": 2, "no": 8}, 0.6),
    ("don't", {"dont": 3, "no": 7}, 0.9),
    ("couldnt've", {"couldn'tve": 4, "no": 6}, 1),
    ("couldntve", {"couldn't've": 9, "no": 1}, 0),  # one apostrophe is forgiven, not two
    ("Im", {"i'm": 9, "im": 1}, 0.3),  # the table has these with a capital only
    ("lets", {"let's": 9, "lets": 1}, 0.3),
    ("somebody'd", {"somebodyd": 1, "x": 9}, 0.3),
    ("ten oclock", {"10 o'clock": 4, "noon": 6}, 1),
    # punctuation
    ("red/blue", {"red blue": 4, "red": 6}, 1),
    ("red, blue", {"red blue": 4, "red": 6}, 1),
    ("red -blue", {"red blue": 4, "red": 6}, 1),
    ("red- blue-green", {"red bluegreen": 2, "red blue green": 8}, 0.6),  # once beside a space: never a space
    ("red- blue/green", {"red blue green": 4, "red": 6}, 1),  # each mark by itself
    ("t-shirt", {"t shirt": 3, "tshirt": 7}, 0.9),
    ("t-shirt!", {"T-shirt": 3, "tshirt": 7}, 0.9),
    ("1,000", {"1000": 4, "1": 6}, 1),
    ("1, 000", {"1 000": 4, "1000": 6}, 1),
    ("1,000-2,000", {"10002000": 1, "1000 2000": 9}, 0.3),  # a number with a comma: no mark leaves a space
    ("10:30", {"10:30": 2, "10 30": 8}, 0.6),
    ("50%", {"50%": 2, "50": 8}, 0.6),
    ("$5", {"$5": 2, "5": 8}, 0.6),
    ("dog's", {"dog's": 2, "dogs": 8}, 0.6),
    # points
    ("2.50", {"2.50": 2, "250": 8}, 0.6),
    ("2.", {"2": 2, "2.0": 8}, 0.6),
    ("u.s.", {"us": 2, "u s": 8}, 0.6),
    ("v.2", {"v.2": 2, "v2": 8}, 0.6),  # a digit after it saves a point,
    ("2.v", {"2v": 2, "2.5": 8}, 0.6),  # one before it does not
    (".5", {".5": 2, "5": 8}, 0.6),
    ("...", {"the": 2, "x": 8}, 0.6),
    # lines
    ("red\nblue", {"red\tblue": 2, "red": 8}, 0.6),
    ("red-\nblue-white", {"red bluewhite": 2, "red": 8}, 0.6),  # a line break is a space beside the mark
    ("The dog's toys, two.", {"dog's toys 2": 4, "x": 6}, 1),
]


@pytest.mark.parametrize(("prediction", "counts", "expected"), ROWS)
def test_rows_worked_out_by_hand(prediction: str, counts: dict[str, int], expected: float) -> None:
    answers = [answer for answer, count in counts.items() for _ in range(count)]
    assert len(answers) == 10
    assert accuracy(prediction, answers) == expected
    assert accuracy(prediction, answers[::-1]) == expected


def test_how_many_agree() -> None:
    worth = [accuracy("cat", ["cat"] * count + ["dog"] * (10 - count)) for count in range(11)]
    assert worth == [0, 0.3, 0.6, 0.9, 1, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("mark", MARKS)
def test_each_mark(mark: str) -> None:
    assert normalise(f"x{mark}y") == "x y"
    assert normalise(f"x{mark} y{mark}z") == "x yz"
    assert normalise(f"x {mark}y{mark}z") == "x yz"
    assert normalise(f"x{mark}y 1,5") == "xy 15"
    assert normalise(f"{mark}x{mark}") == "x"  # nothing beside it but the ends


@pytest.mark.parametrize("sign", list(":'%$&*#~^|"))
def test_other_signs_stay(sign: str) -> None:
    assert normalise(f"x{sign}y {sign}") == f"x{sign}y {sign}"


@pytest.mark.parametrize(("word", "digits"), NUMBERS.items())
def test_each_number(word: str, digits: str) -> None:
    assert normalise(word) == normalise(word.upper()) == normalise(f"the {word}.") == digits


@pytest.mark.parametrize(("word", "form"), FORMS.items())
def test_each_contraction(word: str, form: str) -> None:
    """Also those with a capital, which the lower case keeps from being mended."""
    assert normalise(f"x {word}") == f"x {form if word == word.lower() else word.lower()}"


def test_no_other_contractions() -> None:
    assert {word: form for word, form in FORMS.items() if word == word.lower() and word != form} == CONTRACTIONS


def test_thirty_two_points_go() -> None:
    """The original passes re.UNICODE, which is 32, as the count."""
    assert normalise("." * 32 + "x") == "x"
    assert normalise("." * 33 + "x") == ".x"


def test_numbers_come_before_articles_and_contractions_last() -> None:
    assert normalise("a one the dont") == "1 don't"


# ------------------------------------------------------------------ other numbers of people


CREDITS = [
    *[(0, 1, 0.0), (1, 1, 1.0)],
    *[(0, 2, 0.0), (1, 2, 1 / 2), (2, 2, 1.0)],  # one of two: 0 without himself, 1 without the other
    *[(1, 3, 1 / 3), (2, 3, 2 / 3), (3, 3, 1.0)],  # one of three: 0, 1/2, 1/2
    *[(1, 4, 1 / 4), (3, 4, 3 / 4), (4, 4, 1.0)],  # one of four: 0, 1/3, 1/3, 1/3
    *[(3, 5, 4 / 5), (4, 5, 1.0), (3, 1000, 0.999)],  # three of five: 2/3, 2/3, 2/3, 1, 1
]


@pytest.mark.parametrize(("matches", "people", "expected"), CREDITS)
def test_credit(matches: int, people: int, expected: float) -> None:
    assert credit(matches, people) == pytest.approx(expected, abs=1e-15)
    assert accuracy("x", ["x"] * matches + ["y"] * (people - matches)) == credit(matches, people)


def test_one_answer_is_compared_as_written() -> None:
    assert accuracy("red", ["red"]) == 1
    assert accuracy("Red", ["red"]) == 0


def test_no_answers() -> None:
    with pytest.raises(ValueError, match="at least one answer"):
        accuracy("x", [])


@given(people=st.integers(1, 30))
def test_credit_rises_from_nothing_to_all(people: int) -> None:
    worth = [credit(matches, people) for matches in range(people + 1)]
    assert worth[0] == 0
    assert worth[-1] == 1
    assert worth == sorted(worth)


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


WORDS = [
    *FORMS,
    *NUMBERS,
    *MARKS,
    "a",
    "an",
    "the",
    "A",
    "1,000",
    "2.5",
    ".",
    "...",
    "x",
    "Dog",
    "7",
    "İ",
    "٣",
    " ",
    "\n",
    "\t",
    "\xa0",
]
PIECES = st.lists(st.sampled_from(WORDS), max_size=6)
ANSWER = st.one_of(st.text(max_size=12), PIECES.map("".join), PIECES.map(" ".join))


@given(ANSWER)
@example("." * 40)
@example("red-\nblue-white")
def test_normalise_equals_the_original(answer: str) -> None:
    trimmed = answer.replace("\n", " ").replace("\t", " ").strip()
    assert normalise(answer) == original_words(original_punctuation(trimmed))


@given(ANSWER)
def test_what_is_normalised_stays(answer: str) -> None:
    once = normalise(answer)
    if answer.count(".") <= 32:
        assert normalise(once) == once


@given(
    st.lists(ANSWER, min_size=1, max_size=4), st.lists(st.integers(0, 3), min_size=4, max_size=12), st.integers(0, 3)
)
def test_accuracy_equals_the_original(distinct: list[str], chosen: list[int], predicted: int) -> None:
    """From four people on; with fewer the original gives no answer 1."""
    answers = [distinct[index % len(distinct)] for index in chosen]
    prediction = distinct[predicted % len(distinct)]
    for text in (prediction, prediction.upper(), normalise(prediction)):
        assert accuracy(text, answers) == pytest.approx(original_accuracy(text, answers), abs=1e-12)


# ------------------------------------------------------------------ many questions


def near(percent: float) -> Any:
    return pytest.approx(percent, abs=1e-12)


def test_means_over_all_and_by_type() -> None:
    measured = vqa_accuracy(
        ["yes", "2", "cat", "dog"],
        [["yes"] * 10, ["two"] * 1 + ["3"] * 9, ["cat"] * 2 + ["cow"] * 8, ["bird"] * 10],
        ["is the", "how many", "what is", ""],
        ["yes/no", "number", "other", "other"],
    )
    assert measured == VqaAccuracy(
        overall=Mean(near(47.5), 4),  # (100 + 30 + 60 + 0) / 4
        by_question_type={
            "how many": Mean(near(30), 1),
            "is the": Mean(100, 1),
            "what is": Mean(near(60), 1),
        },
        by_answer_type={
            "number": Mean(near(30), 1),
            "other": Mean(near(30), 2),
            "yes/no": Mean(100, 1),
        },
    )
    assert list(measured.by_answer_type) == ["number", "other", "yes/no"]


def test_nothing_is_rounded() -> None:
    third = vqa_accuracy(["x", "y", "z"], [["x"] * 10] * 3, [""] * 3, [""] * 3)
    assert third == (Mean(near(100 / 3), 3), {}, {})


def test_what_cannot_be_averaged() -> None:
    with pytest.raises(ValueError, match="at least one question"):
        vqa_accuracy([], [], [], [])
    for unequal in (([["x"]], ["", ""], [""]), ([["x"]], [""], []), ([], [""], [""])):
        with pytest.raises(ValueError, match="zip"):
            vqa_accuracy(["x"], *unequal)


def test_the_metric_needs_python_alone() -> None:
    code = "import sys, tasks.vqa.metric; sys.exit(bool({'torch', 'numpy', 'maskvlm'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
