import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reference import wsol_evaluation as wsol

GOLDEN = Path(__file__).parent / "golden" / "wsol"
# clockwise from north
RING = [(-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1)]


# ---------------------------------------------------------------------------------------------
# A slow reference: threshold, flood fill, follow the border, shoelace
# ---------------------------------------------------------------------------------------------

def flood(cells, steps):
    """Connected components of a set of pixels, each in the order of its first pixel."""
    left, parts = set(cells), []
    for start in sorted(cells):
        if start in left:
            left.remove(start)
            part, stack = [], [start]
            while stack:
                y, x = stack.pop()
                part.append((y, x))
                for dy, dx in steps:
                    if (y + dy, x + dx) in left:
                        left.remove((y + dy, x + dx))
                        stack.append((y + dy, x + dx))
            parts.append(part)
    return parts


def border_area(part):
    """Area of the polygon through the pixel centres of the outer border, by walking around it."""
    part, start = set(part), min(part)
    at, heading, path = start, 6, []                      # came from the west: nothing lies there
    while True:
        for turn in range(1, 9):
            way = (heading + turn) % 8
            to = at[0] + RING[way][0], at[1] + RING[way][1]
            if to in part:
                break
        else:
            return 0.0
        if at == start and path and to == path[1 % len(path)]:
            break
        path.append(at)
        at, heading = to, (way + 4) % 8
    return abs(sum(x * v - y * u for (y, x), (v, u) in zip(path, path[1:] + path[:1]))) / 2


def slow_boxes(grey, level, multi):
    height, width = grey.shape
    cells = set(zip(*map(np.ndarray.tolist, np.nonzero(grey > level))))

    def box(part, grow):
        ys, xs = zip(*part)
        return (min(xs) - grow, min(ys) - grow,
                min(max(xs) + grow + 1, width - 1), min(max(ys) + grow + 1, height - 1))

    parts = flood(cells, RING)
    if not multi:
        best = max(parts, key=lambda part: (border_area(part), min(part)), default=None)
        return [box(best, 0)] if best else []
    found = [box(part, 0) for part in parts]
    rest = {(y, x) for y in range(height) for x in range(width)} - cells
    for part in flood(rest, RING[::2]):
        if all(0 < y < height - 1 and 0 < x < width - 1 for y, x in part):
            found.append(box(part, 1))
    return sorted(found)


def by_cell(levels, owner, boxes, wanted=None):
    cells = {}
    if wanted is not None:
        keep = np.isin(levels, wanted)
        levels, owner, boxes = levels[keep], owner[keep], boxes[keep]
    for level, image, box in zip(levels.tolist(), owner.tolist(), boxes.tolist()):
        cells.setdefault((image, level), []).append(tuple(box))
    return cells


