"""Caption data sets on small trees in the real layouts; vocabulary, word vectors, batches,
captioned shapes.
"""

import itertools
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools import captions, synthetic
from data_tools.loader import BadImage
from reference.pcme import plausible_match_codes, tokenize


def picture(path, shade=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 7), (shade, 50, 50)).save(path)


def write_json(path, value):
    path.write_text(json.dumps(value))


# ---------------------------------------------------------------- COCO

# image id, part, split, ids of its sentences
COCO = ((9, "train2014", "train", (11, 12)), (5, "val2014", "restval", (31, 30)),
        (7, "val2014", "val", (40,)), (3, "val2014", "test", (52, 50)))


def coco_tree(root, folders="{part}", deep=False):
    annotations = root / "annotations" / "annotations" if deep else root / "annotations"
    annotations.mkdir(parents=True)
    for part in ("train2014", "val2014"):
        images = [i for i in COCO if i[1] == part]
        name = f"COCO_{part}_%012d.jpg"
        write_json(annotations / f"captions_{part}.json", {
            "images": [{"id": i[0], "file_name": name % i[0]} for i in images],
            "annotations": [{"id": s, "image_id": i[0], "caption": f"caption {s}"}
                            for i in images for s in (*i[3], 1000 + i[0])]})
        write_json(annotations / f"instances_{part}.json", {
            "annotations": [{"image_id": i[0], "category_id": 90, "iscrowd": 0}
                            for i in images if i[0] != 3]})
        for i in images:
            picture(root / folders.format(part=part) / (name % i[0]))
    write_json(root / "dataset_coco.json", {
        "dataset": "coco",
        "images": [{"cocoid": i, "filepath": part, "split": split, "sentids": list(ids)}
                   for i, part, split, ids in COCO]})
    return root


@pytest.mark.parametrize("folders, deep", [("{part}", False), ("images/{part}", True),
                                           ("images/trainval35k", True)])
def test_coco_in_its_three_layouts(tmp_path, folders, deep):
    root = coco_tree(tmp_path, folders, deep)
    train = captions.coco_captions(root, "train", root / "dataset_coco.json")
    assert train.image_ids.tolist() == [9, 5]
    assert train.caption_ids.tolist() == [11, 12, 31, 30]  # extra captions are left out
    assert train.captions[2] == "caption 31" and train.owner.tolist() == [0, 0, 1, 1]
    assert train.caption_image_ids.tolist() == [9, 9, 5, 5] and train.open(1).size == (9, 7)
    assert train.images[0].name == "COCO_train2014_000000000009.jpg"
    codes, annotated = plausible_match_codes(captions.coco_instances(root), [9, 3])
    assert annotated.tolist() == [True, False] and codes[0, 89] == 1


def test_id_lists_give_the_split_of_the_json(tmp_path):
    root = coco_tree(tmp_path)
    for split, ids in (("train", [11, 12]), ("restval", [31, 30]), ("dev", [40])):
        np.save(root / f"coco_{split}_ids.npy", np.array(ids))
    (root / "test_ids.txt").write_text("52\n50\n")
    for split in ("train", "dev", "test"):
        listed, named = (captions.karpathy_ids(source, split)
                         for source in (root, root / "dataset_coco.json"))
        assert listed.tolist() == named.tolist()


def test_captions_are_grouped_by_image_in_the_order_of_first_appearance(tmp_path):
    root = coco_tree(tmp_path)
    (root / "train_ids.txt").write_text("31\n11\n30\n")
    (root / "restval_ids.txt").write_text("12\n")
    data = captions.coco_captions(root, "train", root)
    assert data.caption_ids.tolist() == [31, 30, 11, 12] and data.image_ids.tolist() == [5, 9]


