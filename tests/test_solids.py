import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from experiments import solids
from experiments.encoder import train_encoder
from experiments.solids import BOUND, SOLIDS, TARGET_HEIGHT, Scenes, draw_scenes, render
from models.encoders import untrained_encoder
from tests.conftest import ENCODER


@pytest.fixture(params=SOLIDS)
def solid(request):
    return SOLIDS[request.param]


def test_a_distance_is_never_too_large(solid):
    """A ray advances by the distance, so it must not jump over the solid: the distance has slope 1 at most."""
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(20000, 3, generator=generator) * 4 - torch.tensor([2.0, 1, 2])
    b = a + torch.randn(20000, 3, generator=generator) * 0.1
    slope = (solid(a) - solid(b)).abs() / (a - b).norm(dim=1)
    assert slope.max() < 1.001 and slope.median() > 0.4


def test_a_solid_stands_on_the_floor_inside_its_bound(solid):
    p = torch.rand(200000, 3, generator=torch.Generator().manual_seed(0)) * 4 - torch.tensor([2.0, 0, 2])
    inside = p[solid(p) < 0]
    assert len(inside) > 500 and inside[:, 1].min() < 0.15
    assert (inside - torch.tensor([0, TARGET_HEIGHT, 0])).norm(dim=1).max() < BOUND


def test_distances_of_simple_solids():
    p = torch.tensor([[0.0, 0.85, 2.0], [0, 0.7, 2], [0, 0.75, 2], [0, 0.32, 0]])
    found = [solids.sphere(p)[0], solids.cube(p)[1], solids.cylinder(p)[2], solids.torus(p)[3]]
    assert torch.stack(found).tolist() == pytest.approx([1.15, 1.3, 1.34, 0.36], abs=1e-6)
    above_cone = solids.cone(torch.tensor([[0.0, 0, 0], [0, 2, 0]]))
    assert above_cone.tolist() == pytest.approx([0, 0.3 * 0.9 / math.hypot(0.9, 1.7)])


def test_a_picture_has_the_colours_of_its_scene_and_a_shadow_away_from_the_light():
    lamp = torch.nn.functional.normalize(torch.tensor([[-1.0, 1, 0.3]]), dim=1)  # from the left
    red, white = torch.tensor([[0.8, 0, 0]]), torch.tensor([[0.8, 0.8, 0.8]])
    scene = Scenes(torch.zeros(1), lamp, red, white)
    picture = render(solids.sphere, scene)[0].double()
    assert picture.shape == (48, 48, 3)
    middle = picture[24, 24]
    assert middle[0] > 2 * middle[1] and (picture[0, 0] - picture[0, 0, 0]).abs().max() == 0
    assert picture[28:36, 36:44].mean() < 0.9 * picture[28:36, 4:12].mean()
    turned = render(solids.sphere, scene._replace(yaw=torch.ones(1)))[0].double()
    assert (turned - picture).abs().max() <= 2  # the light does not turn with the solid


def test_files(tmp_path, monkeypatch):
    monkeypatch.setattr(solids, "PER_CLASS", (3, 1))
    monkeypatch.setattr(solids, "BATCH_SIZE", 2)
    for half in (0, 1):
        solids.write_images(tmp_path / str(half), half)
    files = sorted((tmp_path / "0").glob("*/*.png"))
    assert len(files) == 30 and len(list((tmp_path / "1").glob("*/*.png"))) == 10
    assert sorted(folder.name for folder in (tmp_path / "0").iterdir()) == list(SOLIDS)
    pictures = {np.array(Image.open(path)).tobytes() for path in [*files, *(tmp_path / "1").glob("*/*.png")]}
    assert len(pictures) == 40  # none twice, in neither part
    cubes = render(SOLIDS["cube"], draw_scenes(2, torch.Generator().manual_seed(4))).numpy()
    assert np.array_equal(cubes[1], np.array(Image.open(tmp_path / "0" / "cube" / "0001.png")))


def test_factors_are_those_of_the_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(solids, "BATCH_SIZE", 2)
    solids.write_images(tmp_path, 1, per_class=3)
    factors = solids.factors_of(1, per_class=3)
    for row, path in zip(factors, sorted(tmp_path.glob("*/*.png")), strict=True):
        yaw, light, solid, floor = row[:1], row[None, 1:4], row[None, 4:7] ** 2.2, row[None, 7:] ** 2.2
        picture = render(SOLIDS[path.parent.name], Scenes(yaw, light, solid, floor))[0].int().numpy()
        assert abs(picture - np.array(Image.open(path))).max() <= 1


def test_an_encoder_learns_factors_as_well_as_classes(tmp_path):
    generator = torch.Generator().manual_seed(0)
    red, labels = torch.rand(256, generator=generator), torch.arange(256) % 2
    images = torch.zeros(256, 3, 16, 16)
    images[:, 0], images[:, 1] = red[:, None, None], labels[:, None, None]
    pixels = (images * 255).round()
    train_encoder(tmp_path / "encoder.safetensors", ENCODER, pixels.to(torch.uint8), labels, 150, factors=red[:, None])
    network = untrained_encoder(f"{ENCODER}:num_classes=3", 16).network.eval()
    network.load_state_dict(load_file(tmp_path / "encoder.safetensors"))
    outputs = network(pixels / 127.5 - 1)
    assert (outputs[:, :2].argmax(1) == labels).float().mean() > 0.95
    assert torch.corrcoef(torch.stack([outputs[:, 2], red]))[0, 1] > 0.9
