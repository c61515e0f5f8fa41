"""video_diffusion.py: cameras and rays obey projective geometry, worlds their laws, the network leaves
pictures alone until it is told that they are a clip, and frames that are given stay as they are."""

import functools
import math

import numpy as np
import pytest
import torch

import video_diffusion as vd
from inprocess import call



def cameras(n=5, frames=4, size=32, seed=0):
    return vd.random_orbits(n, frames, size, np.random.default_rng(seed))


def rotation(seed=0):
    """A random rotation, float64."""
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    return torch.from_numpy(q * np.linalg.det(q))


def small(data="orbit", **flags):
    """Arguments and a random Film: clips of 4 frames, 16 x 16; digits with a convolution over time."""
    argv = ["--data", data, "--device", "cpu", *"--height 16 --frames 4 --patch 2 --width 8 --mults 1 2 "
            "--heads 1 --sample-steps 3 --num 2 --scenes 4 --side-width 4".split()]
    args = vd.parse_args(argv)
    args.bf16, args.shape = False, [3 if data == "orbit" else 1, 16, 16]
    args.time_kernel = 0 if data == "orbit" else 3
    for key, value in flags.items():
        setattr(args, key, value)
    torch.manual_seed(0)
    model = vd.Film(args).eval()
    for net in (model.net, model.ema):  # nothing is zero, or nothing would be tested
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.2)
    return args, model


# ---- Cameras (slide Generative models + geometry) ------------------------------------------------


def test_project_by_hand():
    """A camera at (0, -4, 0) that looks at the origin: right is x, up is z, so that (1, 0, 0.5) is seen
    f/4 to the right of the centre and f/8 above it."""
    pose = vd.look_at(torch.tensor([0.0, -4, 0]), torch.zeros(3))
    K = vd.intrinsics(torch.tensor(90.0), 32)
    assert torch.allclose(K, torch.tensor([[16.0, 0, 16], [0, 16, 16], [0, 0, 1]]), atol=1e-5)
    uv, depth = vd.project(K, pose, torch.tensor([1.0, 0, 0.5]))
    assert torch.allclose(uv, torch.tensor([16 + 4.0, 16 - 2.0]), atol=1e-5)
    assert float(depth) == pytest.approx(4)


def test_poses_are_right_handed_rotations():
    """Trap 8: axes as in OpenCV, x right, y down, z forward; determinant 1, not -1."""
    _, pose = cameras()
    R = pose[..., :3]
    assert torch.allclose(R @ R.mT, torch.eye(3).expand_as(R), atol=1e-5)
    assert torch.allclose(torch.linalg.det(R), torch.ones(R.shape[:2]), atol=1e-5)
    assert (R[..., 2, 1] < 0).all()  # down points down in the world


@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (3, 3), (5, 2)])
def test_a_pixel_is_seen_on_its_own_ray(shape):
    """Traps 29, 30: project(o + s d) is the pixel's centre, at + 0.5, for batches of 3 and 3 views too,
    where a cross product without dim takes the wrong axis."""
    K, pose = cameras(*shape)
    d = vd.pixel_rays(K, pose, 5, 7)  # (n, F, 5, 7, 3)
    X = pose[..., None, None, :, 3] + 2.7 * d
    uv, depth = vd.project(K[:, :, None, None], pose[:, :, None, None], X)
    v, u = torch.meshgrid(torch.arange(5) + 0.5, torch.arange(7) + 0.5, indexing="ij")
    assert torch.allclose(uv, torch.stack([u, v], -1).expand_as(uv), atol=2e-3)
    assert (depth > 0).all()
    rays = vd.plucker(K, pose, 5, 7)
    d2, m = rays.movedim(2, -1).split(3, -1)
    expected = np.cross(pose[..., None, None, :, 3].expand_as(d).numpy(), d.numpy())
    assert np.allclose(m, expected, atol=1e-5) and torch.allclose(d, d2)


def test_pluecker_identities():
    """|d| = 1, d . m = 0, and the moment is the same from any point of the ray."""
    K, pose = cameras()
    d, m = vd.plucker(K, pose, 6, 6).movedim(2, -1).split(3, -1)
    assert torch.allclose(d.norm(dim=-1), torch.ones(5, 4, 6, 6), atol=1e-5)
    assert (d * m).sum(-1).abs().max() < 1e-5
    o = pose[..., None, None, :, 3] + 1.9 * d
    assert torch.allclose(torch.linalg.cross(o, d, dim=-1), m, atol=1e-5)


