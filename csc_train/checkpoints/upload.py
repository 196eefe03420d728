"""Upload a final model or an export, with its card, to the hub: one commit of the files that are not there yet."""

import contextlib
import hashlib
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import disable_progress_bars

from csc_train.checkpoints.config import ExportConfig
from csc_train.checkpoints.content import first_difference, sha256
from csc_train.checkpoints.locate import CHECKPOINTS_FOLDER, MODEL_FOLDER
from csc_train.checkpoints.manifest import CARD_FILE, MANIFEST_FILE, Manifest, read_manifest
from csc_train.errors import InputError, causes
from csc_train.hub_access import offline_without_hub
from csc_train.overrides import hint
from csc_train.progress import ProgressBar

TOKEN_VARIABLE = "HF_TOKEN"
"""The environment variable with the token, its only place: no setting, log, error or file holds one."""
WAITS_S = (1, 4, 16)
"""Before each repeat of what the library does not repeat: to create a repository, look at it, and commit."""
RETRYABLE = (409, 412, 429)
"""HTTP statuses, beside 5xx, after which to look again: of a commit whose parent is not the newest, and of haste."""
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
"""Files of another layout, between whose weights and the new ones a reader could not choose."""
_ADVICE = {
    401: f"the hub does not accept the token in {TOKEN_VARIABLE}: set one that is valid",
    403: f"the token in {TOKEN_VARIABLE} has no right to that: give it the permission to write there, or set another",
    404: "there is no such repository, or the token may not see it",
}
logger = logging.getLogger(__name__)


def check_push(config: ExportConfig) -> HfApi:
    """Check that the hub answers, accepts the token, and lets it write to the owner's repositories.

    Returns:
        The client, with the token.

    Raises:
        InputError: it does not; or the repository is public and the upload shall be private.
    """
    place, owner = f"push_to={config.push_to}", str(config.push_to).partition("/")[0]
    if not (token := os.environ.get(TOKEN_VARIABLE, "").strip()):
        raise InputError(f"{place}: {TOKEN_VARIABLE} is not set: give a token that may write there in the environment")
    if not token.isascii() or not token.isprintable():
        raise InputError(f"{place}: {TOKEN_VARIABLE} holds characters that no token has: copy it again")
    with offline_without_hub() as offline, _hub_refusals(place):
        if offline:
            raise InputError(f"{place}: {offline}: upload from a machine that reaches the hub")
        api = HfApi(token=token)
        account = api.whoami()
        owners = [account["name"], *(each["name"] for each in account.get("orgs") or ())]
        if owner.lower() not in map(str.lower, owners):
            raise InputError(f"{place}: the token is of {account['name']}: the owner must be {' or '.join(owners)}")
        if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise InputError(f"{place}: {_ADVICE[403]}")
        with contextlib.suppress(errors.RepositoryNotFoundError):  # it will be created
            if config.push_private and api.repo_info(str(config.push_to)).private is False:
                raise InputError(f"{place}: the repository is public: add push_private=false, or choose another")
        return api


def push(api: HfApi, directory: Path, config: ExportConfig) -> None:
    """Upload a model's files, as its manifest names them, its manifest and its card in one commit.

    Files that the repository holds with the same content are left out. A broken connection is followed by a look at
    what has arrived; the commit names its parent, so it never lands twice. Files of others stay; weights in other
    files than the new ones are removed by the same commit.

    Args:
        api: the client (see `check_push`).

    Raises:
        InputError: the directory is not as it was written; or the hub cannot be reached, or refuses the upload, which
            says how to resume it.
    """
    manifest = read_manifest(directory)
    if difference := first_difference(directory, manifest.files) if manifest.files else "its manifest names no files":
        raise InputError(f"{directory}: not as it was written ({difference}): export the model again")
    resume = f"the model in {directory} is whole; to upload it: python recipes/export.py " + hint(
        {"source": directory, "push_to": config.push_to} | ({} if config.push_private else {"push_private": False})
    )
    try:
        logging.getLogger("huggingface_hub.utils._http").addFilter(_is_unsigned)
        with _hub_refusals(f"push_to={config.push_to}"):
            commit = _push(api, directory, manifest, config)
    except InputError as error:
        raise InputError(f"{error}; {resume}") from error
    except KeyboardInterrupt:
        logger.info(f"interrupted: {resume}")
        sys.exit(130)
    logger.info(f"{directory} is {config.push_to} at commit {commit}")


