"""The grammar of sources, and what the plain formats yield for good entries and each kind of bad one."""

import json
import subprocess

import pytest

from clipmoe_jax.data.sources import (
    BadRecord,
    ImageFolder,
    Pair,
    ShareGPT4V,
    canonical,
    is_source,
    open_source,
    source_stamp,
    with_seed,
)
from clipmoe_jax.data.sources.files import expand_braces, find_files
from clipmoe_jax.data.sources.folders import Img2Dataset

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
        pytest.param(entry(image=["a.png", "b.png"]), "several images", id="two images"),
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
def test_bad_entries_of_sharegpt4v_are_named_by_kind(tmp_path, bad_entry, kind):
    bad, good = share_gpt4v(tmp_path, [bad_entry, entry()])
    assert isinstance(bad, BadRecord) and bad.kind == kind
    assert good == Pair("a.png", PNG, ("a red cube",))


def test_paths_stay_inside_the_image_folder_and_outside_linked_ones(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "c.png").write_bytes(PNG)
    names = ("sub/../a.png", "link/c.png", "c.png")
    share_gpt4v(tmp_path, [entry(image=name) | {"id": name} for name in names])
    (tmp_path / "images" / "link").symlink_to("../elsewhere")
    (tmp_path / "images" / "c.png").symlink_to("../elsewhere/c.png")
    (tmp_path / "linked").symlink_to("images")  # itself a link: that is what the user names
    for images in ("images", "linked"):
        spec = f"sharegpt4v:{tmp_path}/captions.json?images={tmp_path / images}"
        inside, *links = open_source(spec)
        assert isinstance(inside, Pair) and [record.kind for record in links] == ["a link", "a link"]
        assert (
            "remove it, or add ?follow_links=true to the source (--follow_links of prepare)"
            in links[1].detail
        )
        assert [record.image for record in open_source(f"{spec}&follow_links=true")] == 3 * [PNG]


def test_image_folder_reads_a_caption_from_each_line(tmp_path):
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


