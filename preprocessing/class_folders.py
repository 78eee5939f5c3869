"""Labels from class folders: which folders of a source are the classes."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from common.errors import InputError, printable
from common.image_files import SHOWN, ImageFiles, check_split, common_depth
from common.sources import FileSource


@dataclass(frozen=True)
class ClassFolders:
    """The class folders of a source.

    Attributes:
        labels: of each image, the number of its class folder in sorted order.
        classes: names of the class folders, sorted; those without images have a number as well.
        bare: class folders without images, by their path in the source, and why they have none.
        notes: what a user should know about the choice of the folders.
    """

    labels: list[int]
    classes: list[str]
    bare: dict[str, str]
    notes: list[str]


def find_class_folders(source: FileSource, names: list[str], found: ImageFiles) -> ClassFolders:
    """Return the class folders of images. Folders that contain all class folders (train/...) are not classes.

    Raises InputError if the folders are parts of a data set (train, val), or if it is not clear which are the classes.
    """
    folders = [name.split("/")[:-1] for name in names]
    depth = common_depth(folders)
    above = folders[0][:depth]
    bare = {path: path.split("/") for path in found.bare_folders}
    is_single = all(len(folder) == depth for folder in folders)
    lost = [bare[path] for path in bare.keys() - found.other_folders]
    if is_single and depth and any(parts[: depth - 1] == above[:-1] for parts in lost):
        depth, above, is_single = depth - 1, above[:-1], False  # one class folder has images, others have none
    if is_single:  # a single folder of images
        return ClassFolders([0] * len(names), [above[-1] if above else source.path.stem], {}, [])

    with_images = {folder[depth] for folder in folders if len(folder) > depth}
    at_level = {path: parts for path, parts in bare.items() if parts[:depth] == above and len(parts) > depth}
    empty = {
        parts[depth]: found.bare_folders[path] for path, parts in at_level.items() if parts[depth] not in with_images
    }
    classes = sorted(with_images | empty.keys())
    prefix = "".join(f"{part}/" for part in above)
    check_split(source, [f"{prefix}{name}" for name in classes])
    _check_depths(source, names, folders, depth)
    notes = _check_subfolders(source, folders, depth)
    if outside := sorted(bare.keys() - at_level.keys()):
        shown = ", ".join(printable(path) for path in outside[:SHOWN]) + (", ..." if len(outside) > SHOWN else "")
        notes.append(
            f"{source.path}: {len(outside):,} folders without images are outside {prefix} and ignored ({shown})"
        )
    number = {name: index for index, name in enumerate(classes)}
    bare_classes = {f"{prefix}{name}": reason for name, reason in sorted(empty.items())}
    return ClassFolders([number[folder[depth]] for folder in folders], classes, bare_classes, notes)


def _check_depths(source: FileSource, names: list[str], folders: list[list[str]], depth: int) -> None:
    """Raise InputError, naming two images, if images are at different depths."""
    depths = [len(folder) for folder in folders]
    if min(depths) == max(depths):
        return
    shallow, deep = depths.index(min(depths)), depths.index(max(depths))
    other = source.describe(names[deep])
    if depths[shallow] == depth:
        problem = f"is next to class folders, which contain {other}; move it into one of them"
    else:
        problem = f"is at another depth than {other}; allowed: images of all classes at one depth"
    raise InputError(f"{source.describe(names[shallow])}: {problem}, or list the labels in a dataset.json")


def _check_subfolders(source: FileSource, folders: list[list[str]], depth: int) -> list[str]:
    """Return a note if class folders contain several folders.

    Raises InputError if two class folders contain the same two folders: these may be the classes.
    """
    # The class folders that contain a folder, by its name and by the full path of images in them.
    by_name, by_path, children = defaultdict(set), defaultdict(set), defaultdict(set)
    for name, *inside in (folder[depth:] for folder in folders):
        if inside:
            by_name[inside[0]].add(name)
            by_path["/".join(inside)].add(name)
            children[name].add("/".join(inside))
    parents = by_name if sum(len(above) > 1 for above in by_name.values()) > 1 else by_path
    repeated = sorted(name for name, above in parents.items() if len(above) > 1)
    if len(repeated) > 1:  # one is normal, as in Tiny ImageNet's n01443537/images
        one, other = sorted(parents[repeated[0]], key=lambda name: (not name.lower().startswith("train"), name))[:2]
        where = "".join(f"{part}/" for part in folders[0][:depth])
        if len(folders[0]) > depth + 2:
            check_split(source, [f"{where}{one}/{name}" for name in repeated])
        both = f"{source.path}: {one} and {other} both contain folders {repeated[0]} and {repeated[1]}"
        advice = (
            f"if these are the classes, use {source.path / where / one}, otherwise list the labels in a dataset.json"
        )
        raise InputError(f"{printable(both)}; {printable(advice)}")
    for name, inside in sorted(children.items()):
        if len(inside) > 1:
            one, other = sorted(inside)[:2]
            return [printable(f"{source.path}: {name} is a class, and its folders {one} and {other} are not")]
    return []
