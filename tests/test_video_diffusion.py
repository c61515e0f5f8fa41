"""video_diffusion.py: the renderer against a ray tracer of a few lines, motion against its laws,
the network against what it must not see, Muon against an SVD, the sampler against Gaussians."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import video_diffusion as vd
from inprocess import call

SMALL = ("--scenes 12 --frames 4 --height 16 --width 16 --batch-size 4 --picture-steps 1 --steps 3 "
         "--every 3 --sample-steps 2 --num 3 --device cpu").split()


def test_cameras():
    """Poses are right-handed, the target is in the middle, up is up and right is right. Points on a
    patch's ray are seen in its middle. Pluecker coordinates name the line; the planes are crossed
    where the ray has their height; lengths are in units of the first camera's distance."""
    def project(K, pose, X):  # K R^T (X - c), as the docstring has it
        p = K @ pose[..., :3].mT @ (X - pose[..., 3])[..., None]
        return p[..., :2, 0] / p[..., 2:, 0]

    pose = vd.look_at(torch.tensor([3.0, 0, 2]), target := torch.tensor([0, 0.5, 0.1]))
    moved = target + torch.tensor([[0, 0, 0], [0, 0, 0.1], [0, 0.1, 0]])
    at = project(torch.diag(torch.tensor([10.0, 10, 1])), pose, moved)
    assert torch.allclose(pose[:, :3].mT @ pose[:, :3], torch.eye(3), atol=1e-6)
    assert torch.det(pose[:, :3]) > 0.99 and torch.allclose(at[0], torch.zeros(2), atol=1e-5)
    assert at[1, 1] < -0.1 and at[2, 0] > 0.1  # seen from +x, y is right
    g = torch.Generator().manual_seed(0)
    eye = torch.randn(3, 2, 3, generator=g) + torch.tensor([0, 0, 4.0])
    pose = vd.look_at(eye, torch.randn(3, 2, 3, generator=g) * 0.2)
    K = torch.tensor([[21.0, 0, 7], [0, 27, 11], [0, 0, 1]]).expand(3, 2, 3, 3)
    v, u = torch.meshgrid(torch.arange(3) + 0.5, torch.arange(4) + 0.5, indexing="ij")
    X = pose[:, :, None, None, :, 3] + 1.7 * vd.pixel_rays(K, pose, 3, 4, 0.25)
    seen = project(K[:, :, None, None], pose[:, :, None, None], X)
    assert torch.allclose(seen, 4 * torch.stack([u, v], -1), atol=1e-3)
    rays = vd.camera_rays(K, pose, 12, 16, 4).movedim(2, -1)  # (n, F, 3, 4, 34)
    d, c = rays[..., :3], pose[..., 3] / pose[:, :1, :, 3].norm(dim=-1, keepdim=True)
    c = c[:, :, None, None]
    assert rays.shape[-1] == vd.RAYS
    assert torch.allclose(torch.linalg.cross(c + 1.7 * d, d), rays[..., 3:6], atol=1e-5)
    for k, z in ((6, 0.0), (8, 0.15)):
        X = c + (z - c[..., 2:]) / d[..., 2:] * d
        near = (d[..., 2] < -0.1) & (X[..., :2].abs() < 2).all(-1)
        assert near.any() and torch.allclose(X[near][:, :2], rays[..., k:k + 2][near], atol=1e-5)
    angle = torch.cat([math.pi * 2**i * rays[..., 6:10] for i in range(3)], -1)
    assert torch.allclose(rays[..., 10:], torch.cat([angle.sin(), angle.cos()], -1), atol=1e-4)
    level = vd.look_at(eye, eye + torch.tensor([1.0, 0, 0.5]))  # such rays meet no plane
    assert vd.camera_rays(K, level, 12, 16, 4)[:, :, 6:10].abs().max() == 2
    pose = torch.cat([pose[..., :3], 5 * pose[..., 3:]], -1)
    assert torch.allclose(vd.camera_rays(K, pose, 12, 16, 4).movedim(2, -1), rays, atol=1e-5)


