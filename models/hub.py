"""Where weights are: in a local file or folder, or on the Hugging Face hub.

`local_or_hub` alone decides whether a name is a path or a repository. Files of the hub come from the local cache or
from a download; otherwise there is a clear error without delay. The client of the hub retries an unreachable server for
up to a minute for each file. Here the cache is read first, and one short request tests whether the server is reachable.
"""

from __future__ import annotations

import os
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from common.io import InputError, clear_leftovers, first_line

REACH_TIMEOUT = 10  # seconds; a slower server is not usable for gigabytes
HUB_PART = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)  # of owner/name/folder/file
FILE_ENDINGS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".tar", ".zip", ".npz", ".json")


class HubName(NamedTuple):
    """A repository of the hub, `owner/name`, and a file or folder in it; "" is the repository itself."""

    repo: str
    inside: str

    @property
    def is_file(self) -> bool:
        return self.inside.endswith(FILE_ENDINGS)


def local_or_hub(name: str | Path, allowed: str, flag: str = "") -> Path | HubName:
    """Return the existing file or folder of this name, or the place on the hub that it names. `~` is the home folder.

    `owner/name` is a repository, `owner/name/file.pt` a file in it, also in folders. A name is a local path if it
    exists, and also if it starts with `.`, `/` or `~`, if its first folder exists here, or if it is a single name or
    `folder/file` with an ending of a file. `flag` and `allowed` are for the error.
    Raises InputError if a local path does not exist.
    """
    text = str(name)
    path = os.path.expanduser(text)
    if os.path.exists(path):
        return Path(path)
    parts = text.split("/")
    is_path = not all(HUB_PART.fullmatch(part) for part in parts) or os.path.lexists(parts[0])
    if is_path or len(parts) == 1 or (len(parts) == 2 and text.endswith(FILE_ENDINGS)):
        raise InputError(f"{f'{flag} '.lstrip()}{text}: no such file or folder; allowed: {allowed}")
    return HubName("/".join(parts[:2]), "/".join(parts[2:]))


def hub_folder(place: HubName, files: Sequence[str], instead: str) -> Path:
    """Return the local folder of `files`, which are in one folder of a repository; see `hub_file`."""
    paths = [hub_file(place.repo, f"{place.inside}/{file}".lstrip("/"), instead) for file in files]
    return paths[0].parent


def hub_file(repo: str, filename: str, instead: str) -> Path:
    """Return the local path of `filename` in repository `repo` of the hub, downloaded if it is not cached.

    `instead` says what to do without the hub, for example in which folder to put the file.
    Raises InputError, with the address and `instead`, if the file is not cached and cannot be downloaded.
    """
    from huggingface_hub import constants, errors, hf_hub_download, try_to_load_from_cache

    address = f"{constants.ENDPOINT}/{repo}/resolve/main/{filename}"
    try:
        if isinstance(cached := try_to_load_from_cache(repo, filename), str):
            return Path(cached)
    except errors.HFValidationError as error:
        raise InputError(f"{repo}: not a name of the hub (owner/name). {instead}") from error
    if constants.HF_HUB_OFFLINE:
        raise InputError(f"{address}: not in the local cache, and HF_HUB_OFFLINE forbids to download it. {instead}")
    if not _is_reachable(constants.ENDPOINT):
        raise InputError(f"{address}: not in the local cache, and the hub cannot be reached. {instead}")
    try:
        return Path(hf_hub_download(repo, filename))
    except errors.GatedRepoError as error:
        how = f"ask for it at {constants.ENDPOINT}/{repo}, then run hf auth login"
        raise InputError(f"{address}: needs the owner's permission; {how}. {instead}") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(f"{address}: no such repository; a private one needs hf auth login. {instead}") from error
    except errors.LocalEntryNotFoundError as error:  # also an EntryNotFoundError
        raise InputError(f"{address}: not in the local cache, and the hub cannot be reached. {instead}") from error
    except errors.EntryNotFoundError as error:
        raise InputError(f"{address}: no such file in this repository. {instead}") from error
    except Exception as error:  # the exceptions depend on the client's HTTP library, which has changed
        raise InputError(f"{address}: cannot be downloaded ({first_line(error)}). {instead}") from error


def url_file(address: str, instead: str) -> Path:
    """Return the local copy, in PyTorch's cache, of a file of weights on the authors' own server.

    Raises InputError, with the address and `instead`, if the file is not cached and cannot be downloaded.
    """
    import torch

    path = Path(torch.hub.get_dir()) / "checkpoints" / address.rsplit("/", 1)[-1]
    if path.is_file():
        return path
    if not _is_reachable(address):
        raise InputError(f"{address}: not in {path.parent}, and the server cannot be reached. {instead}")
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(path.parent, path.name)
    try:
        torch.hub.download_url_to_file(address, str(path))
    except OSError as error:
        raise InputError(f"{address}: cannot be downloaded ({first_line(error)}). {instead}") from error
    return path


def _is_reachable(address: str) -> bool:
    """Return whether a server responds, with any status; the proxy settings of the environment apply."""
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=REACH_TIMEOUT).close()
    except OSError as error:
        # HTTPError is a response. The hub's client may have the certificate that Python's own list lacks.
        return isinstance(error, urllib.error.HTTPError) or isinstance(getattr(error, "reason", None), ssl.SSLError)
    return True
