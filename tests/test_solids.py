import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from common.cli import parse
from common.io import read_json
from experiments import judge, preparation, solids
from experiments.convergence import Convergence
from experiments.encoder import train_encoder
from experiments.scoring import Scorer
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
    lamp = F.normalize(torch.tensor([[-1.0, 1, 0.3]]), dim=1)  # from the left
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


def test_maps_show_where_each_part_of_the_solid_is(monkeypatch):
    monkeypatch.setattr(solids, "BATCH_SIZE", 2)
    maps = solids.maps_of(1, per_class=3)
    assert maps.shape == (30, 4, 24, 24) and torch.equal(maps, solids.maps_of(1, per_class=3))
    for name, own in zip(SOLIDS, maps.split(3), strict=True):
        share, places = own[:, 0], own[:, 1:].permute(0, 2, 3, 1)
        assert ((share == 0) | (share == 1)).float().mean() > 0.8 and 0.05 < share.mean() < 0.5
        assert places[share == 0].abs().max() == 0
        surface = places[share == 1] + torch.tensor([0, TARGET_HEIGHT, 0])
        assert SOLIDS[name](surface).abs().quantile(0.9) < 0.06  # means of four places are almost on the surface
    # The share is that of the pictures: on a black floor only the solid is visible.
    _, _, scenes = next(iter(solids.scenes_of(1, 3)))
    glowing = render(SOLIDS["cone"], scenes._replace(floor_colour=torch.zeros(2, 3), solid_colour=torch.ones(2, 3)))
    visible = (glowing.amax(dim=3) > 0).float().view(2, 24, 2, 24, 2).mean(dim=(2, 4))
    assert (visible - maps[:2, 0]).abs().max() == 0


def test_patch_tokens_learn_maps(tmp_path, monkeypatch):
    """The product of two colours is a linear function of the patch tokens after training with maps, and not before."""
    monkeypatch.setattr(judge, "BATCH_SIZE", 32)
    generator = torch.Generator().manual_seed(0)
    blocks = torch.rand(512, 3, 8, 8, generator=generator)
    images = (F.interpolate(blocks, 16, mode="nearest") * 255).round()
    labels, product = torch.arange(512) % 2, images[:, :1] * images[:, 1:2] / 255**2
    spec = "timm/test_resnet:input=32:mean=0.5:std=0.5:output_stride=8"
    explained = []
    for maps in (None, product[:400]):
        path = tmp_path / "encoder.safetensors"
        train_encoder(path, spec, images[:400].to(torch.uint8), labels[:400], 100, maps=maps)
        network = untrained_encoder(f"{spec}:num_classes=2", 16).network.eval()
        network.load_state_dict(load_file(path))
        with torch.no_grad():
            tokens = network.forward_features(F.interpolate(images / 127.5 - 1, (32, 32), mode="bicubic"))
        tokens, wanted = (x.permute(0, 2, 3, 1).flatten(1, 2) for x in (tokens, F.adaptive_avg_pool2d(product, 4)))
        inputs = torch.cat([tokens, torch.ones_like(wanted)], dim=2).double()
        solution = torch.linalg.lstsq(inputs[:400].flatten(0, 1), wanted[:400].flatten(0, 1).double()).solution
        error = inputs[400:] @ solution - wanted[400:]
        explained.append(float(1 - error.square().mean() / wanted[400:].var()))
    assert explained[1] > explained[0] + 0.2


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


def test_the_preset_makes_data_tokens_and_judge(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "SOLIDS_PER_CLASS", (3, 2))
    monkeypatch.setattr(preparation, "SOLIDS_ENCODER_STEPS", 2)
    config = parse(Convergence, "", ["--preset", "solids", "--out", str(tmp_path / "out"), "--judge-steps", "2"])
    files = preparation.prepare_solids(tmp_path, config)
    images, labels = judge.load_images(files.data / "images")
    assert images.shape == (30, 3, 24, 24) and labels.bincount().tolist() == [3] * 10
    latents, tokens = (read_json(files.data / name / "dataset.json") for name in ("vae-sd", preparation.TOKENS))
    assert len(latents["labels"]) == 30 and tokens["encoder"]["tokens"] == 36
    scorer = Scorer(files.judges)  # reads encoder, judge and the held-out half
    assert scorer.score_images(images, labels)["distance"] > 0
