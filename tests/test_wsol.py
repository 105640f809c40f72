"""The localization methods and baselines: parity with the public networks, definitions, errors."""

import io
import itertools
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_tools.synthetic import scenes
from reference import wsol

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "wsol"
METHODS = np.load(GOLDEN / "methods.npz")
NETWORKS = np.load(GOLDEN / "networks.npz")


def tensor(key: str) -> torch.Tensor:
    return torch.from_numpy(METHODS[key])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=dtype)


# ---- HaS, CutMix, ADL ----


@pytest.mark.parametrize("grid, rate", [(4, 50), (10, 30), (16, 100), (0, 50)])
def test_has_equals_the_published_loop(grid, rate):
    x = tensor("has_x")
    cells = -(-32 // grid) if grid else 0
    draws = tensor("has_draws")[:3 * cells * cells].reshape(3, cells, cells) if grid else None
    before = x.clone()
    assert torch.equal(wsol.has(x, grid, rate / 100, draws=draws), tensor(f"has_g{grid}_d{rate}"))
    assert torch.equal(x, before)


def test_has_hides_square_cells_of_any_image():
    x = torch.ones(64, 2, 13, 22)
    out = wsol.has(x, 5, 0.4, generator(1))
    assert torch.equal(out[:, 0], out[:, 1])
    for rows, columns in itertools.product(range(0, 13, 5), range(0, 22, 5)):
        cell = out[:, 0, rows:rows + 5, columns:columns + 5].flatten(1)
        assert torch.equal(cell.amin(1), cell.amax(1))
    assert abs(1 - out.mean() - 0.4) < 0.05
    assert torch.equal(out, wsol.has(x.to(memory_format=torch.channels_last), 5, 0.4, generator(1)))
    assert wsol.has(x.half(), 5, 0.4, generator(1)).dtype == torch.float16


def test_has_compiles_for_any_batch_size():
    torch._dynamo.reset()
    hide = torch.compile(lambda x: wsol.has(x, 4, 0.5), backend="eager")
    for size in (2, 3, 5):
        x = randn(size, 3, 8, 8)
        out = hide(x)
        assert ((out == x) | (out == 0)).all() and out.shape == x.shape


def test_has_hides_pixels_that_are_not_finite():
    x = torch.full((1, 1, 4, 4), torch.inf)
    assert wsol.has(x, 2, 1.0).abs().sum() == 0


def test_rand_bbox_equals_the_published_box():
    for lam, cx, cy, *box in METHODS["rand_bbox_lam_cx_cy_x1y1x2y2"]:
        assert wsol.rand_bbox((1, 3, 17, 23), lam, cx, cy) == tuple(box)
    assert wsol.rand_bbox((1, 3, 8, 8), 0.75, 99, -5) == (8, 0, 8, 0)      # centre outside: empty


def test_cutmix_equals_the_published_function():
    lam, cx, cy = METHODS["cutmix_lam0_cx_cy"]
    x, before = tensor("cutmix_x"), tensor("cutmix_x")
    draws = (lam, tensor("cutmix_perm"), int(cx), int(cy))
    out, a, b, lam = wsol.cutmix(x, tensor("cutmix_t"), 1.0, draws=draws)
    assert torch.equal(out, tensor("cutmix_out")) and torch.equal(x, before)
    assert torch.equal(a, tensor("cutmix_ta")) and torch.equal(b, tensor("cutmix_tb"))
    assert lam == pytest.approx(float(METHODS["cutmix_lam"]), abs=1e-12)


def test_cutmix_pastes_the_area_it_reports():
    x = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 16, 20)
    for seed in range(20):
        out, a, b, lam = wsol.cutmix(x, torch.arange(8), 0.7, generator(seed))
        pasted = (out != x).flatten(1).float().mean(1)
        assert torch.equal(out[:, 0, 0, 0].long().eq(a) | out[:, 0, 0, 0].long().eq(b),
                           torch.ones(8).bool())
        moved = a != b
        assert torch.allclose(pasted[moved], torch.full_like(pasted[moved], 1 - lam))
        again = wsol.cutmix(x, torch.arange(8), 0.7, generator(seed))
        assert torch.equal(out, again[0]) and lam == again[3]


@pytest.mark.parametrize("rate, threshold", [(75, 90), (40, 60)])
def test_adl_equals_the_published_layer(rate, threshold):
    layer = wsol.ADL(rate / 100, threshold / 100, generator())
    for seed, coin in enumerate(METHODS[f"adl_u_{rate}_{threshold}"], 7):
        assert torch.rand((), generator=generator(seed)).item() == pytest.approx(coin, abs=1e-7)
        layer.generator.manual_seed(seed)
        expected = tensor(f"adl_out_{rate}_{threshold}")[seed - 7]
        assert torch.allclose(layer(tensor("adl_x")), expected, atol=1e-6)


