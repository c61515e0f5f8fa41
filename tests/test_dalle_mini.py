"""dalle_mini.py: text comes back from its tokens, nobody looks ahead, no probability crosses from
words to codes, kept keys and values change nothing, and held-out pairs stay held out."""

import itertools
import math
import signal

import numpy as np
import pytest
import torch

import dalle_mini as dm
from inprocess import call



def small(**flags):
    """Arguments and a random Model: 8 x 12 images, 2 x 3 codes of K = 6, text of 5 tokens."""
    argv = ("--device cpu --width 16 --code-dim 4 --codebook-size 6 --blocks 1 --model-width 32 "
            "--model-layers 3 --heads 2 --text-length 5 --merges 9 --side-width 32").split()
    args = dm.parse_args(argv)
    args.shape, args.learned, args.bf16, args.data = [3, 8, 12], [[32, 97], [256, 98]], False, "x"
    for key, value in flags.items():
        setattr(args, key, value)
    torch.manual_seed(0)
    model = dm.DallE(args).eval()
    for p in model.transformer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return args, model


def some_codes(model, n=4):
    return torch.randint(model.K, (n, model.h, model.w), generator=torch.Generator().manual_seed(3))


# ---- The world of captions -----------------------------------------------------------------------


def test_held_out_pairs_are_never_shown():
    """Over 20,000 scenes: of the 80 pairs of digit and colour training shows exactly those 70 with
    (d + c) % 8 != 0, the other kind of scene exactly the 10 others."""
    for seen in (True, False):
        facts = dm.random_facts(20_000, np.random.default_rng(0), seen).reshape(-1, 2)
        found = {(int(d), int(c)) for d, c in facts if d < 10}
        assert found == {(d, c) for d in range(10) for c in range(8) if ((d + c) % 8 != 0) == seen}
        assert set(map(tuple, facts[facts[:, 0] == 10].tolist())) == {dm.NONE}


def test_captions_say_what_stands_where():
    facts = np.tile(dm.NONE, (5, 1))
    facts[1], facts[2] = (7, 0), (2, 6)
    assert dm.describe(facts) == "a red seven left of an orange two"
    assert dm.describe(facts, turn=True) == "an orange two right of a red seven"
    assert dm.describe(facts, short=True) == "red seven left of orange two"
    facts = facts[[0, 0, 0, 1, 2]]
    assert dm.describe(facts) == "a red seven above an orange two"
    assert dm.describe(facts, turn=True) == "an orange two below a red seven"
    assert dm.describe(facts[[4, 0, 0, 0, 0]]) == "an orange two"


def test_all_captions_are_different_and_hold_every_scene():
    texts = set(dm.all_captions())
    assert len(texts) == 80 + 2 * 80 * 80
    for seen in (True, False):
        facts = dm.random_facts(200, np.random.default_rng(1), seen)
        assert all(dm.describe(f) in texts for f in facts)


def test_scenes_show_their_facts():
    """Where something stands there is ink of its colour, within a pixel of its place; elsewhere the
    background is 16; the digit is one of the wanted class."""
    images = torch.zeros(20, 1, 28, 28, dtype=torch.uint8)
    labels = torch.arange(20) % 10
    images[:, :, 8:20, 8:20] = (labels * 20 + 60).view(-1, 1, 1, 1).byte()  # brightness says which
    facts = dm.random_facts(50, np.random.default_rng(0))
    x = dm.render(facts, images, labels, np.random.default_rng(1))
    assert x.shape == (50, 3, 32, 32) and x.dtype == torch.uint8
    for scene, f in zip(x, facts):
        rest = scene.clone()
        for (r, c), (digit, colour) in zip(dm.PLACES, f):
            if digit < 10:
                rgb = torch.tensor(list(dm.COLOURS.values())[colour])
                part = scene[:, r - 1:r + 1, c - 1:c + 1].float()
                want = 16 + (digit * 20 + 60) / 255 * (rgb - 16)
                assert torch.allclose(part, want.view(3, 1, 1).expand(3, 2, 2), atol=1)
                rest[:, max(0, r - 8):r + 8, max(0, c - 8):c + 8] = 16
        assert (rest == 16).all()


