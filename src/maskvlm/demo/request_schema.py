"""A closed schema for questions to the page. Anything else is rejected, and Gradio only gets what was validated.

Gradio itself accepts a file by a path or a URL anywhere in a call, and checks neither when it is mounted. Here a file
is accepted only where an image is expected, and only if it was uploaded to this page or made by it.
"""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

import gradio as gr
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from maskvlm.demo.input_limits import OWN
from maskvlm.demo.refusal import Refused
from maskvlm.demo.request_origin import is_own

FILE = "/gradio_api/file="
MAX_TEXT = 2**16  # characters of a text; `input_limits` has the limits for models, with messages
WORDS = 10_000  # maximum number of words that can be chosen
SHELF = re.compile(r"[0-9a-f]{64}/[\w.-]{1,255}")
"""Path of an image of the page within the folder."""

Session = Annotated[str, Field(pattern=r"^[0-9A-Za-z]{1,40}$")]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Name = Annotated[str, Field(max_length=1024, pattern=r"^[^/\\]*$")]


class Closed(BaseModel):
    """Base class that allows no other keys and converts nothing."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Meta(Closed):
    """The marker by which Gradio recognises a file."""

    kind: Literal["gradio.FileData"] = Field(alias="_type")


class File(Closed):
    """An uploaded image, as described by the page. Only `path` is used."""

    path: Annotated[str, Field(max_length=4096)]
    meta: Meta
    url: Annotated[str, Field(max_length=8192)] | None = None
    orig_name: Name | None = None
    mime_type: Annotated[str, Field(max_length=255)] | None = None
    size: Count | None = None
    is_stream: Literal[False] = False


class OwnImage(Closed):
    """One of the page's own images (`Opener.keep`): its name is not the path of a file. Only `path` is used."""

    path: Annotated[str, Field(pattern=rf"^{OWN}[0-9a-f]{{64}}$")]
    url: Annotated[str, Field(max_length=2**17, pattern=r"^data:image/")] | None = None


class Click(Closed):
    """What was clicked: a patch, an example, or a tab."""

    index: Count
    value: Annotated[str, Field(max_length=200)] | None = None


class Call(Closed):
    """A question; `data` is checked against the inputs of its function."""

    fn_index: Count
    session_hash: Session
    data: Annotated[list[Any], Field(max_length=50)]
    event_data: Click | None = None
    trigger_id: Count | None = None


IMAGE: TypeAdapter[Any] = TypeAdapter(OwnImage | File | None)


def takes(component: Any) -> TypeAdapter[Any]:
    """The values that a component accepts. Raises TypeError if there is no rule for it yet."""
    match component:
        case gr.Image():
            return IMAGE
        case gr.Textbox():
            return TypeAdapter(Text | None)
        case gr.CheckboxGroup():
            return TypeAdapter(Annotated[list[Annotated[int, Field(ge=0, lt=WORDS)]], Field(max_length=WORDS)])
        case gr.Dropdown():
            return TypeAdapter(Annotated[int, Field(ge=0, lt=len(component.choices))])
        case gr.State():  # kept on the server
            return TypeAdapter(None)
    raise TypeError(f"what may a {type(component).__name__} be given? Say so in maskvlm.demo.request_schema")


class Calls:
    """The questions of one page.

    Args:
        blocks: the page.
        folder: folder of uploads and results.
    """

    def __init__(self, blocks: gr.Blocks, folder: Path) -> None:
        self.blocks, self.folder = blocks, folder.resolve()
        # Input types of each function, collected at the start, so that a component without a rule fails there.
        self.input_types = {
            number: [takes(each) for each in function.inputs] for number, function in blocks.fns.items()
        }

    def understood(self, body: bytes, host: str) -> bytes:
        """The validated question for Gradio, with only the path of each image. Raises Refused: not of this page."""
        try:
            call = Call.model_validate_json(body)
        except ValidationError as error:
            is_json = error.errors(include_input=False)[0]["type"] != "json_invalid"
            raise (no_question() if is_json else Refused(400, "Invalid JSON.")) from None
        adapters = self.input_types.get(call.fn_index)
        if adapters is None or len(adapters) != len(call.data):
            raise no_question()
        content = call.model_dump()
        # Rebuilt from the validated values: nothing else in the body reaches Gradio.
        content["data"] = [self.value(adapter, each, host) for adapter, each in zip(adapters, call.data, strict=True)]
        return json.dumps(content).encode()

    def value(self, adapter: TypeAdapter[Any], content: Any, host: str) -> Any:
        """A value of a question. Raises Refused: it has another type, or is an image that is not of this page."""
        content = check_shape(adapter, content)
        if isinstance(content, OwnImage):
            # Without `meta` Gradio does not treat it as a file.
            return {"path": content.path}
        if not isinstance(content, File):
            return content
        # The shape alone does not show that the file belongs to this page.
        check_upload(content, self.folder, host)
        # Only the path is passed on; everything else about the file is dropped.
        return {"path": content.path, "meta": {"_type": "gradio.FileData"}}


def no_question() -> Refused:
    """The error for a call that the page does not make."""
    return Refused(400, "Invalid request.")


def not_ours() -> Refused:
    """The error for an image that was not uploaded here."""
    return Refused(403, "Upload the image: URLs and paths are not opened.")


def check_shape(adapter: TypeAdapter[Any], value: Any) -> Any:
    """The value, validated and converted to its type. Raises Refused."""
    try:
        return adapter.validate_python(value, strict=True)
    except (ValidationError, RecursionError):
        raise (not_ours() if adapter is IMAGE else no_question()) from None


def check_upload(file: File, folder: Path, host: str) -> None:
    """Raises Refused if the path or URL is not that of an image of this page."""
    address = file.url is None or is_address_of(file.url, file.path, host)
    if not address or not is_of_page(file.path, folder):
        raise not_ours()


def is_of_page(path: str, folder: Path) -> bool:
    """Whether a path is exactly that of an image that was uploaded to this page or made by it."""
    place = Path(path)
    try:
        # Exactly, and without links: any other spelling might be resolved to another file later.
        is_shelved = place.is_relative_to(folder) and SHELF.fullmatch(str(place.relative_to(folder))) is not None
        return is_shelved and str(place) == path and place.resolve() == place
    except (OSError, RuntimeError, ValueError):
        return False


def is_address_of(url: str, path: str, host: str) -> bool:
    """Whether a URL is the one under which this page serves the file of that path."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    # The same path as that of the file, with no query or fragment that another reader might follow.
    own = is_own(f"{parts.scheme}://{parts.netloc}", host)
    return own and unquote(parts.path) == FILE + path and not parts.query and not parts.fragment
