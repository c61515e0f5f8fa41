"""experiments/video_motion.py, video_geometry.py, video_views.py, bench_video_diffusion.py: their
measures on clips whose answer is known, and each once as a program, in miniature."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from inprocess import call

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))
import bench_video_diffusion
import video_diffusion as vd
import video_geometry
import video_motion
import video_views
from test_video_diffusion import SMALL


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with checkpoints of both worlds, after a few steps."""
    folder = tmp_path_factory.mktemp("video")
    for data in ("roll", "orbit"):
        call(vd, "--train", "--data", data, *SMALL, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def world():
    """world(data): scenes, cameras and clips of 8 scenes of full size, rendered once."""
    found = {}
    for data in ("roll", "orbit"):
        scenes, K, pose = vd.random_world(data, 8, 8, 32, np.random.default_rng(0))
        found[data] = scenes, K, pose, vd.render_clips(scenes, K, pose, 32, 32)
    return found


# ---- video_motion.py -----------------------------------------------------------------------------


def test_spheres_are_found(world):
    """In all frames, in their colours, and less than a pixel from where their centres are seen, but
    when one hides the other; noise has hardly any."""
    scenes, K, pose, clips = world["roll"]
    at, there, hues = video_motion.find(clips)
    assert there.float().mean() > 0.98
    true = (scenes.colour[:, :, None] - vd.HUES).abs().sum(-1).argmin(2)
    assert torch.equal(true.sort(1).values, hues)
    at, there, _ = video_motion.find(clips, true)
    seen = video_motion.project(K[:, :, None], pose[:, :, None], scenes.centre)
    off = (at - seen).norm(dim=-1)[there]
    assert off.median() < 0.4 and (off < 1).float().mean() > 0.85
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, clips.shape, dtype=torch.uint8, generator=generator)
    assert video_motion.find(noise)[1].float().mean() < 0.15


def test_places_on_the_table(world):
    """Seen at a pixel, and back."""
    scenes, K, pose, _ = world["roll"]
    seen = video_motion.project(K[:, :1], pose[:, :1], scenes.centre[:, 0])
    p = torch.cat([video_motion.to_table(seen[:, i:i + 1], K[:, 0], pose[:, 0],
                                         scenes.radius[:, i, None, None]) for i in (0, 1)], dim=1)
    assert torch.allclose(p, scenes.centre[:, 0, :, :2], atol=1e-4)


def test_fit_of_the_law(world):
    """The law's own paths fit; turned round half-way, or with frames in another order, they do not,
    and the distance is in pixels."""
    scenes, K, pose, clips = world["roll"]
    there = torch.ones(8, 8, 2, dtype=torch.bool)
    seen = video_motion.project(K[:, :, None], pose[:, :, None], scenes.centre)
    good = video_motion.fit_law(seen, there, K, pose, 30)
    assert good.median() < 0.5
    mixed = video_motion.fit_law(seen[:, [0, 5, 2, 7, 1, 6, 3, 4]], there, K, pose, 30)
    assert (mixed > 2 * good).float().mean() > 0.8
    assert mixed.median() > 1.5


def test_spread_by_hand():
    """Three answers a pixel apart in a row: 1, 1 and 2; who is missing does not count."""
    at = torch.arange(3.0).view(1, 3, 1, 1, 1) * torch.tensor([1.0, 0]) + torch.zeros(1, 3, 2, 2, 2)
    there = torch.ones(1, 3, 2, 2, dtype=torch.bool)
    assert video_motion.spread_of(at, there) == pytest.approx(4 / 3)
    there[0, 2] = False
    assert video_motion.spread_of(at, there) == pytest.approx(1)


def test_motion_in_miniature(trained):
    said = call(video_motion, "--model", "out/video_diffusion/model.pt", "--num", 3, cwd=trained)
    for row in ("real clips", "drawn, 0 frames given", "drawn, 1 frames given", "noise",
                "drawn, 2 given, frames not joined"):
        assert re.search(rf"\| {row} \| [\d.]+ \| [\d.]+ px \|", said), said
    assert (trained / "out/video_motion/worst.png").exists()


