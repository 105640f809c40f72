import json

import pytest
import torch
from PIL import Image

from data_tools.loader import BadImage
from data_tools.objectnet import objectnet

NAMES = ["kit fox", "barber chair", "folding chair", "rocking chair, rocker"]


def tree(root):
    """Three folders, two of them in an ImageNet of four classes; ids of 2012 run backwards."""
    for folder in ("chair", "desk_lamp", "fox"):
        (root / "images" / folder).mkdir(parents=True)
        image = Image.new("RGB", (10, 8), (255, 0, 0))
        image.paste((0, 0, 255), (2, 2, 8, 6))
        image.save(root / "images" / folder / "a.png")
    mappings = root / "mappings"
    mappings.mkdir()
    folders = {"chair": "Chair", "desk_lamp": "Desk lamp", "fox": "Fox"}
    objects = {"Chair": "barber chair; folding chair; rocking chair, rocker", "Fox": "kit fox"}
    (mappings / "folder_to_objectnet_label.json").write_text(json.dumps(folders))
    (mappings / "objectnet_to_imagenet_1k.json").write_text(json.dumps(objects))
    numbers = {str(number): 3 - number for number in range(4)}
    (mappings / "pytorch_to_imagenet_2012_id.json").write_text(json.dumps(numbers))
    (mappings / "imagenet_to_label_2012_v2").write_text("".join(f"{name}\n" for name in NAMES))
    return mappings


def test_overlapping_classes_without_their_border(tmp_path):
    tree(tmp_path)
    dataset, valid = objectnet(tmp_path, num_classes=4)
    assert dataset.classes == ["chair", "fox"] and dataset.labels.tolist() == [0, 1]
    assert valid.tolist() == [[True, True, True, False], [False, False, False, True]]
    image, label = dataset[1]
    assert image.size == (6, 4) and image.getcolors() == [(24, (0, 0, 255))] and label == 1
    file = tmp_path / "images" / "fox" / "a.png"
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(BadImage, match="fox/a.png: "):
        dataset.open(1)
    Image.new("RGB", (9, 4)).save(file)
    with pytest.raises(BadImage, match="fox/a.png: nothing but border"):
        dataset.open(1)
    predictions = torch.tensor([2, 2])
    assert valid[torch.tensor(dataset.labels), predictions].tolist() == [True, False]


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    names = tree(tmp_path) / "imagenet_to_label_2012_v2"
    expected = objectnet(tmp_path, num_classes=4)[1]
    names.write_bytes(b"\xef\xbb\xbf" + names.read_bytes().replace(b"\n", b"\r\n"))
    assert torch.equal(objectnet(tmp_path, num_classes=4)[1], expected)


@pytest.mark.parametrize("name, text, words", [
    ("folder_to_objectnet_label.json", None, "no such file"),
    ("imagenet_to_label_2012_v2", None, "no such file"),
    ("objectnet_to_imagenet_1k.json", "{", "damaged"),
    ("objectnet_to_imagenet_1k.json", "[]", "one JSON object"),
    ("objectnet_to_imagenet_1k.json", '{"Chair": 3}', "1k.json must hold .* values of type str"),
    ("pytorch_to_imagenet_2012_id.json", '{"0": [1]}', "id.json must hold .* values of type int"),
    ("pytorch_to_imagenet_2012_id.json", '{"x": 1}', "id.json: not {class number: id}.*'x'"),
    ("pytorch_to_imagenet_2012_id.json", '{"0": 1, "1": 1}', "id.json: .*an id stands twice"),
    ("pytorch_to_imagenet_2012_id.json", '{"-1": 1}', "id.json: .*a number is negative"),
    ("imagenet_to_label_2012_v2", b"\xff", "label_2012_v2: not UTF-8 text"),
    ("objectnet_to_imagenet_1k.json", '{"Chair": "stool"}', "'stool' .for 'Chair'. is none"),
    ("objectnet_to_imagenet_1k.json", '{"Stool": "stool"}', "no folder overlaps"),
    ("folder_to_objectnet_label.json", '{"chair": "Chair"}', "desk_lamp: not in")])
def test_broken_mappings_are_named(tmp_path, name, text, words):
    path = tree(tmp_path) / name
    path.unlink()
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=words):
        objectnet(tmp_path, num_classes=4)