def test_linked_folders_are_followed_once(tmp_path):
    for name in ("pairs/own", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.png").write_bytes(PNG)
        (tmp_path / name / "a.txt").write_text("text")
        (tmp_path / name / "a.tar").write_bytes(b"")
    (tmp_path / "pairs" / "linked").symlink_to("../elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to("../pairs")  # is not gone around in
    pairs = str(tmp_path / "pairs")
    assert [pair.id for pair in ImageFolder(pairs, follow_links=True)] == ["linked/a.png", "own/a.png"]
    found = find_files(pairs, "webdataset", ".tar", follow_links=True)
    assert list(found) == ["linked/a.tar", "own/a.tar"]


@pytest.mark.parametrize(
    ("text", "kind"), [(None, "missing caption"), ("", "empty caption"), ("\n \n", "empty caption")]
)
def test_image_without_caption_is_a_bad_record(tmp_path, text, kind):
    (tmp_path / "a.png").write_bytes(PNG)
    if text is not None:
        (tmp_path / "a.txt").write_text(text)
    (record,) = ImageFolder(str(tmp_path))
    assert (record.id, record.kind) == ("a.png", kind)


def write(folder, **texts):
    """Files of a folder: images of any contents, captions of the given texts."""
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(PNG if text is None else text.encode())
    return str(folder)


def kinds(source):
    assert len(source) == len(list(source))
    return [(record.id, getattr(record, "kind", "pair")) for record in source]


def test_captions_without_an_image_are_bad_records(tmp_path):
    folder = write(tmp_path, **{"a.png": None, "a.txt": "a", "b.txt": "b", "sub/a.txt": "c", "d.md": "d"})
    missing = [("b.txt", "missing image"), ("sub/a.txt", "missing image")]
    assert kinds(ImageFolder(folder)) == [("a.png", "pair"), *missing]
    write(tmp_path, **dict.fromkeys(("00000_stats.json", "config.json", "01.json", "02.json"), "{}"))
    write(tmp_path, **{"02.txt": ""})
    of_json = [("01.json", "missing image"), ("02.txt", "missing image")]
    assert kinds(Img2Dataset(folder)) == [*of_json, ("a.png", "pair"), *missing]


def test_images_of_other_kinds_are_bad_records(tmp_path):
    folder = write(tmp_path, **{"a.tif": None, "a.txt": "a", "b.HEIC": None, "b.png": None, "b.txt": "b"})
    other = "another kind of image"
    assert kinds(ImageFolder(folder)) == [("a.tif", other), ("b.HEIC", other), ("b.png", "pair")]
    write(tmp_path, **{"cat/a.ppm": None, "cat/a.md": ""})
    assert ("cat/a.ppm", other) in kinds(open_source(f"classes:{folder}"))


def test_images_of_one_stem_share_their_captions(tmp_path):
    folder = write(tmp_path, **{"a.png": None, "a.jpg": None, "a.txt": "a"})
    assert list(ImageFolder(folder)) == [Pair("a.jpg", PNG, ("a",)), Pair("a.png", PNG, ("a",))]


def test_hidden_files_and_folders_are_passed_over(tmp_path):
    """As Jupyter, file managers and macOS leave them."""
    for folder in ("cat", "dog", ".ipynb_checkpoints", ".trash/cat"):
        write(
            tmp_path / "in" / folder, **{"0.png": None, "._0.png": None, "0.txt": "text", "._0.txt": "\xff"}
        )
        write(tmp_path / "in" / folder, **{"0.tar": "", "._0.tar": "", ".0.tar.gz": ""})
    expected = [("cat/0.png", "pair"), ("dog/0.png", "pair")]
    for kind in ("classes", "folder", "img2dataset"):
        assert kinds(open_source(f"{kind}:{tmp_path}/in")) == expected
    assert list(find_files(f"{tmp_path}/in", "webdataset", ".tar")) == ["cat/0.tar", "dog/0.tar"]
    (tmp_path / "in").rename(tmp_path / ".in")  # the folder that is named may be hidden
    assert kinds(open_source(f"classes:{tmp_path}/.in")) == expected


def test_compressed_files_are_not_left_out_unseen(tmp_path):
    folder = write(tmp_path, **{"0.tar": "", "1.TAR": "", "2.tar.gz": "", "3.md.gz": ""})
    with pytest.raises(ValueError, match="source webdataset:.* has 1 compressed files, .*/2.tar.gz: unpack"):
        open_source(f"webdataset:{folder}")
    (tmp_path / "2.tar.gz").unlink()
    assert list(find_files(folder, "webdataset", ".tar")) == ["0.tar", "1.TAR"]


@pytest.fixture
def captioned(tmp_path):
    """captions.json, and images/a.png with its caption beside it."""
    share_gpt4v(tmp_path, [entry()])
    (tmp_path / "images" / "a.txt").write_text("text")
    return tmp_path


def test_image_folder_is_an_option_or_an_argument(captioned):
    spec, images = f"sharegpt4v:{captioned / 'captions.json'}", str(captioned / "images")
    expected = [Pair("a.png", PNG, ("a red cube",))]
    assert list(open_source(f"{spec}?images={images}")) == expected
    assert list(open_source(spec, images)) == expected
    assert list(open_source(f"{spec}?images={images}", images)) == expected
    with pytest.raises(ValueError, match="captions.json.* is given another image folder, other: leave one"):
        open_source(f"{spec}?images={images}", "other")


def test_several_sources_are_one_with_numbered_ids(captioned):
    images = captioned / "images"
    folder, conversations = f"folder:{images}", f"sharegpt4v:{captioned / 'captions.json'}"
    expected = [Pair("0/a.png", PNG, ("text",)), Pair("1/a.png", PNG, ("a red cube",))]
    source = open_source(f"{folder},{conversations}?images={images}")
    assert len(source) == 2 and list(source) == list(source) == expected
    assert list(open_source(f"{folder},{conversations}", str(images))) == expected  # for the one with a use
    assert [pair.id for pair in open_source(f"{folder},{folder}")] == ["0/a.png", "1/a.png"]


def test_bad_records_of_several_sources_are_numbered_too(captioned):
    (captioned / "images" / "a.txt").write_text("")
    records = open_source(f"folder:{captioned / 'images'},folder:{captioned / 'images'}")
    assert [(bad.id, bad.kind) for bad in records] == [(f"{i}/a.png", "empty caption") for i in (0, 1)]


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("50% of, all", "50%25 of%2C all"),
        ("a,b", "a,b"),  # no kind follows the comma
        ("a+b", "a+b"),
        ("a,folder:b", "a%2Cfolder:b"),
        ("what?", "what?"),
        ("why?images=b", "why%3Fimages=b"),
        ("a&b", "a&b"),
    ],
)
def test_paths_may_have_odd_characters(tmp_path, name, written):
    (tmp_path / name).mkdir()
    (tmp_path / name / "a.png").write_bytes(PNG)
    (tmp_path / name / "a.txt").write_text("text")
    assert len(open_source(f"folder:{tmp_path}/{written}")) == 1