def test_rigid_motion_of_rays():
    """Trap 30: world moved by X -> Q X + s: (d, m) -> (Q d, Q m + s x Q d)."""
    K, pose = (a.double() for a in cameras())
    Q, s = rotation(), torch.tensor([0.3, -1.2, 0.8]).double()
    moved = torch.cat([Q @ pose[..., :3], Q @ pose[..., 3:] + s[:, None]], -1)
    d, m = vd.plucker(K, pose, 4, 4).movedim(2, -1).split(3, -1)
    d2, m2 = vd.plucker(K, moved, 4, 4).movedim(2, -1).split(3, -1)
    assert torch.allclose(d2, d @ Q.T, atol=1e-6)
    assert torch.allclose(m2, m @ Q.T + torch.linalg.cross(s.expand_as(d), d @ Q.T, dim=-1), atol=1e-6)


def test_scale_is_normalised():
    """Trap 31: all translations times 7 are the same input."""
    K, pose = cameras()
    larger = torch.cat([pose[..., :3], 7 * pose[..., 3:]], -1)
    one, two = (vd.Clips(torch.empty(5, 4, 3, 32, 32), K, p).rays(2) for p in (pose, larger))
    assert torch.allclose(one, two, atol=1e-4)
    assert one.shape == (5, 4, 34, 16, 16)
    assert torch.allclose(vd.normalised(pose)[:, 0, :, 3].norm(dim=1), torch.ones(5), atol=1e-5)


def test_resize_and_cut_of_K():
    """Trap 30: what is at (u, v) is, after a resize by 3 and a cut from (5, 2), at (3u - 5, 3v - 2)."""
    K, pose = cameras()
    X = torch.tensor([0.2, 0.1, 0.3])
    uv = vd.project(K, pose, X)[0]
    found = vd.project(vd.resized(K, 3, 5, 2), pose, X)[0]
    assert torch.allclose(found, 3 * uv - torch.tensor([5.0, 2.0]), atol=1e-3)


def test_mirror():
    """Trap 32: the mirrored camera sees mirrored points at W - u, and stays right-handed; rendering the
    mirrored scene with it gives the mirrored picture."""
    K, pose = cameras(3, 2)
    K = K.clone()
    K[..., 0, 2] += 1.7
    K2, pose2 = vd.mirrored(K, pose, 32)
    X = torch.tensor([0.3, -0.2, 0.4])
    uv, z = vd.project(K, pose, X)
    uv2, z2 = vd.project(K2, pose2, X * torch.tensor([-1, 1, 1]))
    assert torch.allclose(uv2[..., 0], 32 - uv[..., 0], atol=1e-4)
    assert torch.allclose(uv2[..., 1], uv[..., 1], atol=1e-4) and torch.allclose(z, z2, atol=1e-5)
    assert torch.allclose(torch.linalg.det(pose2[..., :3]), torch.ones(3, 2), atol=1e-5)
    scenes, M = vd.random_scenes(3, np.random.default_rng(1)), torch.tensor([-1.0, 1, 1])
    other = scenes._replace(centre=scenes.centre * M, light=scenes.light * M)
    x, y = vd.render_clips(scenes, K, pose, 32), vd.render_clips(other, K2, pose2, 32)
    assert (x.flip(-1).int() - y.int()).abs().float().mean() < 0.2  # an edge may round otherwise


def test_things_on_a_plane_have_the_same_coordinates_in_all_views():
    """plane_points: a point of the table, looked at by any camera, is at its own x and y."""
    K, pose = cameras(2, 6)
    X = torch.tensor([0.21, -0.13, 0.0])
    uv = vd.project(K, pose, X)[0]  # (2, 6, 2)
    shifted = vd.resized(K, 1.0)
    shifted[..., :2, 2] += 0.5 - uv  # the pixel at (0.5, 0.5) now looks at X
    found = vd.plane_points(shifted, pose, 1, 1)[:, :, :2, 0, 0]
    assert torch.allclose(found, X[:2].expand_as(found), atol=1e-3)
    raised = vd.plane_points(shifted, pose, 1, 1, heights=(0.5,))[:, :, :, 0, 0]
    assert (raised - X[:2]).abs().max() > 0.1


# ---- The worlds ----------------------------------------------------------------------------------


def test_bounce_is_a_walk_that_turns_at_the_walls():
    """Against a loop that moves step by step and reflects whatever sticks out; positions stay inside."""
    rng = np.random.default_rng(0)
    start, velocity = rng.uniform(7, 25, 50), rng.uniform(-3, 3, 50)
    found = vd.bounce(torch.from_numpy(start), torch.from_numpy(velocity), 40, 7, 25).numpy()
    x, v = start.copy(), velocity.copy()
    for f in range(40):
        assert np.allclose(found[:, f], x)
        x = x + v
        low, high = x < 7, x > 25
        x = np.where(low, 14 - x, np.where(high, 50 - x, x))
        v = np.where(low | high, -v, v)


