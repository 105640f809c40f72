"""The localization methods and baselines: parity with the public networks, definitions, errors."""

import io
import itertools
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from reference import wsol

GOLDEN = Path(__file__).parent / "golden" / "wsol"
METHODS = np.load(GOLDEN / "methods.npz")
NETWORKS = np.load(GOLDEN / "networks.npz")


def tensor(key: str) -> torch.Tensor:
    return torch.from_numpy(METHODS[key])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=dtype)


# ---- HaS, CutMix, ADL --------------------------------------------------------------------------------


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


def test_has_hides_pixels_that_are_not_finite():
    x = torch.full((1, 1, 4, 4), torch.inf)
    assert wsol.has(x, 2, 1.0).abs().sum() == 0


def test_rand_bbox_equals_the_published_box():
    for lam, cx, cy, *box in METHODS["rand_bbox_lam_cx_cy_x1y1x2y2"]:
        assert wsol.rand_bbox((1, 3, 17, 23), lam, cx, cy) == tuple(box)


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
        assert torch.equal(out[:, 0, 0, 0].long().eq(a) | out[:, 0, 0, 0].long().eq(b), torch.ones(8).bool())
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


def test_adl_is_the_identity_in_eval_mode_and_prints_its_settings():
    layer = wsol.ADL(0.4, 0.8).eval()
    x = randn(2, 3, 4, 4)
    assert layer(x) is x and "adl_drop_rate=0.4" in repr(layer)


# ---- ACoL and SPG ------------------------------------------------------------------------------------


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


THRESHOLDS = {"default": ((.7, .01), (.5, .05), (.7, .1)), "tight": ((.99999, .2), (.9, .3), (.95, .4))}


@pytest.mark.parametrize("name", THRESHOLDS)
def test_spg_equals_the_published_loss_and_gradients(name):
    maps = {key: tensor(f"spg_{key}").requires_grad_() for key in ("b1", "b2", "c")}
    logits = tensor("spg_fm").mean((2, 3)).requires_grad_()
    attention, fused = wsol.spg_attention(tensor("spg_fm"), tensor("spg_lab"), maps["b1"], maps["b2"])
    assert not attention.requires_grad and not fused.requires_grad
    torch.testing.assert_close(attention[:, :, ::4, ::4], tensor("spg_attention"), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(fused[:, :, ::4, ::4], tensor("spg_fused"), rtol=1e-4, atol=1e-6)
    assert torch.equal(wsol.spg_mask(attention, *THRESHOLDS[name][0]).to(torch.uint8), tensor(f"spg_mask_{name}"))
    out = {"logits": logits, "attention": attention, "fused_attention": fused,
           **{f"logits_{key}": value for key, value in maps.items()}}
    loss = wsol.spg_loss(out, tensor("spg_lab"), THRESHOLDS[name])
    assert loss.item() == pytest.approx(float(METHODS[f"spg_loss_{name}"]), rel=1e-4)
    loss.backward()
    for key, value in {"logits": logits, **maps}.items():
        torch.testing.assert_close(value.grad, tensor(f"spg_grad_{key}_{name}"), rtol=1e-4, atol=1e-7)


def test_spg_without_a_confident_pixel_is_plain_cross_entropy():
    maps = {f"logits_{key}": torch.zeros(2, 1, 5, 5, requires_grad=True) for key in ("b1", "b2", "c")}
    nan = torch.full((2, 1, 8, 8), torch.nan)
    out = {"logits": randn(2, 4), "attention": nan, "fused_attention": nan, **maps}
    target = torch.tensor([0, 3])
    loss = wsol.spg_loss(out, target, ((.9, .1), (.9, .0), (.9, .1)))
    # B2's map is .5 everywhere: it is above .7 of its own maximum, so B1 is asked for 1 everywhere
    expected = F.cross_entropy(out["logits"], target) + np.log(2)
    torch.testing.assert_close(loss, expected)


# ---- Networks ----------------------------------------------------------------------------------------

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
    return {name: torch.tensor(0) if name.endswith("num_batches_tracked") else formula(name, value.shape)
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
        expected = {"acol": {"logit_b", "feat_map_a", "feat_map_b"}, "spg": {
            "logits_b1", "logits_b2", "logits_c", "attention", "fused_attention"}}.get(method, set())
        assert set(out) == {"logits"} | expected
        for name in set(out) & {"logits", "logit_b", "logits_b1", "logits_b2", "logits_c"}:
            close_to_fixture(out[name], f"{key}_{name}")
        if method == "acol":
            assert wsol.acol_loss(out, labels).item() == pytest.approx(float(NETWORKS[f"{key}_loss"]), rel=1e-3)
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