def test_percent_escapes_in_options_are_decoded(tmp_path):
    share_gpt4v(tmp_path, [entry()])
    (tmp_path / "images").rename(tmp_path / "a&b+c?d=e")
    spec = f"sharegpt4v:{tmp_path / 'captions.json'}?images={tmp_path}/a%26b+c%3Fd=e"
    assert [record.image for record in open_source(spec)] == [PNG]


def test_paths_may_begin_at_home(captioned, monkeypatch):
    monkeypatch.setenv("HOME", str(captioned))
    expected = [Pair("a.png", PNG, ("a red cube",))]
    assert list(open_source("sharegpt4v:~/captions.json?images=~/images")) == expected
    assert list(open_source("sharegpt4v:~/captions.json", "~/images")) == expected
    assert len(open_source("folder:~/images,folder:~/images")) == 2
    (captioned / "~").mkdir()
    monkeypatch.chdir(captioned)
    assert len(open_source("folder:./~")) == 0
    with pytest.raises(
        FileNotFoundError, match=f"prepared data set of that name or folder: .*{captioned}/tf"
    ):
        open_source("tfds:x?data_dir=~/tfds")


def test_question_mark_may_be_a_pattern(tmp_path):
    (tmp_path / "00.tar").write_bytes(b"")
    assert len(open_source(f"webdataset:{tmp_path}/0?.tar")) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("folder:x", True),
        ("tfds:x?split=val", True),
        ("data/train", False),
        ("gs://x/y", False),
        ("folder", False),
    ],
)
def test_source_is_told_from_a_prepared_folder(text, expected):
    assert is_source(text) is expected


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("digit_scenes:train", "digit_scenes:train?seed=3"),
        ("digit_scenes:train?pairs=4", "digit_scenes:train?pairs=4&seed=3"),
        ("digit_scenes:train?seed=9&pairs=4", "digit_scenes:train?seed=9&pairs=4"),
        ("folder:a%2Cb,digit_scenes:test", "folder:a%2Cb,digit_scenes:test?seed=3"),
        ("coco:x.json#test?images=y", "coco:x.json#test?images=y"),
    ],
)
def test_only_generated_sources_get_a_seed(spec, expected):
    assert with_seed(spec, 3) == expected == with_seed(expected, 4)


def test_seed_of_the_caller_is_that_of_sources_without_one():
    def images(spec, seed):
        return [pair.image for pair in open_source(spec, seed=seed)]

    first = images("digit_scenes:train?pairs=2", 0)
    assert images("digit_scenes:train?pairs=2", 1) != first
    assert images("digit_scenes:train?pairs=2&seed=0", 1) == first