def test_boxes_of_20000_random_maps_equal_the_slow_reference():
    rng = np.random.default_rng(0)
    checked = 0
    for height, width, values in ((3, 3, 4), (5, 5, 2), (4, 4, 3), (3, 6, 3), (6, 6, 2), (1, 6, 3),
                                  (6, 1, 3), (7, 7, 2), (4, 3, 4), (5, 4, 3)):
        count = 2000
        grey = rng.integers(0, values, (count, height, width)) * (255 // (values - 1))
        if values == 2:                                   # dense ones too: holes, rings, lines
            grey[::2] = 255 * (rng.random(grey[::2].shape) < 0.65)
        maps = grey / 255
        grey = (maps * 255).astype(np.uint8)
        single = by_cell(*wsol.scoremap_boxes(maps, multi_contour=False), np.unique(grey))
        multi = by_cell(*wsol.scoremap_boxes(maps), np.unique(grey))
        for image in range(count):
            # one level of each distinct binary image, the same for both modes
            here = grey[image]
            for level in sorted(set(here.ravel().tolist()))[:-1]:
                key = image, level
                assert sorted(multi.get(key, [])) == slow_boxes(here, level, True), (here, level)
                assert single.get(key, []) == slow_boxes(here, level, False), (here, level)
            checked += 1
    assert checked == 20000


@pytest.mark.parametrize("height,width", [(9, 9), (12, 7)])
def test_every_level_of_noise_and_smooth_maps_equals_the_slow_reference(height, width):
    rng = np.random.default_rng(1)
    smooth = wsol.resize_scoremap(rng.random((3, 3, 4)), (height, width))
    maps = wsol.normalize_scoremap(np.concatenate([smooth, rng.random((3, height, width))]))
    grey = (maps * 255).astype(np.uint8)
    for multi in (False, True):
        cells = by_cell(*wsol.scoremap_boxes(torch.from_numpy(maps), multi))
        for image in range(len(maps)):
            for level in range(255):
                found = sorted(cells.get((image, level), []))
                assert found == slow_boxes(grey[image], level, multi)


def test_boxes_fixture():
    data = np.load(GOLDEN / "boxes.npz")
    for name in data["names"]:
        scoremap = data[f"map_{name}"].astype(np.float64)
        for multi in (0, 1):
            boxes, counts = wsol.compute_bboxes_from_scoremaps(scoremap, data["thresholds"],
                                                               bool(multi))
            assert counts == data[f"counts_{name}_multi{multi}"].tolist()
            assert np.array_equal(np.concatenate(boxes), data[f"boxes_{name}_multi{multi}"])


def test_a_batch_gives_the_boxes_of_its_maps():
    rng = np.random.default_rng(2)
    # more than one block
    maps = wsol.normalize_scoremap(wsol.resize_scoremap(rng.random((9, 6, 6)), 300))
    for multi in (False, True):
        batch = by_cell(*wsol.scoremap_boxes(maps, multi))
        for image in range(9):
            alone = by_cell(*wsol.scoremap_boxes(maps[image], multi))
            assert {level: sorted(boxes) for (_, level), boxes in alone.items()} == {
                level: sorted(boxes) for (owner, level), boxes in batch.items() if owner == image}


@pytest.mark.filterwarnings("error:.*not writable")
def test_array_kinds():
    rng = np.random.default_rng(3)
    maps = rng.random((2, 10, 12))
    expected = wsol.scoremap_boxes(maps)
    for same in (np.asfortranarray(maps), np.ascontiguousarray(maps[:, :, ::-1])[:, :, ::-1],
                 torch.from_numpy(maps), torch.from_numpy(maps.transpose(0, 2, 1).copy()).mT):
        found = wsol.scoremap_boxes(same)
        assert all(isinstance(part, type(same)) for part in found)
        assert all(np.array_equal(np.asarray(a), b) for a, b in zip(found, expected))
    maps.flags.writeable = False                          # as those of a mapped file
    assert np.array_equal(wsol.scoremap_boxes(maps)[2], expected[2])
    half = torch.from_numpy(maps.copy()).half()
    assert all(torch.equal(a, b) for a, b in
               zip(wsol.scoremap_boxes(half), wsol.scoremap_boxes(half.double())))
    levels, owner, boxes = wsol.scoremap_boxes(np.zeros((0, 5, 5)))
    assert len(levels) == len(owner) == 0 and boxes.shape == (0, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_equals_cpu():
    rng = np.random.default_rng(4)
    maps = wsol.normalize_scoremap(wsol.resize_scoremap(rng.random((8, 14, 14)), 224))
    maps = torch.from_numpy(maps)
    for multi in (False, True):
        cpu, gpu = (by_cell(*wsol.scoremap_boxes(maps.to(device), multi))
                    for device in ("cpu", "cuda"))
        assert {k: sorted(v) for k, v in cpu.items()} == {k: sorted(v) for k, v in gpu.items()}


# ---------------------------------------------------------------------------------------------
# Score maps
# ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name,size,tolerance,flips", [
    ("7x7", 224, 1e-12, 0), ("14x14", 224, 1e-12, 0), ("28x28", (224, 224), 1e-12, 0),
    ("6x9", (40, 50), 1e-5, 2)])
def test_resize_and_normalize_fixture(name, size, tolerance, flips):
    data = np.load(GOLDEN / "resize_iou.npz")
    resized = wsol.resize_scoremap(data[f"cam_{name}"], size)
    normalized = wsol.normalize_scoremap(resized)
    assert resized.dtype == normalized.dtype == np.float64
    np.testing.assert_allclose(resized[::3, ::3], data[f"resized_{name}"], rtol=0, atol=tolerance)
    np.testing.assert_allclose(normalized[::3, ::3], data[f"normalized_{name}"], rtol=0,
                               atol=tolerance)
    assert ((normalized * 255).astype(np.uint8) != data[f"u8_{name}"]).sum() <= flips


def test_broken_and_constant_maps_become_zero():
    data = np.load(GOLDEN / "resize_iou.npz")
    assert np.array_equal(wsol.normalize_scoremap(np.full((4, 4), 3.0)),
                          data["constant_normalized"])
    assert np.array_equal(wsol.normalize_scoremap(np.array([[1.0, np.nan], [0, 2]])),
                          data["nan_normalized"])
    for value in (0.1, 0.3, -7.7, 1e30):
        resized = wsol.resize_scoremap(np.full((2, 14, 14), value), 224)
        assert (resized == value).all() and not wsol.normalize_scoremap(resized).any()
    assert not wsol.normalize_scoremap(np.full((3, 3), 7)).any()             # whole numbers too
    assert wsol.normalize_scoremap(torch.tensor([[0, 1], [2, 4]])).tolist() == [[0, .25], [.5, 1]]
    with pytest.raises(TypeError, match="cam must hold float or int values, got complex128"):
        wsol.normalize_scoremap(np.ones((2, 2), complex))
    for function in (wsol.normalize_scoremap, lambda cam: wsol.resize_scoremap(cam, 4)):
        with pytest.raises(ValueError, match="cam must not be empty"):
            function(np.zeros((2, 0, 3)))
    mixed = torch.tensor([[[0.0, 2], [1, 4]], [[0, np.inf], [1, 2]], [[5, 5], [5, 5]]])
    zero = [[0, 0], [0, 0]]
    assert wsol.normalize_scoremap(mixed).tolist() == [[[0, 0.5], [0.25, 1]], zero, zero]


