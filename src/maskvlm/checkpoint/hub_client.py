"""Files that are not local: from the hub's cache on this machine, or else from the hub itself.

Whatever is on this machine is used without asking the hub. If the hub cannot be reached, its own clients retry for half
a minute per file; here one request of at most PROBE_SECONDS decides, once per process.
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

from maskvlm.checkpoint.integrity import first_line, models_here
from maskvlm.config.bundled_models import bundled_folder
from maskvlm.config.given_options import nearest
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.paths import expand_user

PROBE_SECONDS = 5.0
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
"""Names under which timm and transformers store weights, in the order in which they are tried."""
PARTS = ["*.json", "*.safetensors", "*.txt", "README.md"]
"""Files that are downloaded for a model of this project: no pickle, no code."""

T = TypeVar("T")


class Unreachable(UserError):
    """Weights are not on this machine, and the hub cannot be reached.

    Args:
        names: the weights, such as `roberta-base (Hugging Face)`.
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
    """Whether the hub answers a short request, made through the session (proxy, certificates, offline mode) that
    downloads use."""
    try:
        get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
    except Exception:  # the HTTP library, and so its exceptions, differ between versions of the client
        return False
    return True


def from_cache_or_hub(name: str, fetch: Callable[[bool], T], where: str = "model.backbone") -> T:
    """What `fetch(local_files_only)` finds in the cache, or else on the hub.

    Args:
        where: the place that an error names.

    Raises:
        Unreachable: it is not in the cache, and the hub cannot be reached (66).
        UserError: the hub does not know the name (66), or its files cannot be used (65).
    """
    try:
        return fetch(True)
    except (OSError, ValueError):  # what the libraries raise if a file is not in the cache
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
        what = f"{name} cannot be used ({first_line(error)})"
        raise UserError(where, what, "Choose another one", ExitCode.BAD_DATA) from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def hub_weights(name: str, repository: str, filename: str | None = None) -> Path:
    """The weight file of a repository (`owner/name`, `owner/name@revision`); raises as `from_cache_or_hub`."""
    repo, _, revision = repository.partition("@")
    places: dict[str, Any] = {"revision": revision or None}

    def fetch(local: bool) -> Path:
        for candidate in (filename,) if filename else WEIGHT_FILES:
            try:
                return Path(hf_hub_download(repo, candidate, local_files_only=local, **places))
            except EntryNotFoundError as error:
                # If the repository lacks the file, try the next name.
                if isinstance(error, LocalEntryNotFoundError) and not local:
                    raise  # the connection broke
        raise FileNotFoundError(f"{repo} holds none of {', '.join(WEIGHT_FILES)}")

    return from_cache_or_hub(name, fetch)


def is_cached(repository: str, names: Iterable[str]) -> bool:
    """Whether one of these files of a repository (`owner/name`, `owner/name@revision`) is in the hub's cache here."""
    repo, _, revision = repository.partition("@")
    # The client returns None, or a special object for a file that the repository is known not to have.
    return any(isinstance(try_to_load_from_cache(repo, name, revision=revision or None), str) for name in names)


