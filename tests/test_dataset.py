import json
import os
import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import InputError
from dataset import GlobalBatchSampler, LatentDataset
from tests.conftest import NUM_CLASSES, RESOLUTION

IMAGE = "images/00000/img00000005.png"
LATENT = "vae-sd/00000/img-mean-std-00000005.npy"
FOLDERS = ("images", "vae-sd")


def to_zip(folder):
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder))
    shutil.rmtree(folder)


@pytest.mark.parametrize("zipped", [(), ("images",), ("images", "vae-sd")])
def test_items_are_paired_and_labelled(data, zipped):
    for name in zipped:
        to_zip(data / name)
    dataset = LatentDataset(data)
    dataset.check()
    assert len(dataset) == 24 and dataset.num_classes == NUM_CLASSES
    assert dataset.resolution == RESOLUTION and dataset.latent_format.codec == "pixel"
    for i in (0, 7, 23):
        image, moments, label = dataset[i]
        assert image.dtype == torch.uint8 and image.shape == (3, RESOLUTION, RESOLUTION)
        assert moments.dtype == torch.float32 and moments.shape == (6, RESOLUTION, RESOLUTION)
        assert label == i % NUM_CLASSES and label.dtype == torch.int64
        torch.testing.assert_close(moments[:3], image / 127.5 - 1)


def test_pairs_by_index_not_by_position(data):
    """The folder of a file does not matter."""
    moved = data / "vae-sd" / "elsewhere" / "img-mean-std-00000005.npy"
    moved.parent.mkdir()
    (data / LATENT).rename(moved)
    image, moments, _ = LatentDataset(data)[5]
    torch.testing.assert_close(moments[:3], image / 127.5 - 1)


