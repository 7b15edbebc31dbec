"""What is not in a local file: the hub's cache on this machine, or else the hub itself.

Whatever is on this machine is taken without asking the hub. Where the hub cannot be reached its own clients
try again for half a minute a file; here one question of at most PROBE_SECONDS decides, once a process.
"""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session, validate_repo_id

from maskvlm.checkpoint.integrity import first_line
from maskvlm.config.bundled_models import bundled_folder
from maskvlm.utils.errors import ExitCode, UserError

PROBE_SECONDS = 5.0
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
"""Names under which timm and transformers store weights, in the order in which they are looked for."""
PARTS = ["*.json", "*.safetensors", "*.txt", "README.md"]
"""What is fetched of a model of this project: no pickle, no code."""

T = TypeVar("T")


class Unreachable(UserError):
    """Weights that are neither on this machine nor, at the moment, to be had from the hub.

    Args:
        names: which ones, such as `roberta-base (Hugging Face)`.
    """

    def __init__(self, *names: str) -> None:
        self.names = names
        what = f"no weights for {' and '.join(names)}: not on this machine, and the hub cannot be reached"
        todo = (
            "Name local ones (encoders=FOLDER, or --model.backbone.image.weights FILE and "
            "--model.backbone.text.name FOLDER), "
            "or start from random ones with --model.random_init true"
        )
        super().__init__("model.backbone", what, todo, ExitCode.MISSING_INPUT)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.names


@functools.cache
def hub_reachable() -> bool:
    """One short question, through the session (proxy, certificates, offline mode) of the hub's downloads."""
    try:
        get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
    except Exception:  # the session's library, and so its exceptions, differ between versions of the client
        return False
    return True


def from_cache_or_hub(name: str, fetch: Callable[[bool], T], where: str = "model.backbone") -> T:
    """What `fetch(local_files_only)` finds in the cache, or else on the hub.

    Args:
        where: what a mistake is blamed on.

    Raises:
        Unreachable: not in the cache, and the hub cannot be asked.
        UserError: the hub does not know the name, or what it has is of no use.
    """
    try:
        return fetch(True)
    except (OSError, ValueError):  # what the libraries raise where a file is not in the cache
        pass
    if not hub_reachable():
        raise Unreachable(name)
    try:
        return fetch(False)
    except Exception as error:
        # Libraries wrap the client's errors in their own.
        chain = list(_chain(error))
        if any(isinstance(e, RepositoryNotFoundError | RevisionNotFoundError) for e in chain):
            what = f"the hub has no {name}, or does not show it to you"
            raise UserError(where, what, "Check the name", ExitCode.MISSING_INPUT) from error
        if any(isinstance(e, LocalEntryNotFoundError | ConnectionError | TimeoutError) for e in chain):
            raise Unreachable(name) from error
        what = f"{name} is of no use ({first_line(error)})"
        raise UserError(where, what, "Choose another one", ExitCode.BAD_DATA) from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def hub_weights(name: str, repository: str, filename: str | None = None) -> Path:
    """The weight file of a repository (`owner/name`, `owner/name@revision`); raises as from_cache_or_hub."""
    repo, _, revision = repository.partition("@")
    places: dict[str, Any] = {"revision": revision or None}

    def fetch(local: bool) -> Path:
        for candidate in (filename,) if filename else WEIGHT_FILES:
            try:
                return Path(hf_hub_download(repo, candidate, local_files_only=local, **places))
            except EntryNotFoundError as error:
                # Of a file that the repository lacks the next name is tried.
                if isinstance(error, LocalEntryNotFoundError) and not local:
                    raise  # the connection broke
        raise FileNotFoundError(f"{repo} holds none of {', '.join(WEIGHT_FILES)}")

    return from_cache_or_hub(name, fetch)


def is_cached(repository: str, names: Iterable[str]) -> bool:
    """Whether one of these files of a repository (`owner/name`, `owner/name@revision`) is in the hub's cache here."""
    repo, _, revision = repository.partition("@")
    # The client gives None, or an object of its own for a file that the repository is known not to have.
    return any(isinstance(try_to_load_from_cache(repo, name, revision=revision or None), str) for name in names)


