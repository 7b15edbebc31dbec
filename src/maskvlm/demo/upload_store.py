"""Where uploads lie: each as one whole file of a name that we choose, so many at once, and for so long."""

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

MAX_BYTES = 256 * 2**20  # bytes of all uploads and results that wait for their removal
MAX_FILES = 5000  # of these
KEPT_SECONDS = 600  # until an upload or a result is removed
AT_ONCE = 20  # uploads that arrive at the same time; others wait
KINDS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpg", b"GIF8": "gif", b"RIFF": "webp", b"BM": "bmp"}
"""How a file begins, and the ending that it gets: so a browser shows it. Whether it is an image is found out later."""


class Shelf:
    """The folder of uploads and results.

    Args:
        folder: nothing else is in it.
        known: paths of uploads; whoever removes old files reads it.
    """

    def __init__(self, folder: Path, known: MutableSet[str]) -> None:
        self.folder, self.known, self.turns = folder, known, asyncio.Semaphore(AT_ONCE)
        self.measured, self.held = -1.0, (0, 0)
        self.added = (0, 0)  # files and bytes, ever

    async def put(self, scope: Scope, receive: Receive) -> str:
        """Keep the one file of a form. Its name is not used, and of an upload that breaks off nothing stays.

        Returns:
            The path that the page then names it by.

        Raises:
            Refused: no form with one file and nothing else, or there is no room.
        """
        async with self.turns:
            await self.check_room()
            try:
                async with Request(scope, receive).form(max_files=1, max_fields=0) as form:
                    # Exactly one file and no other field; the name that it was given is not read.
                    (file,) = form.getlist("files")
                    path = await asyncio.to_thread(self.write, file.file)  # type: ignore[union-attr]
            except (MultiPartException, HTTPException, ValueError, AttributeError):
                raise Refused(400, "That is no upload of one file.") from None
            except OSError as error:
                raise Refused(507, f"The image cannot be kept here ({error.strerror}).") from None
            # Gradio removes what stands in this set once it is old.
            self.known.add(path)
            # Counted on from the last look at the folder.
            size = Path(path).stat().st_size
            self.held, self.added = ((n + 1, total + size) for n, total in (self.held, self.added))
        return path

    def write(self, file: IO[bytes]) -> str:
        """Under a name that cannot be guessed: images of one visitor are not another's to see."""
        place = self.folder / secrets.token_hex(32)
        place.mkdir()
        head = file.read(4)
        ending = next((name for start, name in KINDS.items() if head.startswith(start)), "bin")
        file.seek(0)
        try:
            # A place of its own for each file: x forbids writing over one.
            with (place / f"image.{ending}").open("xb") as target:
                shutil.copyfileobj(file, target)
        except OSError:
            shutil.rmtree(place, ignore_errors=True)
            raise
        return target.name

    async def check_room(self) -> None:
        """Raises Refused: too much is kept at the moment. It is counted once a second at most."""
        if time.monotonic() - self.measured > 1:
            self.measured, (count, size) = time.monotonic(), self.added
            totals = await asyncio.to_thread(held, self.folder)
            # What was put there while it was counted may not have been seen: rather twice than not at all.
            self.held = totals[0] + self.added[0] - count, totals[1] + self.added[1] - size
        count, size = self.held
        if count > MAX_FILES or size > MAX_BYTES:
            minutes = KEPT_SECONDS // 60
            raise Refused(503, f"Too many images are here at the moment. Try again in {minutes} minutes.")


def held(folder: Path) -> tuple[int, int]:
    """Number and bytes of all files in a folder; some may go while they are counted.

    Places that were emptied long ago are taken away: Gradio removes the files alone.
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
