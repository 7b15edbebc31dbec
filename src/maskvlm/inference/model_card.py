"""The `README.md` of a model on the hub: what it is, its training data and scope, its evaluation, and how to use it.

It states only what the checkpoint records, and says so where nothing is recorded.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from maskvlm.data.batch import InputSpec
from maskvlm.inference.hf_config import MaskVLMConfig

UNNAMED = "THIS_FOLDER_OR_HUB_NAME"
"""Placeholder in a card for the folder or hub name if neither is known yet."""
DRAWN = re.compile(r"(maskvlm\.data|tasks\.\w+)\.scenes\.[\w.]+")
"""Synthetic sources: the built-in world that this project draws, and the tasks' questions about it."""
UNKNOWN = "unknown"
"""Source name in the history of older checkpoints (`warm_start.training_history_of`)."""
USES = {
    "MaskedPretraining": 'model.fill_mask("image.jpg", "a [MASK] dog")',
    "Retrieval": 'model.rank("image.jpg", ["a dog", "a cat"])',
    "Vqa": 'model.answer("image.jpg", "what is the dog doing?")',
    "Nlvr": 'model.compare("left.jpg", "right.jpg", "there are two dogs")',
    "Entailment": 'model.entail("image.jpg", "a dog sleeps")',
    "Captioning": 'model.caption("image.jpg")',
}
"""Example call by task."""
USES_DRAWN = {
    "MaskedPretraining": 'model.fill_mask("scene.png", "a [MASK] star at the top")  # `maskvlm scene 6` draws one',
    "Retrieval": 'model.rank("scene.png", ["a blue star", "a red square"])',
    "Vqa": 'model.answer("scene.png", "what colour is the star?")',
    "Nlvr": 'model.compare("left.png", "right.png", "there is a star in both pictures")',
    "Entailment": 'model.entail("scene.png", "the star is blue")',
    "Captioning": 'model.caption("scene.png")',
}
"""The same for models that know only drawn scenes."""


class KnownSet(NamedTuple):
    """A training set by name. licence: in words, from its manifest; "not known" if it is not recorded."""

    title: str
    licence: str


class RunFacts(NamedTuple):
    """What the files next to a checkpoint record about its run. card: of the evaluation. versions: of the packages,
    with command and commit. metrics: numbers by name."""

    card: dict[str, Any]
    versions: dict[str, Any]
    metrics: dict[str, float]


def run_facts(config: MaskVLMConfig) -> RunFacts:
    """The run facts of a model. They are untrusted: anything not in the expected form is left out."""

    def mapping(value: Any) -> dict[str, Any]:
        return value if isinstance(value, dict) else {}

    evaluation = mapping(config.evaluation)
    card = mapping(evaluation.get("card"))
    versions = mapping(card.get("versions"))
    command = versions.get("command")
    right = isinstance(command, list) and all(isinstance(word, str) for word in command)
    versions = {**versions, "command": command if right else None, "packages": mapping(versions.get("packages"))}
    items = mapping(evaluation.get("metrics")).items()
    # An integer may be too large for a float.
    numbers = {name: value for name, value in items if type(value) in (int, float) and abs(value) < 1e300}
    return RunFacts(card, versions, numbers)


def model_card(config: MaskVLMConfig, spec: InputSpec, name: str, sets: Mapping[str, KnownSet]) -> str:
    """The text of the card.

    Args:
        spec: image size and texts of the model.
        name: the name to load it by; UNNAMED if not known.
        sets: training sets with known names, by their hash in the history.
    """
    task = str((config.task or {}).get("class_path", "unknown"))
    lineage = config.lineage or []
    uses = USES_DRAWN if knows_drawn_alone(lineage) else USES
    lines = [
        # The hub reads the part between the dashes as YAML.
        "---",
        "library_name: maskvlm",
        *_licence(config),
        "pipeline_tag: image-text-to-text",
        "tags: [maskvlm, vision-and-language, masked-modelling]",
        "---",
        "",
        f"# {'MaskVLM' if name == UNNAMED else name}",
        "",
        "Two encoders and two cross encoders trained by joint masked modelling "
        "([Kwon et al., ICLR 2023](https://arxiv.org/abs/2208.02131)).",
        "",
        f"- task: `{task}`" + (f", {len(config.labels)} labels" if config.labels else ""),
        f"- images: {spec.image_size} x {spec.image_size} px; texts: up to {spec.text_length} tokens of "
        f"{spec.vocab_size}",
        f"- steps: {config.step:,}",
        *_made_by(run_facts(config).versions),
        "",
        "## Use",
        "",
        "```python",
        "from maskvlm import MaskVLM",
        "",
        f'model = MaskVLM.from_pretrained("{name}")',
        uses.get(task.rpartition(".")[2], uses["MaskedPretraining"]),
        "```",
        "",
        "## Data seen",
        "",
        *[_data_line(entry, sets) for entry in lineage],
        "",
        limits(lineage),
        *_pretrained(config),
        "",
        "## Licence",
        "",
        terms(config),
        "",
        "## Evaluation",
        "",
        *_evaluation(config),
    ]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------- what it has seen


