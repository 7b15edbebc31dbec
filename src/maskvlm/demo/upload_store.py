"""Storage of uploads: each a complete file under a name of our own, limited in number, size and time."""

import asyncio
import secrets
import shutil
import time
from collections.abc import MutableSet
from pathlib import Path
from typing import IO

from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request

from maskvlm.demo.refusal import Receive, Refused, Scope

MAX_BYTES = 256 * 2**20  # total size of all stored uploads and results
MAX_FILES = 5000  # number of stored uploads and results
KEPT_SECONDS = 600  # until an upload or a result is removed
AT_ONCE = 20  # concurrent uploads; others wait
KINDS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpg", b"GIF8": "gif", b"RIFF": "webp", b"BM": "bmp"}
"""First bytes of a file -> its extension, so that a browser shows it. Whether it is an image is checked later."""


class Shelf:
    """The folder of uploads and results.

    Args:
        folder: folder that contains nothing else.
        known: paths of uploads, from which Gradio removes old files.
    """

    def __init__(self, folder: Path, known: MutableSet[str]) -> None:
        self.folder, self.known, self.turns = folder, known, asyncio.Semaphore(AT_ONCE)
        self.measured, self.held = -1.0, (0, 0)
        self.added = (0, 0)  # files and bytes added since the start

    async def put(self, scope: Scope, receive: Receive) -> str:
        """Store the single file of a form. Its name is not used, and nothing remains of an interrupted upload.

        Returns:
            The path by which the page refers to it.

        Raises:
            Refused: it is not a form with exactly one file, or there is no room.
        """
        async with self.turns:
            await self.check_room()
            try:
                async with Request(scope, receive).form(max_files=1, max_fields=0) as form:
                    # Exactly one file and no other field; its given name is not read.
                    (file,) = form.getlist("files")
                    path = await asyncio.to_thread(self.write, file.file)  # type: ignore[union-attr]
            except (MultiPartException, HTTPException, ValueError, AttributeError):
                raise Refused(400, "Upload exactly one file.") from None
            except OSError as error:
                raise Refused(507, f"The image cannot be stored ({error.strerror}).") from None
            # Gradio removes old files in this set.
            self.known.add(path)
            # Added to the totals of the last look at the folder.
            size = Path(path).stat().st_size
            self.held, self.added = ((n + 1, total + size) for n, total in (self.held, self.added))
        return path

    def write(self, file: IO[bytes]) -> str:
        """Write a file under a name that cannot be guessed, so that visitors cannot see each other's images."""
        place = self.folder / secrets.token_hex(32)
        place.mkdir()
        head = file.read(4)
        ending = next((name for start, name in KINDS.items() if head.startswith(start)), "bin")
        file.seek(0)
        try:
            # Each file has its own folder; x forbids overwriting.
            with (place / f"image.{ending}").open("xb") as target:
                shutil.copyfileobj(file, target)
        except OSError:
            shutil.rmtree(place, ignore_errors=True)
            raise
        return target.name

    async def check_room(self) -> None:
        """Raises Refused: too much is stored at the moment. The folder is counted at most once per second."""
        if time.monotonic() - self.measured > 1:
            self.measured, (count, size) = time.monotonic(), self.added
            totals = await asyncio.to_thread(held, self.folder)
            # Files added during the count may have been missed: rather count them twice than not at all.
            self.held = totals[0] + self.added[0] - count, totals[1] + self.added[1] - size
        count, size = self.held
        if count > MAX_FILES or size > MAX_BYTES:
            minutes = KEPT_SECONDS // 60
            raise Refused(503, f"Too many images are stored at the moment. Try again in {minutes} minutes.")


def held(folder: Path) -> tuple[int, int]:
    """Number and total size of all files in a folder; some may be removed while they are counted.

    Also removes folders that have been empty for long, as Gradio removes only the files.
    """
    sizes: list[int] = []
    for path in folder.rglob("*"):
        try:
            if path.is_file():
                sizes.append(path.stat().st_size)
            elif time.time() - path.stat().st_mtime > KEPT_SECONDS:
                path.rmdir()
        except OSError:
            continue
    return len(sizes), sum(sizes)