# ---- Text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a red seven", "", " ", "  two  spaces ", "naïve café 日本 🙂\n\ttab",
                                  "\x00\x7f", "ab abab"])
@pytest.mark.parametrize("pairs", [[], [[32, 97], [256, 98]], [[97, 98], [256, 256]]])
def test_text_comes_back(text, pairs):
    """decode(encode(s)) is s, for any text and whatever was learned."""
    bpe = dm.BytePairs(pairs)
    assert bpe.decode(bpe.encode(text)) == text


def test_pairs_are_learned_by_frequency_and_applied_by_rank():
    """By hand: in " ab ab abc" (space, a) and (a, b) are met 3 times each; the larger pair of numbers
    goes first."""
    pairs = dm.BytePairs.learn(["ab ab abc"], 10)
    assert pairs[0] == (97, 98) and pairs[1] == (32, 256) and pairs[2] == (257, 99)
    assert len(pairs) == 3  # nothing left to join
    bpe = dm.BytePairs(pairs)
    assert bpe.encode("ab abc") == [257, 258]
    # by rank, not from the left: (b, c) was learned first, so "abc" is a + bc, though (a, b) exists
    assert dm.BytePairs([(98, 99), (97, 98)]).encode("abc") == [32, 97, 256]
    assert dm.BytePairs([(97, 97)]).encode("aaa") == [32, 256, 97]


def test_words_of_the_captions_are_single_tokens():
    """The default number of merges is enough for all of our captions' words."""
    texts = dm.all_captions()
    bpe = dm.BytePairs(dm.BytePairs.learn(texts, dm.SIZES["small"]["merges"]))
    assert max(len(bpe.encode(t)) for t in texts) == 8
    for text in texts[::97]:
        assert len(bpe.encode(text)) == len(text.split())


def test_each_place_has_its_own_pad():
    args, model = small()
    ids = model.tokens(["", "ab", "a"])
    V = model.transformer.V
    assert ids.tolist()[0] == [V, V + 1, V + 2, V + 3, V + 4]
    assert ids.tolist()[1] == [257, V + 1, V + 2, V + 3, V + 4]


# ---- Attention -----------------------------------------------------------------------------------


def allowed_by_hand(kind, text, h, w):
    """The masks of the paper's figure 11, place by place."""
    L = text + h * w
    mask = torch.zeros(L, L, dtype=torch.bool)
    for i, j in itertools.product(range(L), repeat=2):
        if j <= i:
            a, b = i - text, j - text
            inside = {"full": True, "row": a - b <= w, "column": (a - b) % w == 0,
                      "conv": any(a - b == r * w + c for r in range(6) for c in range(-5, 6))}[kind]
            mask[i, j] = j <= text or inside  # a start, then the text; codes come after
    return mask


@pytest.mark.parametrize("kind", ["full", "row", "column", "conv"])
@pytest.mark.parametrize("size", [(3, 4, 4), (2, 3, 5), (4, 16, 16)])
def test_masks(kind, size):
    assert torch.equal(dm.attention_mask(kind, *size), allowed_by_hand(kind, *size))


def test_paper_pattern_of_masks():
    """64 layers: columns in every fourth from the second on, a window in the last, rows else."""
    kinds = dm.kinds_of("sparse", 64)
    assert kinds[:6] == ["row", "column", "row", "row", "row", "column"] and kinds[-1] == "conv"
    assert kinds.count("column") == 16 and kinds.count("row") == 47


@pytest.mark.parametrize("masks", ["full", "sparse"])
def test_nobody_looks_ahead(masks):
    """Each token of text and of image moves later logits only; with full attention all of them."""
    args, model = small(masks=masks)
    net = model.transformer.double()
    text, codes = model.tokens(["ab a"]), some_codes(model, 1).flatten(1)
    N, places = net.N, net.N + 6
    with torch.no_grad():
        one = net(text, codes)
        for i in range(places):
            t, c = text.clone(), codes.clone()
            if i < N:
                t[0, i] = (t[0, i] + 1) % 10
            else:
                c[0, i - N] = (c[0, i - N] + 1) % 6
            moved = torch.cat([(a - b).abs().amax(-1)[0] > 1e-12 for a, b in zip(net(t, c), one)])
            later = torch.arange(places) > i
            assert not (moved & ~later).any()
            assert masks == "sparse" or (moved == later).all()
            if i == N - 1:  # the last word, a pad, predicts the first code
                assert moved[N]