def folder_of_hub(name: str, settings: Mapping[str, Any] | None = None) -> Path:
    """The folder of a bundled model, by its name; a path that exists, or a text that cannot be a repository's name, as
    it is; else the local folder of a hub repository, downloaded if necessary.

    Args:
        name: `scenes-tiny`, a path, or `owner/name`, `owner/name@revision`.
        settings: revision, token, cache_dir, local_files_only.

    Raises:
        UserError: the hub does not know the repository, or cannot be reached (66); its files cannot be used (65).
    """
    if (own := bundled_folder(name)) is not None:
        return own
    path = expand_user(name)
    # An existing path takes precedence over a repository of that name.
    if path.exists() or not is_repository(name):
        return path
    repo, _, revision = name.partition("@")
    # Settings of `from_pretrained` that the client takes unchanged.
    known = {key: value for key, value in (settings or {}).items() if key in ("revision", "token", "cache_dir")}
    # A setting of None stands for the default, which may be in the name.
    known["revision"] = known.get("revision") or revision or None
    only = bool((settings or {}).get("local_files_only"))

    def get(local: bool) -> Path:
        return Path(snapshot_download(repo, local_files_only=local or only, allow_patterns=PARTS, **known))

    try:
        return from_cache_or_hub(f"{name} (Hugging Face)", get, name)
    except Unreachable as error:
        near = nearest(name, models_here(), 0.7)
        what = "no such file or folder, nor is it in the cache, and the hub cannot be reached"
        what += f" (did you mean {near}?)" if near else ""
        todo = f"Check the path or the connection; there are: {', '.join(models_here())}"
        raise UserError(name, what, todo, ExitCode.MISSING_INPUT) from error


def upload(folder: Path, repository: str, message: str, settings: Mapping[str, Any]) -> str:
    """Upload a folder's files (`PARTS`) to a repository, which is created if it does not exist.

    Args:
        settings: token, private, revision (a branch), create_pr.

    Returns:
        The URL of the commit.

    Raises:
        UserError: invalid name, not logged in, or the hub cannot be reached (69).
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
    """What the hub reports before an upload. user: owner of the token. there: whether the repository exists."""

    user: str
    there: bool


def check_publishable(repository: str) -> OnHub:
    """Ask the hub whose token is used, and whether that user may create or write a repository. Writes nothing.

    Args:
        repository: `owner/name`.

    Raises:
        UserError: there is no token, or it is rejected, read-only or of a user who is neither the owner nor a member of
            it; or the hub cannot be reached (69).
    """
    api, log_in = HfApi(), "Log in (hf auth login) or set HF_TOKEN, with a token that has write access"
    try:
        account = api.whoami()
    except LocalTokenNotFoundError:
        # Without a token only public repositories are visible.
        state = "already exists" if repo_there(api, repository) else "is free"
        raise UserError(
            repository, f"{state}; there is no token to upload with", log_in, ExitCode.UNAVAILABLE
        ) from None
    except Exception as error:  # as above, of many libraries
        what = f"the hub rejects the token, or cannot be reached ({first_line(error)})"
        raise UserError(repository, what, log_in, ExitCode.UNAVAILABLE) from error
    there, user, owner = repo_there(api, repository), str(account["name"]), repository.partition("/")[0]
    state = "already exists" if there else "is free"
    if owner.lower() not in {name.lower() for name in (user, *(each["name"] for each in account.get("orgs", ())))}:
        what = f"{state}; the token is of {user}, who is neither {owner} nor a member of it"
        raise UserError(repository, what, f"Name {user}/{repository.partition('/')[2]}", ExitCode.UNAVAILABLE)
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        what = f"{state}; the token of {user} may only read"
        raise UserError(repository, what, log_in, ExitCode.UNAVAILABLE)
    return OnHub(user, there)


def repo_there(api: HfApi, repository: str) -> bool:
    """Whether a repository exists and is visible to us. Raises UserError if the hub cannot be reached (69)."""
    try:
        return api.repo_exists(repository)
    except Exception as error:  # as above, of many libraries
        what = f"the hub cannot be queried for it ({first_line(error)})"
        raise UserError(repository, what, "Check the connection", ExitCode.UNAVAILABLE) from error


def check_repository(name: str) -> None:
    """Raises UserError if a name is not a valid `owner/name` of the hub."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"to={name}", f"is not a valid hub name ({first_line(error)})", "Give owner/name") from None
    if "/" not in name:
        raise UserError(f"to={name}", "names no owner", "Give owner/name")


def is_repository(name: str) -> bool:
    """Whether a name can be a hub repository (`owner/name`) rather than a path."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name) is not None and not name.endswith(".ckpt")
