"""Rows of a json in the Karpathy layout."""

from typing import Any


def sentence(raw: str) -> dict[str, Any]:
    return {"raw": raw, "tokens": raw.split(), "sentid": 0}


def image(name: str, split: str = "train", *captions: str, **more: Any) -> dict[str, Any]:
    return {"filename": name, "split": split, "sentences": [sentence(text) for text in captions], **more}
