"""Zero-shot classification: compares an image with a prompt for each class (Radford et al. 2021).

Shapes: B images, K classes, E contrast width.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from maskvlm.data.files import image_names, load_json
from maskvlm.data.raw.lines import text_lines
from maskvlm.data.safe_open import content_of
from maskvlm.suites.metrics import percent_right
from maskvlm.suites.scores import pair_scores
from maskvlm.suites.suite import MAX_FILE_BYTES, ItemRows, Suite, SuiteItem, SuiteMetric, plain_text
from maskvlm.utils.errors import ExitCode, UserError

if TYPE_CHECKING:
    from maskvlm.inference.pretrained import PretrainedMaskVLM

TEMPLATE = "a photo of a {}"


class Zeroshot(Suite):
    """Zero-shot classification of a folder with a subfolder for each class: CLASS/ANY/NAME.jpg.

    Args:
        template: prompts with `{}` in place of the class; several are averaged.
        templates: file of prompts, one per line.
        names: JSON file of folder -> class name, for folders not named after their class (`n01440764`).
    """

    question = "which of the classes an image shows, told by their names alone"
    licence = "that of the images that you name"
    ways = ("contrast", "match")
    traps = (
        "The names and the templates are part of the measurement: `a orange` or `crane` (the bird, the machine) cost "
        "points that are no fault of the images. Say which you took.",
        "Templates that are chosen on these images make the figure too good.",
        "Top-1 of classes of unequal size can be had by naming the largest; the mean per class cannot.",
        "Classes that the training captions name are not unseen: zero-shot says that no label was trained on.",
    )

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--template",
            action="append",
            help=f"prompt with {{}} for the class (default: '{TEMPLATE}'); may be repeated",
        )
        parser.add_argument("--templates", type=Path, help="file of prompts, one per line")
        parser.add_argument("--names", type=Path, help='JSON file of class names: {"n01440764": "tench", ...}')

    def __init__(
        self, template: Sequence[str] | None = None, templates: Path | None = None, names: Path | None = None
    ) -> None:
        self.templates = [*(template or [])]
        if templates is not None:
            lines = ((line.number, line.text.strip(), line.problem) for line in text_lines(templates))
            for number, text, problem in lines:
                if problem:
                    raise UserError(f"{templates}:{number}", problem[1], "Fix this line", ExitCode.BAD_DATA)
                self.templates += [text] if text else []
        self.templates = self.templates or [TEMPLATE]
        if wrong := [each for each in self.templates if each.count("{}") != 1]:
            raise UserError("--template", f"'{wrong[0][:80]}' has no place for the class", "Write {} there, once")
        self.names = {} if names is None else _names(names)

    def read(self, path: Path, images: Path | None) -> ItemRows:
        if images is not None:
            raise UserError("--images", "the folders of the classes are those of --path", "Leave it out")
        rows, left_out = ItemRows(path, path), dict[str, list[str]]()
        files = image_names(path, left_out)
        rows.skipped |= {reason: [f"{path}/{name}" for name in names] for reason, names in left_out.items() if names}
        classes = sorted({name.partition("/")[0] for name in files if "/" in name})
        if len(classes) < 2:
            what = f"{len(classes)} folder{'s' * (len(classes) != 1)} of a class"
            raise UserError(path, what, "Two or more are needed: CLASS/NAME.jpg", ExitCode.BAD_DATA)
        called = [plain_text(self.names.get(each, each.replace("_", " ")), each, str(path)) for each in classes]
        if twice := [name for name, count in Counter(called).items() if count > 1]:
            raise UserError(
                path, f"two classes are called '{twice[0]}'", "Give them different names", ExitCode.BAD_DATA
            )
        # All templates of the first class, then those of the next.
        texts = tuple(template.replace("{}", name) for name in called for template in self.templates)
        rows.notes.append(f"{len(classes)} classes; texts such as '{texts[0]}'")
        for name in files:
            label, slash, _ = name.partition("/")
            if slash:
                number = classes.index(label)
                rows.items.append(SuiteItem((str(path / name),), texts, number, called[number], name))
            else:
                rows.skip("in no class", f"{path}/{name}: it is not in a folder of a class")
        return rows

    def ask(self, model: "PretrainedMaskVLM", items: Sequence[SuiteItem], way: str) -> list[Tensor]:
        """Scores of the classes, [K]: with contrast the cosine with the mean embedding of a class's templates, with
        match the mean score over the templates."""
        count = len(self.templates)
        if way == "contrast":
            # (classes * templates, E) -> (classes, templates, E) -> (classes, E)
            text_CE = model.encode_text(list(items[0].texts)).cpu()
            text_KE = F.normalize(text_CE.unflatten(0, (-1, count)).mean(1), dim=-1)
            image_BE = model.encode_image([item.images[0] for item in items]).cpu()
            return list(image_BE @ text_KE.T)
        return [torch.tensor(each).unflatten(0, (-1, count)).mean(1) for each in pair_scores(model, items, way)]

    def metrics(self, items: Sequence[SuiteItem], scores: Sequence[Any], way: str) -> list[SuiteMetric]:
        score_BK = torch.stack([torch.as_tensor(each, dtype=torch.float64) for each in scores])
        truth_B1, classes = torch.tensor([[item.truth] for item in items]), score_BK.shape[1]
        # Number of other classes that do not score below the true one: a tie or NaN counts against the model.
        before = ((~(score_BK < score_BK.gather(1, truth_B1))).sum(1) - 1).tolist()
        groups = [item.images[0] for item in items]
        figures = [percent_right("top-1", [place < 1 for place in before], 100 / classes, groups)]
        if classes > 5:
            figures.append(percent_right("top-5", [place < 5 for place in before], 500 / classes, groups))
        of_class: dict[str, list[bool]] = {}
        for item, place in zip(items, before, strict=True):
            of_class.setdefault(item.kind, []).append(place < 1)
        shares = {name: 100 * sum(right) / len(right) for name, right in of_class.items()}
        figures.append(SuiteMetric("mean per class", sum(shares.values()) / len(shares), 100 / classes, len(items)))
        largest = max(of_class.values(), key=len)
        figures.append(SuiteMetric("always the largest class", 100 * len(largest) / len(items), None, len(items)))
        figures += [
            SuiteMetric(f"  {name}", share, None, len(of_class[name])) for name, share in sorted(shares.items())
        ]
        return figures


def _names(file: Path) -> dict[str, str]:
    content = load_json(content_of(file, MAX_FILE_BYTES), file)
    if not isinstance(content, dict) or not all(isinstance(each, str) for each in content.values()):
        raise UserError(file, "not an object of folders and names", 'Write {"n01440764": "tench"}', ExitCode.BAD_DATA)
    return content