@pytest.mark.parametrize("name, rate", [("importance", 0.0), ("drop", 1.0)])
def test_adl_gradients(name, rate):
    x = tensor("adl_x").requires_grad_()
    wsol.ADL(rate, 0.9)(x).square().sum().backward()
    assert torch.allclose(x.grad, tensor(f"adl_grad_{name}"), atol=1e-6)


def test_adl_is_the_identity_in_eval_mode():
    layer = wsol.ADL(0.4, 0.8).eval()
    x = randn(2, 3, 4, 4)
    assert layer(x) is x


# ---- ACoL and SPG ----


def test_acol_pieces_equal_the_published_ones():
    attention = wsol.acol_attention(tensor("acol_fm"), tensor("acol_lab"))
    assert torch.allclose(attention, tensor("acol_att"), atol=1e-6)
    assert torch.allclose(wsol.normalize_tensor(tensor("acol_fm")), tensor("acol_norm"), atol=1e-6)
    erased = wsol.erase_attention(tensor("acol_feat"), attention, 0.6)
    assert torch.equal(erased, tensor("acol_erased"))


def test_a_constant_map_is_nan_and_erases_nothing():
    flat = torch.ones(1, 2, 3, 3)
    attention = wsol.acol_attention(flat, torch.tensor([1]))
    assert attention.isnan().all()
    assert torch.equal(wsol.erase_attention(flat, attention, 0.5), flat)


THRESHOLDS = {"default": ((.7, .01), (.5, .05), (.7, .1)),
              "tight": ((.99999, .2), (.9, .3), (.95, .4))}


@pytest.mark.parametrize("name", THRESHOLDS)
def test_spg_equals_the_published_loss_and_gradients(name):
    maps = {key: tensor(f"spg_{key}").requires_grad_() for key in ("b1", "b2", "c")}
    logits = tensor("spg_fm").mean((2, 3)).requires_grad_()
    attention, fused = wsol.spg_attention(tensor("spg_fm"), tensor("spg_lab"), maps["b1"],
                                          maps["b2"])
    assert not attention.requires_grad and not fused.requires_grad
    torch.testing.assert_close(attention[:, :, ::4, ::4], tensor("spg_attention"), rtol=1e-4,
                               atol=1e-6)
    torch.testing.assert_close(fused[:, :, ::4, ::4], tensor("spg_fused"), rtol=1e-4, atol=1e-6)
    assert torch.equal(wsol.spg_mask(attention, *THRESHOLDS[name][0]).to(torch.uint8),
                       tensor(f"spg_mask_{name}"))
    out = {"logits": logits, "attention": attention, "fused_attention": fused,
           **{f"logits_{key}": value for key, value in maps.items()}}
    loss = wsol.spg_loss(out, tensor("spg_lab"), THRESHOLDS[name])
    assert loss.item() == pytest.approx(float(METHODS[f"spg_loss_{name}"]), rel=1e-4)
    loss.backward()
    for key, value in {"logits": logits, **maps}.items():
        torch.testing.assert_close(value.grad, tensor(f"spg_grad_{key}_{name}"), rtol=1e-4,
                                   atol=1e-7)


def test_spg_loss_in_double_precision():
    attention, fused = torch.rand(2, 2, 1, 8, 8, generator=generator(), dtype=torch.float64)

    def loss(logits, b1, b2, c):
        out = {"logits": logits, "logits_b1": b1, "logits_b2": b2, "logits_c": c,
               "attention": attention, "fused_attention": fused}
        return wsol.spg_loss(out, torch.tensor([0, 2]), ((.6, .2), (.55, .45), (.5, .4)))

    inputs = [randn(*shape, seed=seed, dtype=torch.float64).requires_grad_()
              for seed, shape in enumerate([(2, 3)] + [(2, 1, 4, 4)] * 3)]
    assert torch.autograd.gradcheck(loss, inputs)


def test_spg_without_a_confident_pixel_is_plain_cross_entropy():
    maps = {f"logits_{key}": torch.zeros(2, 1, 5, 5, requires_grad=True)
            for key in ("b1", "b2", "c")}
    nan = torch.full((2, 1, 8, 8), torch.nan)
    out = {"logits": randn(2, 4), "attention": nan, "fused_attention": nan, **maps}
    target = torch.tensor([0, 3])
    loss = wsol.spg_loss(out, target, ((.9, .1), (.9, .0), (.9, .1)))
    # B2's map is .5 everywhere: it is above .7 of its own maximum, so B1 is asked for 1 everywhere
    expected = F.cross_entropy(out["logits"], target) + np.log(2)
    torch.testing.assert_close(loss, expected)


# ---- Networks ----

INDEX = np.arange(65521, dtype=np.uint64)
TABLE = ((INDEX + np.uint64(1)) * np.uint64(2654435761)) % np.uint64(2**32)
TABLE ^= TABLE >> np.uint64(15)
TABLE = (TABLE * np.uint64(2246822519)) % np.uint64(2**32)
TABLE ^= TABLE >> np.uint64(13)
TABLE = 2 * TABLE / 2**32 - 1


