"""Captions as plain text: cleaning and identity. Nothing here imports torch."""

import hashlib
import re
import unicodedata

MAX_CAPTION_BYTES = 4096
"""Longer captions are truncated to this length before tokenizing: over a hundred times the 30 tokens a model reads."""

_SURROGATES = re.compile("[\ud800-\udfff]")
_TERMINAL_ESCAPE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")


def clean_caption(text: str) -> tuple[str, str | None]:
    """Plain, printable, composed (NFC) text on one line, at most MAX_CAPTION_BYTES bytes of UTF-8.

    Returns:
        The text ("" if nothing is left) and the most serious repair, from worst to mildest: "empty", "cut",
        "surrogate" (halves of UTF-16 pairs: a whole pair becomes its character, a lone half U+FFFD), "control"
        (control and format characters dropped, including zero-width joiners and terminal escapes); None if nothing but
        white space and composition changed.
    """
    # the fast path, taken by most captions: printable ASCII needs no composing or dropping
    if text.isascii() and text.isprintable() and len(text) <= MAX_CAPTION_BYTES:
        text = " ".join(text.split())
        return text, None if text else "empty"
    notes = set()
    if len(text) > MAX_CAPTION_BYTES:  # a character is at least one byte; composing a huge text can be slow
        text = text[:MAX_CAPTION_BYTES]
        notes.add("cut")
    # a whole pair becomes its character, a lone half U+FFFD
    if _SURROGATES.search(text):
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        notes.add("surrogate")
    folded = " ".join(text.split())
    # white space is folded first, as line ends and tabs are control characters too
    printable = _drop_controls(folded)
    if printable != folded:
        notes.add("control")
    # folded again, as two spaces may meet where a character was dropped
    text = " ".join(unicodedata.normalize("NFC", printable).split())
    if len(text.encode()) > MAX_CAPTION_BYTES:
        # "ignore" drops a character that the cut splits
        text = text.encode()[:MAX_CAPTION_BYTES].decode(errors="ignore").rstrip()
        notes.add("cut")
    if not text:
        notes.add("empty")
    return text, next((note for note in ("empty", "cut", "surrogate", "control") if note in notes), None)


def _drop_controls(text: str) -> str:
    # whole sequences first, as without its first character the rest of one is printable
    text = _TERMINAL_ESCAPE.sub("", text)
    return "".join(c for c in text if unicodedata.category(c) not in ("Cc", "Cf"))


def stable_id(text: str) -> int:
    """63-bit hash that is the same in every process and on every machine; fits a signed int64."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    # one bit less, so that it fits torch's signed 64 bits
    return int.from_bytes(digest, "big") >> 1


def caption_id(text: str) -> int:
    """`stable_id` of the cleaned caption in lower case: equal for captions with the same words."""
    return stable_id(clean_caption(text)[0].lower())