def test_what_is_wrong_with_a_coco_tree_is_named(tmp_path):
    root = coco_tree(tmp_path)
    with pytest.raises(FileNotFoundError, match="id list of split 'test'.*coco_test_ids.npy"):
        captions.coco_captions(root, "test", root / "annotations")
    with pytest.raises(ValueError, match="split must be"):
        captions.karpathy_ids(root / "dataset_coco.json", "val")
    (root / "test_ids.txt").write_text("52\n77\n")
    with pytest.raises(ValueError, match=r"1 caption ids.*\[77\]"):
        captions.coco_captions(root, "test", root)
    for lines, message in (("52\n52\n", "test_ids.txt:2: '52' stands twice"),
                           ("52\n1.5\n", "test_ids.txt:2: a caption id expected, got '1.5'"),
                           ("5 2\n", "test_ids.txt:1: a caption id"), ("\n", "list is empty")):
        (root / "test_ids.txt").write_text(lines)
        with pytest.raises(ValueError, match=message):
            captions.karpathy_ids(root, "test")
    for ids in (np.array([1.5]), np.array([[1, 2]]), np.array([1, 1]), np.zeros(0, int)):
        np.save(root / "test_ids.npy", ids)
        with pytest.raises(ValueError, match="test_ids.npy: not a list of different caption ids"):
            captions.karpathy_ids(root, "test")
    (root / "test_ids.npy").unlink()
    (root / "dataset_coco.json").write_text("{")
    with pytest.raises(ValueError, match="dataset_coco.json: not valid JSON"):
        captions.karpathy_ids(root / "dataset_coco.json", "test")
    write_json(root / "dataset_coco.json", {"images": [{"split": "test"}]})
    with pytest.raises(ValueError, match="dataset_coco.json: not Karpathy's.*no 'sentids'"):
        captions.karpathy_ids(root / "dataset_coco.json", "test")
    for ids in ("12", [1.5]):
        write_json(root / "dataset_coco.json", {"images": [{"split": "test", "sentids": ids}]})
        with pytest.raises(ValueError, match="dataset_coco.json: not Karpathy's.*sentence id"):
            captions.karpathy_ids(root / "dataset_coco.json", "test")
    (root / "test_ids.txt").write_bytes(b"\xef\xbb\xbf52\r\n\r\n")           # as Windows writes it
    assert captions.karpathy_ids(root, "test").tolist() == [52]
    path = root / "annotations" / "captions_val2014.json"
    for change, message in ((lambda c: c["annotations"].append(c["annotations"][0]), "twice"),
                            (lambda c: c["images"].append(c["images"][0]), "stands twice"),
                            (lambda c: c["annotations"][0].update(caption=5), "is no text"),
                            (lambda c: c["images"][0].update(file_name=5), "is no text")):
        content = json.loads(whole := path.read_text())
        change(content)
        write_json(path, content)
        with pytest.raises(ValueError, match=f"captions_val2014.json: not a COCO.*{message}"):
            captions.coco_captions(root, "test", root)
        path.write_text(whole)
    for name, call in (("captions", lambda: captions.coco_captions(root, "test", root)),
                       ("instances", lambda: captions.coco_instances(root))):
        write_json(root / "annotations" / f"{name}_val2014.json", {"images": []})
        with pytest.raises(ValueError, match=f"{name}_val2014.json: not a COCO.*no 'annotations'"):
            call()
    (root / "annotations" / "captions_val2014.json").unlink()
    with pytest.raises(FileNotFoundError, match="captions_val2014.json not found"):
        captions.coco_captions(root, "test", root)


def test_lists_of_matches(tmp_path):
    path = tmp_path / "eccv.json"
    write_json(path, {"5": [50, 51], "7": [99]})
    rows, positives = captions.match_lists(path, [3, 5, 7], [50, 52, 51])
    assert rows.tolist() == [1, 2]
    assert positives.tolist() == [[True, False, True], [False, False, False]]
    with pytest.raises(ValueError, match="gallery_ids must differ, 1 of 2 do"):
        captions.match_lists(path, [5], [50, 50])
    write_json(path, {"five": [50]})
    with pytest.raises(ValueError, match="eccv.json: not a list of matches.*five"):
        captions.match_lists(path, [5], [50])