def test_stamp_changes_with_a_file(tmp_path):
    file = tmp_path / "x.json"
    file.write_text("[]")
    specs = [f"coco:{file}", f"coco:{file}#test?images=DIR", f"folder:{tmp_path},csv:{file}?images=DIR"]
    before = [source_stamp(spec) for spec in specs]
    assert before == [source_stamp(spec) for spec in specs] and all(before)
    file.write_text("[1]")
    assert all(source_stamp(spec) != stamp for spec, stamp in zip(specs, before, strict=True))
    assert source_stamp("digit_scenes:train") == source_stamp("folder:/nowhere") == ""


@pytest.mark.parametrize(
    ("spec", "file"),
    [
        ("folder:{0}", "sub/a.txt"),
        ("folder:{0}", "a.JPG"),
        ("classes:{0}/", "sub/a.png"),
        ("img2dataset:{0}", "sub/000.json"),
        ("webdataset:{0}", "sub/0.tar"),
        ("webdataset:{0}/[ab].*", "a.tar"),
        ("parquet:{0}", "0.parquet"),
        ("tfds:{0}", "any"),
        ("tfds:sub?data_dir={0}", "sub/any"),
        ("folder:{0}/sub,folder:{0}", "a.txt"),
    ],
)
def test_stamp_changes_with_a_file_of_many(tmp_path, spec, file):
    spec = spec.format(tmp_path)
    write(tmp_path, **{file: "", "b.tar": "", "b.parquet": "", "b.txt": "", "b.png": ""})
    before = source_stamp(spec)
    assert before == source_stamp(spec) != ""
    write(tmp_path, **{file: "longer"})
    assert source_stamp(spec) != before


@pytest.mark.parametrize("kind", ["folder", "classes", "img2dataset", "webdataset", "parquet"])
def test_stamp_does_not_change_with_files_of_other_uses(tmp_path, kind):
    """As a run leaves them, whose workdir may lie in the folder."""
    write(tmp_path, **{"a.png": "", "a.txt": "", "0.json": "", "a.tar": "", "a.parquet": ""})
    before = source_stamp(f"{kind}:{tmp_path}")
    write(
        tmp_path,
        **{"run/done.json": "{}", "run/x.array_record-0": "", "run/metrics.jsonl": "{}", "x.npy": ""},
    )
    assert source_stamp(f"{kind}:{tmp_path}") == before != ""


def test_one_source_has_one_canonical_spelling(tmp_path, monkeypatch):
    write(tmp_path, **{"data/x.json": "[]", "images/a.png": None})
    (tmp_path / "link").symlink_to("data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    root = tmp_path.resolve()
    for spec, others in {
        f"coco:{root}/data/x.json?images={root}/images": (
            "coco:data/x.json?images=images",
            "coco:./link/x.json?images=data/../images/",
            "coco:~/data/x%2Ejson?images=~/images",
        ),
        f"coco:{root}/data/x.json#test?images=y": ("coco:link/x.json#test?images=./y",),
        f"folder:{root}/data,digit_scenes:train?pairs=2&seed=1": (
            "folder:link,digit_scenes:train?seed=1&pairs=2",
        ),
        f"webdataset:{root}/data/0*.tar": ("webdataset:data/0*.tar",),
        f"tfds:name?data_dir={root}/data": ("tfds:name?data_dir=link",),
    }.items():
        assert {canonical(other) for other in others} == {canonical(spec)}, spec
    assert canonical("coco:data/x.json", "images") == canonical("coco:data/x.json?images=images")
    different = (
        "folder:data",
        "classes:data",
        "folder:images",
        "folder:data,folder:data",
        "coco:data?images=a",
    )
    assert len({canonical(spec) for spec in different}) == len(different)


def test_pattern_takes_files_in_the_order_of_their_paths(tmp_path):
    write(tmp_path, **{"0-x/1": "", "0/1": "", "0/.1": ""})
    assert list(find_files(f"{tmp_path}/*/*", "webdataset", "")) == ["0/1", "0-x/1"]


@pytest.mark.parametrize(
    "path", ["{0..2}", "a{08..11}.tar", "{7..9}/{x,,y z}", "{x,{1..2}}", "{a}{1..}", "{05..5}"]
)
def test_braces_name_what_they_do_in_a_shell(path):
    quoted = path.replace(" ", "\\ ")
    shell = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {quoted}"], capture_output=True, text=True, check=True
    )
    assert sorted(set(expand_braces(path))) == sorted(shell.stdout.splitlines())