def test_digits_are_where_they_are_said_to_be():
    """A digit of one bright spot in its middle: the centre of mass is the centre that is told."""
    digit = torch.zeros(1, 1, 14, 14)
    digit[0, 0, 6:8, 6:8] = 1
    torch.manual_seed(0)
    video, centres, labels = vd.digit_clips(digit, torch.tensor([5]), 60, 5, 32)
    assert video.shape == (60, 5, 1, 32, 32) and (labels == 5).all()
    assert centres.min() >= 7 and centres.max() <= 25
    ink = (video[:, :, 0] + 1) / 2
    for n in range(60):
        for f in range(5):
            if (centres[n, f, 0] - centres[n, f, 1]).abs().max() < 4:
                continue  # over one another
            for row, col in centres[n, f]:
                r, c = int(row), int(col)
                part = ink[n, f, r - 2:r + 3, c - 2:c + 3]
                at = torch.stack(torch.meshgrid(torch.arange(r - 2, r + 3), torch.arange(c - 2, c + 3),
                                                indexing="ij")) + 0.5
                mass = (at * part).sum((1, 2)) / part.sum()
                assert torch.allclose(mass, torch.stack([row, col]), atol=0.02)


def one_sphere(light=(0.0, 0.0, 1.0)):
    return vd.Scenes(torch.tensor([[[0.0, 0, 0.5]]]), torch.tensor([[0.5]]),
                     torch.tensor([[[1.0, 0.2, 0.2]]]), torch.tensor([light]),
                     torch.tensor([[0.9, 0.4]]))


def test_rays_by_hand():
    """A sphere of radius 1/2 on the table, the sun at the zenith. From (0, -3, 0.5): the ray towards
    the middle meets it at y = -1/2, lit from the side not at all by Lambert: 0.35 of its colour. A ray
    straight down at x = 1 meets the table, lit; one at x = 0.3, from below the sphere, in its shadow;
    one upwards nothing."""
    scene = one_sphere()
    o = torch.tensor([[0.0, -3, 0.5]])
    which, point, lit = vd.cast(scene, o, torch.tensor([[[0.0, 1, 0], [0, 0, 1]]]))
    assert which.tolist() == [[0, 2]]
    assert torch.allclose(point[0, 0], torch.tensor([0, -0.5, 0.5]), atol=1e-5)
    colour = vd.shade(scene, which, point, lit)
    assert torch.allclose(colour[0, 0], 0.35 * torch.tensor([1, 0.2, 0.2]), atol=1e-4)
    assert torch.allclose(colour[0, 1], vd.SKY)
    for x, shines, tone in ((1.0, True, 0.4), (0.3, False, 0.9)):
        which, point, lit = vd.cast(scene, torch.tensor([[x, 0, 0.001]]), torch.tensor([[[0, 0, -1.0]]]))
        assert which.item() == 1 and lit.item() == shines
        expected = tone * (1.0 if shines else 0.35)
        assert vd.shade(scene, which, point, lit)[0, 0].tolist() == pytest.approx([expected] * 3)


def test_shadow_of_a_slanting_sun():
    """The sun at 45 degrees from +x: the shadow's centre lies at x = -1/2, and there alone is it dark
    along the x axis: between -1/2 - 1/sqrt(2) and -1/2 + 1/sqrt(2) where the sphere does not stand."""
    s = 1 / math.sqrt(2)
    scene = one_sphere((s, 0.0, s))
    for x in np.linspace(-1.19, 1.19, 60):
        _, _, lit = vd.cast(scene, torch.tensor([[x, 0, 0.001]]).float(), torch.tensor([[[0, 0, -1.0]]]))
        assert lit.item() == (abs(x + 0.5) > s), x


def test_spheres_are_seen_where_they_are_projected():
    """The renderer and project() agree: the centre of a sphere's pixels is its centre's projection, to
    a fraction of a pixel (an ellipse's centre is not quite it)."""
    rng = np.random.default_rng(3)
    scenes, (K, pose) = vd.random_scenes(20, rng), vd.random_orbits(20, 1, 64, rng)
    d = vd.pixel_rays(K, pose, 64, 64)[:, 0].flatten(1, 2)
    for j in range(2):
        one = vd.Scenes(*(a[:, j:j + 1] for a in scenes[:3]), *scenes[3:])
        mask = (vd.cast(one, pose[:, 0, :, 3], d)[0] == 0).view(20, 64, 64)
        uv = vd.project(K[:, 0], pose[:, 0], scenes.centre[:, j])[0]
        for n in range(20):
            row, col = mask[n].nonzero().T
            if len(row) and row.min() > 0 and col.min() > 0 and row.max() < 63 and col.max() < 63:
                assert abs(float(col.float().mean()) + 0.5 - uv[n, 0]) < 0.6
                assert abs(float(row.float().mean()) + 0.5 - uv[n, 1]) < 0.6


