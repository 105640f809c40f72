"""PCME: public reference values, identities, gradients, errors."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from reference import pcme

GOLDEN = Path(__file__).parent / "golden" / "pcme"


def golden(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file}


def tensor(array, grad=False):
    return torch.tensor(array, requires_grad=grad)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def close(actual, expected, rtol=1e-9, atol=1e-12):
    values = (x.detach() if isinstance(x, torch.Tensor) else x for x in (actual, expected))
    np.testing.assert_allclose(*values, rtol=rtol, atol=atol)


# ---------------------------------------------------------------- public values

def test_samples():
    f = {name: tensor(array) for name, array in golden("sampling").items()}
    close(pcme.sample_gaussian(f["mu"], f["logsigma"], 7, eps=f["eps"]), f["samples"], 1e-6, 1e-6)


def loaded(module, f):
    module.load_state_dict({k[6:]: tensor(v) for k, v in f.items() if k.startswith("param_")})
    return module


def check_head(module, f, out):
    for key in ("mu", "logsigma", "attention", "residual", "uncertainty_attention"):
        close(out[key], f["embedding" if key == "mu" else key], 1e-4, 1e-5)
    (out["mu"] * tensor(f["cotangent_embedding"])
     + out["logsigma"] * tensor(f["cotangent_logsigma"])).sum().backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    assert len(gradients) == sum(key.startswith("param_") for key in f)
    for name, grad in gradients.items():
        close(grad, f[f"grad_{name}"], 1e-4, 1e-5)


def test_image_encoder():
    f = golden("image_head")
    encoder = loaded(pcme.EncoderImage(nn.Identity(), 24, 16, 0), f)
    x = tensor(f["feature_map"], True)
    out = encoder(x)
    assert torch.equal(out["embedding"], out["mu"])
    check_head(encoder, f, out)
    close(x.grad, f["grad_feature_map"], 1e-4, 1e-5)
    again = encoder(tensor(f["feature_map"]).to(memory_format=torch.channels_last))
    close(again["mu"], f["embedding"], 1e-4, 1e-5)


def test_text_encoder_in_any_order():
    f = golden("text_head")
    encoder = loaded(pcme.EncoderText(15, 12, 16, n_samples_inference=0), f)
    tokens, lengths = tensor(f["tokens"]), tensor(f["lengths"])
    check_head(encoder, f, encoder(tokens, lengths))
    order = torch.tensor([2, 0, 3, 1])
    out = encoder(tokens[order], lengths[order])
    close(out["logsigma"], f["logsigma"][order.numpy()], 1e-4, 1e-5)


def test_pie_net_with_three_heads():
    f = golden("pie_net_k3")
    net = loaded(pcme.PIENet(3, 10, 8, 5), f)
    out = net(*(tensor(f[name]) for name in ("global_embedding", "local_features", "pad_mask")))
    for actual, name in zip(out, ("out", "attention", "residual")):
        close(actual, f[name], 1e-4, 1e-5)


def check_gradients(criterion, inputs, f, rtol=1e-9, atol=1e-12):
    leaves = inputs | {"shift": criterion.shift, "negative_scale": criterion.negative_scale}
    for key, value in leaves.items():
        grad = torch.zeros_like(value) if value.grad is None else value.grad
        close(grad, f[f"grad_{key}"], rtol, atol)


@pytest.mark.parametrize(
    "name, tolerance", [("loss_coco_like", 1e-4), ("loss_j1", 1e-4), ("loss_cub_like_f64", 1e-9)])
@pytest.mark.parametrize("block", [None, 4])
def test_loss(name, tolerance, block):
    f = golden(name)
    criterion = pcme.MCSoftContrastiveLoss(f["init_shift"], f["init_negative_scale"], block=block,
                                           uniform_lambda=float(f["uniform_lambda"]),
                                           vib_beta=float(f["vib_beta"]))
    names = ("image_samples", "caption_samples", "image_logsigma", "caption_logsigma")
    inputs = {name: tensor(f[name], True) for name in names}
    criterion.to(inputs["image_samples"].dtype)
    loss, parts = criterion(*inputs.values(), uniform_rows=tensor(f["uniform_rows"]))
    expected = {key[4:]: value for key, value in f.items() if key.startswith("out_")}
    assert parts.keys() == expected.keys()
    for key in expected:
        close(parts[key], expected[key], tolerance, tolerance)
    loss.backward()
    check_gradients(criterion, inputs, f, tolerance, tolerance)
    images, captions = (tensor(f[key]) for key in ("image_samples", "caption_samples"))
    distance = pcme._logits(images, captions, 0.0, 0.5).neg().permute(0, 2, 3, 1)
    close(distance, f["pair_distances"], max(tolerance, 1e-9), 1e-5 if tolerance > 1e-6 else 1e-9)


def test_match_probability():
    f = golden("match_prob")
    q, g = tensor(f["query_samples"]), tensor(f["gallery_samples"])
    ab, exact = {k: float(f[k]) for k in ("shift", "negative_scale")}, f["match_prob_exact_f64"]
    criterion = pcme.MCSoftContrastiveLoss(*ab.values())
    for block in (None, 2):
        close(pcme.pairwise_similarity(q, g, **ab, block=block), exact, 0, 1e-12)
    single = pcme.pairwise_similarity(q.float(), g.float(), **ab)
    close(single, f["match_prob_official_f32"], 0, 2e-6)
    close((-single).sort(1).values, f["official_sorted_negative_sims"], 0, 2e-6)
    close(criterion.double().match_prob(q, g), exact, 0, 1e-12)
    close(criterion.log_match_prob(q, g).exp(), exact, 1e-12, 1e-12)
    close(pcme.pairwise_similarity(q, g, "log_matching_prob", **ab), np.log(exact), 1e-9)


@pytest.mark.parametrize("block", [None, 2])
def test_gaussian_distances(block):
    f = golden("gaussian_distances")
    mus, sigmas = ([tensor(f[f"{side}_{name}"]) for side in ("query", "gallery")]
                   for name in ("mu", "logsigma"))

    def check(name, expected, rtol=1e-9):
        arguments = sigmas if name in pcme.GAUSSIANS else ()
        close(pcme.pairwise_similarity(*mus, name, *arguments, block=block), expected, rtol)

    for name in ("elk", "l2", "min", "max", "wasserstein", "js"):
        check(name, f[f"official_{name}"])
    check("bhattacharyya", f["official_bhattacharyya"], 1e-4)
    for name, expected in {
            "kl_official": f["official_kl"], "reverse_kl_official": f["official_reverse_kl"],
            "kl": -f["exact_kl_query_gallery"], "reverse_kl": -f["exact_kl_gallery_query"],
            "csd": -f["exact_csd"], "bhattacharyya": -f["exact_bhattacharyya"],
            "wasserstein": -f["exact_wasserstein2_squared"],
            "js": -(2 * f["exact_jeffreys"] + 2 * 16),
            "elk": f["exact_log_elk"] + 8 * math.log(2 * math.pi)}.items():
        check(name, expected)


def test_pcme_plus_plus():
    f = golden("pcmepp_loss")
    settings = ("init_shift", "init_negative_scale", "vib_beta", "smoothness_alpha")
    criterion = pcme.ClosedFormSampledDistanceLoss(*(float(f[name]) for name in settings)).double()
    names = ("image_mean", "caption_mean", "image_log_var", "caption_log_var")
    inputs = {name: tensor(f[name], True) for name in names}
    loss, parts = criterion(*inputs.values(), tensor(f["matched"]))
    close(loss, f["loss"].reshape(()) if loss.ndim == 0 else f["loss"])
    assert parts["n_pseudo_positives"] == f["n_pseudo_positives"]
    loss.backward()
    check_gradients(criterion, inputs, f)


@pytest.mark.parametrize("name", ["coco_recall_matmul", "coco_recall_match_prob"])
def test_coco_recalls(name):
    f = golden(name)
    result = pcme.coco_recalls(f["similarity_i2t"], f["image_ids"], f["caption_image_ids"],
                               int(f["n_folds"]))
    assert len(result) == 24
    for key, value in result.items():
        assert value == pytest.approx(float(f[key]), abs=1e-9), key
    method = "matmul" if "matmul" in name else "matching_prob"
    sim = pcme.pairwise_similarity(f["image_samples"], f["caption_samples"], method,
                                   shift=f["shift"], negative_scale=f["negative_scale"])
    close(sim, f["similarity_i2t"], 1e-5, 1e-6)


@pytest.mark.parametrize("name", ["cub_metrics_matmul", "cub_metrics_elk"])
def test_cub_metrics(name):
    f = golden(name)
    if str(f["method"]) == "matmul":
        sim = pcme.pairwise_similarity(f["image_samples"], f["caption_samples"], "matmul")
    else:
        sim = pcme.pairwise_similarity(f["image_samples"][:, 0], f["caption_samples"][:, 0], "elk",
                                       f["image_logsigma"], f["caption_logsigma"])
    for way, s, q, g in (("i2t", sim, "image", "caption"), ("t2i", sim.T, "caption", "image")):
        result = pcme.cub_metrics(s, f[f"{q}_labels"], f[f"{g}_labels"])
        assert {f"{way}_{key}" for key in result} == {key for key in f if key.startswith(way)}
        for key, value in result.items():
            assert value == pytest.approx(float(f[f"{way}_{key}"]), abs=1e-9), key
        percent = pcme.cub_metrics(s, f[f"{q}_labels"], f[f"{g}_labels"], percent=True)
        assert percent["r_precision"] == pytest.approx(100 * result["r_precision"])
        assert percent["medr"] == result["medr"]


def test_eccv_metrics():
    f = golden("eccv_metrics")
    sim, positives = f["similarity"], f["positives"]
    for key, value in pcme.eccv_metrics(sim, positives).items():
        close(value, f[key])
    close(pcme.recall_at_k(sim, positives, 5), f["r5"])
    close(pcme.recall_at_k(sim, positives, 10), f["r10"])
    close(pcme.r_precision(sim, positives), f["rprecision"])
    close(pcme.map_at_r(torch.tensor(sim), positives), f["eccv_map_at_r"])


@pytest.mark.parametrize("name", ["pmrp", "pmrp_missing_and_drop_last"])
def test_pmrp(name):
    f = golden(name)
    owner = [f["image_ids"].tolist().index(image) for image in f["caption_image_ids"]]
    result = pcme.pmrp(f["similarity"], f["codes"], owner, drop_last=bool(f["drop_last"]),
                       annotated=f["annotated"])
    for way in ("i2t", "t2i"):
        for name in (f"{way}_pmrp", f"{way}_pmr1"):
            close(result[name], f[name])
        for name in (f"{way}_rprecision", f"{way}_r1"):
            close(result[name], [f[f"{name}_zeta{zeta}"] for zeta in range(3)])


def test_tokenizer():
    f = golden("tokenizer")
    for caption, expected in zip(f["captions"], f["tokens_joined"]):
        assert pcme.tokenize(str(caption)) == str(expected).split("\x1f")


@pytest.mark.parametrize("text, tokens", [
    ("'no way", "' no way"), ("rock 'n roll", "rock 'n roll"), ("say ''hi''", "say `` hi ''"),
    ("the dogs' tails", "the dogs ' tails"), ("wait... what", "wait ... what"), ("", ""),
    ("1,000 dogs: two, black", "1,000 dogs : two , black"), ("ends here.)", "ends here . )"),
    ("a [red] {x} <y>", "a [ red ] { x } < y >"), ("the u.s. flag", "the u.s. flag"),
    ("they'll can't we've", "they 'll ca n't we 've"), ("a–b--c", "a – b -- c"),
    ("wanna go gimme more'n", "wan na go gim me more 'n"), ("50% off*", "50 % off *"),
    ("“x”", "“ x ”"), ('""a dog""', "`` `` a dog '' ''"), ("``` x", "`` ` x"),
    ('so\t"x"', "so '' x ''")])
def test_tokenizer_rules(text, tokens):
    assert pcme.tokenize(text) == tokens.split()
    assert pcme.tokenize("'no 'x", legacy_quotes=True) == ["'no", "'", "x"]


# ---------------------------------------------------------------- identities

def naive_loss(images, captions, matched, a, b):
    total = 0.0
    for i, zi in enumerate(images):
        for c, zc in enumerate(captions):
            d = ((zi[:, None] - zc[None]).square().sum(-1) + 1e-6).sqrt()
            p = torch.sigmoid(2 * (b - a * d)).mean()
            n = torch.sigmoid(-2 * (b - a * d)).mean()
            total = total - 2 * (matched[i, c] * p.log() + (1 - matched[i, c]) * n.log())
    return total


def test_soft_labels_rectangles_and_reductions():
    g = rng()
    images, captions = (torch.randn(n, j, 6, generator=g, dtype=torch.float64) * 0.4
                        for n, j in ((3, 4), (5, 2)))
    matched = torch.rand(3, 5, generator=g, dtype=torch.float64)
    make = lambda **options: pcme.MCSoftContrastiveLoss(2, 3, **options).double()  # noqa: E731
    expected = naive_loss(images, captions, matched, 3, 2)
    loss, parts = make()(images, captions, matched=matched)
    close(loss, expected)
    close(parts["i2t_pos_loss"] + parts["i2t_neg_loss"], expected / 2)
    close(make(reduction="mean")(images, captions, matched=matched)[0], expected / 15)
    table = make(reduction="none", block=2)(images, captions, matched=matched)[0]
    assert table.shape == (3, 5)
    close(table.sum(), expected)
    hard = matched > 0.5
    close(make()(images, captions, matched=hard)[0],
          make()(images, captions, matched=hard.double())[0])


@pytest.mark.parametrize("criterion", [
    pcme.MCSoftContrastiveLoss(), pcme.TripletLoss(), pcme.InfoNCELoss()])
def test_reported_parts_are_copies(criterion):
    x, y = torch.randn(2, 4, 3, 8, generator=rng())
    loss, parts = criterion(x, y)
    before = loss.item()
    for part in parts.values():
        part.add_(1)
    assert loss.item() == before == criterion(x, y)[0].item()


def test_gradients_of_the_loss():
    g = rng(1)
    inputs = [torch.randn(*shape, generator=g, dtype=torch.float64, requires_grad=True)
              for shape in ((3, 2, 4), (3, 2, 4), (3, 4), (3, 4))]
    criterion = pcme.MCSoftContrastiveLoss(2, 2, uniform_lambda=1.0, vib_beta=0.1,
                                           kl_convention="std", deterministic_weight=0.5).double()
    assert torch.autograd.gradcheck(lambda *x: criterion(*x)[0], inputs)


def test_kl_conventions():
    g = rng()
    mu, logsigma = (torch.randn(4, 5, generator=g, dtype=torch.float64) for _ in range(2))
    criterion = pcme.MCSoftContrastiveLoss(vib_beta=1.0, kl_convention="std").double()
    z = mu.unsqueeze(1)
    _, parts = criterion(z + 1, z + 1, logsigma, logsigma, image_mu=mu, caption_mu=mu)
    gaussian, unit = (torch.distributions.Normal(*x) for x in ((mu, logsigma.exp()), (0.0, 1.0)))
    close(parts["vib_loss"], 2 * torch.distributions.kl_divergence(gaussian, unit).sum())


def test_extreme_logits_stay_finite():
    z = torch.randn(4, 3, 8, generator=rng())
    for shift, scale in ((1000.0, 1.0), (-1000.0, 1.0), (15.0, 1000.0)):
        criterion = pcme.MCSoftContrastiveLoss(shift, scale)
        x = z.clone().requires_grad_()
        loss, _ = criterion(x, z)
        loss.backward()
        assert loss.isfinite() and x.grad.isfinite().all()
        assert criterion.log_match_prob(z, z).isfinite().all()


def test_uniformity_falls_as_points_spread_and_has_gradients_at_duplicates():
    direction = nn.functional.normalize(torch.randn(20, 1, 8, generator=rng()), dim=-1)
    criterion, values = pcme.MCSoftContrastiveLoss(uniform_lambda=1.0), []
    for spread in (0.0, 0.3, 1.0):
        x = (spread * direction + (1 - spread)).requires_grad_()
        loss, parts = criterion(x, x)
        loss.backward()
        assert x.grad.isfinite().all()
        values.append(float(parts["uniform_loss"]))
    assert values[0] == pytest.approx(0, abs=1e-5) and values[0] > values[1] > values[2] >= -8


def test_uniformity_draws_128_rows_from_the_generator():
    x, criterion = torch.randn(40, 3, 4, generator=rng()), pcme.MCSoftContrastiveLoss(5, 5, 7, 1.0)
    first, again, other = (criterion(x, -x, generator=rng(s))[0] for s in (5, 5, 6))
    assert first == again != other


@pytest.mark.parametrize("dim", [64, 256])
def test_moment_score_is_the_limit_of_many_samples(dim):
    g = rng(dim)
    q, k = (nn.functional.normalize(torch.randn(3, dim, generator=g, dtype=torch.float64), dim=1)
            for _ in range(2))
    k[0] = q[0]
    k[1] = nn.functional.normalize(q[1] + 0.3 * k[1], dim=0)
    for level in (-4.0, -3.0, -2.0):
        l1, l2 = (level + 0.3 * torch.randn(3, dim, generator=g, dtype=torch.float64)
                  for _ in range(2))
        for ab in (5.0, 15.0):
            score = pcme.pairwise_similarity(q, k, "match_prob_moment", l1, l2, ab, ab)
            noise = torch.randn(4000, dim, generator=g, dtype=torch.float64)
            sigma = ((2 * l1)[:, None].exp() + (2 * l2).exp()).sqrt()
            for i, j in itertools.product(range(3), range(3)):
                d = (q[i] - k[j] + sigma[i, j] * noise).square().sum(1).add(1e-6).sqrt()
                assert abs(score[i, j] - torch.sigmoid(2 * ab * (1 - d)).mean()) < 0.02


@pytest.mark.parametrize("j", [1, 2])
def test_log_scores_rank_where_probabilities_saturate(j):
    q = torch.zeros(1, j, 4)
    g = torch.linspace(0, 0.1, 6).view(6, 1, 1).expand(6, j, 4)
    log = pcme.pairwise_similarity(q, g, "log_matching_prob", shift=25.0)
    assert (log[0, :-1] > log[0, 1:]).all()
    assert len(pcme.pairwise_similarity(q, g, shift=25.0).unique()) < 6
    close(pcme.MCSoftContrastiveLoss(25.0).log_match_prob(q, g), log, 1e-6, 0)


def test_half_out_and_foreign_inputs():
    g = rng()
    q, k = (torch.randn(5, 3, 8, generator=g) for _ in range(2))
    half = pcme.pairwise_similarity(q.half(), k.half())
    assert half.dtype == torch.float32
    close(half, pcme.pairwise_similarity(q.half().float(), k.half().float()), 0, 0)
    assert pcme.MCSoftContrastiveLoss()(q.half(), k.half())[0].dtype == torch.float32
    criterion = pcme.MCSoftContrastiveLoss()
    for dtype in (torch.float32, torch.float64):  # of the input, not of the parameters
        assert criterion.double().match_prob(q.to(dtype), k.to(dtype)).dtype == dtype
        assert criterion.float().log_match_prob(q.to(dtype), k.to(dtype)).dtype == dtype
    out = torch.empty(5, 5)
    assert pcme.pairwise_similarity(q, k, out=out) is out
    strided = k.transpose(0, 1).contiguous().transpose(0, 1)
    close(pcme.pairwise_similarity(q.numpy(), strided.numpy()), out)
    assert pcme.pairwise_similarity(q, k, dtype=torch.float64).dtype == torch.float64
    close(pcme.pairwise_similarity(q, k, "matmul", dtype=torch.float16),
          pcme.pairwise_similarity(q, k, "matmul").half(), 0, 0)
    before = q.clone()
    pcme.pairwise_similarity(q, k, "matmul")
    assert torch.equal(q, before)
    close(pcme.pairwise_similarity(q, k, "matmul"), torch.einsum("ijd,nkd->in", q, k), 1e-4, 1e-5)


@pytest.mark.parametrize("method", pcme.METHODS)
def test_similarities_keep_their_digits_under_autocast(method):
    q, g = torch.randn(2, 5, *((3, 8) if method in pcme.SAMPLED else (8,)), generator=rng())
    sigmas = 0.1 * torch.randn(2, 5, 8, generator=rng())
    expected = pcme.pairwise_similarity(q, g, method, *sigmas)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pcme.pairwise_similarity(q, g, method, *sigmas), expected)


def test_arrays_of_narrow_integers_and_reversed_views():
    g = rng()
    sim, codes = torch.rand(6, 6, generator=g).numpy(), torch.randint(2, (6, 4), generator=g)
    owner = np.arange(6)
    expected = pcme.pmrp(np.ascontiguousarray(sim[::-1]), codes, owner, folds=2)
    for dtype in (np.uint8, np.uint16):                       # uint8 is no mask here
        assert pcme.pmrp(sim[::-1], codes, owner.astype(dtype), folds=2) == expected


def test_sides_of_two_dtypes_are_computed_in_the_wider_one():
    x, y, l = torch.randn(3, 4, 2, 8, generator=rng())
    sampled = pcme.MCSoftContrastiveLoss(2, 2, vib_beta=0.1, uniform_lambda=0.1,
                                         deterministic_weight=0.1)
    closed = pcme.ClosedFormSampledDistanceLoss(2, 2, 0.1, 0.1)
    for criterion, inputs in ((sampled, (x, y, l[:, 0], l[:, 1])), (pcme.InfoNCELoss(), (x, y)),
                              (pcme.TripletLoss(), (x, y)),
                              (closed, (x[:, 0], y[:, 0], l[:, 0], l[:, 1]))):
        expected = criterion(*(part.double() for part in inputs))[0]
        for dtypes in ((torch.float32, torch.float64), (torch.float64, torch.float32)):
            loss = criterion(*(part.to(d) for part, d in zip(inputs, 2 * dtypes)))[0]
            assert loss.dtype == torch.float64
            close(loss, expected)


def test_antithetic_samples_average_to_the_mean():
    mu, logsigma = torch.randn(3, 5, generator=rng()), torch.zeros(3, 5)
    close(pcme.sample_gaussian(mu, logsigma, 4, rng(), antithetic=True).mean(1), mu, 1e-5, 1e-6)
    assert pcme.sample_gaussian(mu, logsigma, 3, rng(), antithetic=True).shape == (3, 3, 5)
    first, again = (pcme.sample_gaussian(mu, logsigma, 3, rng(7)) for _ in range(2))
    assert torch.equal(first, again)


# ---------------------------------------------------------------- metrics

def test_ties_keep_the_gallery_order():
    sim = np.zeros((1, 4))
    for place, k in itertools.product(range(4), range(1, 5)):
        positives = np.eye(4, dtype=bool)[[place]]
        assert pcme.recall_at_k(sim, positives, k) == float(k > place)
        assert pcme.r_precision(sim, positives) == float(place == 0)


def test_integer_scores_are_ranked():
    sim, positives = torch.tensor([[1, 3, 2], [2, 2, 1]]), [[0, 1, 0], [0, 1, 0]]
    for dtype in (torch.int64, torch.uint8, torch.float16):
        assert pcme.recall_at_k(sim.to(dtype), positives, 1) == 0.5
        assert pcme.map_at_r(sim.to(dtype), positives) == 0.5


def test_scores_that_carry_gradients_can_be_judged():
    sim = torch.randn(4, 8, generator=rng(), requires_grad=True)
    owner = torch.arange(8) // 2
    assert pcme.pmrp(sim, np.eye(4), owner, zetas=(0,))["i2t_pmrp"] >= 0
    assert pcme.coco_recalls(sim, torch.arange(4), owner, 2).keys() > {"nfold_t2i_recall_1"}
    assert 0 <= pcme.r_precision(sim, owner == torch.arange(4)[:, None]) <= 1


def test_random_rankings_have_r_precision_r_over_n():
    sim = torch.rand(400, 200, generator=rng())
    labels = torch.arange(200) % 4
    positives = (torch.arange(400) % 4)[:, None] == labels
    assert pcme.r_precision(sim, positives) == pytest.approx(0.25, abs=0.02)


def test_pmrp_folds_cut_before_unannotated_images_leave():
    g = rng(3)
    sim, codes = torch.rand(8, 16, generator=g), torch.randint(2, (8, 5), generator=g)
    owner, annotated = torch.arange(16) // 2, torch.tensor([1, 0, 1, 1, 1, 1, 1, 0]).bool()
    folded = pcme.pmrp(sim, codes, owner, folds=2, annotated=annotated)
    halves = [pcme.pmrp(sim[r][:, c], codes[r], owner[c] - r.start, annotated=annotated[r])
              for r, c in ((slice(0, 4), slice(0, 8)), (slice(4, 8), slice(8, 16)))]
    for key in folded:
        assert folded[key] == pytest.approx(np.mean([half[key] for half in halves]))


def test_pmrp_with_many_equal_scores_is_that_of_a_stable_ranking():
    g = rng(4)
    sim = torch.randint(3, (9, 27), generator=g).double()
    codes, owner = torch.randint(2, (9, 4), generator=g), torch.arange(27) // 3
    result = pcme.pmrp(sim, codes, owner)
    hamming = (codes[:, None] != codes[owner]).sum(-1)
    for zeta in range(3):
        for way, s, h in (("i2t", sim, hamming), ("t2i", sim.T, hamming.T)):
            for row, (scores, plausible) in enumerate(zip(s, h <= zeta)):
                ranking = sorted(range(len(scores)), key=lambda item: (-scores[item], item))
                hits = [bool(plausible[item]) for item in ranking[:int(plausible.sum())]]
                assert result[f"{way}_rprecision"][zeta, row] == pytest.approx(np.mean(hits))
                assert result[f"{way}_r1"][zeta, row] == float(plausible[ranking[0]])


def test_plausible_match_codes():
    items = [{"image_id": i, "category_id": c} for i, c in ((7, 90), (7, 1), (5, 3))]
    codes, annotated = pcme.plausible_match_codes({"annotations": items}, [7, 9])
    assert codes.shape == (2, 90) and codes.dtype == np.uint8
    assert codes[0].nonzero()[0].tolist() == [0, 89]
    assert annotated.tolist() == [True, False]
    codes, annotated = pcme.plausible_match_codes(items, [9, 7, 7])
    assert codes.sum(1).tolist() == [0, 2, 2] and annotated.tolist() == [False, True, True]


def test_uncertainty_and_bins():
    l = torch.randn(30, 4, generator=rng(), dtype=torch.float64)
    close(pcme.uncertainty(l), l.mean(1))
    close(pcme.uncertainty(l, "trace"), (2 * l).exp().sum(1))
    u = np.arange(25.0)[::-1]
    bins = pcme.uncertainty_bins(u, -u, 10)
    assert bins["uncertainty"].tolist() == [2 * i + 0.5 for i in range(10)]
    close(bins["correlation"], -1)
    close(pcme.uncertainty_bins(torch.tensor(u.copy(), requires_grad=True), -u)["metric"],
          bins["metric"])
    half = torch.tensor(u.copy()).bfloat16()
    assert pcme.uncertainty_bins(half, -half)["metric"].tolist() == bins["metric"].tolist()


# ---------------------------------------------------------------- errors

def z(*shape):
    return torch.randn(*shape, generator=rng())


MC, SIM = pcme.MCSoftContrastiveLoss, pcme.pairwise_similarity
LOSS = MC()


@pytest.mark.parametrize("call, message", [
    (lambda: LOSS(z(3, 4), z(3, 2, 4)), "image_samples"),
    (lambda: LOSS(z(3, 2, 4), z(3, 2, 5)), "same D"),
    (lambda: LOSS(z(3, 0, 4), z(3, 2, 4)), "non-empty"),
    (lambda: LOSS(z(0, 2, 4), z(0, 2, 4)), "non-empty"),
    (lambda: LOSS(z(3, 2, 4), z(2, 2, 4)), "matched is needed"),
    (lambda: LOSS(z(2, 2, 4), z(2, 2, 4), matched=z(3, 2)), "matched"),
    (lambda: LOSS(z(2, 2, 4), z(2, 2, 4), matched=torch.full((2, 2), 2.0)), r"\[0, 1\]"),
    (lambda: MC(vib_beta=1.0)(z(2, 2, 4), z(2, 2, 4)), "image_logsigma"),
    (lambda: MC(vib_beta=-1.0), "vib_beta"),
    (lambda: MC(uniform_lambda=-1.0), "uniform"),
    (lambda: MC(reduction="max"), "reduction"),
    (lambda: MC(kl_convention="x"), "kl_conv"),
    (lambda: MC(uniform_lambda=1.0)(z(2, 2, 4), z(2, 2, 4), uniform_rows=[1]), "2 rows"),
    (lambda: MC(uniform_lambda=1.0)(z(2, 2, 4), z(2, 2, 4), uniform_rows=[1, 8]), "uniform_rows"),
    (lambda: MC(num_samples=0), "num_samples"),
    (lambda: MC(vib_beta=1.0, kl_convention="std")(
        z(2, 2, 4), z(2, 2, 4), z(2, 4), z(2, 4), caption_mu=z(3, 4)), "caption_mu"),
    (lambda: MC(block=0), "block"),
    (lambda: MC(num_samples=True), "num_samples"),
    (lambda: MC(init_shift=math.nan), "init_shift"),
    (lambda: MC(uniform_lambda=math.inf), "uniform_lambda"),
    (lambda: pcme.InfoNCELoss(0.0), "init_temperature"),
    (lambda: pcme.TripletLoss(math.nan), "margin"),
    (lambda: pcme.GaussianHead(0, 4), "d_in"),
    (lambda: pcme.GaussianHead(3, 4)(z(2, 4)), "x must be"),
    (lambda: pcme.EncoderImage(nn.Identity(), 0, 8), "cnn_dim"),
    (lambda: pcme.EncoderImage(nn.Identity(), 4, 8, -1), "n_samples_inference"),
    (lambda: pcme.EncoderImage(nn.Identity(), 4, 8, 0)(z(2, 4, 0, 3)), "backbone"),
    (lambda: pcme.EncoderText(0, 4, 8), "vocab_size"),
    (lambda: pcme.MultiHeadSelfAttention(1, 4, 2)(z(2, 4)), "x must be"),
    (lambda: pcme.MultiHeadSelfAttention(1, 4, 2)(z(2, 3, 4), torch.ones(2, 3).bool()), "mask"),
    (lambda: pcme.PIENet(1, 4, 6, 2)(z(1, 6), z(2, 3, 4)), "out must be"),
    (lambda: pcme.UncertaintyModuleImage(4, 6, 2)(z(1, 4), z(2, 3, 4)), "pooled"),
    (lambda: pcme.sample_gaussian(z(2, 3), z(2, 4), 7), "logsigma"),
    (lambda: pcme.sample_gaussian(z(2, 3), z(2, 3), 0), "num_samples"),
    (lambda: pcme.sample_gaussian(z(2, 3), z(2, 3), 2, eps=z(2, 3, 3)), "eps"),
    (lambda: pcme.EncoderText(5, 4, 8, final_state="first"), "final_state"),
    (lambda: SIM(z(2, 2, 4), z(2, 2, 4), "cosine"), "method"),
    (lambda: SIM(z(2, 4), z(2, 4)), "samples"),
    (lambda: SIM(z(2, 4), z(2, 4), "csd"), "q_logsigma"),
    (lambda: SIM(z(2, 4), z(2, 5), "l2"), "same D"),
    (lambda: SIM(z(2, 4), z(2, 4), "l2", out=z(3, 3)), "out"),
    (lambda: SIM(z(2, 4), z(2, 4), "l2", shift=math.nan), "shift"),
    (lambda: pcme.recall_at_k(torch.tensor([[math.nan, 1.0]]), [[True, False]], 1), "NaN"),
    (lambda: pcme.r_precision(z(2, 3), np.eye(2, 3) * [[1], [0]]), r"no positive.*\[1\]"),
    (lambda: pcme.recall_at_k(z(2, 3), torch.ones(3, 2), 1), "positives"),
    (lambda: pcme.r_precision(z(2, 3), torch.full((2, 3), 0.5)), "positives must be 0 or 1"),
    (lambda: pcme.recall_at_k(z(2, 3), torch.ones(2, 3), 1.5), "k must be an integer"),
    (lambda: pcme.plausible_match_codes({"images": []}, [1]), "annotations"),
    (lambda: pcme.plausible_match_codes([{"image_id": 1}], [1]), "category_id"),
    (lambda: pcme.coco_recalls(z(5, 5), range(5), range(5), 2.5), "folds must be an integer"),
    (lambda: pcme.cub_metrics(z(2, 3), [0, 1], [0, 1]), "g_labels"),
    (lambda: pcme.coco_recalls(z(3, 6), [0, 1, 2], [0, 0, 1, 1, 2, 2], 2), "folds"),
    (lambda: pcme.coco_recalls(z(3, 6), [0, 1], [0] * 6), "image_ids"),
    (lambda: pcme.pmrp(z(2, 4), np.eye(2), [0, 0, 1, 1], zetas=(-1,)), "zetas"),
    (lambda: pcme.pmrp(z(2, 4), np.eye(2), [0, 0, 1, 2]), "0..1"),
    (lambda: pcme.pmrp(z(2, 4), np.eye(3), [0, 0, 1, 1]), "codes"),
    (lambda: pcme.pmrp(z(2, 4), 2 * np.eye(2), [0, 0, 1, 1]), "0 or 1"),
    (lambda: pcme.uncertainty(z(2, 3), "max"), "kind"),
    (lambda: pcme.uncertainty_bins([1.0], [1.0]), "n_bins"),
    (lambda: pcme.uncertainty_bins([1.0, math.nan], [1.0, 0.0], 2), "finite"),
    (lambda: pcme.ClosedFormSampledDistanceLoss(vib_beta=-1), "vib_beta")])
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_types_are_checked():
    encoder, tokens = pcme.EncoderText(5, 4, 8), torch.ones(2, 3, dtype=torch.int64)
    for lengths in ([0, 1], [1, 4], [1]):
        with pytest.raises(ValueError, match="lengths"):
            encoder(tokens, torch.tensor(lengths))
    with pytest.raises(TypeError, match="lengths"):
        encoder(tokens, torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match=r"tokens must be in 0..4, got 1..5"):
        encoder(torch.tensor([[1, 5, 2]]), torch.tensor([2]))
    for name, call in {
            "lengths": lambda: encoder(tokens, None),
            "tokens": lambda: encoder(tokens.float(), torch.tensor([1, 2])),
            "caption": lambda: pcme.tokenize(3),
            "caption_samples": lambda: LOSS(z(2, 2, 2), np.zeros((2, 2, 2))),
            "image_samples": lambda: LOSS(torch.ones(2, 2, 2, dtype=torch.int64), z(2, 2, 2)),
            "eps": lambda: pcme.sample_gaussian(z(2, 3), z(2, 3), 1, eps=tokens.unsqueeze(1)),
            "out": lambda: SIM(z(2, 4), z(2, 4), "l2", out=tokens),
            "dtype": lambda: SIM(z(2, 4), z(2, 4), "l2", dtype=torch.int64),
            "positives": lambda: pcme.r_precision(z(2, 3), None)}.items():
        with pytest.raises(TypeError, match=name):
            call()