def test_braces_take_every_shard_that_they_name(tmp_path):
    write(tmp_path, **{f"{part}/{i:05d}.tar": "" for part in ("a", "b") for i in range(9, 12)})
    source = f"{tmp_path}/{{a,b}}/{{00009..00011}}.tar"
    assert list(find_files(source, "webdataset", ".tar")) == [
        f"{part}/{i:05d}.tar" for part in ("a", "b") for i in range(9, 12)
    ]
    before = source_stamp(f"webdataset:{source}")
    (tmp_path / "b" / "00010.tar").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"\{00009..00011}.tar has no .*/b/00010.tar: put it there, or"
    ):
        open_source(f"webdataset:{source}")
    assert source_stamp(f"webdataset:{source}") != before


@pytest.mark.parametrize(
    ("spec", "images", "error", "message"),
    [
        (
            "laion:x",
            None,
            ValueError,
            "source laion:x is not KIND:PATH: use one such as sharegpt4v:.*folder:DIR",
        ),
        (
            "folder:s3://b/pairs",
            None,
            ValueError,
            "source folder:s3://b/pairs lies in a bucket: copy",
        ),
        ("folder", None, ValueError, "source folder is not KIND:PATH"),
        ("folder:?images=x", None, ValueError, "is not KIND:PATH"),
        ("folder:/nowhere", None, FileNotFoundError, "source folder:/nowhere does not exist"),
        (f"folder:{__file__}", None, FileNotFoundError, "test_sources.py is not a folder"),
        ("folder:/", "x", ValueError, "source folder:/ has no use for images=x"),
        ("folder:/?images=x", None, ValueError, "source folder:/.images=x has no use for images=x"),
        ("folder:/?depth=1", None, ValueError, "no option depth; folder has follow_links"),
        ("coco:x?depth=1&images=y", None, ValueError, "no option depth; coco has images, follow_links"),
        ("coco:x?images=", None, ValueError, r"options are written \?name=value&name=value"),
        ("coco:x?images=y&images=z", None, ValueError, "option images is given twice"),
        ("sharegpt4v:x.json", None, ValueError, "needs the folder its image paths start from"),
        ("sharegpt4v:/no.json", "/", FileNotFoundError, "source sharegpt4v:/no.json does not exist"),
    ],
)
def test_wrong_specs_are_told_in_one_line(spec, images, error, message):
    with pytest.raises(error, match=message) as raised:
        open_source(spec, images)
    assert "\n" not in str(raised.value) and "--" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b'[\n {"image" 1}]', "not valid JSON at line 2 column 11", id="not JSON"),
        pytest.param(b'{"a": 1}', "holds an object, not a list", id="not a list"),
        pytest.param(b'["\xff"]', "not UTF-8 at byte 2", id="not UTF-8"),
    ],
)
def test_malformed_json_is_refused_with_its_place(tmp_path, content, message):
    path = tmp_path / "captions.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"captions.json .*{message}"):
        ShareGPT4V(str(path), str(tmp_path))


def test_image_root_must_exist(tmp_path):
    (tmp_path / "captions.json").write_text("[]")
    with pytest.raises(FileNotFoundError, match="images=/nowhere does not exist"):
        ShareGPT4V(str(tmp_path / "captions.json"), "/nowhere")