# ---------------------------------------------------------------- CUB


def cub_tree(root):
    for folder, stems in (("001.Black_footed", ("B_0001_jpg", "A_0002")), ("012.Yellow", ("Y_1",)),
                          ("200.Last", ("L_1",))):
        for stem in stems:
            picture(root / "CUB_200_2011" / "images" / folder / f"{stem}.jpg")
            text = root / "cvpr2016_cub" / "text_c10" / folder / f"{stem}.txt"
            text.parent.mkdir(parents=True, exist_ok=True)
            text.write_text(f"a bird {stem}\nanother caption\n")
    lists = root / "lists"
    lists.mkdir()
    (lists / "trainvalclasses.txt").write_text("001.Black_footed_Albatross\n200.Other_name\n")
    (lists / "testclasses.txt").write_text("012.Yellow\n")
    (lists / "seen_test_images.txt").write_text("001.Black_footed/A_0002.jpg\n012.Yellow/Y_1.jpg\n")
    return root


def test_cub_with_the_published_lists(tmp_path):
    root = cub_tree(tmp_path)
    classes = captions.cub_classes("trainval", root / "lists")
    assert classes == [0, 199]  # by number: the names differ
    everything = captions.cub_captions(root, classes)
    assert [path.name for path in everything.images] == ["A_0002.jpg", "B_0001_jpg.jpg", "L_1.jpg"]
    assert everything.classes.tolist() == [0, 0, 199]
    assert everything.captions[2] == "a bird B_0001_jpg"
    held_out = captions.seen_test_images(root / "lists")
    assert len(captions.cub_captions(root, classes, omit=held_out)) == 2
    only = captions.cub_captions(root, classes, only=held_out)
    assert only.captions == ["a bird A_0002", "another caption"]
    assert len(captions.cub_captions(root, captions.cub_classes("test", root / "lists"))) == 1


def test_what_is_wrong_with_a_cub_tree_is_named(tmp_path):
    root = cub_tree(tmp_path)
    with pytest.warns(UserWarning, match="cannot be compared"):
        assert captions.cub_classes("test") == list(range(150, 200))
    with pytest.raises(ValueError, match="split 'val1' needs"):
        captions.cub_classes("val1")
    with pytest.raises(FileNotFoundError, match="valclasses2.txt"):
        captions.cub_classes("val2", root / "lists")
    text = root / "cvpr2016_cub" / "text_c10" / "012.Yellow" / "Y_1.txt"
    text.write_text("one\n\n two \n")
    with pytest.warns(UserWarning, match="Y_1.txt: 1 blank"):
        assert captions.cub_captions(root, [11]).captions == ["one", "two"]
    text.write_bytes(b"\xef\xbb\xbfone\x0b\r\nt\xefo\r\n\r\n")
    assert captions.cub_captions(root, [11]).captions == ["one", "t\ufffdo"]
    text.write_text("\n")
    with pytest.raises(ValueError, match="Y_1.txt: no caption for .*Y_1.jpg"):
        captions.cub_captions(root, [11])
    text.unlink()
    with pytest.raises(FileNotFoundError, match="Y_1.txt: no captions for .*older CUB-200"):
        captions.cub_captions(root, [11])
    with pytest.raises(ValueError, match="no captions are left"):
        captions.cub_captions(root, [50])
    for lines, message in (("\nYellow\n", ":2: 'Yellow'"), ("001.A\n201.B\n", ":2: '201.B'"),
                           ("001.A\n001.B\n", ":2: '001.B' stands twice"), ("", ": .* is empty")):
        (root / "lists" / "testclasses.txt").write_text(lines)
        with pytest.raises(ValueError, match=f"testclasses.txt{message}"):
            captions.cub_classes("test", root / "lists")
    (root / "lists" / "seen_test_images.txt").write_text("\n")
    with pytest.raises(ValueError, match="seen_test_images.txt: the list is empty"):
        captions.seen_test_images(root / "lists")