def sequence(name: str, count: int) -> np.ndarray:
    return np.resize(np.roll(TABLE, -(zlib.crc32(name.encode()) % 65521)), count)


def formula(name: str, shape: torch.Size) -> torch.Tensor:
    """The parameter that the fixtures give to a name of the state dict."""
    s = sequence(name, int(np.prod(shape))).reshape(shape)
    if len(shape) >= 2:
        s = s * np.sqrt(6 / np.prod(shape[1:])) * (0.5 if shape[0] == 10 else 1.0)
    elif name.endswith("running_var"):
        s = 1 + 0.2 * s
    elif name.endswith(".weight"):
        s = 1 + 0.1 * s
    else:
        s = 0.1 * s
    return torch.from_numpy(s.astype(np.float32))


def formula_state(network: torch.nn.Module) -> dict:
    return {name: torch.tensor(0) if name.endswith("num_batches_tracked")
            else formula(name, value.shape)
            for name, value in network.state_dict().items()}


def test_the_fixtures_formula():
    assert np.array_equal(TABLE[:16], NETWORKS["hash_table_first16"])


def close_to_fixture(actual: torch.Tensor, key: str) -> None:
    expected = NETWORKS[key]
    assert actual.shape == expected.shape, key
    assert np.abs(actual.numpy() - expected).max() <= 1e-3 * np.abs(expected).max(), key


@pytest.mark.parametrize("arch, method", list(itertools.product(
    wsol.ARCHS, ("cam", "acol", "spg", "adl"))))
def test_networks_equal_the_published_ones(arch, method):
    x = torch.from_numpy(2 * sequence("inputa", 2 * 3 * 96 * 96).reshape(2, 3, 96, 96)).float()
    labels, state = torch.tensor([3, 7]), None
    for large in (False, True):
        key = f"{arch}_{method}_{28 if large else 14}"
        with torch.device("meta"):
            network = wsol.build_network(arch, method, 10, large_feature_map=large)
        names = list(network.state_dict())
        assert names == NETWORKS[f"{key}_names"].tolist()
        assert sum(p.numel() for p in network.parameters()) == NETWORKS[f"{key}_nparams"]
        state = state if state and list(state) == names else formula_state(network)
        network.load_state_dict(state, assign=True)
        network.eval()
        with torch.no_grad():
            out = network(x, labels)
        more = {"acol": {"logit_b", "feat_map_a", "feat_map_b"},
                "spg": {"logits_b1", "logits_b2", "logits_c", "attention", "fused_attention"}}
        assert set(out) == {"logits"} | more.get(method, set())
        for name in set(out) & {"logits", "logit_b", "logits_b1", "logits_b2", "logits_c"}:
            close_to_fixture(out[name], f"{key}_{name}")
        if method == "acol":
            loss = wsol.acol_loss(out, labels)
            assert loss.item() == pytest.approx(float(NETWORKS[f"{key}_loss"]), rel=1e-3)
        if method == "spg":
            assert out["attention"].shape == out["fused_attention"].shape == (2, 1, 96, 96)
            with torch.no_grad():  # the public code makes its masks at 224 x 224 whatever the input
                class_maps = network.outputs(x, labels)["class_maps"]
            out["attention"], out["fused_attention"] = wsol.spg_attention(
                class_maps, labels, out["logits_b1"], out["logits_b2"])
            loss = wsol.spg_loss(out, labels, wsol.SPG_THRESHOLDS)
            assert loss.item() == pytest.approx(float(NETWORKS[f"{key}_loss"]), rel=1e-3)
        logits, maps = network.predict(x, labels)
        assert torch.equal(logits, out["logits"])
        close_to_fixture(maps, f"{key}_cam")


@pytest.mark.parametrize("arch, method, classes, count", [
    ("vgg16", "cam", 200, 19_639_304), ("vgg16", "spg", 1000, 29_387_562),
    ("resnet50", "acol", 100, 80_340_232), ("resnet50", "spg", 200, 61_671_690),
    ("inception_v3", "adl", 1000, 26_507_976), ("inception_v3", "acol", 200, 42_410_096)])
def test_parameter_counts(arch, method, classes, count):
    with torch.device("meta"):
        network = wsol.build_network(arch, method, classes)
    assert sum(p.numel() for p in network.parameters()) == count


@pytest.mark.parametrize("arch", wsol.ARCHS)
@pytest.mark.parametrize("large, side", [(False, 14), (True, 28)])
def test_maps_at_224_pixels(arch, large, side):
    with torch.device("meta"):
        network = wsol.build_network(arch, "cutmix", 5, large_feature_map=large).eval()
        assert network.taps(torch.empty(1, 3, 224, 224))[-1].shape[2:] == (side, side)


def test_build_network_is_reproducible_and_accepts_any_memory_format():
    before = torch.get_rng_state()
    one, two = (wsol.build_network("resnet50", "adl", 3, generator=generator(4)).state_dict()
                for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(torch.get_rng_state(), before)
    network = wsol.build_network("resnet50", "cam", 3, generator=generator(4)).eval()
    x, labels = randn(1, 3, 64, 64), torch.tensor([2])
    maps = network(x, labels, return_cam=True)
    last = network.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last),
                                                         labels, return_cam=True)
    torch.testing.assert_close(maps, last, rtol=1e-3, atol=1e-5)
    assert network.double()(x.double(), labels, return_cam=True).dtype == torch.float64