def test_stream_is_two_distributions():
    """p(text) sums to 1 over all texts of words and pads, p(codes | text) over all grids: nothing
    crosses from one vocabulary to the other."""
    args, model = small(text_length=2, codebook_size=3, shape=[3, 4, 12])
    net = model.transformer.double()
    with torch.no_grad():
        every = torch.tensor(list(itertools.product(range(3), repeat=3))).view(-1, 1, 3)
        total = net.log_prob(torch.tensor([[97, net.V + 1]]).expand(27, -1), every)[1].exp().sum()
        assert float(total) == pytest.approx(1, abs=1e-5)
        words = net.V + net.N
        assert net.word_head.out_features == words and net.code_head.out_features == 3
        pairs = torch.cartesian_prod(torch.arange(words), torch.arange(words))
        total = sum(net.log_prob(part, torch.zeros(len(part), 1, 3, dtype=torch.long))[0].exp().sum()
                    for part in pairs.split(20_000))
        assert float(total) == pytest.approx(1, abs=1e-4)


def test_untrained_stream_is_uniform():
    args, _ = small()
    net = dm.DallE(args).transformer
    p = net.log_prob(torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 2, 3, dtype=torch.long))
    assert torch.allclose(p[0], torch.full((2,), -5 * math.log(258 + 5)), atol=1e-4)
    assert torch.allclose(p[1], torch.full((2,), -6 * math.log(6)), atol=1e-4)


def test_loss_is_one_part_text_and_seven_parts_image():
    args, model = small()
    text, codes = model.tokens(["ab", "a ab"]), some_codes(model, 2)
    stage = dm.TokenStage(args, model, text, codes)
    loss, bits = stage(text, codes)
    a, b = model.transformer(text, codes.flatten(1))
    a = torch.nn.functional.cross_entropy(a.flatten(0, 1), text.flatten())
    b = torch.nn.functional.cross_entropy(b.flatten(0, 1), codes.flatten())
    assert torch.allclose(loss, (a + 7 * b) / 8) and torch.allclose(bits, b / math.log(2))


def test_one_text_in_ten_is_the_empty_one():
    """What guidance calls "none" is what training shows: pads only."""
    args, model = small(model_batch=20_000)
    text, codes = model.tokens(["ab"]), some_codes(model, 1)
    torch.manual_seed(0)
    drawn, _ = dm.TokenStage(args, model, text, codes).batch(1)
    empty = (drawn == model.tokens([""])).all(1)
    assert (empty | (drawn == text).all(1)).all()
    assert float(empty.float().mean()) == pytest.approx(0.1, abs=0.01)
    assert model.tokens([""])[0].tolist() == model.transformer.pad([])


def test_attention_in_float32_on_a_cpu():
    """By the formula in float64, of bfloat16 numbers under autocast too."""
    mask = dm.attention_mask("full", 3, 2, 2)
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = torch.randn(3, 2, 2, 7, 4).to(dtype)
        score = (q.double() @ k.double().mT / 2).masked_fill(~mask, -math.inf).softmax(-1)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = dm.attend(q, k, v, attn_mask=mask)
        assert out.dtype == torch.float32
        assert torch.allclose(out.double(), score @ v.double(), atol=1e-5)


# ---- Sampling ------------------------------------------------------------------------------------


