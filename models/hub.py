"""Published weights: from the local cache if they are there, else downloaded, else a clear error at once.

The one place that knows of the Hugging Face hub. The hub's own client tries an unreachable network for up to a minute
with each file; here the cache is asked first, and one short request then tells whether the hub can be reached at all.
"""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from pathlib import Path

from common.io import InputError

REACH_TIMEOUT = 10  # seconds; a hub that takes longer to say a word is of no use for gigabytes


def hub_file(repo: str, filename: str, instead: str) -> Path:
    """Return the local path of `filename` in the hub's repository `repo`, downloading it if it is not in the cache.

    `instead` says what to do without the hub (which file to put where, which flag names it).
    Raises InputError, naming the address and `instead`, if the file is neither in the cache nor to be had.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    address = f"{constants.ENDPOINT}/{repo}/resolve/main/{filename}"
    try:
        return Path(hf_hub_download(repo, filename, local_files_only=True))
    except HFValidationError as error:
        raise InputError(f"{repo}: not a name of the hub (owner/name). {instead}") from error
    except LocalEntryNotFoundError:
        pass
    if not _answers(constants.ENDPOINT):
        raise InputError(f"{address}: not in the local cache, and the hub cannot be reached. {instead}")
    try:
        return Path(hf_hub_download(repo, filename))
    except Exception as error:  # the client lets through whatever its HTTP library of the day raises
        raise InputError(f"{address}: cannot be downloaded ({_first_line(error)}). {instead}") from error


def url_file(address: str, instead: str) -> Path:
    """Return the local copy of a file of weights that its authors serve themselves, kept in PyTorch's own cache.

    Raises InputError, naming the address and `instead`, if the file is neither there nor to be had.
    """
    import torch

    path = Path(torch.hub.get_dir()) / "checkpoints" / address.rsplit("/", 1)[-1]
    if path.is_file():
        return path
    if not _answers(address):
        raise InputError(f"{address}: not in {path.parent}, and the server cannot be reached. {instead}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(address, str(path))
    except OSError as error:
        raise InputError(f"{address}: cannot be downloaded ({_first_line(error)}). {instead}") from error
    return path


def _answers(address: str) -> bool:
    """Whether a server answers there, if only to refuse; the environment's proxy settings are followed."""
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=REACH_TIMEOUT).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        # A certificate that Python's own list does not know may be in the list of the hub's client.
        return isinstance(error.reason, ssl.SSLError)
    except OSError:
        return False
    return True


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