def _push(api: HfApi, directory: Path, manifest: Manifest, config: ExportConfig) -> str:
    repository = str(config.push_to)
    names = [*manifest.files, MANIFEST_FILE, *([CARD_FILE] if (directory / CARD_FILE).is_file() else [])]
    additions = {name: CommitOperationAdd(name, directory / name) for name in names}
    for wait in (*WAITS_S, None):
        try:
            api.create_repo(repository, private=config.push_private, exist_ok=True)
            return _commit_missing(api, repository, directory, additions, manifest)
        except (ConnectionError, TimeoutError, errors.HTTPError) as error:
            status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 500
            if wait is None or not (status >= 500 or status in RETRYABLE):
                raise
            logger.info(f"note: {_reason(error)}: in {wait} s, a look at what {repository} holds")
            time.sleep(wait)
    raise AssertionError


def _commit_missing(
    api: HfApi, repository: str, directory: Path, additions: dict[str, CommitOperationAdd], manifest: Manifest
) -> str:
    """Commit the files that the newest commit of the repository lacks; returns the commit that holds them all."""
    parent = api.repo_info(repository).sha or ""
    tree = api.list_repo_tree(repository, recursive=True, revision=parent or None)
    held = {each.path: each for each in tree if isinstance(each, RepoFile)}
    missing = {name: each for name, each in additions.items() if not _is_same(directory / name, held.get(name))}
    stale = [name for name in held.keys() - additions.keys() if any(fnmatch(name, each) for each in WEIGHTS)]
    if not missing and not stale:
        logger.info(f"{repository}: commit {parent[:12]} holds all {len(additions)} files of {directory}")
        return parent
    others = sorted(held.keys() - additions.keys() - {*stale, ".gitattributes"})
    for files, fate in ((stale, "are removed, since readers would mix them with the new ones"), (others, "stay")):
        if files:
            logger.info(f"note: {repository} holds other files, which {fate}: {', '.join(sorted(files))}")
    size = sum((directory / name).stat().st_size for name in missing)
    there = len(additions) - len(missing)
    logger.info(
        f"upload: {len(missing)} of {len(additions)} files, {size / 1e6:.1f} MB"
        + (f"; {repository} has the other {there}" if there else "")
    )
    if not (draws := sys.stderr.isatty()):
        disable_progress_bars()  # the library's, which are enough on a terminal
    with ProgressBar(total=size, desc="upload", unit="byte", unit_scale=True, disable=draws) as bar:
        for name, each in missing.items():
            api.preupload_lfs_files(repository, [each], free_memory=False)
            bar.update((directory / name).stat().st_size)
    commit = api.create_commit(
        repository,
        [*missing.values(), *map(CommitOperationDelete, stale)],
        commit_message=_message(directory, manifest),
        parent_commit=parent or None,
    )
    return commit.oid


def _is_same(path: Path, held: RepoFile | None) -> bool:
    """Whether the repository holds a file with this content."""
    if held is None or held.size != path.stat().st_size:
        return False
    if held.lfs:
        return held.lfs.sha256 == sha256(path)
    content = path.read_bytes()
    return held.blob_id == hashlib.sha1(b"blob %d\0%b" % (len(content), content), usedforsecurity=False).hexdigest()


def _message(directory: Path, manifest: Manifest) -> str:
    """The commit message: run, step and form of the model."""
    place = Path(manifest.exported_from or directory).absolute()
    if place.name == MODEL_FOLDER:
        place = place.parent
    elif place.parent.name == CHECKPOINTS_FOLDER:
        place = place.parent.parent
    step = f"step {manifest.export['step']}" if manifest.export.get("step") else "final model"
    return f"{place.name}: {step}, {manifest.export.get('format', 'merged')}"


@contextlib.contextmanager
def _hub_refusals(place: str) -> Iterator[None]:
    """Turn what the hub or the way to it refuses into an InputError of one line, without tokens and signatures."""
    try:
        yield
    except InputError:
        raise
    # The library raises RuntimeError for a file, and ValueError for a card or a file that the hub does not take
    except (OSError, errors.HTTPError, RuntimeError, ValueError) as error:
        raise InputError(f"{place}: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    """Why the hub refuses, in one line."""
    found = list(causes(error))
    refused = next((each for each in found if isinstance(each, errors.HfHubHTTPError)), None)
    if refused is not None:
        status = refused.response.status_code
        return _ADVICE.get(status) or f"HTTP {status}: {_bare(refused.server_message or 'the hub gives no reason')}"
    return _bare(
        f"{error} ({type(found[-1]).__name__}: {found[-1]})" if found[1:] else f"{error}" or type(error).__name__
    )


def _bare(text: str) -> str:
    """A text in one line, without the token and the queries of addresses, which may be signatures."""
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    text = " ".join(re.sub(r"\?\S*=\S*", "", text).split())
    return text.replace(token, TOKEN_VARIABLE) if token else text


def _is_unsigned(record: logging.LogRecord) -> bool:
    """Whether the library's log record names no address with a query, which may be a signature."""
    return re.search(r"\?\S*=", record.getMessage()) is None
