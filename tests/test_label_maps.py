import json
import multiprocessing
import pickle

import numpy as np
import pytest
import torch

from data_tools import label_maps
from data_tools.label_maps import LabelMaps, StoreWriter, generate


def maps_of(count, k=3, h=4, w=5, classes=20, seed=0):
    scores = 5 * torch.randn(count, classes, h, w, generator=torch.Generator().manual_seed(seed))
    values, index = scores.topk(k, dim=1)
    return torch.stack([values.half().float(), index.float()], 1)


def names(count):
    return [f"/data/train/n{i % 3:08d}/n{i % 3:08d}_{i}.JPEG" for i in range(count)]


def write_store(folder, maps, shard_size=4, rank=0, world_size=1, limit=None):
    n, _, k, h, w = maps.shape
    writer = StoreWriter(folder, names(n), k=k, height=h, width=w, num_classes=20,
                         shard_size=shard_size)
    steps = generate(lambda rows: maps[rows], writer, batch_size=3, rank=rank,
                     world_size=world_size)
    return [step for _, step in zip(range(limit or 10**9), steps)]


def test_a_store_gives_back_what_was_written(tmp_path):
    maps = maps_of(10)
    steps = write_store(tmp_path, maps)
    assert steps[-1] == {"image": 10, "total": 10, "rows": 2}
    store = LabelMaps(tmp_path)
    assert len(store) == 10
    assert torch.equal(store[list(range(10))], maps)
    assert store[3].dtype == torch.float32
    assert torch.equal(store[-1], maps[-1]) and torch.equal(store[[9, 0, 5]], maps[[9, 0, 5]])
    assert store.index("elsewhere/n00000001/n00000001_4.JPEG") == 4
    assert store[[]].shape == (0, 2, 3, 4, 5)
    assert not list(label_maps.verify(tmp_path)) and not list(tmp_path.glob(".*"))
    StoreWriter(tmp_path, names(10), k=3, height=4, width=5, num_classes=20,
                shard_size=4).write(0, maps[:4].bfloat16())
    assert torch.equal(LabelMaps(tmp_path)[0], maps[0].bfloat16().float())
    again = pickle.loads(pickle.dumps(store))
    assert torch.equal(again[7], maps[7])
    with pytest.raises(KeyError, match="n9/x"):
        store.index("n9/x.JPEG")
    for row in (np.int64(3), torch.tensor(3)):
        assert torch.equal(store[row], maps[3])
    for rows in ([True, False], [1.5]):
        with pytest.raises(TypeError, match="rows must be integers"):
            store[rows]
    with pytest.raises(IndexError, match="0..9"):
        store[[10]]


def test_the_size_of_imagenet_maps(tmp_path):
    maps = maps_of(64, k=5, h=15, w=15)
    write_store(tmp_path, maps, shard_size=64)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) / 64 <= 4600


def test_generation_goes_on_where_it_stopped(tmp_path):
    maps = maps_of(10)
    write_store(tmp_path, maps, limit=3)  # killed inside the second shard
    with pytest.raises(ValueError, match="unfinished: 2 shards"):
        LabelMaps(tmp_path)
    before = (tmp_path / "shard-00000.npy").stat().st_mtime_ns
    assert write_store(tmp_path, maps)[0]["total"] == 6
    assert (tmp_path / "shard-00000.npy").stat().st_mtime_ns == before
    assert torch.equal(LabelMaps(tmp_path)[list(range(10))], maps)
    assert write_store(tmp_path, maps) == []


def test_processes_share_the_shards(tmp_path):
    maps = maps_of(10)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=write_store, args=(tmp_path, maps, 2, rank, 2))
               for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(worker.exitcode == 0 for worker in workers)
    assert torch.equal(LabelMaps(tmp_path)[list(range(10))], maps)


def test_released_tree_to_store_and_back(tmp_path, capsys):
    maps = maps_of(7, h=4, w=4)
    for name, m in zip(names(7), maps):
        path = tmp_path / "tree" / f"{label_maps.image_key(name)}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(m, path)
    arguments = [str(tmp_path / "tree"), str(tmp_path / "store"), "--num-classes", "20"]
    assert label_maps.main(["pack", *arguments]) == 0
    store = LabelMaps(tmp_path / "store")
    for name, m in zip(names(7), maps):
        assert torch.equal(store[store.index(name)], m)
    assert label_maps.main(["verify", str(tmp_path / "store")]) == 0
    assert "7 maps" in capsys.readouterr().out
    assert label_maps.main(["unpack", str(tmp_path / "store"), str(tmp_path / "back")]) == 0
    for name, m in zip(names(7), maps):
        path = tmp_path / "back" / f"{label_maps.image_key(name)}.pt"
        assert torch.equal(label_maps.read_released(path), m)
    list(label_maps.pack(tmp_path / "tree", tmp_path / "turned", num_classes=20, transpose=True))
    assert torch.equal(LabelMaps(tmp_path / "turned")[0], store[0].transpose(2, 3))


