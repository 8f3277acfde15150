"""Formats in: what a source yields for good entries and for each kind of bad one."""

import json

import pytest

from clipmoe_jax.data.sources import BadRecord, ImageFolder, Pair, ShareGPT4V, open_source
from clipmoe_jax.data.sources.base import find_files

PNG = b"the sources do not look inside image files"


def entry(image="a.png", caption="a red cube", **fields):
    turns = [{"from": "human", "value": "Describe it."}, {"from": "gpt", "value": caption}]
    return {"image": image, "conversations": turns} | fields


def share_gpt4v(tmp_path, entries):
    images = tmp_path / "images"
    images.mkdir(exist_ok=True)
    (images / "a.png").write_bytes(PNG)
    (tmp_path / "captions.json").write_text(json.dumps(entries))
    return ShareGPT4V(str(tmp_path / "captions.json"), str(images))


def test_sharegpt4v_reads_the_first_answer(tmp_path):
    later_turns = entry(id="seven")
    later_turns["conversations"] += [{"from": "gpt", "value": "a second answer"}]
    source = share_gpt4v(tmp_path, [entry(), later_turns, entry(caption=" padded \n", id=8)])
    assert len(source) == 3
    assert list(source) == [
        Pair("a.png", PNG, ("a red cube",)),
        Pair("seven", PNG, ("a red cube",)),
        Pair("8", PNG, ("padded",)),
    ]
    assert list(source) == list(source)  # a second pass reads again


@pytest.mark.parametrize(
    ("bad_entry", "kind"),
    [
        pytest.param(entry(image="b.png"), "missing image", id="no such file"),
        pytest.param(entry(image=None), "missing image", id="no image path"),
        pytest.param(entry(image="."), "missing image", id="a folder"),
        pytest.param(entry(image="a.png/b.png"), "missing image", id="a file as folder"),
        pytest.param(entry(image="a\0.png"), "unreadable image", id="a null byte"),
        pytest.param(entry(image="../a.png"), "path outside the image folder", id="climbs out"),
        pytest.param(entry(image="/etc/hostname"), "path outside the image folder", id="absolute"),
        pytest.param(entry(caption="  \n"), "empty caption", id="white space"),
        pytest.param(entry(caption="half \ud83d"), "invalid text", id="lone surrogate"),
        pytest.param(entry(caption=None), "missing caption", id="caption is null"),
        pytest.param(entry(caption=3), "malformed entry", id="caption is a number"),
        pytest.param(entry(conversations=[]), "missing caption", id="no turns"),
        pytest.param(entry(conversations="text"), "malformed entry", id="turns are a string"),
        pytest.param({"image": "a.png"}, "malformed entry", id="no conversations"),
        pytest.param("a.png", "malformed entry", id="not a dict"),
    ],
)
def test_sharegpt4v_bad_entries(tmp_path, bad_entry, kind):
    bad, good = share_gpt4v(tmp_path, [bad_entry, entry()])
    assert isinstance(bad, BadRecord) and bad.kind == kind
    assert good == Pair("a.png", PNG, ("a red cube",))


def test_sharegpt4v_paths_stay_inside_the_folder_without_resolving_links(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "c.png").write_bytes(PNG)
    source = share_gpt4v(tmp_path, [entry(image="sub/../a.png"), entry(image="link/c.png")])
    (tmp_path / "images" / "link").symlink_to(elsewhere)
    assert [record.image for record in source] == [PNG, PNG]


def test_image_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.JPG", "a.png", "sub/c.webp"):
        (tmp_path / name).write_bytes(PNG)
    (tmp_path / "a.txt").write_text("one caption")
    (tmp_path / "b.txt").write_text("\ufeffcafé\r\n\n  second line  \n", encoding="utf-8")
    (tmp_path / "sub" / "c.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "notes.md").write_text("not an image")
    source = ImageFolder(str(tmp_path))
    assert len(source) == 3
    first, second, third = source
    assert first == Pair("a.png", PNG, ("one caption",))
    assert second == Pair("b.JPG", PNG, ("café", "second line"))
    assert (third.id, third.kind) == ("sub/c.webp", "invalid text")


def test_linked_folders_count(tmp_path):
    for name in ("pairs/own", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.png").write_bytes(PNG)
        (tmp_path / name / "a.txt").write_text("text")
        (tmp_path / name / "a.tar").write_bytes(b"")
    (tmp_path / "pairs" / "linked").symlink_to("../elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to("../pairs")  # is not gone around in
    assert [pair.id for pair in ImageFolder(str(tmp_path / "pairs"))] == ["linked/a.png", "own/a.png"]
    found = find_files(str(tmp_path / "pairs"), "webdataset", ".tar")
    assert list(found) == ["linked/a.tar", "own/a.tar"]


@pytest.mark.parametrize(
    ("text", "kind"), [(None, "missing caption"), ("", "empty caption"), ("\n \n", "empty caption")]
)
def test_image_folder_without_captions(tmp_path, text, kind):
    (tmp_path / "a.png").write_bytes(PNG)
    if text is not None:
        (tmp_path / "a.txt").write_text(text)
    (record,) = ImageFolder(str(tmp_path))
    assert (record.id, record.kind) == ("a.png", kind)


def test_open_source(tmp_path):
    share_gpt4v(tmp_path, [entry()])
    captions, images = tmp_path / "captions.json", str(tmp_path / "images")
    assert len(open_source(f"sharegpt4v:{captions}", images)) == 1
    assert len(open_source(f"folder:{images}")) == 1


@pytest.mark.parametrize(
    ("spec", "images", "error", "message"),
    [
        (
            "laion:x",
            None,
            ValueError,
            "source=laion:x is not KIND:PATH: use one such as sharegpt4v:.*folder:DIR",
        ),
        ("folder", None, ValueError, "source=folder is not KIND:PATH"),
        ("folder:/nowhere", None, FileNotFoundError, "--source=folder:/nowhere is not a folder"),
        ("folder:/", "x", ValueError, "--images=x has no use"),
        ("sharegpt4v:x.json", None, ValueError, "needs --images=DIR"),
        ("sharegpt4v:/no.json", "/", FileNotFoundError, "--source=sharegpt4v:/no.json does not"),
    ],
)
def test_wrong_specs(spec, images, error, message):
    with pytest.raises(error, match=message):
        open_source(spec, images)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b'[\n {"image" 1}]', "not valid JSON at line 2 column 11", id="not JSON"),
        pytest.param(b'{"a": 1}', "holds a JSON dict, expected a list", id="not a list"),
        pytest.param(b'["\xff"]', "not UTF-8 at byte 2", id="not UTF-8"),
    ],
)
def test_malformed_json(tmp_path, content, message):
    path = tmp_path / "captions.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"captions.json .*{message}"):
        ShareGPT4V(str(path), str(tmp_path))


def test_image_root_must_exist(tmp_path):
    (tmp_path / "captions.json").write_text("[]")
    with pytest.raises(FileNotFoundError, match="--images=/nowhere is not a folder"):
        ShareGPT4V(str(tmp_path / "captions.json"), "/nowhere")