# ---- video_geometry.py, video_views.py -----------------------------------------------------------


def test_geometry_knows_what_is_right(world):
    """The rows that anchor the table: real renders are best in everything, an empty table has no
    spheres and shadows but its lines, and moved pictures have none of it."""
    scenes, K, pose, real = world["orbit"]
    empty, bright = (vd.render_clips(video_geometry.without(scenes, what), K, pose, 32, 32)
                     for what in ("spheres", "shadows"))
    measure = lambda x: video_geometry.measures(x, real, empty, bright, scenes, K, pose)
    psnr, sharp, off, found, lines, shadows = measure(real)
    assert psnr > 60 and (sharp, off, found) == (1, 0, 1) and lines < 0.5
    assert shadows == pytest.approx(1, abs=1e-3)
    psnr, _, _, found, lines, shadows = measure(empty)
    assert psnr < 25 and found < 0.1 and lines < 0.5 and shadows < 0.4
    *_, shadows = measure(bright)
    assert shadows == pytest.approx(0, abs=0.02)
    moved = measure(real.roll(4, 4))
    assert moved[2] == pytest.approx(4, abs=0.7) and moved[4] > 2 * lines and moved[0] < psnr + 3
    blurred = torch.nn.functional.avg_pool2d(real.float().flatten(0, 1), 3, 1, 1).byte()
    assert measure(blurred.view_as(real))[1] < 0.8


def test_psnr_by_hand():
    x = torch.zeros(1, 1, 1, 2, 2, dtype=torch.uint8)
    assert video_geometry.psnr(x + 10, x).item() == pytest.approx(28.13, abs=0.01)


def test_epipolar_lines(world):
    """Whatever its distance, a point of the first view is seen on its line, and others are not."""
    _, K, pose, _ = world["orbit"]
    X = torch.tensor([[0.3, -0.2, 0.1], [0.1, 0.4, 0.5]])
    seen = video_motion.project(K[0, :, None], pose[0, :, None], X)  # (F, 2, 2)
    for b in range(2):
        line = video_views.epipolar_line(K[0], pose[0], 0, 3, *seen[0, b].tolist())
        assert video_views.distance_to_line(seen[3, b], line) < 0.05
        assert video_views.distance_to_line(seen[3, 1 - b], line) > 0.5


def test_attention_is_recorded(trained):
    """It sums to 1 over all patches of all frames, and the network is as it was."""
    args = vd.parse_args([], vd.load_checkpoint(
        trained / "out/video_diffusion_orbit/model.pt")["config"])
    model, attend = vd.build(args), vd.attend
    x, t = torch.randn(1, 4, 3, 16, 16), torch.full((1, 4), 500)
    found = video_views.record_attention(model, x, t, torch.randn(1, 4, vd.RAYS, 4, 4))
    assert found.shape == (1, 4, 4, 4, 4, 4, 4) and vd.attend is attend
    assert torch.allclose(found.sum(dim=(4, 5, 6)), torch.ones(1, 4, 4, 4), atol=1e-4)


def test_orbit_experiments_in_miniature(trained):
    model = "out/video_diffusion_orbit/model.pt"
    said = call(video_geometry, "--model", model, "--num", 3, cwd=trained)
    for row in ("real renders", "drawn", "drawn, one sampling step", "the empty table", "noise"):
        assert f"| {row} | " in said
    said = call(video_views, "--model", model, "--num", 3, cwd=trained)
    assert "| first and last given | " in said
    for name in ("epipolar", "attention", "between"):
        assert (trained / f"out/video_views/{name}.png").stat().st_size > 1000


def test_bench_in_miniature(tmp_path):
    said = call(bench_video_diffusion, *SMALL, "--rounds", 1, cwd=tmp_path)
    assert "| video_diffusion.py | " in said