@pytest.mark.parametrize("method", ("cam", "adl", "spg", "acol"))
@pytest.mark.parametrize("arch", ("vgg16", "resnet50"))
def test_load_torchvision_finds_the_layers_that_moved(arch, method):
    """The weights of plain torchvision networks land in the same order of layers."""
    with torch.device("meta"):
        plain = wsol.build_network(arch, "cam", 1000)
        network = wsol.build_network(arch, method, 1000)
    source = {}
    for number, (name, value) in enumerate(plain.state_dict().items()):
        if not name.startswith("conv6"):  # torchvision's VGG has none
            source[name] = torch.full((), float(number)).expand(value.shape)
    if arch == "vgg16":
        source = {name: value for name, value in source.items() if name.startswith("features.")}
        source["classifier.0.weight"] = torch.zeros(2, 2)
    network.load_state_dict({name: torch.zeros(()).expand(value.shape) - 1
                             for name, value in network.state_dict().items()},
                            assign=True)
    for parameter in itertools.chain(network.parameters(), network.buffers()):
        parameter.data = parameter.data.clone()
    kept = wsol.load_torchvision(network, source)
    state = {name: value for name, value in network.state_dict().items()
             if "num_batches" not in name}
    loaded = [float(state[name].flatten()[0]) for name in state if name not in kept]
    expected = [float(value.flatten()[0]) for name, value in source.items()
                if not name.startswith(("classifier", "fc") if method in ("spg", "acol")
                                       else "classifier")
                and "num_batches" not in name]
    assert loaded == expected
    assert all((state[name] == -1).all() for name in kept)
    assert all(name.startswith(wsol._NEW_LAYERS) for name in kept)


def test_load_torchvision_rejects_a_foreign_checkpoint():
    with torch.device("meta"):
        network = wsol.build_network("resnet50", "cam", 2)
    with pytest.raises(ValueError, match="resnet50"):
        wsol.load_torchvision(network, {"blocks.0.weight": torch.zeros(2)})


# ---- Heads ----


def heads() -> dict:
    trunk = lambda: torch.nn.Conv2d(3, 6, 3, stride=2, padding=1)              # noqa: E731
    return {"cam": wsol.CAMHead(trunk(), 6, 4), "acol": wsol.ACoLHead(trunk(), 6, 4, 0.6, width=8),
            "spg": wsol.SPGHead(trunk(), 6, 4, width=8)}