def test_resize_agrees_with_torch_and_keeps_its_input():
    cam = torch.rand(2, 3, 7, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = cam.clone()
    expected = torch.nn.functional.interpolate(cam, size=(20, 33), mode="bicubic",
                                               align_corners=False)
    torch.testing.assert_close(wsol.resize_scoremap(cam, (20, 33)), expected, rtol=0, atol=1e-12)
    wsol.normalize_scoremap(cam)
    assert torch.equal(cam, before)
    assert torch.equal(wsol.resize_scoremap(cam, (7, 9)), cam)


def test_check_scoremap_validity():
    wsol.check_scoremap_validity(np.random.default_rng(0).random((4, 5)))
    for wrong, error in ((torch.zeros(3, 3), TypeError), (np.zeros((3, 3), np.float32), TypeError),
                         (np.zeros((1, 3, 3)), ValueError), (np.full((3, 3), np.nan), ValueError),
                         (np.full((3, 3), 1.01), ValueError), (np.full((3, 3), -0.01), ValueError)):
        with pytest.raises(error, match="scoremap"):
            wsol.check_scoremap_validity(wrong)


# ---------------------------------------------------------------------------------------------
# Boxes and MaxBoxAcc
# ---------------------------------------------------------------------------------------------

def test_iou_fixture_and_errors():
    data = np.load(GOLDEN / "resize_iou.npz")
    assert np.array_equal(wsol.calculate_multiple_iou(data["iou_a"], data["iou_b"]), data["iou_ab"])
    assert wsol.calculate_multiple_iou([[0, 0, 0, 0]], [[0, 0, 1, 1]]).tolist() == [[0.25]]
    for wrong in ([[2, 0, 1, 5]], [[-1, 0, 1, 5]], [[0, 0, 1]]):
        with pytest.raises(RuntimeError, match="box_b"):
            wsol.calculate_multiple_iou([[0, 0, 1, 1]], wrong)


def test_resize_bbox():
    data = np.load(GOLDEN / "box_metrics.npz")
    sizes = data["image_sizes_wh"][data["gt_owner"]]
    assert [wsol.resize_bbox(box, size, (224, 224))
            for box, size in zip(data["gt_boxes"], sizes)] == list(
        map(tuple, data["gt_boxes_224"].tolist()))
    with pytest.raises(RuntimeError, match="box"):
        wsol.resize_bbox((5, 0, 4, 1), (10, 10), (224, 224))
    for sizes, message in ((((0, 10), (4, 4)), "image_size"), (((10,), (4, 4)), "image_size"),
                           (((10, 10), (4, -4)), "resize_size")):
        with pytest.raises(ValueError, match=message):
            wsol.resize_bbox((0, 0, 4, 1), *sizes)


def box_truth():
    data = np.load(GOLDEN / "box_metrics.npz")
    boxes = {f"{n}": data["gt_boxes"][data["gt_owner"] == n] for n in range(len(data["maps_u8"]))}
    return data, boxes, {f"{n}": size for n, size in enumerate(data["image_sizes_wh"])}


@pytest.mark.parametrize("multi", [0, 1])
@pytest.mark.parametrize("taus", [100, 1000])
def test_box_metrics_fixture(multi, taus):
    data, boxes, sizes = box_truth()
    evaluator = wsol.BoxEvaluator(boxes, sizes, interval=1 / taus, multi_contour_eval=bool(multi))
    evaluator.accumulate_batch(data["maps_u8"] / 255.0, list(boxes))
    counts = data[f"num_correct_multi{multi}_thr{taus}"]
    assert np.array_equal(np.stack([evaluator.num_correct[iou] for iou in (30, 50, 70)]), counts)
    np.testing.assert_allclose(evaluator.compute(strict=True),
                               data[f"maxboxacc_multi{multi}_thr{taus}"], rtol=1e-12)
    result = evaluator.result()
    assert result.n == evaluator.cnt == len(boxes) and result.curve.shape == (3, taus)
    assert result.v2 == np.mean(result.max_box_acc)
    assert np.array_equal(result.best_threshold, evaluator.cam_threshold_list[counts.argmax(1)])
    per_image = evaluator.per_image()
    assert np.array_equal(per_image["correct"].sum(0) * 100 / 24, result.max_box_acc)


def test_one_by_one_merged_and_pickled_equal_one_batch():
    data, boxes, sizes = box_truth()
    maps, ids = data["maps_u8"][:8] / 255.0, list(boxes)[:8]
    whole = wsol.BoxEvaluator(boxes, sizes)
    whole.accumulate_batch(torch.from_numpy(maps), ids)
    parts = [wsol.BoxEvaluator(boxes, sizes) for _ in range(2)]
    for n, image_id in enumerate(ids):
        parts[n % 2].accumulate(maps[n], image_id)
    merged = parts[0].merge(pickle.loads(pickle.dumps(parts[1])))      # as after all_gather_object
    assert merged.compute() == whole.compute() and merged.cnt == 8
    assert np.array_equal(merged.result().curve, whole.result().curve)
    numbered = wsol.BoxEvaluator(*({int(i): known[i] for i in ids} for known in (boxes, sizes)))
    numbered.accumulate_batch(maps, torch.tensor(list(map(int, ids))))  # as a DataLoader gives them
    assert numbered.compute() == whole.compute()
    order = [merged.image_ids.index(image_id) for image_id in ids]
    assert np.array_equal(merged.per_image()["iou"][order], whole.per_image()["iou"])
    with pytest.raises(ValueError, match="twice"):
        whole.merge(merged)
    with pytest.raises(ValueError, match="cam_threshold_list"):
        whole.merge(wsol.BoxEvaluator(boxes, sizes, interval=0.01))
    with pytest.raises(ValueError, match="multi_contour_eval"):
        whole.merge(wsol.BoxEvaluator(boxes, sizes, multi_contour_eval=False))
    with pytest.raises(ValueError, match="never accumulated"):
        whole.compute(strict=True)
    first, second = (wsol.BoxEvaluator({f"{n}": boxes[f"{n}"] for n in some}, sizes, interval=0.1)
                     for some in ((0, 1), (2, 3)))
    first.accumulate(maps[0], "0")
    second.accumulate(maps[2], "2")
    with pytest.raises(ValueError, match="1 of 2 images were never accumulated, first '1'"):
        first.merge(second).compute(strict=True)


def test_evaluators_own_their_ground_truth_and_thresholds():
    rng = np.random.default_rng(0)
    maps, taus = rng.random((2, 8, 8)), np.arange(0, 1, 0.1)
    boxes = {name: np.array([[1, 1, 5, 6]], np.float16) for name in "ab"}
    sizes = dict.fromkeys("ab", (900, 700))
    masks = {name: rng.integers(0, 2, (8, 8)) for name in "ab"}
    results = []
    for changed in (False, True):
        evaluators = (wsol.BoxEvaluator(boxes, sizes, taus, resize_length=8),
                      wsol.MaskEvaluator(masks, taus, resize_length=8))
        if changed:
            taus += 0.05
            for truth in (boxes, masks):
                truth["a"][:] = 0
                del truth["b"]
        for evaluator in evaluators:
            evaluator.accumulate_batch(maps, ["a", "b"])
        results.append((evaluators[0].result().curve.tolist(), evaluators[0].cam_threshold_list[1],
                        evaluators[1].compute()))
    assert results[0] == results[1]
    large = np.array([[300, 300, 600, 600]])              # times 224 no float16
    half, whole = (wsol.BoxEvaluator({"a": large.astype(kind)}, {"a": (900, 700)}).gt_boxes["a"]
                   for kind in (np.float16, np.int64))
    assert np.array_equal(half, whole)


def test_many_true_boxes_and_low_maps_against_the_definition():
    rng = np.random.default_rng(5)
    size, ids = 24, [f"{n}" for n in range(6)]
    corner = rng.integers(0, 40, (6, 5, 2))
    truth = {i: np.concatenate([c, c + rng.integers(2, 30, (5, 2))], 1)[:n + 1] * (n != 3)
             for n, (i, c) in enumerate(zip(ids, corner))}
    sizes = dict.fromkeys(ids, (80, 70))
    maps = wsol.normalize_scoremap(wsol.resize_scoremap(rng.random((6, 5, 5)), size)) * 0.6
    maps[3] = 0                                           # no foreground: [0, 0, 0, 0] is predicted
    taus = np.array([0.0, 0.2, 0.55, 0.9, 1.0])
    for multi in (False, True):
        evaluator = wsol.BoxEvaluator(truth, sizes, taus, iou_threshold_list=(10, 40),
                                      multi_contour_eval=multi, resize_length=size)
        evaluator.accumulate_batch(maps, ids)
        expected = np.zeros((2, len(taus)), int)
        for image_id, scoremap in zip(ids, maps):
            gt = np.array([wsol.resize_bbox(box, (80, 70), (size, size))
                           for box in truth[image_id]])
            for t, boxes in enumerate(wsol.compute_bboxes_from_scoremaps(scoremap, taus, multi)[0]):
                best = wsol.calculate_multiple_iou(boxes, gt).max()
                expected[:, t] += best >= np.array([0.1, 0.4])
        assert np.array_equal(np.stack(list(evaluator.num_correct.values())), expected)


def test_confidence_interval_covers_and_shrinks():
    data, boxes, sizes = box_truth()
    evaluator = wsol.BoxEvaluator(boxes, sizes, interval=0.01)
    evaluator.accumulate_batch(data["maps_u8"] / 255.0, list(boxes))
    wide, again = (evaluator.confidence_interval(resamples=200, seed=1) for _ in range(2))
    narrow = evaluator.confidence_interval(level=0.5, resamples=200, seed=1)
    assert np.array_equal(wide["max_box_acc"], again["max_box_acc"])
    low, high = wide["v2"]
    assert low < evaluator.result().v2 < high and low < narrow["v2"][0] < narrow["v2"][1] < high
    with pytest.raises(ValueError, match="level"):
        evaluator.confidence_interval(level=1.5)
    with pytest.raises(ValueError, match="resamples"):
        evaluator.confidence_interval(resamples=0)


def test_top_one_localization_needs_the_class():
    maps = np.zeros((4, 8, 8))
    maps[:, 2:5, 2:5] = 1
    ids = list("abcd")
    truth = dict.fromkeys(ids, [[2, 2, 5, 5]]), dict.fromkeys(ids, (8, 8))
    top = wsol.TopOneLoc(*truth, iou_threshold_list=(50,), resize_length=8)
    top.accumulate_batch(maps[:3], ids[:3], torch.tensor([0, 1, 3]) == torch.arange(3))
    top.accumulate(maps[3], "d", True)
    assert top.compute(strict=True) == [75.0]
    for wrong in ([1], [True, False], 0.5):
        with pytest.raises(ValueError, match="predicted"):
            top.accumulate_batch(maps[:1], ["a"], wrong)


def test_box_evaluator_errors():
    truth, sizes = {"a": [[0, 0, 5, 5]], "b": [[1, 1, 3, 3]]}, {"a": (8, 8), "b": (8, 8)}

    def make(**options):
        return wsol.BoxEvaluator(options.pop("gt_boxes", truth), options.pop("image_sizes", sizes),
                                 **{"resize_length": 8, **options})

    for options, message in (
            ({"gt_boxes": {"a": []}}, "no box for image 'a'"), ({"gt_boxes": {}}, "empty"),
            ({"gt_boxes": {"a": [[5, 0, 4, 1]]}}, "'a'"),
            ({"gt_boxes": {"a": [[-1, 0, 4, 1]]}}, "'a'"),
            ({"image_sizes": {"a": (8, 8)}}, "image_sizes"),
            ({"image_sizes": {"a": (0, 8), "b": (8, 8)}}, "positive"),
            ({"iou_threshold_list": (0, 50)}, "iou_threshold_list"),
            ({"iou_threshold_list": (101,)}, "iou_threshold_list"),
            ({"iou_threshold_list": ()}, "iou_threshold_list"),
            ({"iou_threshold_list": (50, 50)}, "distinct"),
            ({"cam_threshold_list": []}, "cam_threshold_list"),
            ({"cam_threshold_list": [1.5]}, "cam_threshold_list"),
            ({"interval": 0}, "interval"), ({"resize_length": 0}, "resize_length"),
            ({"resize_length": 2.5}, "resize_length")):
        with pytest.raises(ValueError, match=message):
            make(**options)
    evaluator = make()
    with pytest.raises(RuntimeError, match="accumulated"):
        evaluator.compute()
    good = np.zeros((8, 8))
    for scoremap, image_id, error, message in (
            (good[None], "a", ValueError, "dimensions"), (good[:4], "a", ValueError, "8 x 8"),
            (good + np.nan, "a", ValueError, "NaN"), (good + 1.5, "a", ValueError, r"\[0, 1\]"),
            (good.astype(int), "a", TypeError, "float"), (good.tolist(), "a", TypeError, "list"),
            (good, "z", KeyError, "'z'")):
        with pytest.raises(error, match=message):
            evaluator.accumulate(scoremap, image_id)
    with pytest.raises(ValueError, match="2 image ids"):
        evaluator.accumulate_batch(good[None], ["a", "b"])
    with pytest.raises(ValueError, match="twice"):
        evaluator.accumulate_batch(np.stack([good, good]), ["a", "a"])
    assert evaluator.cnt == 0                             # a refused call leaves no trace
    evaluator.accumulate(good, "a")
    with pytest.raises(ValueError, match="'a' accumulated twice"):
        evaluator.accumulate(good, "a")
    repeated = make(allow_repeat=True)
    repeated.accumulate_batch(np.stack([good, good]), ["a", "a"])
    assert repeated.cnt == 2
    repeated.accumulate(good.astype(">f8"), "b")          # the other byte order
    with pytest.raises(ValueError, match="scoremap_threshold_list"):
        wsol.compute_bboxes_from_scoremaps(good, [])
    with pytest.raises(ValueError, match="size"):
        wsol.resize_scoremap(good, 0)


# ---------------------------------------------------------------------------------------------
# PxAP
# ---------------------------------------------------------------------------------------------

def masks_of(data):
    return {n: wsol.get_mask([data[f"mask_{n}_{k}"] for k in range(count)], data[f"ignore_{n}"])
            for n, count in enumerate(data["n_masks"])}


@pytest.mark.parametrize("taus", [100, 1000])
def test_pxap_fixture(taus):
    data = np.load(GOLDEN / "pxap.npz")
    masks, maps = masks_of(data), data["maps_u8"] / 255.0
    assert np.array_equal(np.stack(list(masks.values())), data["gt_mask_224"])
    evaluator = wsol.MaskEvaluator(masks, interval=1 / taus)
    evaluator.accumulate_batch(torch.from_numpy(maps[:7]), range(7))
    rest = wsol.MaskEvaluator(masks, np.arange(0, 1, 1 / taus))
    for n in (7, 8, 9):
        rest.accumulate(maps[n], n)
    evaluator.merge(rest)
    assert np.array_equal(evaluator.gt_true_score_hist, data[f"hist_true_thr{taus}"])
    assert np.array_equal(evaluator.gt_false_score_hist, data[f"hist_false_thr{taus}"])
    value = evaluator.compute(strict=True)
    np.testing.assert_allclose(value, data[f"pxap_thr{taus}"], rtol=1e-12)
    precision, recall, thresholds = evaluator.curve()
    assert (np.diff(thresholds) < 0).all() and np.isfinite(precision).all()
    np.testing.assert_allclose(100 * (precision * np.diff(recall, prepend=0)).sum(), value,
                               rtol=1e-12)
    low, high = evaluator.confidence_interval(resamples=100)
    assert low < value < high and np.isfinite(evaluator.per_image()).all()


def test_scores_at_and_beside_the_edges_fall_into_the_bins_of_numpy():
    for thresholds in (np.arange(0, 1, 0.001), np.arange(0, 1, 0.01), np.arange(0, 1, 0.3),
                       np.array([0.0]), np.array([0, 0.1, 0.5, 0.51, 1 - 1e-9]),
                       np.array([0.2, 0.4, 0.6])):
        scores = np.concatenate([thresholds, np.nextafter(thresholds, 2),
                                 np.nextafter(thresholds, -1)[1:], [1.0],
                                 np.random.default_rng(0).random(500)])
        side = int(np.sqrt(len(scores)))
        scores = scores[:side * side].reshape(side, side)
        evaluator = wsol.MaskEvaluator({"a": np.ones((side, side), np.uint8)}, thresholds,
                                       resize_length=side)
        evaluator.accumulate(scores, "a")
        expected = np.histogram(scores, np.append(thresholds, [1, 2, 3]))[0]
        assert np.array_equal(evaluator.gt_true_score_hist, expected)


def test_mask_of_any_size_is_sampled_without_half_pixels():
    column = wsol.get_mask([np.arange(36)[None].repeat(2, 0) % 2])
    scale = 1.0 / (224.0 / 36)
    assert np.array_equal(column[0], np.array([int(x * scale) % 2 for x in range(224)]))
    both = wsol.get_mask([np.eye(2), np.eye(2) * 0.4], np.ones((1, 1)), size=2)
    assert both.tolist() == [[1, 255], [255, 1]]


def test_mask_errors():
    with pytest.raises(ValueError, match="instance_masks"):
        wsol.get_mask([])
    with pytest.raises(ValueError, match="2-d"):
        wsol.get_mask([np.zeros((2, 2, 3))])
    with pytest.raises(ValueError, match="size"):
        wsol.get_mask([np.zeros((2, 2))], size=0)
    with pytest.raises(ValueError, match="size"):
        wsol.get_mask([np.zeros((2, 2))], size=2.5)
    zeros = np.zeros((4, 4))
    for masks, options, message in (
            ({"a": zeros[:3]}, {}, "4 x 4"), ({"a": zeros + 2}, {}, "0, 1 and 255"),
            ({}, {}, "empty"), ({"a": zeros}, {"cam_threshold_list": [0, 0.5, 0.5]}, "rise")):
        with pytest.raises(ValueError, match=message):
            wsol.MaskEvaluator(masks, resize_length=4, **options)
    evaluator = wsol.MaskEvaluator({"a": zeros}, resize_length=4)
    with pytest.raises(RuntimeError, match="accumulated"):
        evaluator.compute()
    evaluator.accumulate(zeros, "a")
    for result in (evaluator.compute, evaluator.confidence_interval):
        with pytest.raises(RuntimeError, match="positive"):
            result()
    with pytest.raises(TypeError, match="merge"):
        evaluator.merge(wsol.BoxEvaluator({"a": [[0, 0, 1, 1]]}, {"a": (4, 4)}))


# ---------------------------------------------------------------------------------------------
# Files and search
# ---------------------------------------------------------------------------------------------

def test_evaluate_wsol_reads_files(tmp_path):
    data, boxes, sizes = box_truth()
    maps = data["maps_u8"][:5] / 255.0
    folder = tmp_path / "metadata" / "CUB" / "test"
    folder.mkdir(parents=True)
    ids = [f"class/{n}.jpg" for n in range(5)]
    (folder / "image_ids.txt").write_text("".join(f"{i}\n" for i in ids))
    (folder / "image_sizes.txt").write_text(
        "".join(f"{i},{sizes[str(n)][0]},{sizes[str(n)][1]}\n" for n, i in enumerate(ids)))
    (folder / "localization.txt").write_text(
        "".join(f"{i},{','.join(map(str, box))}\n" for n, i in enumerate(ids)
                for box in boxes[str(n)]))
    (tmp_path / "maps" / "class").mkdir(parents=True)
    for n, image_id in enumerate(ids):                    # both namings
        np.save(tmp_path / "maps" / (f"{image_id}.npy" if n % 2 else f"class/{n}.npy"), maps[n])
    evaluator = wsol.BoxEvaluator({i: boxes[str(n)] for n, i in enumerate(ids)},
                                  {i: sizes[str(n)] for n, i in enumerate(ids)})
    evaluator.accumulate_batch(maps, ids)
    call = [tmp_path / "maps", tmp_path / "metadata", None, "CUB", "test"]
    assert wsol.evaluate_wsol(*call) == pytest.approx(evaluator.result().v2, rel=1e-12)
    assert wsol.evaluate_wsol(*call, multi_iou_eval=False) == evaluator.compute()[1]
    with pytest.raises(ValueError, match="dataset_name"):
        wsol.evaluate_wsol(tmp_path, tmp_path, None, "COCO", "test")
    for text in folder.glob("*.txt"):                     # as some editors save them
        spaced = text.read_text().replace(",", " , ").replace("\n", " \n")
        text.write_text(spaced, encoding="utf-8-sig", newline="\r\n")
    assert wsol.evaluate_wsol(*call, multi_iou_eval=False) == evaluator.compute()[1]
    for broken, error in ((maps[0] * 2, ValueError), (np.float32(maps[0]), TypeError),
                          (maps[0, :100], ValueError)):
        np.save(tmp_path / "maps" / "class/0.npy", broken)
        with pytest.raises(error, match="class/0.npy: "):
            wsol.evaluate_wsol(*call)
    for line, message in (("class/0.jpg,1,2,3", "5 fields"), ("class/0.jpg,1,2,3,x", "numbers")):
        (folder / "localization.txt").write_text(f"{line}\n")
        with pytest.raises(ValueError, match=f"localization.txt:1: {message}"):
            wsol.evaluate_wsol(*call)
    (folder / "localization.txt").write_bytes(b"class/\xff.jpg,1,2,3,4\n")
    with pytest.raises(ValueError, match="localization.txt: not UTF-8 text"):
        wsol.evaluate_wsol(*call)


def test_evaluate_wsol_reads_masks(tmp_path):
    data = np.load(GOLDEN / "pxap.npz")
    folder, images = tmp_path / "metadata" / "OpenImages" / "val", tmp_path / "masks" / "OpenImages"
    folder.mkdir(parents=True)
    images.mkdir(parents=True)
    rows, ids = [], [f"val/c/{n}.jpg" for n in range(3)]
    (tmp_path / "maps" / "val" / "c").mkdir(parents=True)
    for n, image_id in enumerate(ids):
        np.save(tmp_path / "maps" / f"{image_id}.npy", data["maps_u8"][n] / 255.0)
        Image.fromarray(data[f"ignore_{n}"]).save(images / f"{n}_ignore.png")
        for k in range(data["n_masks"][n]):
            Image.fromarray(data[f"mask_{n}_{k}"]).save(images / f"{n}_{k}.png")
            rows.append(f"{image_id},{n}_{k}.png,{'' if k else f'{n}_ignore.png'}\n")
    (folder / "image_ids.txt").write_text("".join(f"{i}\n" for i in ids))
    (folder / "localization.txt").write_text("".join(rows))
    evaluator = wsol.MaskEvaluator(masks_of(data))
    evaluator.accumulate_batch(data["maps_u8"][:3] / 255.0, range(3))
    call = [tmp_path / "maps", tmp_path / "metadata", tmp_path / "masks", "OpenImages", "val"]
    assert wsol.evaluate_wsol(*call) == evaluator.compute()
    with pytest.raises(ValueError, match="mask_root"):
        wsol.evaluate_wsol(*call[:2], None, *call[3:])
    (folder / "localization.txt").write_text("".join(rows + [rows[0]]))
    with pytest.raises(ValueError, match="only the first line of 'val/c/0.jpg'"):
        wsol.evaluate_wsol(*call)
    (folder / "localization.txt").write_text("".join(rows))
    (tmp_path / "maps" / f"{ids[0]}.npy").unlink()
    with pytest.raises(FileNotFoundError, match="val/c/0.jpg.npy"):
        wsol.evaluate_wsol(*call)


def test_samples_stay_in_the_space():
    rng = np.random.default_rng(0)
    keys = {"cam": set(), "has": {"has_drop_rate", "has_grid_size"},
            "acol": {"acol_drop_threshold"},
            "spg": {f"spg_threshold_{n}{e}" for n in "123" for e in "hl"},
            "adl": {"adl_drop_rate", "adl_drop_threshold"},
            "cutmix": {"cutmix_beta", "cutmix_prob"}}
    for method, names in keys.items():
        space = wsol.search_space(method)
        trials = [wsol.sample_trial(space, rng) for _ in range(300)]
        assert all(set(trial) == names | {"lr", "large_feature_map"} for trial in trials)
        assert all(1e-5 <= trial["lr"] <= 1 for trial in trials)
        assert 0.3 < np.mean([trial["lr"] < 10 ** -2.5 for trial in trials]) < 0.7
        assert {trial["large_feature_map"] for trial in trials} == {False, True}
        for trial in trials:
            json.dumps(trial)
            for name in names - {"has_grid_size", "cutmix_beta"}:
                assert 0 <= trial[name] <= 1
            assert 1 <= trial.get("has_grid_size", 1) <= 224 and trial.get("cutmix_beta", 0) >= 0
            for n in "123" if method == "spg" else "":
                assert trial[f"spg_threshold_{n}l"] <= trial[f"spg_threshold_{n}h"]
    first, second = (wsol.sample_trial(wsol.search_space("spg"), np.random.default_rng(3))
                     for _ in range(2))
    assert first == second
    with pytest.raises(ValueError, match="method"):
        wsol.search_space("grad")
    with pytest.raises(ValueError, match="distribution"):
        wsol.sample_trial({"lr": ("normal", 0, 1)}, rng)
    for entry in (("uniform", 0), ("uniform", "low", 1), ("loguniform", 0, 1), ("choice", ()), 3):
        with pytest.raises(ValueError, match="distribution of lr"):
            wsol.sample_trial({"lr": entry}, rng)


def test_search_goes_on_where_it_stopped(tmp_path):
    space, seen = wsol.search_space("adl"), []

    def score(trial):
        seen.append(trial)
        return float("nan") if len(seen) == 2 else -abs(np.log(trial["lr"]) + 5)

    whole = wsol.random_search(score, space, tmp_path / "whole.jsonl", trials=6, seed=4)
    assert whole[-1]["score"] is None and whole[0]["score"] == max(r["score"] for r in whole[:-1])
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    seen[:] = [None, None]
    assert wsol.random_search(score, space, tmp_path / "cut.jsonl", trials=6, seed=4) == whole
    assert len(seen) == 2 + 3
    assert (tmp_path / "cut.jsonl").read_text() == "".join(lines)
    with pytest.raises(ValueError, match="trial 0 of seed 4 is not what seed 5"):
        wsol.random_search(score, space, tmp_path / "cut.jsonl", trials=6, seed=5)
    with pytest.raises(ValueError, match="this space"):
        wsol.random_search(score, wsol.search_space("has"), tmp_path / "cut.jsonl", 6, seed=4)
    for broken in ("junk", "{}", "[]", "null", lines[1].replace("null", '"high"')):
        (tmp_path / "cut.jsonl").write_text(f"{lines[0]}{broken.strip()}\n{lines[2]}")
        with pytest.raises(ValueError, match="cut.jsonl:2: not the record"):
            wsol.random_search(score, space, tmp_path / "cut.jsonl", trials=6, seed=4)