# ---------------------------------------------------------------- Flickr8k


@pytest.mark.parametrize("layout", captions.FLICKR_LAYOUTS)
def test_flickr8k_in_its_layouts(tmp_path, layout):
    text, lists, folder = layout
    number = "#{}" if "token" in text else ""
    (tmp_path / text).write_text("".join(f"{name}.jpg{number.format(i)}\t{name} {i} .\n"
                                         for name in "abc" for i in range(2)))
    for split, names in (("train", "ca"), ("dev", "b"), ("test", "b")):
        (tmp_path / lists.format(split)).write_text("".join(f"{n}.jpg\n" for n in names))
    for name in "abc":
        picture(tmp_path / folder / f"{name}.jpg")
    data = captions.flickr8k(tmp_path, "train")
    with pytest.raises(ValueError, match="images must not be negative, got -1"):
        data.first(-1)
    assert [path.name for path in data.images] == ["c.jpg", "a.jpg"]
    assert data.captions == ["c 0 .", "c 1 .", "a 0 .", "a 1 ."]
    memory = data.in_memory()
    assert memory.images.shape == (2, 3, 7, 9) and memory.images.dtype == torch.uint8
    assert np.array_equal(memory.open(0), np.asarray(data.open(0).convert("RGB")))
    assert data.first(1).captions == ["c 0 .", "c 1 ."] and len(data.first(1)) == 1
    (tmp_path / folder / "c.jpg").write_bytes(b"no image")
    with pytest.raises(BadImage, match="c.jpg: not an image"):
        data.open(0)
    (tmp_path / text).write_text("c.jpg\tone\u2028line\x85 .\na.jpg\ta .\n", encoding="utf-8")
    assert captions.flickr8k(tmp_path, "train").captions == ["one\u2028line\x85 .", "a ."]
    (tmp_path / lists.format("test")).write_text("d.jpg\n")
    with pytest.raises(ValueError, match="no caption for 1 images.*d.jpg"):
        captions.flickr8k(tmp_path, "test")
    (tmp_path / text).write_bytes(b"\xef\xbb\xbfc.jpg\tone\r\na.jpg\ttwo\r\n\r\n")
    assert captions.flickr8k(tmp_path, "train").captions == ["one", "two"]
    (tmp_path / text).write_text("a.jpg\ta dog\nb.jpg a cat\n")
    with pytest.raises(ValueError, match=f"{text}:2: no tab"):
        captions.flickr8k(tmp_path, "train")
    for names, message in (("", "the list is empty"), ("a.jpg\na.jpg\n", "'a.jpg' stands twice")):
        (tmp_path / lists.format("test")).write_text(names)
        with pytest.raises(ValueError, match=f"{lists.format('test')}:.*{message}"):
            captions.flickr8k(tmp_path, "test")


def test_a_folder_that_is_not_flickr8k_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no Flickr8k here; .* captions.txt and images/"):
        captions.flickr8k(tmp_path, "train")
    with pytest.raises(ValueError, match="split must be"):
        captions.flickr8k(tmp_path, "val")


# ---------------------------------------------------------------- words


