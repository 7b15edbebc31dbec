"""What a question to the page may hold: a closed schema. All else is refused, and Gradio gets what was understood.

Gradio itself takes a file by a path or an address wherever one stands in a call, and checks neither when it is mounted.
Here a file stands only where an image is asked for, and only one that was uploaded to this page or made by it.
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
MAX_TEXT = 2**16  # characters of one text; what a model is asked is bounded in `input_limits`, with a line that says so
WORDS = 10_000  # that can be chosen
SHELF = re.compile(r"[0-9a-f]{64}/[\w.-]{1,255}")
"""Where in the folder an image of the page lies."""

Session = Annotated[str, Field(pattern=r"^[0-9A-Za-z]{1,40}$")]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Name = Annotated[str, Field(max_length=1024, pattern=r"^[^/\\]*$")]


class Closed(BaseModel):
    """No other keys, and nothing is converted."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Meta(Closed):
    """How Gradio knows a file."""

    kind: Literal["gradio.FileData"] = Field(alias="_type")


class File(Closed):
    """An image: what the page was told when it was uploaded. Only `path` is used."""

    path: Annotated[str, Field(max_length=4096)]
    meta: Meta
    url: Annotated[str, Field(max_length=8192)] | None = None
    orig_name: Name | None = None
    mime_type: Annotated[str, Field(max_length=255)] | None = None
    size: Count | None = None
    is_stream: Literal[False] = False


class OwnImage(Closed):
    """An image that the page showed by itself (`Opener.keep`): nothing is opened by this name. Only `path` is used."""

    path: Annotated[str, Field(pattern=rf"^{OWN}[0-9a-f]{{64}}$")]
    url: Annotated[str, Field(max_length=2**17, pattern=r"^data:image/")] | None = None


class Click(Closed):
    """What somebody clicked: a patch, an example, or a tab."""

    index: Count
    value: Annotated[str, Field(max_length=200)] | None = None


class Call(Closed):
    """A question; `data` is checked by what its function takes."""

    fn_index: Count
    session_hash: Session
    data: Annotated[list[Any], Field(max_length=50)]
    event_data: Click | None = None
    trigger_id: Count | None = None


IMAGE: TypeAdapter[Any] = TypeAdapter(OwnImage | File | None)


def takes(component: Any) -> TypeAdapter[Any]:
    """What a component may be given. Raises TypeError: nobody has said so yet."""
    match component:
        case gr.Image():
            return IMAGE
        case gr.Textbox():
            return TypeAdapter(Text | None)
        case gr.CheckboxGroup():
            return TypeAdapter(Annotated[list[Annotated[int, Field(ge=0, lt=WORDS)]], Field(max_length=WORDS)])
        case gr.Dropdown():
            return TypeAdapter(Annotated[int, Field(ge=0, lt=len(component.choices))])
        case gr.State():  # it stays here
            return TypeAdapter(None)
    raise TypeError(f"what may a {type(component).__name__} be given? Say so in maskvlm.demo.request_schema")


class Calls:
    """The questions of one page.

    Args:
        blocks: the page.
        folder: where uploads and results lie.
    """

    def __init__(self, blocks: gr.Blocks, folder: Path) -> None:
        self.blocks, self.folder = blocks, folder.resolve()
        # What each function of the page takes, found at the start: a component without a rule stops it there.
        self.input_types = {
            number: [takes(each) for each in function.inputs] for number, function in blocks.fns.items()
        }

    def understood(self, body: bytes, host: str) -> bytes:
        """A question as Gradio gets it: of each image its path alone. Raises Refused: it is none of this page's."""
        try:
            call = Call.model_validate_json(body)
        except ValidationError as error:
            is_json = error.errors(include_input=False)[0]["type"] != "json_invalid"
            raise (no_question() if is_json else Refused(400, "That is no JSON.")) from None
        adapters = self.input_types.get(call.fn_index)
        if adapters is None or len(adapters) != len(call.data):
            raise no_question()
        content = call.model_dump()
        # Built anew of what was understood: nothing else of the body reaches Gradio.
        content["data"] = [self.value(adapter, each, host) for adapter, each in zip(adapters, call.data, strict=True)]
        return json.dumps(content).encode()

    def value(self, adapter: TypeAdapter[Any], content: Any, host: str) -> Any:
        """One value of a question. Raises Refused: it is of another kind, or an image that is not of this page."""
        content = check_shape(adapter, content)
        if isinstance(content, OwnImage):
            # Without `meta` Gradio takes it for no file.
            return {"path": content.path}
        if not isinstance(content, File):
            return content
        # A check of the shape alone does not say whose file it is.
        check_upload(content, self.folder, host)
        # The path alone goes on: what else was said of the file is dropped.
        return {"path": content.path, "meta": {"_type": "gradio.FileData"}}


def no_question() -> Refused:
    """The refusal of a call that the page does not make."""
    return Refused(400, "That is no question of this page.")


def not_ours() -> Refused:
    """The refusal of an image that was not uploaded here."""
    return Refused(403, "An image must be uploaded: addresses and paths are not opened.")


def check_shape(adapter: TypeAdapter[Any], value: Any) -> Any:
    """Returns the value as its type. Raises Refused."""
    try:
        return adapter.validate_python(value, strict=True)
    except (ValidationError, RecursionError):
        raise (not_ours() if adapter is IMAGE else no_question()) from None


def check_upload(file: File, folder: Path, host: str) -> None:
    """Raises Refused: a path or an address of something else than an image of this page."""
    address = file.url is None or is_address_of(file.url, file.path, host)
    if not address or not is_of_page(file.path, folder):
        raise not_ours()


def is_of_page(path: str, folder: Path) -> bool:
    """Whether a path is, letter for letter, that of an image that was uploaded to this page or made by it."""
    place = Path(path)
    try:
        # Letter for letter and without links: any other spelling might be read as another file behind this door.
        is_shelved = place.is_relative_to(folder) and SHELF.fullmatch(str(place.relative_to(folder))) is not None
        return is_shelved and str(place) == path and place.resolve() == place
    except (OSError, RuntimeError, ValueError):
        return False


def is_address_of(url: str, path: str, host: str) -> bool:
    """Whether an address is where this page shows the file of that path."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    # The same path as that of the file, and nothing beside it that another reader might follow.
    own = is_own(f"{parts.scheme}://{parts.netloc}", host)
    return own and unquote(parts.path) == FILE + path and not parts.query and not parts.fragment