@pytest.mark.parametrize("name", ("cam", "acol", "spg"))
def test_heads_give_logits_and_maps(name):
    head, x, labels = heads()[name].eval(), randn(3, 3, 10, 12), torch.tensor([0, 3, 1])
    out = head(x, labels)
    maps = head(x, labels, return_cam=True)
    assert out["logits"].shape == (3, 4) and maps.shape == (3, 5, 6)
    logits, predicted = head.predict(x, labels)
    assert torch.equal(logits, out["logits"]) and torch.equal(predicted, maps)
    assert predicted.is_inference() and out["logits"].requires_grad and not maps.requires_grad
    assert head(x)["logits"].shape == (3, 4)
    one = head.predict(x[1:2], labels[1:2])[1]
    torch.testing.assert_close(one, maps[1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ("cam", "acol", "spg"))
def test_logits_and_maps_come_from_one_forward(name):
    head, calls = heads()[name].eval(), []
    for part in (head.features, *([head.SPG_B_shared, head.SPG_C] if name == "spg" else [])):
        part.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    head.predict(randn(2, 3, 10, 12), torch.tensor([0, 3]))
    assert calls == [False]             # the trunk; SPG's branches teach, they have no say


def test_cam_is_the_logit_before_pooling():
    head, x = wsol.CAMHead(None, 6, 4), randn(2, 6, 5, 7)
    labels = torch.tensor([2, 0])
    maps, logits = head(x, labels, return_cam=True), head(x)["logits"]
    pooled = 6 * maps.mean((1, 2)) + head.fc.bias[labels]
    torch.testing.assert_close(pooled, logits[torch.arange(2), labels])


def test_acol_head_without_labels_erases_the_predicted_class():
    head, x = heads()["acol"], randn(3, 3, 10, 12)
    predicted = head(x)["logits"].argmax(1)
    assert torch.equal(head(x)["logit_b"], head(x, predicted)["logit_b"])


# ---- Baselines ----


def test_center_gaussian():
    scores = wsol.center_gaussian((5, 8), 0.7)
    assert scores.dtype == np.float64 and scores.min() == 0 and scores.max() == 1
    assert np.allclose(scores, scores[::-1]) and np.allclose(scores, scores[:, ::-1])
    raw = np.exp(-(np.linspace(-1, 1, 9)[:, None]**2 + np.linspace(-1, 1, 9)**2) / 2)
    assert np.allclose(wsol.center_gaussian(9), (raw - raw.min()) / (raw.max() - raw.min()))
    assert not wsol.center_gaussian(1).any()


def nonlinear(x: torch.Tensor) -> torch.Tensor:
    weight = randn(5, x[0].numel(), seed=3, dtype=x.dtype)
    return (x.flatten(1) @ weight.T).tanh() + 0.1 * x.flatten(1).square().mean(1, keepdim=True)


def test_gradient_maps():
    x, y = randn(2, 3, 6, 7, dtype=torch.float64), torch.tensor([4, 1])
    signed = wsol.vanilla_gradient(nonlinear, x, y, reduce=None)
    step = 1e-6 * torch.eye(3 * 6 * 7, dtype=x.dtype).view(-1, 3, 6, 7)
    numeric = (nonlinear(x[:1] + step)[:, 4] - nonlinear(x[:1] - step)[:, 4]) / 2e-6
    torch.testing.assert_close(signed[0], numeric.view(3, 6, 7), rtol=1e-5, atol=1e-8)
    assert torch.equal(wsol.vanilla_gradient(nonlinear, x, y), signed.abs().amax(1))
    assert torch.equal(wsol.vanilla_gradient(lambda z: {"logits": nonlinear(z)}, x, y, "mean"),
                       signed.abs().mean(1))
    torch.testing.assert_close(wsol.smooth_grad(nonlinear, x, y, n=3, sigma=0.0),
                               signed.abs().amax(1))
    one, two = (wsol.smooth_grad(nonlinear, x, y, n=2, generator=generator(1)) for _ in range(2))
    assert torch.equal(one, two) and not torch.equal(one, signed.abs().amax(1))


@pytest.mark.parametrize("baseline", (None, 0.3))
def test_integrated_gradients_sum_to_the_change_of_the_logit(baseline):
    x, y = 0.05 * randn(2, 3, 6, 7, dtype=torch.float64), torch.tensor([4, 1])
    start = torch.zeros_like(x)
    if baseline is not None:
        start = baseline * randn(1, 3, 6, 7, seed=5, dtype=x.dtype) / 6
    signed = wsol.integrated_gradients(nonlinear, x, y, 200, None if baseline is None else start,
                                       reduce=None)
    change = nonlinear(x) - nonlinear(start.expand_as(x))
    torch.testing.assert_close(signed.sum((1, 2, 3)), change[torch.arange(2), y], rtol=1e-3,
                               atol=1e-4)


def test_gradients_work_where_gradients_are_off():
    x, y = randn(1, 3, 6, 7), torch.tensor([0])
    expected = wsol.vanilla_gradient(nonlinear, x, y)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(wsol.vanilla_gradient(nonlinear, x.clone(), y.clone()), expected)
            assert wsol.integrated_gradients(nonlinear, x.clone(), y.clone(), 2).any()
            assert wsol.smooth_grad(nonlinear, x.clone(), y.clone(), 2).any()
    assert not x.requires_grad


def test_few_shot_targets_and_loss():
    target = wsol.few_shot_targets(6, boxes=[[1, 2, 3, 2], [4, 4, 9, 9]])
    expected = torch.zeros(6, 6)
    expected[2, 1:4] = expected[4:, 4:] = 1
    assert torch.equal(target, expected) and target.dtype == torch.float32
    assert wsol.few_shot_targets(6, boxes=[]).sum() == 0
    mask = np.zeros((3, 12))
    mask[1, 4:8] = 255
    resized = wsol.few_shot_targets(6, masks=[mask, np.zeros((5, 5))])
    assert torch.equal(resized.nonzero(), torch.tensor([[2, 2], [2, 3], [3, 2], [3, 3]]))
    assert torch.equal(resized, wsol.few_shot_targets(6, masks=mask))
    logits = randn(2, 1, 3, 3)
    target = torch.stack([expected, resized])
    upsampled = F.interpolate(logits, size=6, mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(wsol.few_shot_loss(logits, target),
                               F.binary_cross_entropy_with_logits(upsampled, target))
    target[1] = 255
    torch.testing.assert_close(wsol.few_shot_loss(logits, target),
                               F.binary_cross_entropy_with_logits(upsampled[:1], target[:1]))


def test_few_shot_head_on_a_published_network():
    network = wsol.build_network("resnet50", "cam", 3, generator=generator())
    head = wsol.FewShotHead(network, network.channels).eval()
    assert head(randn(1, 3, 64, 64)).shape == (1, 1, 4, 4)
    assert head.predict(randn(1, 3, 64, 64)).shape == (1, 4, 4)
    low, high = wsol.parameter_groups(head, 0.1)
    fast = {id(p) for p in high["params"]}
    names = {name for name, p in head.named_parameters() if id(p) in fast}
    assert {"saliency.weight", "features.layer4.0.conv1.weight"} <= names
    assert "features.conv1.weight" not in names
    plain = wsol.FewShotHead(None, 6)
    assert plain(randn(2, 6, 4, 5)).shape == (2, 1, 4, 5)


# ---- Training ----


@pytest.mark.parametrize("head", [wsol.CAMHead, wsol.ACoLHead, wsol.SPGHead])
def test_maps_compile_to_one_graph_for_any_batch_size(head):
    torch._dynamo.reset()
    network = head(torch.nn.Conv2d(3, 4, 3), 4, 2).eval()
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    for size in (2, 3, 5):
        x, labels = randn(size, 3, 8, 8), torch.arange(size) % 2
        torch.testing.assert_close(compiled(x, labels, return_cam=True),
                                   network(x, labels, return_cam=True))


@pytest.mark.parametrize("arch, method, high, low", [
    ("vgg16", "cam", ("conv6.weight", "fc.bias"), ("features.0.weight", "features.28.bias")),
    ("vgg16", "spg", ("SPG_A_1.0.weight", "SPG_C.0.bias"), ("features.0.weight",)),
    ("resnet50", "cam", ("layer4.0.conv1.weight", "fc.weight"),
     ("layer3.5.conv1.weight", "conv1.weight")),
    ("resnet50", "acol", ("layer4.2.bn1.bias",),
     ("classifier_A.0.weight", "layer1.0.conv1.weight")),
    ("inception_v3", "cam", ("SPG_A3_1b.0.weight", "SPG_A4.bias"),
     ("Mixed_6e.branch1x1.conv.weight", "Conv2d_4a_3x3.bn.bias"))])
def test_published_parameter_groups(arch, method, high, low):
    with torch.device("meta"):
        network = wsol.build_network(arch, method, 7)
    names = {id(p): name for name, p in network.named_parameters()}
    slow, fast = wsol.parameter_groups(network, 0.01)
    assert (slow["lr"], fast["lr"]) == (0.01, 0.1)
    assert set(high) <= {names[id(p)] for p in fast["params"]}
    assert set(low) <= {names[id(p)] for p in slow["params"]}
    assert len(slow["params"]) + len(fast["params"]) == len(names)
    slow, fast = wsol.parameter_groups(network, 0.01, official_groups=False)
    assert all(names[id(p)].startswith(wsol._NEW_LAYERS) for p in fast["params"])
    assert not any(names[id(p)].startswith(wsol._NEW_LAYERS) for p in slow["params"])


def test_compiled_and_parallel_models_keep_their_two_learning_rates():
    head = wsol.CAMHead(torch.nn.Conv2d(3, 4, 3), 4, 2)
    compiled, names = torch.compile(head), dict(head.named_parameters())
    for model in (head, compiled, torch.nn.DataParallel(compiled)):
        slow, fast = wsol.parameter_groups(model, 0.01)
        assert [id(p) for p in fast["params"]] == [id(names[f"fc.{n}"]) for n in ("weight", "bias")]
        assert len(slow["params"]) == 2


def test_learning_rate_falls_at_the_start_of_every_third_epoch():
    head = wsol.CAMHead(torch.nn.Conv2d(3, 4, 3), 4, 2)
    loader = [(randn(2, 3, 6, 6), torch.tensor([0, 1]))]
    rows = list(wsol.train(head, loader, {"lr": 0.1, "epochs": 10}))
    decays = [0, 0, 1, 1, 1, 2, 2, 2, 3, 3]
    assert [row["lr"] for row in rows] == pytest.approx([0.1 * 0.1**d for d in decays])
    assert [row["step"] for row in rows] == list(range(10))
    assert all(type(value) is float for value in rows[0].values())


def tiny_network(method: str) -> torch.nn.Module:
    layers = [torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU()]
    layers += {"adl": [wsol.ADL(0.5, 0.8)], "cam": [wsol._Dropout()]}.get(method, [])
    trunk = torch.nn.Sequential(*layers)
    if method == "fewshot":
        network = wsol.FewShotHead(trunk, 8)
    elif method in ("acol", "spg"):
        network = {"acol": wsol.ACoLHead, "spg": wsol.SPGHead}[method](trunk, 8, 3, width=8)
    else:
        network = wsol.CAMHead(trunk, 8, 3)
    for number, parameter in enumerate(network.parameters()):
        parameter.data = 0.3 * randn(*parameter.shape, seed=number)
    return network


@pytest.mark.parametrize("method", (*wsol.METHODS, "fewshot"))
def test_training_resumes_to_the_same_numbers(method):
    images = randn(6, 4, 3, 8, 8)
    targets = torch.arange(24).view(6, 4) % 3
    if method == "fewshot":
        targets = (randn(6, 4, 8, 8, seed=2) > 0).float()
    loader = list(zip(images, targets))
    cfg = {"method": method, "epochs": 2, "decay_frequency": 2, "cutmix_prob": 0.5,
           "large_feature_map": True}
    rows = list(wsol.train(tiny_network(method), loader, cfg))
    assert len(rows) == 12 and all(np.isfinite(row["loss"]) for row in rows)
    network = tiny_network(method)
    steps = wsol.train(network, loader, cfg)
    first = [next(steps) for _ in range(8)]
    network.eval()                      # as an evaluation in between leaves it
    state, file = steps.send("state"), io.BytesIO()
    assert first + list(steps) == rows  # going on must not touch the snapshot
    torch.save(state, file)
    file.seek(0)
    snapshot = torch.load(file, weights_only=True)
    assert first + list(wsol.train(tiny_network(method), loader, cfg, resume=snapshot)) == rows


def test_processes_draw_their_own_numbers(monkeypatch):
    loader = [(randn(2, 3, 8, 8), torch.tensor([0, 2]))]

    def loss(method, rank):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
        network = tiny_network("has")
        return [row["loss"] for row in wsol.train(network, loader, {"method": method, "epochs": 1})]

    assert loss("cam", 0) == loss("cam", 1) and loss("has", 0) != loss("has", 1)


def test_cutmix_of_size_zero_is_plain_training():
    loader = [(randn(2, 3, 8, 8), torch.tensor([0, 2]))]
    rows = [list(wsol.train(tiny_network("cutmix"), loader, {"epochs": 2, **cfg}))
            for cfg in ({"method": "cutmix", "cutmix_beta": 0.0}, {"method": "cam"})]
    assert rows[0] == rows[1]


def test_an_epoch_without_a_batch_is_an_error():
    batches = [(randn(2, 3, 8, 8), torch.tensor([0, 2]))]
    for loader, epoch in ((iter(batches), 1), ([], 0)):
        with pytest.raises(ValueError, match=f"loader gave no batch in epoch {epoch}"):
            list(wsol.train(tiny_network("cam"), loader, {"epochs": 2}))


def test_training_in_bfloat16_runs():
    row, = wsol.train(tiny_network("spg"), [(randn(2, 3, 8, 8), torch.tensor([0, 2]))],
                      {"method": "spg", "epochs": 1, "amp": True})
    assert np.isfinite(row["loss"])


# ---- Errors ----

X, Y, MAPS = torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]), torch.zeros(2, 4, 5, 5)
HEAD = wsol.CAMHead(None, 3, 2)
build = wsol.build_network
BAD_VALUES = {
    "has: grid": ("grid_size", lambda: wsol.has(X, -1, 0.5)),
    "has: fraction of a pixel": ("grid_size", lambda: wsol.has(X, 2.5, 0.5)),
    "has: no number": ("grid_size", lambda: wsol.has(X, float("nan"), 0.5)),
    "has: rate": ("drop_rate", lambda: wsol.has(X, 4, 1.5)),
    "has: one image": ("image", lambda: wsol.has(X[0], 4, 0.5)),
    "has: draws": ("draws", lambda: wsol.has(X, 4, 0.5, draws=torch.zeros(2, 3, 3))),
    "cutmix: beta": ("beta", lambda: wsol.cutmix(X, Y, 0.0)),
    "cutmix: nan": ("beta", lambda: wsol.cutmix(X, Y, float("nan"))),
    "cutmix: labels": ("target", lambda: wsol.cutmix(X, Y[:1], 1.0)),
    "cutmix: one image": ("x must", lambda: wsol.cutmix(X[0], Y, 1.0)),
    "cutmix: permutation": ("permutation",
                            lambda: wsol.cutmix(X, Y, 1.0, draws=(0.5, Y[:1], 1, 1))),
    "rand_bbox: lam": ("lam", lambda: wsol.rand_bbox((1, 3, 4, 4), 1.2)),
    "rand_bbox: three sides": ("size", lambda: wsol.rand_bbox((3, 4, 4), 0.5)),
    "rand_bbox: no pixel": ("size", lambda: wsol.rand_bbox((1, 3, 0, 4), 0.5)),
    "adl: rate": ("adl_drop_rate", lambda: wsol.ADL(-0.1)),
    "adl: threshold": ("adl_drop_threshold", lambda: wsol.ADL(0.5, 1.1)),
    "erase: threshold": ("threshold", lambda: wsol.erase_attention(X, X[:, :1], 2.0)),
    "acol: label range": ("labels", lambda: wsol.acol_attention(MAPS, Y + 3)),
    "acol: label shape": ("labels", lambda: wsol.acol_attention(MAPS, Y[:1])),
    "acol head: threshold": ("drop_threshold", lambda: wsol.ACoLHead(None, 4, 2, 1.5)),
    "cam head: channels": ("channels", lambda: wsol.CAMHead(None, 0, 2)),
    "spg head: classes": ("num_classes", lambda: wsol.SPGHead(None, 4, 0)),
    "few-shot head: channels": ("channels", lambda: wsol.FewShotHead(None, 0)),
    "spg: negative label": ("labels", lambda: wsol.spg_attention(MAPS, Y - 1, *[MAPS[:, :1]] * 2)),
    "adl: shape": ("x must be", lambda: wsol.ADL()(MAPS[0])),
    "normalize: shape": ("x must be", lambda: wsol.normalize_tensor(MAPS[0])),
    "spg: shape": ("attention must be", lambda: wsol.spg_mask(MAPS[0], 0.9, 0.1)),
    "spg: high": ("high", lambda: wsol.spg_mask(MAPS[:, :1], 1.1, 0.1)),
    "spg: low": ("low", lambda: wsol.spg_mask(MAPS[:, :1], 0.9, -0.1)),
    "cam without labels": ("labels", lambda: HEAD(X, return_cam=True)),
    "cam: label range": ("labels", lambda: HEAD(X, Y + 1, return_cam=True)),
    "build: arch": ("arch", lambda: build("resnet18", "cam")),
    "build: method": ("method", lambda: build("vgg16", "gradcam")),
    "build: classes": ("num_classes", lambda: build("vgg16", "cam", 0)),
    "build: adl": ("adl_drop_rate", lambda: build("vgg16", "cam", 2, adl_drop_rate=2.0)),
    "build: acol": ("acol_drop_threshold",
                    lambda: build("vgg16", "cam", 2, acol_drop_threshold=2.0)),
    "targets: neither": ("boxes or masks", lambda: wsol.few_shot_targets(4)),
    "targets: both": ("boxes or masks",
                      lambda: wsol.few_shot_targets(4, [[0, 0, 1, 1]], [np.ones((4, 4))])),
    "targets: box": ("boxes", lambda: wsol.few_shot_targets(4, [[2, 0, 1, 1]])),
    "targets: three numbers": ("boxes", lambda: wsol.few_shot_targets(4, [[0, 0, 1]])),
    "targets: mask": ("masks", lambda: wsol.few_shot_targets(4, masks=[np.ones(4)])),
    "targets: size": ("size", lambda: wsol.few_shot_targets(0, [[0, 0, 1, 1]])),
    "centre: sigma": ("sigma", lambda: wsol.center_gaussian(4, 0.0)),
    "centre: size": ("size", lambda: wsol.center_gaussian((4, -1))),
    "centre: half a pixel": ("size", lambda: wsol.center_gaussian(2.5)),
    "gradient: reduce": ("reduce", lambda: wsol.vanilla_gradient(nonlinear, X, Y, "sum")),
    "ig: steps": ("steps", lambda: wsol.integrated_gradients(nonlinear, X, Y, 0)),
    "smooth: n": ("n must", lambda: wsol.smooth_grad(nonlinear, X, Y, 0)),
    "smooth: sigma": ("sigma", lambda: wsol.smooth_grad(nonlinear, X, Y, sigma=-1.0)),
    "smooth: nan": ("sigma", lambda: wsol.smooth_grad(nonlinear, X, Y, sigma=float("nan"))),
    "train: key": ("learning_rate", lambda: wsol.train(HEAD, [], {"learning_rate": 1})),
    "train: method": ("method", lambda: wsol.train(HEAD, [], {"method": "gradcam"})),
    **{f"train: {name}": (name, lambda name=name, value=value: wsol.train(HEAD, [], {name: value}))
       for name, value in (("epochs", -1), ("decay_frequency", 1.5), ("cutmix_beta", -1.0),
                           ("cutmix_prob", 1.5), ("has_drop_rate", 2.0), ("spg_threshold_2l", -1),
                           ("lr", float("nan")), ("lr_classifier_ratio", -1.0),
                           ("weight_decay", -1.0), ("has_grid_size", -1))},
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_bad_arguments_are_named(name):
    match, call = BAD_VALUES[name]
    with pytest.raises(ValueError, match=match):
        call()


def test_labels_must_be_integers():
    for call in (lambda: wsol.acol_attention(MAPS, Y.float()),
                 lambda: wsol.acol_attention(MAPS, Y > 0),
                 lambda: wsol.acol_attention(MAPS, [0, 1]),
                 lambda: wsol.vanilla_gradient(nonlinear, X, Y.float())):
        with pytest.raises(TypeError, match="labels"):
            call()


# ---- Scenes ----


def test_scenes_have_objects_on_backgrounds_that_tell_the_class():
    data = scenes(600, size=32, seed=3, rho=0.6)
    assert data["images"].shape == (600, 3, 32, 32) and data["images"].dtype == torch.uint8
    told = (data["backgrounds"] == data["labels"]).float().mean()
    assert abs(told - (0.6 + 0.4 / 10)) < 0.07
    assert torch.equal(scenes(600, size=32, seed=3, rho=1.0)["backgrounds"], data["labels"])
    assert all(torch.equal(value, scenes(600, size=32, seed=3, rho=0.6)[key])
               for key, value in data.items())
    for mask, (x0, y0, x1, y1) in zip(data["masks"], data["boxes"].tolist()):
        assert mask[y0:y1, x0:x1].sum() == mask.sum() > 30
        assert mask[y0].any() and mask[:, x1 - 1].any()
    with pytest.raises(ValueError, match="rho"):
        scenes(4, rho=1.5)