def test_vocabulary(tmp_path):
    texts = ["A dog runs.", "a dog barks.", "one cat, a bird"]
    vocabulary = captions.Vocabulary.of(texts, tokenize, threshold=2)
    assert list(vocabulary.word2idx) == [*captions.SPECIAL, "a", "dog", "."]
    assert len(vocabulary) == 7
    tokens, lengths = vocabulary(["a cat", "dog runs a dog."])
    assert tokens.tolist() == [[1, 4, 3, 2, 0, 0, 0], [1, 5, 3, 4, 5, 6, 2]]
    assert lengths.tolist() == [4, 7]
    assert vocabulary([])[0].shape == (0, 2) and vocabulary([])[1].dtype == torch.int64
    with pytest.raises(TypeError, match="several strings"):
        vocabulary("a cat")
    vocabulary.save(tmp_path / "words.json")
    with open(tmp_path / "words.pkl", "wb") as file:
        pickle.dump(vocabulary.word2idx, file)
    (tmp_path / "mark.json").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "words.json").read_bytes())
    for name in ("words.json", "mark.json", "words.pkl"):
        assert captions.Vocabulary.load(tmp_path / name, tokenize).word2idx == vocabulary.word2idx
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_vocabularies_that_are_refused(tmp_path):
    for name, content, message in (
            ("code.pkl", pickle.dumps(print), "not a vocabulary .holds a builtins.print"),
            ("torn.pkl", pickle.dumps({"a": 1})[:-4], "not a vocabulary"),
            ("list.json", b"[1]", "not a vocabulary"), ("torn.json", b"{", "not a vocabulary"),
            ("ids.json", b'{"a": "0"}', "ids integers"), ("a.json", b'{"a": 0}', "must map <pad>")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: .*{message}"):
            captions.Vocabulary.load(tmp_path / name, tokenize)
    with pytest.raises(ValueError, match="must map <pad>"):
        captions.Vocabulary({"a": 0}, tokenize)
    special = {word: number for number, word in enumerate(captions.SPECIAL)}
    with pytest.raises(ValueError, match="each once"):
        captions.Vocabulary({**special, "a": 4, "b": 4}, tokenize)
    with pytest.raises(ValueError, match="threshold"):
        captions.Vocabulary.of([], tokenize, 0)


def test_words_are_dropped_as_published():
    generator = torch.Generator().manual_seed(0)
    words, unknown = list(range(10, 30)), 0
    for _ in range(500):
        dropped = captions.drop_words(words, 0.1, generator)
        known = [w for w in dropped if w != 3]
        assert len(dropped) == 18 and known == sorted(known)
        unknown += dropped.count(3)
    assert unknown / (500 * 18) == pytest.approx(0.1, abs=0.01)
    assert captions.drop_words([5, 6], 0.0, generator) == [5, 6]
    assert captions.drop_words([], 0.1, generator) == []
    with pytest.raises(ValueError, match="probability must be in .0, 1., got 1.5"):
        captions.drop_words([5], 1.5, generator)


def test_word_vectors(tmp_path):
    path = tmp_path / "glove.txt"
    path.write_text("dog 1 2\n. . . 7 8\nblack 3 4\nuns 5 6\n", encoding="utf-8")
    words = ["dog", "black/white", "u.n.s", "cat", "dog", ". . ."]
    vectors, missing = captions.read_glove(path, words, dim=2)
    assert {word: vector.tolist() for word, vector in vectors.items()} == {
        "dog": [1, 2], "black/white": [3, 4], "u.n.s": [5, 6], ". . .": [7, 8]}
    assert missing == ["cat"] and vectors["dog"].dtype == np.float32
    header = tmp_path / "fast.vec"
    for content in (b"1 2\ndog 1 2 \n", b"1 2\r\ndog 1 2\r\n", b"\xef\xbb\xbfdog 1 2\n"):
        header.write_bytes(content)
        assert captions.read_glove(header, ["dog"], 2)[0]["dog"].tolist() == [1, 2]
    header.write_text("1 2\ndog 1 2 \n")
    for dim in (1, 3, 300):
        with pytest.raises(ValueError, match="is dim right"):
            captions.read_glove(path, ["dog"], dim)
    with pytest.raises(ValueError, match="fast.vec:1: "):
        captions.read_glove(header, ["dog"], 3)
    for line in ("dog 1 x", "dog 1 nan", "dog inf 2", "dog 1"):
        header.write_text(f"cat 3 4\n{line}\n")
        with pytest.raises(ValueError, match="fast.vec:2: not a word and 2 numbers"):
            captions.read_glove(header, ["dog"], 2)
    header.write_text("")
    for call, message in ((lambda: captions.read_glove(header, ["dog"], 2), "fast.vec: empty file"),
                          (lambda: captions.read_glove(path, "dog", 2), "words must be several"),
                          (lambda: captions.read_glove(path, ["dog"], 0), "dim at least 1")):
        with pytest.raises(ValueError, match=message):
            call()
    seen = []
    path.write_text("".join(f"word{i} {i} 0\n" for i in range(200_000)))
    captions.read_glove(path, ["word7"], 2, seen.append)
    assert seen == [100_000, 200_000]
    vocabulary = captions.Vocabulary.of(["dog"], tokenize, threshold=1)
    embedding = torch.nn.Embedding(5, 2)
    before = embedding.weight[:4].detach().clone()
    captions.set_word_vectors(embedding, vocabulary, {"dog": vectors["dog"]})
    assert embedding.weight[4].tolist() == [1, 2] and torch.equal(embedding.weight[:4], before)
    for other, vector in ((torch.nn.Embedding(4, 2), np.ones(2)), (embedding, np.ones(1))):
        with pytest.raises(ValueError, match=".* do not fit an embedding of"):
            captions.set_word_vectors(other, vocabulary, {"dog": vector})


# ---------------------------------------------------------------- batches


def small_set(images=7, each=3):
    rows, numbers = np.arange(images), np.arange(images * each)
    pixels = torch.arange(images, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 6, 6)
    texts = [f"w{i} w{i} w{i} w{i}" for i in numbers]
    return captions.CaptionSet(pixels, 100 + rows, texts, numbers, rows.repeat(each), rows // 2)


def batches(pairs, batch_size=4, **options):
    data = small_set()
    vocabulary = captions.Vocabulary.of(data.captions, tokenize)
    return captions.PairBatches(data, vocabulary, batch_size, pairs=pairs,
                                mean_std=((0,) * 3, (1 / 255,) * 3), **options)


def contents(loader):
    """(image rows, caption rows, image ids) of each batch, read from the pixels and the words."""
    rows = []
    for images, tokens, lengths, ids, caption_ids in loader:
        assert ((images.mean((1, 2, 3)) - (ids - 100)).abs() < 1e-3).all()
        words = tokens[:, 1] - 4
        assert (words // 3 + 100 == caption_ids).all() and (lengths == 6).all()
        rows.append((words.tolist(), ids.tolist()))
    return rows


def test_every_caption_comes_once_an_epoch_with_its_image():
    loader = batches("captions", seed=1)
    first = contents(loader)
    assert len(first) == len(loader) == 6 and len(first[-1][0]) == 1
    assert sorted(sum((words for words, _ in first), [])) == list(range(21))
    assert contents(loader) != first  # the next epoch
    loader.set_epoch(0, 2)
    assert contents(loader) == first[2:]
    for place in ((-1, 0), (0, -1), (0, 7)):
        with pytest.raises(ValueError, match="an epoch has 6 steps"):
            loader.set_epoch(*place)
    assert len(contents(batches("captions", seed=2**60))) == 6


def test_every_image_comes_once_an_epoch_with_captions_of_its_own():
    for words, ids in contents(batches("images", captions_per_image=2)):
        assert len(words) == 2 * len(ids) and len(set(words)) == len(words)
        assert [w // 3 + 100 for w in words[::2]] == ids
    for _, tokens, lengths, ids, caption_ids in batches("images", captions_per_image=5):
        assert len(tokens) == len(lengths) == len(caption_ids) == 5 * len(ids)    # with repeats
    fewer = contents(batches("images", captions_per_image=3))
    assert sorted(sum((ids for _, ids in fewer), [])) == list(range(100, 107))


def test_one_item_of_every_class_a_step():
    loader = batches("classes")
    assert len(loader) == 5
    assert all([(i - 100) // 2 for i in ids] == [0, 1, 2, 3] for _, ids in contents(loader))
    assert len({tuple(words) for words, _ in contents(loader)}) > 1


def test_ranks_share_the_batches_of_one_process():
    whole = contents(batches("captions"))
    halves = [contents(batches("captions", rank=rank, world_size=2)) for rank in range(2)]
    assert [(a[0] + b[0], a[1] + b[1]) for a, b in zip(*halves)] == whole[:5]
    assert len(halves[0]) == 5


def test_augmentations_follow_the_seed():
    first, again = (list(batches("captions", word_drop=0.5, erasing=1.0, seed=3))
                    for _ in range(2))
    assert all(torch.equal(x, y) for a, b in zip(first, again) for x, y in zip(a, b))
    assert all((lengths == 4).all() for _, _, lengths, *_ in first)  # half of the four words
    images = torch.ones(200, 3, 20, 20)
    erased = captions.random_erasing(images, 1.0, torch.Generator().manual_seed(0))
    area = 1 - erased.mean((1, 2, 3))
    assert images.min() == 1 and 0.01 < area.min() and area.max() < 0.37
    assert area.mean() == pytest.approx(0.17, abs=0.03)
    assert torch.equal(captions.random_erasing(images, 0.0, torch.Generator()), images)


@pytest.mark.parametrize("options, message", [
    ({"pairs": "words"}, "pairs must be"),
    ({"pairs": "captions", "captions_per_image": 2}, "captions_per_image"),
    ({"pairs": "captions", "batch_size": 3, "world_size": 2}, "multiple of world_size"),
    ({"pairs": "captions", "rank": 2, "world_size": 2}, "rank must be in 0"),
    ({"pairs": "captions", "world_size": 0}, "rank must be in 0"),
    ({"pairs": "captions", "word_drop": 1.0}, "word_drop")])
def test_batches_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        batches(**options)


# ---------------------------------------------------------------- captioned shapes


def test_captions_fit_their_own_image_and_matches_are_those_of_a_search():
    data = synthetic.captioned_shapes(40, 32, seed=2, captions=3)
    matches = synthetic.caption_matches(data["objects"], data["mentions"], data["relations"])
    assert data["images"].shape == (40, 3, 32, 32) and len(data["captions"]) == 120
    assert matches[torch.arange(120) // 3, torch.arange(120)].all() and not matches.all()

    def fits(objects, mentions, relation):
        said = [m for m in mentions.tolist() if max(m) >= 0]
        present = [o for o in objects.tolist() if max(o) >= 0]
        for chosen in itertools.permutations(present, len(said)):
            true = all(a in (-1, b) for m, o in zip(said, chosen) for a, b in zip(m, o))
            if true and relation:
                axis = (lambda p: p % 2) if relation == 1 else (lambda p: p // 2)
                true = axis(chosen[0][3]) < axis(chosen[1][3])
            if true:
                return True
        return False

    for image, caption in itertools.product(range(0, 40, 3), range(0, 120, 5)):
        assert matches[image, caption] == fits(data["objects"][image], data["mentions"][caption],
                                               int(data["relations"][caption]))


def test_captioned_shapes_follow_seed_and_labels():
    first, again, other = (synthetic.captioned_shapes(6, 32, seed=s)["images"] for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    labels = torch.tensor([0, 29, 7])
    data = synthetic.captioned_shapes(3, 32, labels=labels)
    assert torch.equal(5 * data["objects"][:, 0, 1] + data["objects"][:, 0, 2], labels)
    assert (data["objects"][:, 1:] == -1).all()
    codes = synthetic.scene_codes(data["objects"])
    assert codes.shape == (3, 11) and (codes.sum(1) == 2).all()
    assert synthetic.captioned_shapes(0)["captions"] == []
    with pytest.raises(ValueError, match="labels"):
        synthetic.captioned_shapes(2, labels=labels)
    with pytest.raises(ValueError, match="objects in 1..3"):
        synthetic.captioned_shapes(2, objects=4)
