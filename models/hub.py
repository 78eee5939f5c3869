"""Published weights: from the local cache, else downloaded, else a clear error without delay.

The client of the Hugging Face hub retries an unreachable server for up to a minute for each file. Here the cache is
read first, and one short request tests whether the server is reachable.
"""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from pathlib import Path

from common.io import InputError, first_line

REACH_TIMEOUT = 10  # seconds; a slower server is not usable for gigabytes


def hub_file(repo: str, filename: str, instead: str) -> Path:
    """Return the local path of `filename` in repository `repo` of the hub, downloaded if it is not cached.

    `instead` says what to do without the hub, for example in which folder to put the file.
    Raises InputError, with the address and `instead`, if the file is not cached and cannot be downloaded.
    """
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    address = f"{constants.ENDPOINT}/{repo}/resolve/main/{filename}"
    try:
        if isinstance(cached := try_to_load_from_cache(repo, filename), str):
            return Path(cached)
    except HFValidationError as error:
        raise InputError(f"{repo}: not a name of the hub (owner/name). {instead}") from error
    if not _is_reachable(constants.ENDPOINT):
        raise InputError(f"{address}: not in the local cache, and the hub cannot be reached. {instead}")
    try:
        return Path(hf_hub_download(repo, filename))
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