def test_damage_is_named(tmp_path, capsys):
    write_store(tmp_path, maps_of(10))
    shard = tmp_path / "shard-00001.npy"
    data = bytearray(shard.read_bytes())
    data[-1] = 0x7C  # the last score becomes infinite
    data[-2] = 0
    shard.write_bytes(data)
    problems = list(label_maps.verify(tmp_path))
    assert len(problems) == 2
    assert "checksum" in problems[0]
    assert "n00000001_7: a score" in problems[1]
    shard.write_bytes(data[:-1])
    assert any("shard-00001.npy cannot be read" in problem
               for problem in label_maps.verify(tmp_path))
    shard.write_bytes(bytes(data).replace(b"'descr'", b"'descr("))
    assert any("shard-00001.npy cannot be read" in problem
               for problem in label_maps.verify(tmp_path))
    assert label_maps.main(["verify", str(tmp_path)]) == 1
    (tmp_path / "images.txt").write_text("n0/a\n" * 10)
    assert "images.txt: 9 names repeat" in next(label_maps.verify(tmp_path))
    (tmp_path / "images.txt").write_text("n0/a\n")
    with pytest.raises(ValueError, match="images.txt has 1 lines"):
        LabelMaps(tmp_path)
    meta = json.loads((tmp_path / "store.json").read_text())
    for damage in ("{", '{"format": 1}', json.dumps({**meta, "shard_size": 0}),
                   json.dumps({**meta, "k": "2"})):
        (tmp_path / "store.json").write_text(damage)
        with pytest.raises(ValueError, match="store.json is damaged"):
            LabelMaps(tmp_path)
    (tmp_path / "store.json").write_text(json.dumps(meta))
    (tmp_path / "images.txt").unlink()
    with pytest.raises(ValueError, match="images.txt: no such file"):
        LabelMaps(tmp_path)
    assert label_maps.main(["verify", str(tmp_path / "none")]) == 2
    assert "no store.json" in capsys.readouterr().err


@pytest.mark.parametrize("half, value, words", [
    (1, 20, "outside 0..19"), (1, -1, "outside"), (1, 0.5, "not an integer"),
    (0, float("nan"), "not finite"), (0, 1e6, "float16")])
def test_bad_maps_are_refused_by_name(tmp_path, half, value, words):
    maps = maps_of(4)
    maps[2, half, 0, 0, 0] = value
    with pytest.raises(ValueError, match=f"n00000002_2: .*{words}"):
        write_store(tmp_path, maps)
    assert not list(tmp_path.glob("shard*"))


def test_bad_arguments(tmp_path):
    maps = maps_of(4)
    twice = maps.clone()
    twice[1, 1, 1] = twice[1, 1, 0]
    with pytest.raises(ValueError, match="same class twice"):
        write_store(tmp_path / "a", twice)
    write_store(tmp_path / "b", maps)
    with pytest.raises(ValueError, match="another store .*shard_size"):
        write_store(tmp_path / "b", maps, shard_size=2)
    writer = StoreWriter(tmp_path / "c", names(4), k=3, height=4, width=5, num_classes=20,
                         shard_size=2)
    for start in (1, -2, 4):
        with pytest.raises(ValueError, match="whole shard"):
            writer.write(start, maps[:2])
    for place in ((2, 2), (-1, 1), (0, 0)):
        with pytest.raises(ValueError, match="rank must be in 0"):
            list(writer.missing(*place))
    shape = {"k": 3, "height": 4, "width": 5, "num_classes": 20}
    for change in ({"k": 0}, {"num_classes": 40000}, {"height": 0}, {"shard_size": 1.5}):
        with pytest.raises(ValueError, match="need 1 <= k"):
            StoreWriter(tmp_path / "d", names(4), **shape | change)
    with pytest.raises(ValueError, match="repeat"):
        StoreWriter(tmp_path / "d", names(2) * 2, **shape)
    with pytest.raises(ValueError, match="name of one line"):
        label_maps.image_key("a/b\nc")
    with pytest.raises(ValueError, match="class folder"):
        label_maps.image_key("lonely.JPEG")
    with pytest.raises(ValueError, match="no <wnid>"):
        label_maps.released_maps(tmp_path)
    (tmp_path / "n0").mkdir()
    (tmp_path / "n0" / "x.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="x.pt cannot be read"):
        label_maps.read_released(tmp_path / "n0" / "x.pt")
    torch.save(torch.zeros(3), tmp_path / "n0" / "x.pt")
    with pytest.raises(ValueError, match="x.pt must hold"):
        label_maps.read_released(tmp_path / "n0" / "x.pt")
