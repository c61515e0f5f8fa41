"""What experiments on clips measure, on clips whose answer is known; each once in miniature."""

import numpy as np
import pytest
import torch
from inprocess import call
from test_lessons import LESSONS

import video_diffusion as vd
import video_geometry
import video_motion
import video_views


def world(data):
    scenes, K, pose = vd.random_world(data, 8, 8, 32, np.random.default_rng(0))
    seen = video_motion.project(K[:, :, None], pose[:, :, None], scenes.centre)
    return scenes, K, pose, vd.render_clips(scenes, K, pose, 32, 32), seen


def test_motion():
    """Spheres are found within a pixel, noise has none; the law's own paths fit, others do not."""
    scenes, K, pose, clips, seen = world("roll")
    hues = (scenes.colour[:, :, None] - vd.HUES).abs().sum(-1).argmin(2)
    assert torch.equal(hues.sort(1).values, video_motion.find(clips)[2])
    at, there, _ = video_motion.find(clips, hues)
    off = (at - seen).norm(dim=-1)[there]
    assert there.float().mean() > 0.98 and off.median() < 0.4 and (off < 1).float().mean() > 0.85
    assert video_motion.find(torch.randint_like(clips, 256))[1].float().mean() < 0.15
    p = video_motion.to_table(seen[:, 0, :1], K[:, 0], pose[:, 0], scenes.radius[:, :1, None])
    assert torch.allclose(p, scenes.centre[:, 0, :1, :2], atol=1e-4)
    good, mixed = (video_motion.fit_law(x, torch.ones_like(there), K, pose)
                   for x in (seen, seen[:, [0, 5, 2, 7, 1, 6, 3, 4]]))
    assert good.median() < 0.1 and good.max() < 0.5 and mixed.min() > 1.5
    three = torch.arange(3.0).view(1, 3, 1, 1, 1) * torch.tensor([1.0, 0])  # 1, 1 and 2 apart
    there = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool().view(2, 1, 3, 1, 1)
    assert [video_motion.spread_of(three, x) for x in there] == pytest.approx([4 / 3, 1])


def test_geometry():
    """Real renders are best, an empty table has its lines only, moved pictures have none of it."""
    scenes, K, pose, real, seen = world("orbit")
    empty, bright = (vd.render_clips(video_geometry.without(scenes, what), K, pose, 32, 32)
                     for what in ("spheres", "shadows"))
    blurred = torch.nn.functional.avg_pool2d(real.float().flatten(0, 1), 3, 1, 1).byte()
    r, e, b, m, soft = (video_geometry.measures(x, real, empty, bright, scenes, K, pose)
                        for x in (real, empty, bright, real.roll(4, 4), blurred.view_as(real)))
    assert r[:4] == pytest.approx([78.13, 1, 0, 1], 1e-3) and r[4] < 0.5 and 0.99 < r[5] < 1.01
    assert e[0] < 25 and e[3] < 0.1 and e[4] < 0.5 and e[5] < 0.4 and abs(b[5]) < 0.02
    assert abs(m[2] - 4) < 0.7 and m[4] > 2 * e[4] and m[0] < e[0] + 3 and soft[1] < 0.8
    line = video_views.epipolar_line(K[0], pose[0], 0, 3, *seen[0, 0, 0].tolist())
    own, other = (video_views.distance_to_line(place, line) for place in seen[0, 3])
    assert own < 0.05 and other > 0.5


def test_in_miniature(tmp_path):
    """Their tables and pictures; attention sums to 1 over all patches of all frames."""
    flags = [*LESSONS["video_diffusion"].split(), "--device", "cpu"]
    for data, *scripts in (("roll", video_motion), ("orbit", video_geometry, video_views)):
        call(vd, "--train", "--steps", 2, "--data", data, "--out", data, *flags, cwd=tmp_path)
        for script in scripts:
            said = call(script, "--model", f"{data}/model.pt", "--num", 2, cwd=tmp_path)
            assert said.count("|\n") >= 8
    x, rays = torch.randn(1, 4, 3, 16, 16), torch.randn(1, 4, vd.RAYS, 4, 4)
    args = vd.parse_args([], vd.load_checkpoint(tmp_path / "orbit/model.pt")["config"])
    found = video_views.record_attention(vd.build(args), x, torch.full((1, 4), 500), rays)
    assert (found.sum(dim=(4, 5, 6)) - 1).abs().max() < 1e-4
