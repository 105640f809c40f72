"""The annotation files of seven data sets in their published layout, and their broken lines."""

import json

import pytest

from data_tools import video_annotations as va

KINETICS = "label,youtube_id,time_start,time_end,split\n"


def test_kinetics_and_mini_kinetics(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text(
        'label,youtube_id,time_start,time_end,split\n"riding, a bike",abc-_1,5,15,train\n'
        "abseiling,x,120,130,train\nzumba,z_9,0,10,train\n"
    )
    videos, classes = va.read_kinetics(path)
    assert classes == ["abseiling", "riding, a bike", "zumba"] and videos[0] == va.Labelled(
        "riding, a bike/abc-_1_000005_000015", 1, 5.0, 15.0
    )
    (tmp_path / "mini.txt").write_text("z_9\nx\nunknown\n")
    videos, classes = va.read_mini_kinetics(tmp_path / "mini.txt", path)
    assert classes == ["abseiling", "zumba"] and [v.label for v in videos] == [0, 1]
    (tmp_path / "test.csv").write_text("youtube_id,time_start,time_end,split\nq,1,11,test\n")
    assert va.read_kinetics(tmp_path / "test.csv",
                            classes)[0] == [va.Labelled("q_000001_000011", -1, 1.0, 11.0)]
    path.write_text("label,youtube_id,time_start,time_end,split\nabseiling,x,soon,130,train\n")
    with pytest.raises(ValueError, match="train.csv:2"):
        va.read_kinetics(path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="expected columns"):
        va.read_kinetics(path)
    (tmp_path / "mini.txt").write_text("nobody\n")
    with pytest.raises(ValueError, match="mini.txt.*none"):
        va.read_mini_kinetics(tmp_path / "mini.txt", tmp_path / "test.csv")


def test_something_something(tmp_path):
    (tmp_path / "labels.json").write_text(
        json.dumps({"Pushing something": "1", "Holding something next to something": "0"})
    )
    items = [{"id": "7", "label": "pushing a cup", "template": "Pushing [something]",
              "placeholders": ["a cup"]},
             {"id": "8", "template": "Holding [something] next to [something]"}, {"id": "9"}]
    (tmp_path / "train.json").write_text(json.dumps(items))
    videos, classes = va.read_ssv2(tmp_path / "train.json", tmp_path / "labels.json")
    assert [tuple(v[:2]) for v in videos] == [("7.webm", 1), ("8.webm", 0), ("9.webm", -1)]
    assert classes[1] == "Pushing something"
    (tmp_path / "train.json").write_text(
        json.dumps([{"id": "7", "template": "Eating [something]"}])
    )
    with pytest.raises(ValueError, match="train.json: expected.*Eating"):
        va.read_ssv2(tmp_path / "train.json", tmp_path / "labels.json")
    for numbers in (["0", "0"], ["0", "2"], ["1", "2"]):
        (tmp_path / "labels.json").write_text(json.dumps(dict(zip("ab", numbers))))
        with pytest.raises(ValueError, match="labels.json: must number its 2 templates from 0"):
            va.read_ssv2(tmp_path / "train.json", tmp_path / "labels.json")


def test_ucf101_and_hmdb51(tmp_path):
    (tmp_path / "classInd.txt").write_text("1 ApplyEyeMakeup\n2 YoYo\n")
    (tmp_path / "trainlist01.txt").write_text("YoYo/v_YoYo_g08_c01.avi 2\n")
    (tmp_path / "testlist01.txt").write_text("ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi\n")
    assert va.read_ucf101(tmp_path)[0] == [va.Labelled("YoYo/v_YoYo_g08_c01.avi", 1)]
    assert va.read_ucf101(tmp_path, train=False)[0][0].label == 0
    (tmp_path / "trainlist01.txt").write_text("YoYo/v_YoYo_g08_c01.avi 1\n")
    with pytest.raises(ValueError, match="trainlist01.txt:1"):
        va.read_ucf101(tmp_path)
    hmdb = tmp_path / "hmdb"
    hmdb.mkdir()
    (hmdb / "brush_hair_test_split1.txt").write_text("a b.avi 1 \nc.avi 2 \nd.avi 0 \n")
    (hmdb / "wave_test_split1.txt").write_text("w.avi 1\n")
    assert va.read_hmdb51(hmdb)[0] == [va.Labelled("brush_hair/a b.avi", 0),
                                       va.Labelled("wave/w.avi", 1)]
    assert va.read_hmdb51(hmdb, 1, False)[0] == [va.Labelled("brush_hair/c.avi", 0)]
    for name in ("climb", "climb_stairs"):
        (hmdb / f"{name}_test_split3.txt").write_text(f"{name}.avi 1\n")
    assert va.read_hmdb51(hmdb, 3) == ([("climb/climb.avi", 0, None, None),
                                        ("climb_stairs/climb_stairs.avi", 1, None, None)],
                                       ["climb", "climb_stairs"])
    with pytest.raises(ValueError, match="split2"):
        va.read_hmdb51(hmdb, 2)
    (hmdb / "wave_test_split1.txt").write_text("w.avi 3\n")
    with pytest.raises(ValueError, match="wave_test_split1.txt:1"):
        va.read_hmdb51(hmdb)


def test_thumos_and_ava(tmp_path):
    (tmp_path / "Diving_val.txt").write_text(
        "video_validation_0000051  67.5  75.9\nvideo_validation_0000051  80.0 81.5\n"
    )
    (tmp_path / "CricketShot_val.txt").write_text("video_validation_0000052 1 2\n")
    (tmp_path / "Ambiguous_val.txt").write_text("video_validation_0000051 1 2\n")
    videos, classes = va.read_thumos14(tmp_path)
    assert classes == ["CricketShot", "Diving"] and [
        (v.label, v.start, v.end) for v in videos["video_validation_0000051"]
    ] == [(1, 67.5, 75.9), (1, 80.0, 81.5)]
    with pytest.raises(ValueError, match="_test.txt"):
        va.read_thumos14(tmp_path, "test")
    (tmp_path / "Diving_val.txt").write_text("video_validation_0000051  67.5\n")
    with pytest.raises(ValueError, match="Diving_val.txt:1"):
        va.read_thumos14(tmp_path)
    path = tmp_path / "ava_val.csv"
    path.write_text(
        "v1,0902,0.1,0.2,0.5,0.9,12,0\nv1,0902,0.1,0.2,0.5,0.9,80,0\n"
        "v1,0902,0.6,0.2,0.7,0.9,12,1\nv1,0903,0,0,1,1,3,0\n"
    )
    (tmp_path / "excluded.csv").write_text("v1,0903\n")
    (moment,) = va.read_ava(path, tmp_path / "excluded.csv")
    assert (moment.seconds == 902 and moment.boxes.shape == (2, 4)
            and moment.actions == [[12, 80], [12]])
    (tmp_path / "list.pbtxt").write_text(
        'label {\n  name: "bend/bow (at the waist)"\n  label_id: 1\n  label_type: X\n}\n'
        'item {\n  name: "dance"\n  id: 5\n}\n'
    )
    assert va.read_ava_classes(tmp_path / "list.pbtxt") == {
        1: "bend/bow (at the waist)",
        5: "dance",
    }
    path.write_text("v1,0902,0.1,0.2,1.5,0.9,12,0\n")
    with pytest.raises(ValueError, match="ava_val.csv:1"):
        va.read_ava(path)


@pytest.mark.parametrize("read, name, good, lines", [
    (va.read_kinetics, "train.csv", KINETICS + "a,x,0,10,train",
     ("a,x,nan,5,train", "a,x,5,inf,train", "a,x,5", "a,,1,2,train", "a,x,9,3,train")),
    (lambda path: va.read_kinetics(path, ["a"]), "val.csv", KINETICS + "a,x,0,10,train",
     ("b,x,0,10,val",)),
    (lambda path: va.read_ucf101(path.parent), "classInd.txt", "1 A",
     ("2", "x B", "3 B", "2 A", "2 B C")),
    (lambda path: va.read_ucf101(path.parent), "trainlist01.txt", "Yo/v.avi 1",
     ("Yo/v.avi x", "Yo/v.avi 2", "No/v.avi 1", "Yo/v.avi 1 1")),
    (lambda path: va.read_hmdb51(path.parent), "wave_test_split1.txt", "w.avi 1", ("w.avi 3", "1")),
    (lambda path: va.read_thumos14(path.parent), "Diving_val.txt", "v 1.5 2",
     ("v 1", "v a 2", "v nan 2", "v 1 inf", "v 5 2", "v -1 2")),
    (va.read_ava, "ava.csv", "v,902,.1,.1,.2,.2,3,1",
     ("v,902,.1,.1,.2,.2,0,1", "v,902,.1,.1,.2,.2,81,1", "v,902,.1,.1,.2,.2,x,1", "v,902",
      "v,nan,.1,.1,.2,.2,3,1", "v,902,nan,.1,.2,.2,3,1", "v,902,.3,.1,.2,.2,3,1",
      ",902,.1,.1,.2,.2,3,1")),
    (lambda path: va.read_ava(path.parent / "people.csv", path), "excluded.csv", "v,903",
     ("v", "v,x", "v,nan"))])
def test_a_broken_line_is_named(tmp_path, read, name, good, lines):
    (tmp_path / "people.csv").write_text("v,902,.1,.1,.2,.2,3,1\n")
    if name == "trainlist01.txt":
        (tmp_path / "classInd.txt").write_text("1 Yo\n")
    for line in lines:
        (tmp_path / name).write_text(f"{good}\n\n{line}\n")      # an empty line counts
        number = (tmp_path / name).read_text().splitlines().index(line) + 1
        with pytest.raises(ValueError, match=f"{name}:{number}: expected"):
            read(tmp_path / name)


@pytest.mark.parametrize("name, texts", [
    ("train.json", ("", "[1]", '[{"id": "1"', '{"id": "1"}', '[{"template": "Pushing it"}]')),
    ("labels.json", ('{"a": "x"}', "[1, 2]", '{"a"', '{"a": null}'))])
def test_a_broken_json_file_is_named(tmp_path, name, texts):
    for text in texts:
        (tmp_path / "train.json").write_text('[{"id": "1"}]')
        (tmp_path / "labels.json").write_text('{"Pushing something": "0"}')
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=name):
            va.read_ssv2(tmp_path / "train.json", tmp_path / "labels.json")


def test_other_encodings_and_repeated_rows(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text(KINETICS + "m\u00e4hen,x,0,10,train\n", "utf-8-sig", newline="\r\n")
    assert va.read_kinetics(path) == (
        [va.Labelled("m\u00e4hen/x_000000_000010", 0, 0.0, 10.0)], ["m\u00e4hen"])
    path.write_bytes(KINETICS.encode() + b"\xff,x,0,10,train\n")
    with pytest.raises(ValueError, match="train.csv: not UTF-8 text"):
        va.read_kinetics(path)
    path.write_text(2 * "v,902,.1,.1,.2,.2,3,1\n" + "v,0902,.10,.1,.2,.2,5,1\n")
    (moment,) = va.read_ava(path)
    assert moment.actions == [[3, 5]] and moment.boxes.tolist() == [[0.1, 0.1, 0.2, 0.2]]
    path.write_text("item {\n  id: 7\n  name: \"z\"\n}\nitem {\n  id: 8\n}\n")
    with pytest.raises(ValueError, match="train.csv: expected `name"):
        va.read_ava_classes(path)
