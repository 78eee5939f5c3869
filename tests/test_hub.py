"""Where weights are: a local path or the hub; the cache first, then the server, else an error that names the file."""

import hashlib
from pathlib import Path

import pytest
import torch

from common.errors import InputError
from models.autoencoder import load_codec
from models.checkpoint import load_checkpoint
from models.encoders import load_encoder
from models.hub import HubName, hub_file, local_or_hub, url_file


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """An empty cache and a hub that cannot be reached; return the folder of the cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def put_into_cache(cache: Path, repo: str, filename: str, data: bytes = b"{}") -> Path:
    """Put a file of a repository into the hub's local cache, in its format; return the path of the file."""
    folder = cache / ("models--" + repo.replace("/", "--"))
    path = folder / "snapshots" / "abc" / filename
    for target, content in ((path, data), (folder / "refs" / "main", b"abc")):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("owner/name", HubName("owner/name", "")),
        ("owner/name.v2", HubName("owner/name.v2", "")),
        ("owner/name/0400000.pt", HubName("owner/name", "0400000.pt")),
        ("owner/name/a/b/0400000.pt", HubName("owner/name", "a/b/0400000.pt")),
        ("owner/name/vae", HubName("owner/name", "vae")),
    ],
)
def test_names_of_the_hub(name, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert local_or_hub(name, "") == place
    (tmp_path / name).mkdir(parents=True)
    assert local_or_hub(name, "") == Path(name)  # what exists is local


@pytest.mark.parametrize(
    "name",
    [
        "none.pt", "none", "", "exps/none.pt", "models/none.safetensors", "./a/b", "../a/b", "/a/b", "~/a/b",
        "~nobody/a", "owner/name/", "owner//name", "a b/c", "C:\\\\a\\\\b", "here/none", "here/none/0000001.pt",
        "link/none", "\0/a",
    ],
)  # fmt: skip
def test_names_of_local_paths_are_never_looked_up_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to("gone")
    with pytest.raises(InputError) as error:
        local_or_hub(name, "this and that", "--flag")
    assert str(error.value) == f"--flag {name or repr(name)}: no such file or folder; allowed: this and that"


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "w.pt").touch()
    assert local_or_hub("~/w.pt", "") == tmp_path / "w.pt"


def test_programs_take_weights_from_the_hub(no_hub, tmp_path, monkeypatch):
    """A checkpoint, an export, a codec and the weights of an encoder; each is in the cache of the hub."""
    from export import export
    from tests.test_autoencoder import save_kl
    from tests.test_checkpoint import content
    from tests.test_encoders import TINY_VIT, save_timm
    from tests.test_sit import small

    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    torch.save(content(small()), "0000012.pt")
    export("0000012.pt", "folder")
    save_timm(Path("vit.safetensors"), "vit_tiny_patch16_224", depth=2)
    save_kl(Path("kl"))
    put_into_cache(no_hub, "owner/run", "checkpoints/0000012.pt", Path("0000012.pt").read_bytes())
    put_into_cache(no_hub, "owner/weights", "vit.safetensors", Path("vit.safetensors").read_bytes())
    put_into_cache(no_hub, "owner/weights", "model.safetensors", Path("vit.safetensors").read_bytes())
    for repo, folder, inside in (
        ("reg", "folder", ""),
        ("kl", "kl", ""),
        ("pipe", "kl", "vae/"),
        ("all", "kl", "x/vae/"),
    ):
        for file in Path(folder).iterdir():
            put_into_cache(no_hub, f"owner/{repo}", inside + file.name, file.read_bytes())
    assert load_checkpoint("owner/run/checkpoints/0000012.pt")["steps"] == 12
    assert load_checkpoint("owner/reg")["args"].steps == 12
    for name in ("owner/kl", "owner/pipe", "owner/pipe/vae", "owner/all/x"):
        assert load_codec(name).format.codec == name
    for file in ("owner/weights/vit.safetensors", "owner/weights"):
        assert load_encoder(TINY_VIT, 256, file).width == 192
    for load in (load_checkpoint, load_codec, lambda name: load_encoder(TINY_VIT, 256, name)):
        with pytest.raises(InputError, match=r"owner/none/resolve/main/.*hub cannot be reached\. .*none"):
            load("owner/none")
        with pytest.raises(InputError, match=r"folder/none: no such file or folder; allowed: "):
            load("folder/none")


