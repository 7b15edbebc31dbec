"""Groups the files of one key in webdataset's layout, from a tar or a folder."""

from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from maskvlm.data.images import IMAGE_SUFFIXES
from maskvlm.data.raw.archive import members
from maskvlm.data.raw.columns import leads_out
from maskvlm.data.raw.lines import read_text
from maskvlm.data.safe_open import Inside

TEXTS = (".txt", ".caption", ".text", ".cap")


class KeyedFiles(NamedTuple):
    """The files of one key. parts: "image", "text", "json" -> bytes, or the path of the image."""

    key: str
    origin: str
    parts: dict[str, Any]
    problem: tuple[str, str] | None = None


# ------------------------------------------------------------------ tars


def tar_samples(shard: Path | IO[bytes], columns: dict[str, str]) -> Iterator[KeyedFiles]:
    """The members of an archive by key, one key at a time: the name up to its first dot, as in webdataset."""
    group: KeyedFiles | None = None
    for member in members(shard):
        # the archive itself is at fault: the key at which it was cut may lack a file
        if not member.name:
            # complete enough to be used
            if group and "image" in group.parts and group.parts.keys() & {"text", "json"}:
                yield group  # else it was cut
            yield KeyedFiles("", "", {}, member.problem)
            return
        key, kind = _key(member.name, columns)
        if not kind:
            if member.problem:
                yield KeyedFiles(member.name, member.name, {}, member.problem)
            continue
        # webdataset's rule: the files of a key are adjacent; a second file of the same kind starts another sample
        if group is None or group.key != key or kind in group.parts:
            if group:
                yield group
            group = KeyedFiles(key, member.name, {})
        if kind == "image" and "image" not in group.parts:
            # a sample is named after its image
            group = group._replace(origin=member.name)
        if member.problem:
            # the first problem is reported
            group = group._replace(problem=group.problem or member.problem)
        group.parts[kind] = member.content
    if group:
        yield group


def _key(name: str, columns: dict[str, str]) -> tuple[str, str | None]:
    """Key and kind of a member; the kind is None if it is not used."""
    folder, _, base = name.rpartition("/")
    # at the first dot of the name, not of its folders
    stem, _, extension = base.partition(".")
    key, last = (f"{folder}/{stem}" if folder else stem), f".{extension.lower().rsplit('.', 1)[-1]}"
    for role, kind in (("image", "image"), ("caption", "text")):
        if columns.get(role) and columns[role].lower() == extension.lower():
            return key, kind
    if columns.get("image") and last in IMAGE_SUFFIXES:
        return key, None  # another image of the same key
    kinds = {".json": "json", **dict.fromkeys(IMAGE_SUFFIXES, "image"), **dict.fromkeys(TEXTS, "text")}
    return key, kinds.get(last)


# ------------------------------------------------------------------ files


def file_samples(folder: Path, columns: dict[str, str]) -> Iterator[KeyedFiles]:
    """Images of a folder with the `.txt` and `.json` next to them; images are not opened."""
    inside = Inside(folder)
    for path in images_of(folder):
        parts: dict[str, Any] = {"image": str(path)}
        # a link may lead to any file of this machine
        problem = None if inside.holds(path) else leads_out(path.name, folder)
        for kind, suffixes in (("text", TEXTS), ("json", (".json",))):
            beside = next((path.with_suffix(suffix) for suffix in suffixes if path.with_suffix(suffix).is_file()), None)
            if beside:
                text, wrong = read_text(beside) if inside.holds(beside) else ("", leads_out(beside.name, folder))
                parts[kind], problem = text.encode(), problem or wrong
        yield KeyedFiles(path.stem, path.name, parts, problem)


def images_of(folder: Path) -> list[Path]:
    """The images of a folder, sorted by name, without hidden ones."""
    there = (path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(path for path in there if not path.name.startswith("."))
