"""Where weights are: in a local file or folder, or on the Hugging Face hub.

`local_or_hub` alone decides whether a name is a path or a repository. `owner/name@revision` is a branch, a tag or a
commit of a repository; without it, the branch main. The hub's cache names the files after their contents (SHA-256, for
small files the SHA-1 of git), which is compared before a file is used. Files of the hub come from the local cache or
from a download; otherwise there is a clear error without delay. The client of the hub retries an unreachable server for
up to a minute for each file. Here the cache is read first, and one short request tests whether the server is reachable.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from common.errors import InputError, first_line
from common.io import real_path, sha256_of
from common.temporary import clear_leftovers

REACH_TIMEOUT = 10  # seconds; a slower server is not usable for gigabytes
HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.")  # as in the names of files for torch.hub
HUB_PART = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)  # of owner/name/folder/file
FILE_ENDINGS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".tar", ".zip", ".npz", ".json")


class HubName(NamedTuple):
    """A repository of the hub, `owner/name` or `owner/name@revision`, and a file or folder in it, "" for the root."""

    repo: str
    inside: str

    @property
    def is_file(self) -> bool:
        return self.inside.endswith(FILE_ENDINGS)


def local_or_hub(name: str | Path, allowed: str, flag: str = "") -> Path | HubName:
    """Return the existing file or folder of this name, or the place on the hub that it names. `~` is the home folder.

    `owner/name` is a repository, `owner/name/file.pt` a file in it, also in folders; `owner/name@revision` is one state
    of it. A name is a local path if it exists, and also if it starts with `.`, `/` or `~`, if its first folder exists
    here, or if it is a single name or `folder/file` with an ending of a file. `flag` and `allowed` are for the error.
    Raises InputError if a local path does not exist.
    """
    text = str(name)
    path = os.path.expanduser(text)
    if os.path.exists(path):
        return Path(path)
    parts = text.split("/")
    plain = [re.sub(r"(?<=.)@[\w.-]+$", "", part) if place == 1 else part for place, part in enumerate(parts)]
    is_path = not all(HUB_PART.fullmatch(part) for part in plain) or os.path.lexists(parts[0])
    if is_path or len(parts) == 1 or (len(parts) == 2 and text.endswith(FILE_ENDINGS)):
        named = f"{flag} {text or repr(text)}".lstrip()
        raise InputError(f"{named}: no such file or folder; allowed: {allowed}")
    return HubName("/".join(parts[:2]), "/".join(parts[2:]))


def hub_folder(place: HubName, files: Sequence[str], instead: str) -> Path:
    """Return the local folder of `files`, which are in one folder of a repository; see `hub_file`."""
    paths = [hub_file(place.repo, f"{place.inside}/{file}".lstrip("/"), instead) for file in files]
    return paths[0].parent


def hub_file(repo: str, filename: str, instead: str) -> Path:
    """Return the local path of `filename` in repository `repo` of the hub, downloaded if it is not cached.

    `repo` may end in @revision. `instead` says what to do without the hub, for example in which folder to put the file.
    Raises InputError, with the address and `instead`, if the file is not cached and cannot be downloaded, and if its
    content does not have the checksum that the hub gave for it.
    """
    path = Path(_hub_file(repo, filename, instead))
    _verify_cached(path, path.stat().st_mtime_ns)
    return path


@functools.lru_cache(maxsize=64)  # programs ask for the same file several times
def _verify_cached(path: Path, changed: int) -> None:
    """Raise InputError if a file of the hub's cache does not have the content that its name in the cache states."""
    blob = real_path(path)
    if blob.parent.name != "blobs":  # a cache without links, as on Windows, does not keep the checksum
        return
    if re.fullmatch(r"[0-9a-f]{64}", blob.name):
        found = sha256_of(blob)
    elif re.fullmatch(r"[0-9a-f]{40}", blob.name):
        content = blob.read_bytes()
        found = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    else:
        return
    if found != blob.name:
        raise InputError(f"{path}: damaged; its checksum is {found}, but the hub gave {blob.name}; delete {blob}")


def _hub_file(name: str, filename: str, instead: str) -> str:
    """Return the local path of a file of the hub, from the cache or downloaded; see `hub_file`."""
    from huggingface_hub import constants, errors, hf_hub_download, try_to_load_from_cache

    repo, _, revision = name.partition("@")
    address = f"{constants.ENDPOINT}/{repo}/resolve/{revision or 'main'}/{filename}"
    at = {"revision": revision} if revision else {}
    try:
        if isinstance(cached := try_to_load_from_cache(repo, filename, **at), str):
            return cached
    except errors.HFValidationError as error:
        raise InputError(f"{repo}: not a name of the hub (owner/name). {instead}") from error
    if constants.HF_HUB_OFFLINE:
        raise InputError(f"{address}: not in the local cache, and HF_HUB_OFFLINE forbids to download it. {instead}")
    if not _is_reachable(constants.ENDPOINT):
        raise InputError(f"{address}: not in the local cache, and the hub cannot be reached. {instead}")
    try:
        return hf_hub_download(repo, filename, **at)
    except errors.GatedRepoError as error:
        how = f"ask for it at {constants.ENDPOINT}/{repo}, then run hf auth login"
        raise InputError(f"{address}: needs the owner's permission; {how}. {instead}") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(f"{address}: no such repository; a private one needs hf auth login. {instead}") from error
    except errors.LocalEntryNotFoundError as error:  # also an EntryNotFoundError
        raise InputError(f"{address}: not in the local cache, and the hub cannot be reached. {instead}") from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{address}: this repository has no revision {revision or 'main'}. {instead}") from error
    except errors.EntryNotFoundError as error:
        raise InputError(f"{address}: no such file in this repository. {instead}") from error
    except Exception as error:  # the exceptions depend on the client's HTTP library, which has changed
        raise InputError(f"{address}: cannot be downloaded ({first_line(error)}). {instead}") from error


def url_file(address: str, instead: str) -> Path:
    """Return the local copy, in PyTorch's cache, of a file of weights on the authors' own server.

    If its name has a part of its SHA-256, as torch.hub's files do, the content is compared with it.
    Raises InputError, with the address and `instead`, if the file is not cached and cannot be downloaded, or differs.
    """
    import torch

    path = Path(torch.hub.get_dir()) / "checkpoints" / address.rsplit("/", 1)[-1]
    if path.is_file():
        return _as_named(path, instead)
    if not _is_reachable(address):
        raise InputError(f"{address}: not in {path.parent}, and the server cannot be reached. {instead}")
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(path.parent, path.name)
    try:
        torch.hub.download_url_to_file(address, str(path))
    except OSError as error:
        raise InputError(f"{address}: cannot be downloaded ({first_line(error)}). {instead}") from error
    return _as_named(path, instead)


def _as_named(path: Path, instead: str) -> Path:
    """Return a path. Raises InputError if its name has the start of a SHA-256 that is not the content's."""
    named = HASH_IN_NAME.search(path.name)
    if named and not (found := sha256_of(path)).startswith(named[1]):
        raise InputError(f"{path}: damaged; its SHA-256 is {found}, not {named[1]}...; delete it. {instead}")
    return path


def _is_reachable(address: str) -> bool:
    """Return whether a server responds, with any status; the proxy settings of the environment apply."""
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=REACH_TIMEOUT).close()
    except OSError as error:
        # HTTPError is a response. The hub's client may have the certificate that Python's own list lacks.
        return isinstance(error, urllib.error.HTTPError) or isinstance(getattr(error, "reason", None), ssl.SSLError)
    return True