def test_errors_of_the_hub_are_in_our_words(monkeypatch):
    from huggingface_hub import errors

    monkeypatch.setattr("models.hub._is_reachable", lambda address: True)
    for kind, text in (
        (errors.EntryNotFoundError, "no such file in this repository"),
        (errors.RepositoryNotFoundError, "no such repository; a private one needs hf auth login"),
        (errors.RevisionNotFoundError, "this repository has no revision main"),
        (errors.GatedRepoError, "needs the owner's permission; ask for it at"),
        (errors.LocalEntryNotFoundError, "not in the local cache, and the hub cannot be reached"),
    ):

        def fail(*_, kind=kind):
            raise kind.__new__(kind, "404 Client Error. (Request ID: Root=1)")

        monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
        with pytest.raises(InputError, match=rf"owner/name/resolve/main/w\.pt: {text}.*\. Do this instead$"):
            hub_file("owner/name", "w.pt", "Do this instead")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE forbids"):
        hub_file("owner/name", "w.pt", "Do this instead")


def test_a_cached_file_needs_no_hub(no_hub):
    cached = put_into_cache(no_hub, "owner/name", "vae/config.json")
    assert hub_file("owner/name", "vae/config.json", "") == cached
    with pytest.raises(InputError, match=r"owner/name/resolve/main/vae/other: not in .*\. Do this instead"):
        hub_file("owner/name", "vae/other", "Do this instead")


def put_blob(cache: Path, filename: str, data: bytes, digest: str) -> Path:
    """Put a file into the cache as the hub's client does: a link to a file with the checksum as its name."""
    path = put_into_cache(cache, "owner/name", filename, data)
    blob = cache / "models--owner--name" / "blobs" / digest
    blob.parent.mkdir(exist_ok=True)
    path.rename(blob)
    path.symlink_to(blob)
    return path


def test_a_cached_file_has_the_content_that_the_hub_announced(no_hub):
    data = b"weights"
    large = put_blob(no_hub, "model.safetensors", data, hashlib.sha256(data).hexdigest())
    small = put_blob(no_hub, "config.json", data, hashlib.sha1(b"blob 7\0" + data).hexdigest())
    for path in (large, small):
        assert hub_file("owner/name", path.name, "") == path
        path.write_bytes(b"Weights")
        with pytest.raises(InputError, match=rf"{path.name}: damaged; its checksum is \w+, but the hub gave \w+;"):
            hub_file("owner/name", path.name, "")


def test_a_revision_is_part_of_the_name(no_hub, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    put_into_cache(no_hub, "owner/name", "config.json", b"new")
    old = no_hub / "models--owner--name" / "snapshots" / ("a" * 40) / "config.json"
    old.parent.mkdir()
    old.write_bytes(b"old")
    place = local_or_hub(f"owner/name@{'a' * 40}/config.json", "")
    assert place == HubName(f"owner/name@{'a' * 40}", "config.json") and place.is_file
    assert hub_file(place.repo, place.inside, "").read_bytes() == b"old"
    assert hub_file("owner/name", "config.json", "").read_bytes() == b"new"
    with pytest.raises(InputError, match=r"owner/name/resolve/v1\.0/config\.json: not in the local cache"):
        hub_file("owner/name@v1.0", "config.json", "")
    for name in ("owner/name@", "owner@v1/name", "owner/name/file@v1.pt"):
        with pytest.raises(InputError, match="no such file or folder"):
            local_or_hub(name, "")


def test_a_checksum_in_the_name_of_a_file_is_compared(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    digest = hashlib.sha256(b"weights").hexdigest()
    (tmp_path / "checkpoints").mkdir()
    for name in (f"net-{digest[:8]}.pth", "net-224.pth"):
        (tmp_path / "checkpoints" / name).write_bytes(b"weights")
        assert url_file(f"http://127.0.0.1:9/{name}", "").name == name
    (tmp_path / "checkpoints" / "net-01234567.pth").write_bytes(b"weights")
    with pytest.raises(InputError, match=rf"damaged; its SHA-256 is {digest}, not 01234567\.\.\.; delete it\. Do this"):
        url_file("http://127.0.0.1:9/net-01234567.pth", "Do this instead")


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
