"""Published weights: the cache first, then the server, else an error that names the file."""

import pytest
import torch

from common.io import InputError
from models.hub import hub_file, url_file


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """An empty cache and a hub that cannot be reached; return the folder of the cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_a_cached_file_needs_no_hub(no_hub):
    cached = no_hub / "models--owner--name" / "snapshots" / "abc" / "vae" / "config.json"
    for path, text in ((cached, "{}"), (cached.parents[3] / "refs" / "main", "abc")):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    assert hub_file("owner/name", "vae/config.json", "") == cached
    with pytest.raises(InputError, match=r"owner/name/resolve/main/vae/other: not in .*\. Do this instead"):
        hub_file("owner/name", "vae/other", "Do this instead")


def test_a_name_that_the_hub_does_not_allow_is_refused(no_hub):
    with pytest.raises(InputError, match=r"a/b/c: not a name of the hub \(owner/name\)\. Do this instead"):
        hub_file("a/b/c", "config.json", "Do this instead")


def test_weights_served_by_their_authors_are_fetched_once(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    served = tmp_path / "weights.pth"
    served.write_bytes(b"some weights")
    address = served.as_uri()
    assert url_file(address, "").read_bytes() == b"some weights"
    served.unlink()
    assert url_file(address, "").read_bytes() == b"some weights"
    with pytest.raises(InputError, match=r"127\.0\.0\.1:9/other\.pth.* cannot be reached\. Do this instead"):
        url_file("http://127.0.0.1:9/other.pth", "Do this instead")