def hit(centre, radius, o, d):
    """Smallest s > 0 with |o + s d - c| = r, from the roots of the polynomial; or inf."""
    roots = np.roots([d @ d, 2 * d @ (o - centre), (o - centre) @ (o - centre) - radius**2])
    return min((s.real for s in roots if abs(s.imag) < 1e-9 and s.real > 1e-6), default=math.inf)


def trace(centre, radius, colour, sun, tone, turn, o, d):
    """Colour (3,) along one ray, in float64."""
    s = [hit(centre[0], radius[0], o, d), hit(centre[1], radius[1], o, d), math.inf]
    if d[2] < 0:
        x, y, _ = o - o[2] / d[2] * d
        at = (x + 1j * y) * np.exp(-1j * turn)  # turned back
        s[2] = -o[2] / d[2] if max(abs(at.real), abs(at.imag)) <= 1.2 else math.inf
    first = int(np.argmin(s))
    if s[first] == math.inf:
        return np.array([0.10, 0.12, 0.18])
    point = o + s[first] * d
    lit = all(hit(centre[i], radius[i], point, sun) == math.inf for i in {0, 1} - {first})
    if first == 2:
        tiles = int((at.real + 1.2) // 0.8) + int((at.imag + 1.2) // 0.8)
        return np.full(3, tone[tiles % 2] * (0.35 + 0.65 * lit))
    normal = (point - centre[first]) / radius[first]
    return colour[first] * (0.35 + 0.65 * lit * max(0, normal @ sun))


@pytest.mark.parametrize("data", ["roll", "orbit"])
def test_renderer(data):
    """Two frames, ray by ray; rays that graze an edge may differ. A pixel is the mean of 2 x 2."""
    scenes, K, pose = vd.random_world(data, 1, 2, 14, np.random.default_rng(4))
    found, wrong = vd.trace_rays(scenes, K, pose, 14, 14, fine=1)[0], 0
    centre, *others = (a[0].double().numpy() for a in scenes)
    for f, i, j in np.ndindex(2, 14, 14):
        R, c = pose[0, f].double().numpy()[:, :3], pose[0, f, :, 3].double().numpy()
        d = R @ np.linalg.inv(K[0, f].double().numpy()) @ [j + 0.5, i + 0.5, 1]
        want = trace(centre[f], *others, c, d / np.linalg.norm(d))
        wrong += np.abs(found[f, :, i, j].numpy() - want).max() > 1e-3
    assert wrong <= 3
    large = vd.trace_rays(scenes, K * torch.tensor([2.0, 2, 1])[:, None], pose, 28, 28, fine=1)
    mean = F.avg_pool2d(large[0], 2)
    assert torch.allclose(vd.trace_rays(scenes, K, pose, 14, 14)[0], mean, atol=1e-3)


def test_motion_obeys_the_laws(monkeypatch):
    """Alone, a sphere keeps its velocity and is mirrored at the edge. 200 pairs without an edge
    keep momentum and energy, do not overlap, and change along the line of centres alone."""
    p, v = torch.tensor([[[0.0, -0.5], [0.0, 0.9]]]), torch.tensor([[[0.2, 0.0], [0.0, 0.0]]])
    x = vd.roll(p, v, torch.tensor([[0.3, 0.2]]), 10, fine=100)[0, :, 0]
    free = 0.2 * torch.arange(10)
    assert torch.allclose(x[:, 0], torch.minimum(free, 2 * 0.9 - free), atol=0.01)
    assert (x[:, 1] == -0.5).all()
    monkeypatch.setattr(vd, "TABLE", 100.0)
    rng = np.random.default_rng(0)
    radius = torch.from_numpy(rng.uniform(0.2, 0.4, (200, 2))).float()
    p = torch.tensor([[[-0.5, 0.0], [0.5, 0.0]]]).expand(200, -1, -1)
    v = torch.from_numpy(rng.uniform(-0.015, 0.015, (200, 2, 2))).float()
    path = vd.roll(p, v + torch.tensor([[0.05, 0.0], [-0.05, 0.0]]), radius, 16, fine=64)
    before, after = path[:, 1] - path[:, 0], path[:, -1] - path[:, -2]
    assert torch.allclose(before.sum(1), after.sum(1), atol=1e-5)
    assert torch.allclose(before.square().sum((1, 2)), after.square().sum((1, 2)), atol=1e-5)
    gap = path[:, :, 0] - path[:, :, 1]  # at contact |a + b|^2 - |a - b|^2 = 4 a b
    assert (gap.norm(dim=-1) > 2 * radius.prod(-1).sqrt()[:, None] - 0.01).all()
    change = after[:, 0] - before[:, 0]
    n = F.normalize(gap[torch.arange(200), gap.norm(dim=-1).argmin(1)], dim=-1)
    across = (change[:, 0] * n[:, 1] - change[:, 1] * n[:, 0]).abs()
    met = change.norm(dim=-1) > 0.02
    assert met.sum() > 100 and (across < 0.2 * change.norm(dim=-1))[met].all()


@pytest.mark.parametrize("data", ["roll", "orbit"])
def test_random_worlds(data):
    """Spheres stand on the table and apart, colours differ; in one world the spheres move, in the
    other the camera; test scenes are others than training scenes, and the same again."""
    scenes, K, pose = vd.random_world(data, 200, 6, 32, np.random.default_rng(0))
    p, z, eye = scenes.centre[..., :2], scenes.centre[..., 2], pose[..., 3]
    gap, speed = (p[:, :, 0] - p[:, :, 1]).norm(dim=-1), (p[:, 1] - p[:, 0]).norm(dim=-1)
    assert torch.equal(z, scenes.radius[:, None].expand_as(z))
    assert (gap > 2 * scenes.radius.prod(-1).sqrt()[:, None] - 0.06).all()
    assert (p.abs().amax(-1) <= vd.TABLE - scenes.radius[:, None] + 0.04).all()
    assert (scenes.colour[:, 0] != scenes.colour[:, 1]).any(1).all()
    if data == "roll":
        assert (speed < 0.25).all() and (speed > 0.07).float().mean() > 0.9
        assert (eye == eye[0, 0]).all() and (scenes.turn == 0).all()
    else:
        azimuth = torch.rad2deg(torch.atan2(eye[..., 1], eye[..., 0]))
        step = (azimuth.diff(dim=1) + 180) % 360 - 180
        assert azimuth[:, 0].abs().max() < 1e-4 and (step > 0).float().mean() > 0.3
        assert step.abs().min() > 14.9 and step.abs().max() < 45.1
        assert speed.max() == 0 and scenes.turn.std() > 0.3
        eye = vd.random_world("circle", 2, 6, 32, np.random.default_rng(0))[2][..., 3]
        assert torch.allclose(eye[:, 3, :2], -eye[:, 0, :2], atol=1e-5)  # half-way round
    args = vd.parse_args([*SMALL, "--data", data])
    train, again, test = (vd.load_clips(args, part, 2)[0] for part in ("train", "train", "test"))
    assert torch.equal(train, again) and not torch.equal(train, test)


def test_own_clips(tmp_path, capsys):
    """A tenth is for testing; wrong files are refused in one line."""
    clips = np.arange(20, dtype=np.uint8).repeat(3 * 8 * 4).reshape(20, 3, 8, 4, 1)
    args = vd.parse_args(["--data", str(tmp_path / "x.npz"), "--device", "cpu"])
    # no integers, no frames, odd height, four channels, too few
    for wrong in (clips / 2, clips[:, 0], clips[:, :, 1:], clips.repeat(4, axis=4), clips[:1]):
        np.savez(tmp_path / "x.npz", clips=wrong)
        with pytest.raises(SystemExit):
            vd.load_clips(args, "train", 5)
        assert capsys.readouterr().err.count("\n") == 1
    np.savez(tmp_path / "x.npz", clips=clips)
    train, K, _ = vd.load_clips(args, "train", 5)
    assert train.shape == (18, 3, 1, 8, 4) and K.shape == (18, 3, 3, 3)
    assert {*train[:, 0, 0, 0, 0].tolist()} == {*range(20)} - {0, 10}
    assert vd.load_clips(args, "test", 5)[0][:, 0, 0, 0, 0].tolist() == [0, 10, 0, 10, 0]


def network(random_time=True):
    """A small network whose zero-initialised layers are random; those over time if random_time."""
    torch.manual_seed(0)
    net = vd.VideoUNet(3, 2, 16, (1, 1), 1, 2)
    for name, p in net.named_parameters():
        over_time = ".conv3." in name or ".attention.out." in name
        if not p.any() and (random_time or not over_time):
            torch.nn.init.normal_(p, std=0.2)
    x, rays = torch.randn(2, 4, 3, 8, 8), torch.randn(2, 4, vd.RAYS, 4, 4)
    return net, {"x": x, "t": torch.randint(1, 1000, (2, 4)), "rays": rays}


def pile(clip):
    """The frames of a clip, each as a clip of one frame."""
    return {key: a.flatten(0, 1)[:, None] for key, a in clip.items()}


def test_a_clip_starts_as_a_pile_of_pictures():
    """Before training the layers over time change nothing; after two steps all of them learn."""
    net, clip = network(random_time=False)
    assert torch.allclose(net(**clip), net(**pile(clip)).view_as(clip["x"]), atol=1e-5)
    opt = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(2):
        opt.zero_grad()
        net(**clip).square().mean().backward()
        opt.step()
    assert all(p.grad.any() for p in net.parameters())


@torch.no_grad()
def test_who_sees_whom():
    """What changes in one frame changes the answer of its clip alone, there of all frames; and
    their order counts."""
    (net, clip), order = network(), torch.tensor([2, 0, 3, 1])
    for what in clip:
        other = {key: a.clone() for key, a in clip.items()}
        other[what][0, 1] = 900 - other[what][0, 1]
        changed = (net(**clip) - net(**other)).abs().amax(dim=(2, 3, 4)) > 1e-6
        assert changed[0].all() and not changed[1].any()
    turned = net(**{key: a[:, order] for key, a in clip.items()})
    assert (net(**clip)[:, order] - turned).abs().max() > 1e-3


@torch.no_grad()
def test_attention_by_hand():
    """One head, position by position: all see all positions of all frames."""
    torch.manual_seed(0)
    block, (B, N, C, h, w) = vd.TimeAttention(8, 1), (2, 3, 8, 2, 3)
    torch.nn.init.normal_(block.out.weight)
    x, rays = torch.randn(B * N, C, h, w), torch.randn(B * N, vd.RAYS, h, w)
    norm, ray, change = (a.view(B, N, C, h, w) for a in (
        block.norm(x), block.ray(rays), block(x, rays, N) - x))
    for b in range(B):
        qkv = {}
        for f, i, j in np.ndindex(N, h, w):
            code = vd.time_embedding(torch.tensor([f, i, j]), 32).flatten()
            q, k, v = block.qkv(norm[b, f, :, i, j] + block.place(code)).split(C)
            qkv[f, i, j] = q + ray[b, f, :, i, j], k + ray[b, f, :, i, j], v
        for (f, i, j), (q, _, _) in qkv.items():
            weight = torch.stack([q @ k / C**0.5 for _, k, _ in qkv.values()]).softmax(0)
            want = block.out(sum(a * v for a, (_, _, v) in zip(weight, qkv.values())))
            assert torch.allclose(change[b, f, :, i, j], want, atol=1e-4)


def test_attention_in_training_is_that_in_sampling():
    q, k, v = torch.randn(3, 2, 2, 5, 4)
    assert torch.allclose(vd.attend(q, k, v), vd.attend(q.requires_grad_(), k, v), atol=1e-5)


@pytest.mark.parametrize("shape", [(36, 4), (4, 6), (8, 4, 3, 3)], ids=str)
def test_muon(shape):
    """A step goes along the singular vectors of the momentum (U, V of its decomposition U S V^T),
    with all singular values near 1, times lr, and more for tall matrices; no gradient, no step."""
    torch.manual_seed(0)
    p, q = torch.nn.Parameter(torch.randn(shape)), torch.nn.Parameter(torch.ones(shape))
    opt, m = vd.Muon([p, q], 0.1), torch.zeros(shape)
    for _ in range(2):
        before, p.grad = p.detach().clone(), torch.randn(shape)
        m = 0.95 * m + 0.05 * p.grad
        opt.step()
        U, _, V = torch.linalg.svd((0.05 * p.grad + 0.95 * m).flatten(1), full_matrices=False)
        step = (1 - 0.1 * 0.3) * before - p.detach()  # weight decay of 0.3
        values = U.mT @ step.flatten(1) @ V.mT / 0.1
        values = values / max(1, U.shape[0] / V.shape[1]) ** 0.5
        assert ((values.diag() > 0.5) & (values.diag() < 1.3)).all()
        assert (values - values.diag().diag()).abs().max() < 1e-3
    assert (q == 1).all()


def test_loss_by_hand():
    """Given are the first 0 to 4 of 8 frames, and the last in a tenth of the clips. Given frames
    are shown as they are, with t = 0, and do not count; a clip counts 1 to 5 times."""
    torch.manual_seed(0)
    given = vd.draw_given(8000, 8, "cpu")
    assert (given[:, :-1].int().diff(dim=1) <= 0).all()
    counts = given[:, :-1].sum(1).bincount() / 8000
    assert torch.allclose(counts, torch.full((5,), 0.2), atol=0.02)
    assert given[:, -1].float().mean().item() == pytest.approx(0.1, abs=0.01)
    x0, eps, abar = torch.rand(3, 3, 1, 2, 2), torch.randn(3, 3, 1, 2, 2), vd.cosine_abar().float()
    t, a = torch.tensor([[0, 0, 500], [300, 300, 300], [50, 50, 50]]), abar[500]

    def model(x, time, rays):
        assert torch.equal(x[0, :2], x0[0, :2]) and torch.equal(time, t) and rays == "rays"
        assert torch.allclose(x[0, 2], a**0.5 * x0[0, 2] + (1 - a) ** 0.5 * eps[0, 2])
        return x0 + torch.tensor([[9.0, 9, 1], [2, 3, 4], [1, 1, 1]])[:, :, None, None, None]

    loss = vd.video_loss(model, x0, "rays", t, eps, abar)
    low, middle, high = (abar[i] / (1 - abar[i]) for i in (500, 300, 50))  # signal to noise
    assert low < 1 < middle < 5 < high
    assert loss.item() == pytest.approx((1 + middle.item() * (4 + 9 + 16) / 3 + 5) / 3, rel=1e-5)


def test_what_a_step_sees(tmp_path, monkeypatch):
    """Pictures: one frame of each of many clips. Clips: one t, or 0 if given. Every second one has
    much noise."""
    clips, seen = torch.zeros(300, 4, 3, 8, 8, dtype=torch.uint8), []
    clips += torch.arange(4).view(4, 1, 1, 1).byte()  # frame f shows f, of channel 1 the clip
    clips[:, :, 1] = (torch.arange(300) % 200).byte().view(300, 1, 1, 1)

    def spy(model, x0, rays, t, eps, abar):
        assert x0.shape == eps.shape and x0.shape[:2] == t.shape == rays.shape[:2]
        seen.append((x0[:, :, :2, 0, 0], rays.flatten(2).any(2), t))
        return sum(p.sum() for p in model.parameters()) * 0

    monkeypatch.setattr(vd, "video_loss", spy)
    load, camera = vd.load_clips, vd.fixed_camera(300, 4, 8)
    monkeypatch.setattr(vd, "load_clips", lambda args, split, num: (
        (clips, *camera) if split == "train" else load(args, split, num)))
    flags = "--steps 40 --every 40 --batch-size 64 --picture-every 4"
    call(vd, "--train", *SMALL, *flags.split(), cwd=tmp_path)
    shapes = [t.shape for _, _, t in seen]
    assert shapes == [(256, 1) if i == 1 or i % 4 == 0 else (64, 4) for i in range(1, 41)]
    for frame, clip in ((x * 127.5 + 127.5).round().unbind(2) for x, _, _ in seen):
        if frame.shape[1] == 1:  # all frames, and hardly any clip twice
            assert frame.unique().tolist() == [0, 1, 2, 3] and len(clip.unique()) > 120
        else:
            assert (frame == torch.arange(4)).all() and (clip == clip[:, :1]).all()
    pictures, films = ([t for _, _, t in seen if t.shape[1] == n] for n in (1, 4))
    assert all(((t == 0) | (t == t.amax(1, keepdim=True))).all() for t in films)
    for parts in (pictures, films):
        much = torch.stack([t.amax(1) for t in parts]) > 500
        assert much[:, ::2].float().mean() > 0.94 and 0.45 < much[:, 1::2].float().mean() < 0.55
    assert all((t > 0).all() for t in pictures)
    known = (torch.stack(films) == 0).float().mean((0, 1))
    assert torch.allclose(known, torch.tensor([2 / 3, 1 / 3, 0, 0.1]), atol=0.05)
    rays = torch.cat([rays.flatten() for _, rays, _ in seen]).float()
    assert 0.87 < rays.mean() < 0.93  # 10 % withheld


RHO, SD = 0.8, 0.1


def exact(x, t, rays):
    """E[x_0 | x_t] of frames that are normal with deviation SD: of a single one, or of the second
    of two with correlation RHO, of which the first is given."""
    two = x.shape[1] == 2
    mean, var = (RHO * x[:, :1], (1 - RHO**2) * SD**2) if two else (0.0, SD**2)
    assert not two or (t[:, 0] == 0).all()
    a = vd.cosine_abar().tolist()[t[0, -1]]
    return mean + a**0.5 * var / (a * var + 1 - a) * (x - a**0.5 * mean)


def test_from_nothing():
    """The first frame is a picture, the second is drawn given it: right alone and together; where
    something is given, it stays."""
    torch.manual_seed(0)
    args, given = SimpleNamespace(sample_steps=100, guidance=1.0), torch.zeros(6000, 2).bool()
    given[4000:, 0] = True
    clean = torch.full((6000, 2, 1, 1, 1), 0.15)
    before = clean.clone(), given.clone()
    found = vd.sample(exact, clean, given, torch.zeros(6000, 2), args)
    assert torch.equal(clean, before[0]) and torch.equal(given, before[1])  # not changed in place
    pairs, rest = found.flatten(1).split([4000, 2000])
    assert pairs.std(0).tolist() == pytest.approx([SD, SD], rel=0.15)
    assert pairs.T.corrcoef()[0, 1].item() == pytest.approx(RHO, abs=0.05)
    assert (rest[:, 0] == 0.15).all() and rest[:, 1].mean().item() == pytest.approx(0.12, abs=0.01)


@pytest.mark.parametrize("known", [False, True])
def test_sampler_on_gaussians(known):
    """The network is exact. Few steps end in the mean and deviation that follow from Bayes' rule,
    step by step; many nearly in those of a single frame, or of frame 2 given frame 1: the variance
    of q is right for data that are one point, and a little too small for others."""
    abar = vd.cosine_abar().tolist()
    clean = torch.full((8000, 1 + known, 1, 1, 1), 0.15)
    given = torch.tensor([known, False][-1 - known:]).expand(8000, -1)
    mean, var = (RHO * 0.15, (1 - RHO**2) * SD**2) if known else (0.0, SD**2)
    for steps in (3, 7, 250):
        torch.manual_seed(steps)
        args = SimpleNamespace(sample_steps=steps, guidance=1.0)
        found = vd.sample(exact, clean, given, torch.zeros(given.shape), args)
        m, v = 0.0, 1.0
        levels = [abar[round(1000 * i / steps)] for i in range(steps, -1, -1)]
        for a, b in zip(levels, levels[1:]):
            slope = a**0.5 * var / (a * var + 1 - a)  # E[x_0 | x_t] = mean + slope (x_t - ...)
            start, alpha = mean * (1 - slope * a**0.5), a / b
            if b == 1:
                m, v = start + slope * m, slope**2 * v
            else:  # x_s is normal around x_t / sqrt(alpha), and around sqrt(b) x_0
                known_t, known_0 = alpha / (1 - alpha), 1 / (1 - b)
                of_t = known_t * alpha**-0.5 / (known_t + known_0)
                of_0 = known_0 * b**0.5 / (known_t + known_0)
                m = (of_t + of_0 * slope) * m + of_0 * start
                v = (of_t + of_0 * slope) ** 2 * v + 1 / (known_t + known_0)
        assert found[:, -1].mean().item() == pytest.approx(m, abs=5 * (v / 8000) ** 0.5)
        assert found[:, -1].std().item() == pytest.approx(v**0.5, rel=0.04)
        assert not known or (found[:, 0] == 0.15).all()
    assert (m, v**0.5) == (pytest.approx(mean, abs=1e-3), pytest.approx(var**0.5, rel=0.12))


def test_guidance():
    """x_0 is alone + w (joined - alone), and a frame alone has its own t and rays; camera 0 shows
    the network no rays."""
    def model(x, t, rays):
        answer = rays + 0.1 * (t == 0) + 0.1 if x.shape[1] == 1 else torch.full(t.shape, 0.3)
        return answer[..., None, None, None].expand_as(x)

    x, given = torch.randn(2, 4, 1, 2, 2), torch.tensor([[True, False, False, False]] * 2)
    rays = torch.rand(2, 4) / 10
    for w in (0.0, 1.0, 2.5):
        args = SimpleNamespace(sample_steps=3, guidance=w)
        found = vd.sample(model, x, given, rays, args)
        alone = (0.1 + rays)[:, 1:, None, None, None].expand(-1, -1, 1, 2, 2)
        assert torch.allclose(found[:, 1:], alone + w * (0.3 - alone), atol=1e-6)
    args, seen = vd.parse_args(["--data", "orbit", "--device", "cpu"]), []
    args.shape, args.guidance, args.sample_steps = [8, 3, 32, 32], 1, 1
    for camera in (1, 0):
        vd.generate(args, lambda x, t, rays: seen.append(rays.any()) or x, 1, [1], camera)
    assert seen == [True, False]


@pytest.mark.parametrize("data", ["roll", "orbit"])
def test_program(data, tmp_path):
    """What is written; given frames are real ones in the pictures, the others are drawn."""
    out = tmp_path / "out" / ("video_diffusion" if data == "roll" else "video_diffusion_orbit")
    call(vd, "--train", "--data", data, *SMALL, cwd=tmp_path)
    for name in ["samples", *(["futures"] if data == "roll" else ["views", "circle", "withheld"])]:
        assert (out / f"{name}.png").exists() and (out / f"{name}_film.png").exists()
    args = vd.parse_args([], vd.load_checkpoint(out / "model.pt")["config"])
    model = vd.build(args)
    rows = vd.generate(args, model, 2, [4, 1, 0, 2]).view(2, 4, 4, 3, 16, 16)
    same = (rows == vd.load_clips(args, "test", 2)[0][:, None]).all(dim=(3, 4, 5))
    assert torch.equal(same, (torch.arange(4) < torch.tensor([[4], [1], [0], [2]])).expand(2, 4, 4))