# ---- The network (slide Video diffusion models) --------------------------------------------------


def a_clip(args, B=2, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(B, args.frames, *args.shape)
    t = torch.randint(1, 1000, (B, 1)).expand(B, args.frames)
    K, pose = cameras(B, args.frames, args.shape[1])
    clips = vd.Clips(x, K, pose) if args.data == "orbit" else vd.Clips(
        x, labels=torch.randint(10, (B, 2)))
    return x, t, clips.rays(args.patch)


@pytest.mark.parametrize("data", ["orbit", "moving-mnist"])
def test_at_the_start_a_clip_is_a_pile_of_pictures(data):
    """Trap 23: output projections are zero, so video equals the 2-D network frame by frame, exactly;
    and its checkpoint loads unchanged."""
    args, _ = small(data)
    net = vd.Film(args).net.eval()
    for p in net.image.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x, t, rays = a_clip(args)
    with torch.no_grad():
        video = net(x, t, rays)
        for f in range(args.frames):
            alone = net.image(x[:, f], t[:, f], rays[:, f])
            assert torch.allclose(video[:, f], alone, atol=1e-5)
    other = vd.Film(args).net
    other.image.load_state_dict(net.image.state_dict())
    with torch.no_grad():
        assert torch.equal(other(x, t, rays), video)


@pytest.mark.parametrize("data", ["orbit", "moving-mnist"])
def test_pictures_do_not_see_one_another_but_frames_do(data):
    """Traps 24, 25, with time weights that are not zero: in picture mode, when a frame changes, every
    other output is the same to the bit; in a clip none is. A batch of both keeps them apart."""
    args, model = small(data)
    x, t, rays = a_clip(args)
    y = x.clone()
    y[:, 2] += 1  # in both of the batch
    with torch.no_grad():
        for clips in (0, 1, 2, None):  # so many of them are clips; None: all
            a, b = (model.net(v, t, rays, clips) for v in (x, y))
            for n in range(2):
                if n < (2 if clips is None else clips):
                    assert all((a[n, f] - b[n, f]).abs().max() > 1e-4 for f in range(args.frames))
                else:
                    same = [torch.equal(a[n, f], b[n, f]) for f in range(args.frames)]
                    assert same == [f != 2 for f in range(args.frames)]
        y[1] = x[1]
        a, b = (model.net(v, t, rays) for v in (x, y))
        assert torch.equal(a[1], b[1])  # another clip's change is not seen


def test_order_of_frames_matters():
    """Trap 25: without a frame position, reversed input would give reversed output."""
    args, model = small("moving-mnist")
    x, t, rays = a_clip(args)
    with torch.no_grad():
        assert (model.net(x.flip(1), t, rays).flip(1) - model.net(x, t, rays)).abs().max() > 1e-3
        # and with cameras, told alike for all frames
        args, model = small("orbit")
        x, t, rays = a_clip(args)
        rays = rays[:, :1].expand_as(rays)
        assert (model.net(x.flip(1), t, rays).flip(1) - model.net(x, t, rays)).abs().max() > 1e-3


@pytest.mark.parametrize("kernel", [1, 3])
def test_convolution_reaches_the_frames_beside(kernel):
    """It adds nothing at the start; then a change in a frame is seen one frame on and before, as far
    as the kernel is wide, and not further."""
    torch.manual_seed(0)
    layer = vd.TimeBlock(8, 5, 2, kernel, 8)
    x, more = torch.randn(10, 8, 6, 6), torch.randn(10, 5, 6, 6)  # two clips of 5 frames
    y = x.clone()
    y[2, :, 3, 3] += 1
    with torch.no_grad():
        assert torch.equal(layer(x, 5, more), x)
        torch.nn.init.normal_(layer.conv.weight)
        layer.norm_conv = torch.nn.Identity()  # the norm spreads within a frame
        moved = (layer(x, 5, more) - layer(y, 5, more)).abs().amax(1) > 1e-4  # (10, 6, 6)
    want = torch.zeros(10, 6, 6, dtype=torch.bool)
    r = kernel // 2
    want[1:4, 3 - r:4 + r, 3 - r:4 + r] = True
    assert torch.equal(moved, want)


def test_time_learns_from_the_second_step():
    """Trap 26: with only the output projection zero, all weights of time have a gradient at step 2."""
    args, _ = small("orbit")
    net = vd.Film(args).net
    torch.nn.init.normal_(net.image.conv_out.weight)
    x, t, rays = a_clip(args)
    opt = torch.optim.SGD(net.parameters(), 0.1)
    for step in range(2):
        opt.zero_grad()
        (net(x, t, rays) - 1).square().mean().backward()
        grads = {n: float(p.grad.abs().max()) for n, p in net.time.named_parameters()}
        assert all(grads[n] > 0 for n in grads if n.endswith("out.weight"))
        if step == 0:
            assert all(grads[n] == 0 for n in grads if n.endswith("qkv.weight"))
        opt.step()
    assert all(g > 0 for g in grads.values())


def test_attention_at_the_same_place_only_or_everywhere():
    """On maps larger than `joint` a place sees itself in other frames and no other place."""
    torch.manual_seed(0)
    for joint, spreads in ((2, False), (8, True)):
        layer = vd.TimeBlock(8, 5, 2, 0, joint)
        torch.nn.init.normal_(layer.out.weight)
        x, more = torch.randn(3, 8, 4, 4), torch.randn(3, 5, 8, 8)
        y = x.clone()
        y[0, :, 1, 2] = -y[0, :, 1, 2]
        layer.norm = torch.nn.Identity()  # the norm spreads within a frame
        with torch.no_grad():
            moved = (layer(x, 3, more) - layer(y, 3, more)).abs().amax(1) > 1e-6  # (3, 4, 4)
        assert bool(moved[1, 1, 2]) and bool(moved[2, 1, 2])
        moved[:, 1, 2] = False
        assert bool(moved.any()) == spreads


def test_who_is_told_alike_is_looked_at_first():
    """Before any training, of a thing on the table seen by four cameras: the place of a view where it
    is seen looks at those places of the other views more than anywhere else there."""
    args = vd.parse_args(["--data", "orbit", "--device", "cpu", "--size", "small"])
    args.shape = [3, 32, 32]
    torch.manual_seed(0)
    layer = vd.Film(args).net.time[0]
    layer.seen = []
    K, pose = cameras(6, 4)
    rays = vd.Clips(torch.empty(6, 4, 3, 32, 32), K, pose).rays(args.patch)
    with torch.no_grad():
        layer(torch.randn(24, args.width, 8, 8), 4, rays.flatten(0, 1))
    weight = layer.seen[0].view(6, 4, 64, 4, 64)
    uv = vd.project(K, pose, torch.tensor([0.3, 0.2, 0.1]))[0] / 4 - 0.5  # in cells
    near = 0
    for n in range(6):
        cell = uv[n].round().long().clamp(0, 7)
        for f in range(1, 4):
            best = weight[n, 0, cell[0, 1] * 8 + cell[0, 0], f].argmax()
            near += (torch.stack([best % 8, best // 8]) - uv[n, f]).abs().max() < 1.6
    assert near >= 15  # of 18; by chance about 3


# ---- Loss and sampler ----------------------------------------------------------------------------


def test_known_frames_are_clean_told_and_without_loss():
    """Trap 27: their t is 0 and x_0 arrives as it is; what the network says of them does not count."""
    args, _ = small("moving-mnist")
    x, _, _ = a_clip(args)
    known = torch.tensor([[True, False, False, True], [False] * 4])
    t = torch.where(known, 0, torch.tensor([[600], [300]]))
    abar, eps, seen = vd.schedule_of(args), torch.randn_like(x), {}

    def net(xt, tt, rays, clips):
        seen.update(x=xt, t=tt)
        out = torch.zeros_like(xt)
        out[known] = 1e6
        return out

    loss = vd.video_loss(net, x, None, t, eps, known, None, abar, "x0")
    assert torch.equal(seen["x"][known], x[known]) and (seen["t"][known] == 0).all()
    assert float(loss) == pytest.approx(float(x[~known].square().mean()), rel=1e-5)
    assert (seen["x"][~known] - x[~known]).abs().min(-1).values.max() > 0


def test_draw_known_covers_its_cases():
    torch.manual_seed(0)
    known = vd.draw_known(4000, 8, "cpu")
    kinds = {tuple(row) for row in known.tolist()}
    first = lambda k: tuple(f < k for f in range(8))
    assert kinds == {first(k) for k in range(5)} | {(True, *[False] * 6, True)}
    assert not known.all(1).any()


@pytest.mark.parametrize("data", ["orbit", "moving-mnist"])
def test_given_frames_come_back_to_the_bit(data):
    args, model = small(data)
    clips = vd.fixed_clips(args, 3)
    known = vd.nothing_known(clips)
    known[0, :2] = known[1, 0] = known[1, -1] = True
    x = vd.new_clips(args, model, clips, known)
    assert torch.equal(x[known], clips.video[known])
    assert not torch.equal(x[~known], clips.video[~known]) and x.abs().max() <= 1
    assert torch.equal(x, vd.new_clips(args, model, clips, known))  # the same seed, the same clips


def test_the_sampler_meets_a_network_that_knows():
    """A network that always answers with the same clip is sampled to that clip, for all targets."""
    args, _ = small("moving-mnist")
    truth = torch.rand(2, 4, 1, 16, 16) * 2 - 1
    abar = vd.schedule_of(args)
    known = torch.zeros(2, 4, dtype=torch.bool)
    for predict in ("eps", "x0", "v"):
        def net(x, t, rays, clips):
            flat = [a.flatten(0, 1) for a in (truth, x, t)]
            signal, noise = vd.signal_and_noise(abar, flat[2], flat[1])
            eps = (flat[1] - signal * flat[0]) / noise
            return vd.target_of(flat[0], eps, flat[2], abar, predict).view_as(x)
        x = vd.sample_clips(net, torch.randn(2, 4, 1, 16, 16), truth, known, None, abar, predict, 10)
        assert torch.allclose(x, truth, atol=2e-3)


def test_what_is_told_and_what_is_not():
    """The digits of a clip, how often each, in ten channels; nothing there for clips that are not told,
    and the same elsewhere. Clips of a file have none. Without cameras there are no rays."""
    clips = vd.Clips(torch.zeros(3, 4, 1, 16, 16), labels=torch.tensor([[3, 8], [5, 5], [0, 1]]))
    told = torch.tensor([True, True, False]).view(3, 1, 1, 1, 1)
    rays = clips.rays(2, told)
    assert rays.shape == (3, 4, 31, 8, 8)
    count = rays[:, :, 21:]
    assert (count == count[:, :1, :, :1, :1]).all() and (count[2] == 0).all()
    assert count[0, 0, :, 0, 0].nonzero().flatten().tolist() == [3, 8] and count[1, 0, 5, 0, 0] == 2
    assert torch.equal(rays[:, :, :21], vd.Clips(clips.video).rays(2))
    K, pose = cameras(3, 4, 16)
    rays = vd.Clips(torch.zeros(3, 4, 3, 16, 16), K, pose).rays(2, told)
    assert (rays[2] == 0).all() and (rays[:2] != 0).any((1, 2, 3, 4)).all()


def test_guidance_is_a_straight_line():
    """At W = 0 the network is not told, at 1 it is; the same at any W if there is nothing to tell."""
    args, model = small("moving-mnist")
    args.sample_steps = 1  # the answer at t = T, which is a straight line in W
    clips = vd.fixed_clips(args, 2)
    drawn = {}
    for args.guidance in (0.0, 1.0, 2.0):
        drawn[args.guidance] = vd.new_clips(args, model, clips, vd.nothing_known(clips))
        unlabelled = vd.new_clips(args, model, clips, vd.nothing_known(clips), told=False)
        assert torch.allclose(unlabelled, drawn[0.0], atol=1e-5)
    assert not torch.allclose(drawn[0.0], drawn[1.0], atol=1e-3)
    inside = (drawn[2.0].abs() < 0.99) & (drawn[0.0].abs() < 0.99) & (drawn[1.0].abs() < 0.99)
    line = 2 * drawn[1.0] - drawn[0.0]
    assert inside.float().mean() > 0.1 and torch.allclose(drawn[2.0][inside], line[inside], atol=1e-4)


@pytest.mark.parametrize("length, most, given, anchor", [
    (8, 8, 0, False), (24, 8, 4, False), (24, 8, 1, True), (5, 8, 2, False), (9, 8, 0, False), (31, 8, 0, True), (9, 2, 1, True),
    (9, 3, 1, True)])
def test_windows_make_every_frame_once(length, most, given, anchor):
    """Trap 27: each frame is made once, by windows that fit, from frames that are there; later ones
    reuse the last frames, with an anchor the first as well."""
    there = set(range(given))
    for i, (known, new) in enumerate(vd.windows(length, most, given, anchor)):
        assert set(known) <= there and not set(new) & there and new
        assert len(known) + len(new) <= most
        if i:
            assert most < 3 or known[-1] == max(there)
            assert most < 4 or len(known) == max(given if not anchor else 0, most // 2)
            assert not anchor or known[0] == 0
        there |= set(new)
    assert there == set(range(length))


def test_windows_begin_from_noise_of_their_own(monkeypatch):
    """Windows alike in all but their noise differ."""
    args, model = small("moving-mnist")
    seen = []
    monkeypatch.setattr(vd, "sample_clips", lambda net, x, clean, *_: seen.append(x) or clean)
    vd.long_clips(args, model, vd.fixed_clips(args, 1, 3 * args.frames), 0)
    assert len(seen) > 2 and not any(torch.equal(a[:, -1], b[:, -1]) for a, b in zip(seen, seen[1:]))


def test_long_clips_keep_what_is_given():
    args, model = small("moving-mnist")
    clips = vd.fixed_clips(args, 2, 11)
    x = vd.long_clips(args, model, clips, 2)
    assert x.shape[1] == 11 and torch.equal(x[:, :2], clips.video[:, :2])
    assert all((x[:, f] != clips.video[:, f]).any() for f in range(2, 11))


# ---- The measures --------------------------------------------------------------------------------


def test_law_error():
    """0 for what obeys the law (within the grid of tries), as much as was added for what does not; NaN
    frames do not count."""
    rng = np.random.default_rng(0)
    start, velocity = rng.uniform(7, 25, (20, 2)), rng.uniform(-3, 3, (20, 2))
    tracks = vd.bounce(torch.from_numpy(start), torch.from_numpy(velocity), 8, 7, 25).numpy()
    tracks = tracks.transpose(0, 2, 1).copy()
    tracks[0, 3] = np.nan
    assert vd.law_error(tracks, 7, 25).max() < 0.25
    jumping = rng.uniform(7, 25, (40, 8, 2))
    assert vd.law_error(jumping, 7, 25).mean() > 3
    shaken = tracks + rng.normal(0, 1, tracks.shape)
    assert 0.4 < vd.law_error(shaken, 7, 25).mean() < 1.3


def test_found_digits_reads_a_perfect_answer():
    """Cells that are told exactly give back centres, labels and certainty."""
    centres = torch.tensor([[[9.3, 20.1], [22.9, 11.2]]])
    labels = torch.tensor([[3, 8]])

    def tracker(x):
        logits, off = torch.zeros(1, 11, 16, 16), torch.zeros(1, 2, 16, 16)
        logits[:, 10] = 30
        for (row, col), label in zip(centres[0], labels[0]):
            r, c = int(row / 2), int(col / 2)
            logits[0, 10, r, c], logits[0, label, r, c] = 0, 30
            off[0, :, r, c] = torch.tensor([row / 2 - r - 0.5, col / 2 - c - 0.5])
        return logits, off

    at, found, sure = vd.found_digits(tracker, torch.zeros(1, 1, 32, 32))
    order = found[0].argsort()
    assert found[0][order].tolist() == [3, 8] and np.allclose(at[0][order], centres[0], atol=1e-4)
    assert sure.min() > 0.99


def test_geometry_is_kept_by_real_renders_and_not_by_moved_ones():
    """On real renders all errors are small; when each picture is moved by 3 pixels spheres and lines
    are off by that, though lines are as straight as before; when lines are bent, that is seen."""
    rng = np.random.default_rng(5)
    scenes, (K, pose) = vd.random_scenes(12, rng), vd.random_orbits(12, 3, 32, rng)
    x = vd.to_float(vd.render_clips(scenes, K, pose, 32))
    off, found, line, bent, turned, shadow = vd.geometry_of(x, scenes, K, pose)
    assert off < 0.4 and found > 0.95 and line < 0.25 and bent < 0.25 and turned < 6 and shadow < 20
    moved = vd.geometry_of(x.roll(3, -1), scenes, K, pose)
    assert 2.3 < moved[0] < 3.7 and moved[2] > 2 * line
    up = torch.stack([x[..., c].roll(int(2 * math.sin(c / 4)), -1) for c in range(32)], -1)
    assert vd.geometry_of(up, scenes, K, pose)[3] > 1.3 * bent
    turned_sun = scenes._replace(light=scenes.light * torch.tensor([-1, -1, 1.0]))
    y = vd.to_float(vd.render_clips(turned_sun, K, pose, 32))
    assert vd.geometry_of(y, scenes, K, pose)[5] > shadow + 30


# ---- The program ---------------------------------------------------------------------------------

TINY = ("--device cpu --height 16 --frames 4 --patch 2 --width 8 --mults 1 2 --image-steps 3 --steps 4 "
        "--batch-size 4 --side-steps 2 --side-batch 4 --side-width 4 --scenes 6 --sample-steps 2 --num 2 "
        "--every 2 --loose 0.25").split()


@pytest.fixture(autouse=True, scope="module")
def short_reports():
    """Of 4 clips: what is measured is tested above."""
    long = vd.report_motion, vd.report_geometry
    vd.report_motion, vd.report_geometry = (functools.partial(f, num=4) for f in long)
    yield
    vd.report_motion, vd.report_geometry = long


@pytest.mark.parametrize("data", ["moving-mnist", "orbit"])
def test_a_run_writes_what_is_promised(data, tmp_path):
    """From another folder; then every verb; then an export, which samples the same."""
    vd.main(["--train", "--data", data, *TINY, "--out", str(tmp_path / "o")])
    out = tmp_path / "o"
    made = {p.name for p in out.iterdir()}
    assert {"model.pt", "samples.npz", "samples.png", "samples_film.png", "prediction.png", "loss.csv",
            "loss.png", "attention.png", "image_000002.png", "video_000002.png"} <= made
    assert np.load(out / "samples.npz")["arr_0"].shape == (2, 4, 16, 16, 3 if data == "orbit" else 1)
    more = [["--given", "2"], ["--between"], ["--sample", "--length", "9"]]
    if data == "orbit":
        assert {"orbit.png", "orbit_film.png", "epipolar.png", "view.png", "cameras.npz"} <= made
        more += [["--orbit", str(out / "view.png"), "--path", str(out / "cameras.npz")]]
    for flags in more:
        vd.main([*flags, "--out", str(out), "--device", "cpu"])
    assert np.load(out / "samples.npz")["arr_0"].shape[1] == 9 and (out / "between.png").exists()


def test_resume_is_bit_equal_over_all_stages(tmp_path):
    """Stopped in the second part and gone on: the same weights as in one go."""
    flags = ["--train", "--data", "moving-mnist", *TINY, "--data-dir", str(vd.HERE / "data")]
    vd.main([*flags, "--out", str(tmp_path / "a")])
    real = vd.save_checkpoint

    def stop(path, state):
        real(path, state)
        if state["part"] == "video" and state["step"] == 2:
            raise KeyboardInterrupt

    vd.save_checkpoint = stop
    try:
        with pytest.raises(SystemExit):
            vd.main([*flags, "--out", str(tmp_path / "b")])
    finally:
        vd.save_checkpoint = real
    vd.main(["--train", "--resume", "--out", str(tmp_path / "b"), "--device", "cpu", "--data-dir",
             str(vd.HERE / "data")])
    a, b = (torch.load(tmp_path / k / "model.pt", weights_only=True)["model"] for k in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_own_clips(tmp_path):
    """A file of clips trains; too few frames, or no clips, are refused in a line."""
    clips = np.random.default_rng(0).integers(0, 255, (12, 6, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "c.npz", clips=clips)
    vd.main(["--train", "--data", str(tmp_path / "c.npz"), *TINY, "--out", str(tmp_path / "o")])
    assert np.load(tmp_path / "o" / "samples.npz")["arr_0"].shape == (2, 4, 16, 16, 3)
    np.savez(tmp_path / "d.npz", clips=clips[:, :3])
    with pytest.raises(SystemExit) as e:
        vd.main(["--train", "--data", str(tmp_path / "d.npz"), *TINY, "--out", str(tmp_path / "p")])
    assert e.value.code == 2


@pytest.fixture(scope="module")
def orbit_model(tmp_path_factory):
    out = tmp_path_factory.mktemp("orbit")
    vd.main(["--train", "--data", "orbit", *TINY, "--out", str(out)])
    return out


@pytest.mark.parametrize("fault, words", [
    ("given", "at most 2"), ("singular", "K is singular"), ("rotation", "no rotation"),
    ("shape", "expected (F, 3, 4)"), ("size", "trained on"), ("missing", "cannot be read"),
    ("path", "only for --orbit"), ("mirror", "no rotation"), ("digits", "only for moving-mnist"),
    ("guidance", "finite"), ("origin", "at the origin"), ("short", "expected more than the 2 frames"),
    ("length", "not for --between or --path")])
def test_bad_input_is_one_line(orbit_model, tmp_path, capsys, fault, words):
    """More given frames than trained, a singular K, a pose that is no rotation, a picture of another
    size: one line, exit code 2."""
    K, pose = (a[0].numpy() for a in cameras(1, 4, 16))
    if fault == "singular":
        K = K * [[0], [1], [1]]
    if fault == "rotation":
        pose = pose * 1.1
    if fault == "mirror":
        pose = pose * np.array([-1, 1, 1, 1])
    if fault == "origin":
        pose = pose - pose[:1] * [0, 0, 0, 1]
    if fault == "shape":
        pose = pose[0]
    np.savez(tmp_path / "c.npz", K=K, pose=pose)
    vd.save_png(tmp_path / "v.png", np.zeros((1, 20, 16, 3), np.uint8))
    flags = {"given": ["--given", "3"], "size": ["--orbit", str(tmp_path / "v.png")],
             "missing": ["--orbit", "--path", str(tmp_path / "no.npz")],
             "path": ["--path", str(tmp_path / "c.npz")], "digits": ["--sample", "--digits", "3", "8"],
             "short": ["--given", "2", "--length", "2"], "length": ["--between", "--length", "9"],
             "guidance": ["--sample", "--guidance", "nan"]}.get(
                 fault, ["--orbit", "--path", str(tmp_path / "c.npz")])
    with pytest.raises(SystemExit) as e:
        vd.main([*flags, "--out", str(orbit_model), "--device", "cpu"])
    assert e.value.code == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and "Traceback" not in err


def test_help_and_unknown_data(tmp_path):
    assert "--orbit" in call(vd, "--help", cwd=tmp_path)
    assert call(vd, "--train", "--data", "nothing", cwd=tmp_path, code=2).count("\n") == 1