def knows_drawn_alone(lineage: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the weights were trained only on scenes that this project draws."""
    return bool(lineage) and all(DRAWN.fullmatch(str(entry["source"])) for entry in lineage)


def is_unknown(lineage: Sequence[Mapping[str, Any]]) -> bool:
    """Whether part or all of the history is not recorded."""
    return not lineage or any(entry["source"] == UNKNOWN for entry in lineage)


def limits(lineage: Sequence[Mapping[str, Any]]) -> str:
    """What the model knows and does not know, as far as its history records it."""
    if is_unknown(lineage):
        return "A part of what it was trained on is not told: what it knows, and what not, is unknown."
    # Data used twice is counted once; different sets may share images.
    images = {entry["sha"]: entry.get("pictures") or 0 for entry in lineage}
    # A streamed set has no count.
    count = "" if 0 in images.values() else f"at most {sum(images.values()):,} different "
    if knows_drawn_alone(lineage):
        return (
            f"It knows drawn scenes alone ({count}ones): of photographs, and of words beyond those of the scenes, it "
            "knows nothing."
        )
    drawn = any(DRAWN.fullmatch(str(entry["source"])) for entry in lineage)
    some = ", a part of them drawn scenes" if drawn else ""
    return f"It was trained on {count}images with their texts{some}: of what these do not show or say it knows little."


def shape_of_pretrained(config: MaskVLMConfig) -> str:
    """The name of the image encoder if it has the shape of published weights; "" if it has its own."""
    image = (config.backbone or {}).get("init_args", {}).get("image", {}).get("init_args", {})
    return "" if image.get("config") else str(image.get("name", ""))


def _pretrained(config: MaskVLMConfig) -> list[str]:
    if not (name := shape_of_pretrained(config)):
        return []
    sentence = f"Its image encoder has the shape of `{name}`; whether its encoders started from published weights, and "
    return [sentence + "so know more and come with licences of their own, the checkpoint does not tell."]


def _data_line(entry: Mapping[str, Any], sets: Mapping[str, KnownSet]) -> str:
    images = f", {entry['pictures']:,} images" if entry.get("pictures") else ""
    what = f"`{entry['source']}` (`{entry['task']}`{images}, {entry['steps']:,} steps, data hash `{entry['sha'][:16]}`)"
    if DRAWN.fullmatch(str(entry["source"])):
        return f"- scenes that this project draws, with their texts: {what}"
    if (known := sets.get(entry["sha"])) is None:
        return f"- {what}"
    return f"- {known.title}: {what}; terms of the set: {known.licence}"


# ---------------------------------------------------------------------- licence


def is_free(config: MaskVLMConfig) -> bool:
    """Whether everything that the weights derive from is this project's own."""
    return knows_drawn_alone(config.lineage or []) and not shape_of_pretrained(config)


def terms(config: MaskVLMConfig) -> str:
    """What is known about the licence terms of the weights."""
    if is_free(config):
        return "Apache-2.0: code, weights and the scenes that they were trained on are this project's."
    return (
        "The code is under Apache-2.0. Under which terms the weights may be passed on is not known to this card: it "
        "depends on the data above and on the weights that the encoders started from, and whether a set's terms bind "
        "what was trained on it is not settled. Ask before you pass them on."
    )


def _licence(config: MaskVLMConfig) -> list[str]:
    # `other` is the hub's value for terms described in the card.
    return ["license: apache-2.0"] if is_free(config) else ["license: other", "license_name: see-the-card"]


# ---------------------------------------------------------------------- how it was made and measured


def _made_by(versions: Mapping[str, Any]) -> list[str]:
    """The command and the versions that a run's card records."""
    if not versions["command"]:
        return []
    command, torch = " ".join(versions["command"]), versions["packages"].get("torch")
    return [f"- made by: `maskvlm {command}`, commit {versions.get('commit')}, torch {torch}"]


def _evaluation(config: MaskVLMConfig) -> list[str]:
    """A table of the run's metrics, each with its chance level, and what they were measured on."""
    card, _, metrics = run_facts(config)
    if not metrics:
        return ["None came with this checkpoint."]
    step = metrics.get("step")
    # A folder's config.json is sorted by key, a run's files are not: the card must be the same for both.
    facts = {key: card[key] for key in ("data", "split", "sha", "examples", "pictures") if card.get(key)}
    where = [f"- {key}: {json.dumps(value, sort_keys=True, ensure_ascii=False)}" for key, value in facts.items()]
    # metrics.json belongs to the run's last weights; best.ckpt may be from an earlier step.
    if step is not None and step != config.step:
        where.append(f"- measured at step {step:,} of the same run; these weights are of step {config.step:,}")
    # A chance level goes in its metric's row, not in its own row.
    ends = ("_chance", "_majority")
    rows = []
    for key, value in sorted(metrics.items(), key=_numbered):
        if "/" in key and not key.endswith(ends):
            level = next((metrics[key + end] for end in ends if metrics.get(key + end) is not None), None)
            rows.append(f"| {key} | {value:.4g} | {'' if level is None else f'{level:.4g}'} |")
    return [*where, "", "| metric | value | chance level |", "|---|---|---|", *rows]


def _numbered(row: tuple[str, Any]) -> list[str | int]:
    """Sort key that orders r1, r5, r10 numerically."""
    return [int(each) if each.isdecimal() else each for each in re.split(r"(\d+)", row[0])]