def folder_of_hub(name: str, settings: Mapping[str, Any] | None = None) -> Path:
    """A model that comes along, by its name; a path that exists as it is; else the folder of a hub's repository on this
    machine, downloaded where needed.

    Args:
        name: `scenes-tiny`, a path, or `owner/name`, `owner/name@revision`.
        settings: revision, token, cache_dir, local_files_only.

    Raises:
        UserError: neither a path nor a repository, or the hub cannot be reached (66).
    """
    if (own := bundled_folder(name)) is not None:
        return own
    path = Path(name).expanduser()
    # A path that is there wins over a repository of that name.
    if path.exists() or not is_repository(name):
        return path
    repo, _, revision = name.partition("@")
    # Settings of `from_pretrained` that the client takes as they are.
    known = {key: value for key, value in (settings or {}).items() if key in ("revision", "token", "cache_dir")}
    # A None of the settings stands for the default, which the name may tell.
    known["revision"] = known.get("revision") or revision or None
    only = bool((settings or {}).get("local_files_only"))

    def get(local: bool) -> Path:
        return Path(snapshot_download(repo, local_files_only=local or only, allow_patterns=PARTS, **known))

    try:
        return from_cache_or_hub(f"{name} (Hugging Face)", get, name)
    except Unreachable as error:
        what = "no such file or folder, nor is it in the cache, and the hub cannot be reached"
        raise UserError(name, what, "Check the path or the connection", ExitCode.MISSING_INPUT) from error


def upload(folder: Path, repository: str, message: str, settings: Mapping[str, Any]) -> str:
    """Put a folder's files of the hub's format (`PARTS`) into a repository, made where it is not there.

    Args:
        settings: token, private, revision (a branch), create_pr.

    Returns:
        The address of the commit.

    Raises:
        UserError: no such name, not logged in, or the hub cannot be reached (69).
    """
    api, branch = HfApi(token=settings.get("token")), settings.get("revision")
    try:
        name = api.create_repo(repository, private=settings.get("private"), exist_ok=True).repo_id
        if branch is not None:
            api.create_branch(name, branch=branch, exist_ok=True)
        return api.upload_folder(
            repo_id=name, folder_path=folder, allow_patterns=PARTS, commit_message=message,
            revision=branch, create_pr=settings.get("create_pr"),
        )  # fmt: skip
    except Exception as error:  # as above, of many libraries
        what = f"cannot be uploaded ({first_line(error)})"
        todo = "Check name and connection, and log in: hf auth login, or give a token"
        raise UserError(repository, what, todo, ExitCode.UNAVAILABLE) from error


class OnHub(NamedTuple):
    """What the hub says before an upload. user: whose token is used. there: whether it has the repository."""

    user: str
    there: bool


def check_publishable(repository: str) -> OnHub:
    """Ask the hub whose token is used, and whether a name is free or that user's to write to. Nothing is written.

    Args:
        repository: `owner/name`.

    Raises:
        UserError: no token, one that is refused, may only read or is of somebody else than the owner, or the hub cannot
            be reached (69).
    """
    api, log_in = HfApi(), "Log in (hf auth login) or set HF_TOKEN, with a token that may write"
    try:
        account = api.whoami()
    except LocalTokenNotFoundError:
        # Without a token repositories that everybody may read are told.
        state = "is there already" if repo_there(api, repository) else "is free"
        raise UserError(
            repository, f"{state}; there is no token to upload with", log_in, ExitCode.UNAVAILABLE
        ) from None
    except Exception as error:  # as above, of many libraries
        what = f"the hub refuses the token, or cannot be reached ({first_line(error)})"
        raise UserError(repository, what, log_in, ExitCode.UNAVAILABLE) from error
    there, user, owner = repo_there(api, repository), str(account["name"]), repository.partition("/")[0]
    state = "is there already" if there else "is free"
    if owner.lower() not in {name.lower() for name in (user, *(each["name"] for each in account.get("orgs", ())))}:
        what = f"{state}; the token is of {user}, who is neither {owner} nor a member of it"
        raise UserError(repository, what, f"Name {user}/{repository.partition('/')[2]}", ExitCode.UNAVAILABLE)
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        what = f"{state}; the token of {user} may only read"
        raise UserError(repository, what, log_in, ExitCode.UNAVAILABLE)
    return OnHub(user, there)


def repo_there(api: HfApi, repository: str) -> bool:
    """Whether the hub shows us a repository. Raises UserError: it cannot be reached (69)."""
    try:
        return api.repo_exists(repository)
    except Exception as error:  # as above, of many libraries
        what = f"the hub cannot be asked for it ({first_line(error)})"
        raise UserError(repository, what, "Check the connection", ExitCode.UNAVAILABLE) from error


def check_repository(name: str) -> None:
    """Raises UserError: it can be no `owner/name` of the hub."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"to={name}", f"is no name on the hub ({first_line(error)})", "Give owner/name") from None
    if "/" not in name:
        raise UserError(f"to={name}", "names no owner", "Give owner/name")


def is_repository(name: str) -> bool:
    """Whether a name can be one of the hub's (`owner/name`), not a path."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name) is not None and not name.endswith(".ckpt")