def test_published_names_and_codec(data):
    (data / "images").rename(data / "imagenet_256_vae")
    table = json.loads((data / "vae-sd/dataset.json").read_text())
    del table["codec"]
    (data / "vae-sd/dataset.json").write_text(json.dumps(table))
    for path in (data / "vae-sd").rglob("*.npy"):
        np.save(path, np.zeros((8, RESOLUTION // 8, RESOLUTION // 8), np.float32))
    dataset = LatentDataset(data)
    assert not dataset.names_codec
    assert dataset.latent_format.scale == 0.18215 and dataset.latent_size == RESOLUTION // 8


def write_mirrored(data):
    for path in (data / "vae-sd").rglob("img-mean-std-0*.npy"):
        np.save(path.with_name(path.name.replace("std-", "std-flip-")), np.load(path)[:, :, ::-1])
    edit_labels(data, lambda table: table.update(flip=True))


def test_mirror_images(data):
    with pytest.raises(InputError, match=r"--flip: .* has no mirrored latents"):
        LatentDataset(data, flip=True)
    write_mirrored(data)
    dataset = LatentDataset(data, flip=True)
    dataset.check()
    assert len(dataset) == 24
    (image, moments, label), (mirror, mirror_moments, mirror_label) = dataset[5], dataset[5 + 24]
    assert torch.equal(image.flip(2), mirror) and torch.equal(moments.flip(2), mirror_moments) and label == mirror_label
    (data / LATENT.replace("std-", "std-flip-")).unlink()
    with pytest.raises(InputError, match=r"img-mean-std-flip-00000005\.npy: cannot be read \(No such file"):
        LatentDataset(data, flip=True).check()


def edit_labels(data, change, where="vae-sd"):
    path = data / where / "dataset.json"
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))


def drop_all_labels(data):
    for where in FOLDERS:
        edit_labels(data, lambda table: table.update(labels=table["labels"][:3]), where)


DAMAGES = {
    "no data folder": (lambda d: shutil.rmtree(d), "no such folder"),
    "no latents": (lambda d: shutil.rmtree(d / "vae-sd"), "latents expected"),
    "no images": (lambda d: shutil.rmtree(d / "images"), "images expected"),
    "two image folders": (lambda d: (d / "imagenet_256_vae").mkdir(), "images and imagenet_256_vae"),
    "empty image folder": (lambda d: [p.unlink() for p in (d / "images").rglob("*.png")], "images: no file named like"),
    "image alone": (lambda d: (d / LATENT).unlink(), r"1 files have no partner.*img00000005\.png"),
    "latents alone": (lambda d: (d / IMAGE).unlink(), r"1 files have no partner.*img-mean-std-00000005\.npy"),
    "empty png": (lambda d: (d / IMAGE).write_bytes(b""), r"1 broken files:\s+.*img00000005\.png"),
    "cut png": (lambda d: (d / IMAGE).write_bytes((d / IMAGE).read_bytes()[:-20]), r"img00000005\.png: truncated"),
    "cut npy": (lambda d: (d / LATENT).write_bytes((d / LATENT).read_bytes()[:-20]), r"00000005\.npy: \d+ bytes; the"),
    "other dtype": (lambda d: np.save(d / LATENT, np.zeros((6, 16, 16), np.float64)), r"00000005\.npy: \d+ bytes; the"),
    "first latents of other dtype": (
        lambda d: np.save(d / LATENT.replace("5.npy", "0.npy"), np.zeros((6, 16, 16), np.int32)),
        "dtype int32; allowed: float32, float16",
    ),
    "latents of odd channels": (
        lambda d: np.save(d / LATENT.replace("5.npy", "0.npy"), np.zeros((5, 16, 16), np.float32)),
        r"shape \(5, 16, 16\); allowed",
    ),
    "latents of other codec": (
        lambda d: np.save(d / LATENT.replace("5.npy", "0.npy"), np.zeros((8, 16, 16), np.float32)),
        r"shape \(8, 16, 16\); allowed for codec pixel: \(6, h, h\), moments or \(3, h, h\), draw$",
    ),
    "latents of other size": (
        lambda d: np.save(d / LATENT.replace("5.npy", "0.npy"), np.zeros((6, 8, 8), np.float32)),
        "images of 16 px and latents of 8, but codec pixel reduces by 1",
    ),
    "labels missing": (drop_all_labels, r"21 of 24 files have no label.*index 3"),
    "label of text": (lambda d: edit_labels(d, lambda t: t["labels"][4].__setitem__(1, "cat")), "has label 'cat'"),
    "negative label": (lambda d: edit_labels(d, lambda t: t["labels"][4].__setitem__(1, -1)), "has label -1"),
    "labels disagree": (lambda d: edit_labels(d, lambda t: t["labels"][4].__setitem__(1, 2)), "index 4 has label 1 in"),
    "broken json": (lambda d: (d / "vae-sd/dataset.json").write_text("{"), r"dataset\.json: not valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize("both", [True, False])
def test_without_labels_all_images_have_label_0(data, both):
    for where in FOLDERS:
        edit_labels(data, lambda table: table.update(labels=None), where)
    if not both:
        (data / "images/dataset.json").unlink()
    dataset = LatentDataset(data)
    assert dataset.labels.tolist() == [0] * 24 and dataset.num_classes == 1 and dataset.classes.labels == (0,)
    assert not dataset.has_labels
    dataset.keep(5)
    assert len(dataset) == 5 and dataset.classes.labels == (0,)


def test_a_missing_entry_is_an_error_only_if_labels_are_needed(data):
    assert LatentDataset(data, needs_labels=False).labels.tolist() == [i % NUM_CLASSES for i in range(24)]
    for where in FOLDERS:
        edit_labels(data, lambda table: table.pop("labels"), where)
    with pytest.raises(InputError, match=r'24 of 24 files have no label .*\. Data without labels has "labels": null t'):
        LatentDataset(data)
    dataset = LatentDataset(data, needs_labels=False)
    assert dataset.labels.tolist() == [0] * 24 and not dataset.has_labels
    edit_labels(data, lambda table: table.update(labels=[["00000/img00000000.png", 1]]), "images")
    with pytest.raises(InputError, match=r"23 of 24 files have no label .*first: index 1$"):
        LatentDataset(data, needs_labels=False)


def test_null_labels_of_the_latents_leave_those_of_the_images(data):
    edit_labels(data, lambda table: table.update(labels=None))
    assert LatentDataset(data).labels.tolist() == [i % NUM_CLASSES for i in range(24)]


@pytest.mark.parametrize("where", FOLDERS)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_folder_inside_the_folder_is_refused(data, where, zipped):
    (data / "copy").mkdir()
    (data / where).rename(data / "copy" / where)
    (data / "copy").rename(data / where)
    if zipped:
        to_zip(data / where)
    with pytest.raises(InputError, match=rf"{where}/dataset\.json: found; expected only at the top of"):
        LatentDataset(data)


def test_a_dataset_json_next_to_the_folders_is_refused_if_it_is_missed(data):
    shutil.copy(data / "vae-sd/dataset.json", data / "dataset.json")
    assert len(LatentDataset(data)) == 24
    (data / "vae-sd/dataset.json").unlink()
    with pytest.raises(InputError, match=r"data/dataset\.json: is not read there, and .*vae-sd has none"):
        LatentDataset(data)


def photographs(folder):
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (8, 6)).save(folder / name / "1.jpg")


def test_other_folders_name_the_next_command(data, tmp_path):
    def message(folder):
        with pytest.raises(InputError) as caught:
            LatentDataset(folder)
        return str(caught.value)

    for name in FOLDERS:
        assert f"this is {name} itself, use the folder above it: {data}" in message(data / name)
    assert f"; use {data}" in message(tmp_path)
    photographs(tmp_path / "my photos")
    lines = message(tmp_path / "my photos").splitlines()
    assert lines[1].startswith(f"python preprocessing/convert.py --source '{tmp_path}/my photos' --dest")
    assert lines[2].startswith("python preprocessing/encode.py") and lines[3].startswith("python train.py --data-dir")
    photographs(data / "raw" / "images")
    encode = f"python preprocessing/encode.py --source {data}/raw/images --dest {data}/raw/vae-sd"
    assert encode in message(data / "raw")
    shutil.rmtree(data / "images")
    photographs(data / "images")
    text = message(data)
    assert "no file named like 00000/img00000000.png; its images are not converted" in text
    assert f"convert.py --source {data}/images" in text
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables/train.parquet").write_bytes(b"")
    assert "; it contains 1 Parquet table" in message(tmp_path / "tables")
    is_file = "is a file; allowed: the folder of images and latents; "
    assert f"{is_file}it is a Parquet table" in message(tmp_path / "tables/train.parquet")
    (data / "vae-sd.zip").write_bytes(b"")
    assert f"{is_file}use {data}" in message(data / "vae-sd.zip")
    archive = shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path / "my photos")
    assert f"{is_file}it contains photographs" in message(tmp_path / "packed.zip")
    assert f"convert.py --source {archive} --dest {tmp_path}/packed-256/images" in message(tmp_path / "packed.zip")


def test_class_names_are_checked(data):
    def classes(folder, names):
        path = data / folder / "dataset.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"classes": names}))

    for names in ("abc", {"cat": 0}, [["cat"]]):
        classes("images", names)
        with pytest.raises(InputError, match=r"images/dataset\.json: classes is .*; expected a list of names"):
            LatentDataset(data)
    known = [str(label) for label in range(100)]
    classes("images", list(range(100)))
    assert LatentDataset(data).classes.names == tuple(known[label] for label in LatentDataset(data).classes.labels)
    classes("vae-sd", [*known[:7], "dog", *known[8:]])
    with pytest.raises(InputError, match="have different names for class 7: '7' and 'dog'"):
        LatentDataset(data)


@pytest.mark.parametrize("damage", DAMAGES)
def test_check_names_damaged_files(data, damage):
    harm, text = DAMAGES[damage]
    harm(data)
    with pytest.raises(InputError, match=text):
        LatentDataset(data).check()


def test_processes_share_the_check(data):
    (data / LATENT).write_bytes(b"")  # number 5 of 24
    dataset, counts = LatentDataset(data), []
    with pytest.raises(InputError, match=r"1 broken files:\s+.*img-mean-std-00000005\.npy: 0 bytes"):
        dataset.check(part=0, parts=4)
    for part in range(1, 4):
        dataset.check(counts.append, part, parts=4)
    assert counts == [6, 6, 6]


def test_image_does_not_read_latents(data):
    dataset = LatentDataset(data)
    expected = dataset[5][0]
    (data / LATENT).unlink()
    assert torch.equal(dataset.image(5), expected)
    Image.new("RGB", (8, 8)).save(data / IMAGE)
    with pytest.raises(InputError, match=r"img00000005\.png: 8 x 8 pixels; expected 16 x 16"):
        dataset.image(5)


def test_damage_that_check_does_not_find_is_named_when_read(data):
    intact = (data / IMAGE).read_bytes()
    (data / IMAGE).write_bytes(intact[:60] + bytes(len(intact) - 72) + intact[-12:])
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(data / IMAGE.replace("5.png", "6.png"))
    np.save(data / LATENT.replace("5.npy", "7.npy"), np.zeros((6, 8, 32), np.float32))
    dataset = LatentDataset(data)
    with pytest.raises(InputError, match=r"img00000005\.png: not an image that can be read: its data is damaged"):
        dataset[5]
    with pytest.raises(InputError, match=r"img00000006\.png: 8 x 8 pixels; expected 16 x 16"):
        dataset[6]
    with pytest.raises(InputError, match=r"00000007\.npy: shape"):
        dataset[7]


def test_pickled_latents_are_refused(data):
    np.save(data / LATENT.replace("5.npy", "0.npy"), np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"00000000\.npy: dtype object; allowed"):
        LatentDataset(data)


def batches(world_size=1, micro_batches=1, steps=range(7), num=10, size=8, flip=False):
    """Return the global batch of each step, concatenated over all processes."""
    parts = [
        list(GlobalBatchSampler(num, size, 5, steps, rank, world_size, micro_batches, flip))
        for rank in range(world_size)
    ]
    return [
        [i for rank in parts for part in rank[s * micro_batches : (s + 1) * micro_batches] for i in part]
        for s in range(len(steps))
    ]


@pytest.mark.parametrize(("world_size", "micro_batches"), [(2, 1), (1, 2), (4, 2), (2, 4)])
def test_global_batches_do_not_depend_on_processes_or_parts(world_size, micro_batches):
    assert batches(world_size, micro_batches) == batches()


def test_each_epoch_contains_every_sample_once_in_another_order():
    order = [i for batch in batches(steps=range(5)) for i in batch]
    epochs = [order[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_flips_mirror_half_and_keep_the_order():
    plain, flipped = batches(num=100, size=100), batches(num=100, size=100, flip=True)
    for a, b in zip(plain, flipped, strict=True):
        assert a == [i % 100 for i in b] and 30 < sum(i >= 100 for i in b) < 70
    assert flipped == batches(2, 5, num=100, size=100, flip=True)


def test_a_resumed_run_gets_the_remaining_batches():
    assert batches(steps=range(3, 7)) == batches()[3:]


def test_batches_larger_than_the_data():
    assert sorted(batches(num=4, size=8, steps=range(1))[0]) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_indivisible_batch_is_refused():
    with pytest.raises(InputError, match=r"--batch-size 8 \(global\) is not divisible by 3 processes x 1"):
        GlobalBatchSampler(10, 8, 0, range(1), 0, 3)


@pytest.mark.parametrize("mode", ["I;16", "I", "F", "LAB"])
def test_pixels_that_8_bits_cannot_hold_are_refused(data, mode):
    """Pillow clips them."""
    Image.new(mode, (RESOLUTION, RESOLUTION)).save(data / IMAGE, "TIFF")
    with pytest.raises(InputError, match=rf"img00000005\.png: pixels of mode {mode}.*; allowed: 8-bit RGB, grey"):
        LatentDataset(data)[5]


def test_a_fifo_in_place_of_a_file_is_named(data):
    for name in (IMAGE, LATENT):
        content = (data / name).read_bytes()
        (data / name).unlink()
        os.mkfifo(data / name)
        with pytest.raises(InputError, match=rf"1 broken files:\n.*{name}: (is not a regular file|0 bytes)"):
            LatentDataset(data).check()
        with pytest.raises(InputError, match=f"{name}: is not a regular file"):
            LatentDataset(data)[5]
        (data / name).unlink()
        (data / name).write_bytes(content)
    os.mkfifo(data / "fifo")
    with pytest.raises(InputError, match=r"fifo: is a file; allowed: the folder of images and latents$"):
        LatentDataset(data / "fifo")


def test_a_zip_that_was_replaced_is_noticed(data):
    to_zip(data / "images")
    dataset = LatentDataset(data)
    image = dataset.image(3)
    with zipfile.ZipFile(data / "images.zip") as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    swapped = dict(zip(members, reversed(members.values()), strict=True))
    with zipfile.ZipFile(data / "new.zip", "w") as archive:
        for name, content in swapped.items():
            archive.writestr(name, content)
    os.replace(data / "new.zip", data / "images.zip")
    assert torch.equal(dataset.image(3), image)  # from the open file
    dataset.images._descriptor = None  # as in a new worker process
    with pytest.raises(InputError, match="damaged"):
        dataset.image(3)