@pytest.mark.parametrize("masks", ["full", "sparse"])
@pytest.mark.parametrize("w", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("given", [0, 1, 4])
def test_kept_keys_change_nothing(masks, w, given, monkeypatch):
    """The logits at each step are those of the whole network run anew on what is known, with and
    without guidance, and after an image prompt; so 0 is unconditional and 1 conditional."""
    args, model = small(masks=masks)
    net, text, codes = model.transformer, model.tokens(["ab a", "b"]), some_codes(model, 2)
    before, seen, draw = text.clone(), [], dm.draw
    monkeypatch.setattr(dm, "draw", lambda out, *a: (seen.append(out), draw(out, *a))[1])
    dice = torch.rand(2, 6, generator=torch.Generator().manual_seed(0))
    known = codes.flatten(1)[:, :given]
    drawn = dm.draw_codes(net, text, dice, known, w)
    assert torch.equal(text, before) and torch.equal(drawn[:, :given], known)
    empty = model.tokens([""]).expand(2, -1)
    with torch.no_grad():
        cond, none = (net(t, drawn[:, :5])[1][:, given:] for t in (text, empty))
    assert len(seen) == 6 - given
    assert torch.allclose(torch.stack(seen, 1), none + w * (cond - none), atol=1e-4)


def test_draws_follow_the_distribution():
    """Counts of two codes drawn 20,000 times against p(codes | text)."""
    args, model = small(codebook_size=3, shape=[3, 4, 8])
    net = model.transformer
    text = model.tokens(["ab"]).expand(20_000, -1)
    dice = torch.rand(20_000, 2, generator=torch.Generator().manual_seed(1))
    drawn = dm.draw_codes(net, text, dice)
    found = torch.bincount(drawn[:, 0] * 3 + drawn[:, 1], minlength=9) / 20_000
    every = torch.tensor(list(itertools.product(range(3), repeat=2))).view(-1, 1, 2)
    with torch.no_grad():
        want = net.log_prob(text[:9], every)[1].exp()
    assert torch.allclose(found, want, atol=0.012)


def test_top_k_and_top_p():
    """k = 1 is the argmax; ties stay; p keeps the fewest that hold p; both off change nothing; what is
    left sums to 1."""
    logits = torch.tensor([[2.0, 0, 2, 1], [0, 3, 1, 2]])
    kept = lambda *a: torch.isfinite(dm.keep_likely(logits, *a)).tolist()
    assert torch.equal(dm.keep_likely(logits), logits)
    assert torch.equal(dm.keep_likely(logits, 4, 1.0), logits)
    assert torch.equal(dm.keep_likely(logits, 9), logits)
    assert kept(1) == [[True, False, True, False], [False, True, False, False]]
    assert kept(2) == [[True, False, True, False], [False, True, False, True]]
    p = logits.softmax(1)
    for top_p in (0.01, 0.3, 0.6, 0.9, 0.999):
        for row, keep in zip(p, torch.isfinite(dm.keep_likely(logits, 0, top_p))):
            best = row.sort(descending=True).values.cumsum(0)
            assert int(keep.sum()) == int((best < top_p).sum()) + 1
            assert row[keep].min() >= (row[~keep].max() if (~keep).any() else 0)
    assert torch.allclose(dm.keep_likely(logits, 3, 0.9).softmax(1).sum(1), torch.ones(2))


def test_top_k_of_one_draws_the_likeliest():
    args, model = small()
    net, text = model.transformer, model.tokens(["ab"])
    drawn = dm.draw_codes(net, text, torch.rand(1, 6), top_k=1)
    with torch.no_grad():
        assert torch.equal(net(text, drawn[:, :5])[1].argmax(-1), drawn)


def test_text_goes_on_from_the_prompt():
    """The known tokens stay; at least one word is added; behind the first pad are pads only, each its
    place's own; counts follow p(text) without a pad at the first place."""
    args, model = small(text_length=3, merges=2)
    net = model.transformer
    with torch.no_grad():  # few words, so that counting is possible
        net.word_head.bias[:250] -= 50
    text = model.tokens(["ab"]).expand(20_000, -1)
    dice = torch.rand(20_000, 3, generator=torch.Generator().manual_seed(0))
    out = dm.go_on(net, text, 1, dice)
    pad = out >= net.V
    assert (out[:, 0] == 257).all() and not pad[:, 1].any()
    assert (out[:, 2][pad[:, 2]] == net.V + 2).all()
    with torch.no_grad():
        logits = net(text[:1], text[:1, :0])[0][0, 1, :net.V]
    found = torch.bincount(out[:, 1], minlength=net.V) / 20_000
    assert torch.allclose(found, logits.softmax(0), atol=0.012)


def test_best_of_one_is_plain_sampling_and_best_of_n_takes_the_best():
    """Of the same draws, that with the largest cosine between directions of text and image."""
    args, model = small()
    plain = dm.draw_prompts(args, model, model.tokens(["ab", "a"]), 6)
    assert torch.equal(plain, dm.draw_prompts(args, model, model.tokens(["ab", "a"]), 6, best_of=1))
    best = dm.draw_prompts(args, model, model.tokens(["ab", "a"]), 2, best_of=3)
    with torch.no_grad():
        for t, text in enumerate(["ab", "a"]):
            a = model.scorer.of_text(model.tokens([text]))
            cos = (model.scorer.of_image(dm.to_float(plain[t])) @ a.T).view(2, 3)
            for i, j in enumerate(cos.argmax(1)):
                assert torch.equal(best[t, i], plain[t, 3 * i + j])


# ---- Those that judge ----------------------------------------------------------------------------


def test_contrastive_loss_by_hand():
    """Cross-entropy of cosines both ways; a second image of the same words is no wrong answer."""
    args, model = small()
    net, x = model.scorer, torch.randn(3, 3, 8, 12)
    text = model.tokens(["ab", "a", "ab"])
    with torch.no_grad():
        a, b = net.of_text(text), net.of_image(x)
        assert torch.allclose(a.norm(dim=1), torch.ones(3)) and torch.allclose(b.norm(dim=1),
                                                                              torch.ones(3))
        s = 10 * a @ b.T
        total = 0
        for m in (s, s.T):
            total -= m[0, 0] - torch.logsumexp(m[0, [0, 1]], 0)
            total -= m[1, 1] - torch.logsumexp(m[1], 0)
            total -= m[2, 2] - torch.logsumexp(m[2, [1, 2]], 0)
        assert torch.allclose(dm.contrastive_loss(net, text, x), total / 6, atol=1e-5)


def test_accuracy_counts_what_is_right():
    """A checker that reads what we say: right in all, a wrong digit, a wrong colour, one thing too
    many, one missing."""
    facts = torch.tensor(np.tile(dm.NONE, (5, 5, 1)))
    facts[:, 1], facts[:, 2] = torch.tensor([7, 0]), torch.tensor([2, 1])
    read = facts.clone()
    read[1, 1, 0], read[2, 2, 1], read[3, 0, 0], read[4, 2, 0] = 6, 5, 3, 10
    one_hot = torch.nn.functional.one_hot

    def checker(x):
        return one_hot(read[..., 0], 11).float(), one_hot(read[..., 1].clamp(max=7), 8).float()

    found = dm.accuracy(checker, torch.zeros(5, 3, 32, 32, dtype=torch.uint8), facts)
    digit, colour, relation, everything = (f.tolist() for f in found)
    assert digit == [1, 0.5, 1, 1, 0.5] and colour == [1, 1, 0.5, 1, 1]
    assert relation == [1, 1, 1, 0, 0] and everything == [1, 0, 0, 0, 0]


def test_caption_is_the_one_that_bayes_prefers():
    """Among the scorer's shortlist, by log p(text) + log p(codes | text), one by one."""
    args, model = small(text_length=3)
    texts, images = ["ab", "a b", "b", "c"], torch.randint(256, (2, 3, 8, 12), dtype=torch.uint8)
    short, log_p = dm.captions_of(args, model, images, texts, shortlist=3)
    codes = dm.codes_of(model, images)
    with torch.no_grad():
        cos = model.scorer.of_image(dm.to_float(dm.to_uint8(dm.pictures_of(model, codes)))) @ (
            model.scorer.of_text(model.tokens(texts)).T)
        assert torch.equal(short, cos.topk(3).indices)
        for n, i in itertools.product(range(2), range(3)):
            want = sum(model.transformer.log_prob(model.tokens([texts[short[n, i]]]), codes[n:n + 1]))
            assert torch.allclose(log_p[n, i], want, atol=1e-3)


def test_codes_hold_all_that_the_decoder_gets():
    args, model = small()
    images = torch.randint(256, (3, 3, 8, 12), dtype=torch.uint8)
    codes = dm.codes_of(model, images)
    back, same, _ = model.autoencoder(dm.to_float(images))
    assert torch.equal(codes, same) and torch.allclose(dm.pictures_of(model, codes), back, atol=1e-5)


def test_a_code_sees_ten_by_ten_pixels():
    """And so the top half's codes do not depend on what lies 3 pixels below it or farther."""
    args, model = small(shape=[3, 32, 32])
    x = torch.randn(1, 3, 32, 32, requires_grad=True)
    model.autoencoder.encode(x)[0, 4, 4].sum().backward()
    rows, cols = x.grad[0].abs().sum(0).nonzero(as_tuple=True)
    assert (rows.min(), rows.max(), cols.min(), cols.max()) == (13, 22, 13, 22)


# ---- The paper -----------------------------------------------------------------------------------


def test_paper_shapes():
    """12 billion weights, 1,280 places, 8192 codes; nothing is allocated."""
    args = dm.parse_args(["--size", "paper", "--device", "cpu"])
    args.shape, args.data = [3, 128, 128], "x"
    args.learned = [[i // 256, i % 256] for i in range(args.merges)]
    with torch.device("meta"):
        net = dm.DallE(args).transformer
        text = torch.zeros(2, 256, dtype=torch.long)
        words, codes = net(text, torch.zeros(2, 1023, dtype=torch.long))
    assert words.shape == (2, 256, 16_384 + 256) and codes.shape == (2, 1024, 8192)
    body = sum(p.numel() for p in net.blocks.parameters())
    D = 3968
    assert body == 64 * (12 * D * D + 13 * D) and 12.0e9 < body < 12.2e9
    assert net.kinds == dm.kinds_of("sparse", 64) and net.blocks[0].attention.heads == 62


# ---- Files ---------------------------------------------------------------------------------------


SMALL = ("--train --steps 4 --model-steps 4 --side-steps 2 --batch-size 8 --model-batch 8 "
         "--side-batch 8 --width 8 --code-dim 4 --codebook-size 6 --blocks 1 --model-width 32 "
         "--model-layers 2 --heads 2 --side-width 32 --every 2 --num 2 --device cpu").split()


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A data set of 40 pairs, 8 x 12, with captions."""
    folder = tmp_path_factory.mktemp("dm")
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(40, 8, 12, 3), dtype=np.uint8)
    captions = np.array([f"thing {i % 5} of many" for i in range(40)])
    np.savez(folder / "own.npz", images=images, captions=captions)
    np.savez(folder / "bare.npz", images=images)
    np.savez(folder / "odd.npz", images=images[:, :7], captions=captions)
    dm.save_png(folder / "one.png", images[:1])
    dm.save_png(folder / "big.png", images[:1].repeat(2, 1))
    (folder / "cut.png").write_bytes((folder / "one.png").read_bytes()[:-20])
    return folder


@pytest.fixture(scope="module")
def trained(own):
    return call(dm, *SMALL, "--data", "own.npz", cwd=own)


def test_train_writes_what_it_promises(own, trained):
    for name in ("model.pt", "samples.png", "samples.npz", "loss.csv", "loss.png", "codes_000002.png",
                 "model_000002.png", "attention.png"):
        assert (own / "out/dalle_mini" / name).exists(), name
    assert "codes used" in trained


def test_every_verb_runs(own, trained, monkeypatch, capsys):
    monkeypatch.chdir(own)
    cpu = ["--device", "cpu", "--num", "2"]
    dm.main(["--prompt", "Thing 3 of many", "--prompt", "thing 4", "--best-of", "2", "--save", "s.npz",
             "--top-k", "3", "--top-p", "0.9", *cpu])
    assert "spelled" not in capsys.readouterr().out
    saved = np.load("s.npz")
    assert saved["arr_0"].shape == (4, 8, 12, 3)
    assert saved["captions"].tolist() == ["thing 3 of many"] * 2 + ["thing 4"] * 2
    dm.main(["--prompt", "thing ö", *cpu])
    assert "'ö' has no token of its own" in capsys.readouterr().out
    dm.main(["--complete", "one.png", "--prompt", "thing 1", *cpu])
    dm.main(["--complete", "own.npz", *cpu])
    dm.main(["--enhance", "thing", *cpu])
    assert capsys.readouterr().out.count("thing -> thing") == 3
    dm.main(["--caption", "one.png", "--prompt", "thing 1", "--prompt", "thing 2", *cpu])
    dm.main(["--attention", "--prompt", "thing 1", *cpu])
    for name in ("complete", "enhance", "attention"):
        assert (own / "out/dalle_mini" / f"{name}.png").exists(), name


def test_same_seed_same_samples(own, trained, monkeypatch):
    monkeypatch.chdir(own)
    for name in ("a", "b"):
        dm.main(["--sample", "--save", f"{name}.npz", "--device", "cpu"])
    assert (np.load("a.npz")["arr_0"] == np.load("b.npz")["arr_0"]).all()


def test_top_half_is_kept(own, trained):
    """All drawn images have the codes of the given image's top half there."""
    args, model = small()
    top = dm.codes_of(model, torch.randint(256, (1, 3, 4, 12), dtype=torch.uint8)).flatten()
    codes = dm.new_codes(args, model, model.tokens(["ab", "a"]), 5, top)
    assert codes.shape == (2, 5, 2, 3) and (codes[:, :, 0] == top).all()
    assert len(codes[:, :, 1].flatten(0, 1).unique(dim=0)) > 1


@pytest.mark.parametrize("checkpoint", [1, 2, 3, 4])
def test_resumes_to_the_bit(own, trained, checkpoint):
    """Killed right after any checkpoint, of any part or between them, and resumed: the same model."""
    calls, saved = [], dm.save_history

    def killed(*a):
        calls.append(1)
        if len(calls) == checkpoint:
            raise KeyboardInterrupt
        saved(*a)

    short = [*SMALL, "--data", str(own / "own.npz"), "--out", str(own / f"b{checkpoint}")]
    dm.save_history = killed
    try:
        with pytest.raises(SystemExit):
            dm.main(short)
        dm.save_history = saved
        dm.main([*short, "--resume"])
    finally:
        dm.save_history = saved
        signal.signal(signal.SIGINT, signal.default_int_handler)
    one, two = (torch.load(own / p / "model.pt", weights_only=True)
                for p in ("out/dalle_mini", f"b{checkpoint}"))
    assert (two["part"], two["step"]) == ("scorer", 2)
    assert all(torch.equal(one["model"][k], two["model"][k]) for k in one["model"])


def test_scenes_train_and_are_measured(tmp_path, monkeypatch, capsys):
    """All four parts on our own scenes, and the report."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dm, "measure", lambda args, model, real=dm.measure: real(args, model, 6))
    dm.main([*SMALL, "--scenes", "40", "--best-of", "2", "--export", "x.pt"])
    text = capsys.readouterr().out
    for row in ("real scenes, from their codes", "drawn, pairs seen, best of 2",
                "drawn, pairs never seen", "captions of 6 real scenes"):
        assert row in text
    small = torch.load("x.pt", weights_only=True)
    assert all(v.dtype == torch.float16 for v in small["model"].values())


def refused(argv, words, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        dm.main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and words in err and len(err.strip().splitlines()) == 1, err


@pytest.mark.parametrize("argv, words", [
    (["--prompt", "  "], "the text is empty"),
    (["--enhance", ""], "the text is empty"),
    (["--prompt", "qqqqqqqqqqqqqqqqqqqqqqqqqqqqq"], "tokens, but 16 fit"),
    (["--complete", "big.png"], "an image of [3, 16, 12], but the model was trained on [3, 8, 12]"),
    (["--complete", "cut.png"], "is cut off or damaged"),
    (["--complete", "none.png"], "none.png: No such file"),
    (["--caption", "one.png"], "give the captions to choose from"),
    (["--eval"], "only for our own scenes"),
    ([*SMALL, "--data", "odd.npz", "--out", "odd"], "multiples of 4"),
    ([*SMALL, "--data", "bare.npz", "--out", "bare"], "expected 'captions'"),
    ([*SMALL, "--data", "cifar10", "--out", "c"], "is not known"),
    ([*SMALL, "--data", "own.npz", "--text-length", "2", "--out", "t"], "take a larger --text-length"),
    (["--sample", "--heads", "3"], "--heads 3: expected a divisor"),
    (["--sample", "--model-width", "64"], "was trained with 32"),
    (["--sample", "--top-p", "0"], "more than 0"),
    (["--sample", "--out", "nowhere"], "is not there"),
])
def test_bad_input_is_one_line(own, trained, monkeypatch, capsys, argv, words):
    """Exit code 2 and one line."""
    monkeypatch.chdir(own)
    monkeypatch.setattr(dm, "HERE", own)
    refused([*argv, *([] if "--device" in argv else ["--device", "cpu"])], words, capsys)
