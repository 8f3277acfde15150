"""The command prepare: its flags, what it says, and its errors."""

import os
import subprocess
import sys

import pytest
from PIL import Image

from clipmoe_jax.data.preparation import prepare
from clipmoe_jax.data.records import Records
from clipmoe_jax.data.sources import open_source


@pytest.fixture
def pairs(tmp_path):
    """A folder of six images with two captions each."""
    (tmp_path / "pairs").mkdir()
    for i in range(6):
        Image.new("RGB", (9, 8), (i, 0, 0)).save(tmp_path / "pairs" / f"{i:02}.png")
        (tmp_path / "pairs" / f"{i:02}.txt").write_text(f"caption {i}\nsecond caption {i} é\n")
    return tmp_path / "pairs"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "nested" / "out"


def run_command(*arguments):
    command = [sys.executable, "-m", "clipmoe_jax.prepare", *arguments]
    # As on a login node: there are no such devices, and none are needed.
    environment = os.environ | {"JAX_PLATFORMS": "cuda"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_corrected_table_is_prepared_from_the_start(out, tmp_path):
    for i in range(4):
        Image.new("RGB", (9, 8)).save(tmp_path / f"{i}.png")
    table = tmp_path / "x.csv"

    def run(names, caption):
        table.write_text("image,caption\n" + "".join(f"{name}.png,{caption}\n" for name in names))
        return run_command(f"--source=csv:{table}", f"--images={tmp_path}", f"--out={out}", "--num_shards=2")

    failed = run([0, 1, 2, "none"], "wrong")
    assert failed.returncode == 1 and failed.stderr.endswith("or raise --max_bad_fraction\n")
    assert len(list(out.with_name("out.unfinished").rglob("*.done.json"))) == 2
    done = run([0, 1, 2, 3], "right")
    assert done.returncode == 0, done.stderr
    assert [Records(str(out))[i]["captions"] for i in range(4)] == 4 * [["right"]]


def test_command_says_what_it_made(pairs, out):
    done = run_command(f"--source=folder:{pairs}", f"--out={out}", "--split=val")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith(f"{out}: 6 pairs with 12 captions")
    assert len(Records(str(out), "val")) == 6


def test_parts_at_once_and_merged_are_one_data_set(pairs, out, tmp_path):
    arguments = [f"--source=folder:{pairs}", "--num_shards=3"]
    command = [sys.executable, "-m", "clipmoe_jax.prepare", *arguments, f"--out={out}"]
    running = [subprocess.Popen([*command, f"--part={k}/2"], stdout=subprocess.PIPE) for k in range(2)]
    told = [process.communicate()[0].decode() for process in running]
    assert told[0].startswith(f"{out}.parts/00000-of-00002: 2 pairs with 4 captions, ")
    assert told[1].endswith(
        f"When all 2 parts are there: python -m clipmoe_jax.prepare --merge --out={out}\n"
    )
    merged = run_command("--merge", f"--out={out}")
    assert merged.returncode == 0 and merged.stdout.startswith(f"{out}: 6 pairs with 12 captions")
    prepare(open_source(f"folder:{pairs}"), f"{tmp_path}/whole", num_shards=3)
    assert Records(str(out)).fingerprint == Records(f"{tmp_path}/whole").fingerprint


def test_several_sources_become_one_data_set(pairs, out):
    flag = f"--source=folder:{pairs}"
    done = run_command(flag, flag, "--source=digit_scenes:test?pairs=1", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert [Records(str(out))[i]["id"] for i in (0, 6, 12)] == ["0/00.png", "1/00.png", "2/000000"]


def test_links_are_read_where_the_flag_says_so(pairs, out, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "linked").symlink_to(pairs)
    arguments = f"--source=folder:{tmp_path / 'own'}", f"--out={out}"
    refused = run_command(*arguments)
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1
    assert "(--follow_links of prepare)" in refused.stderr
    assert run_command(*arguments, "--follow_links").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source=folder:/nowhere", "--out=x"], "source folder:/nowhere does not exist"),
        (["--source=folder:/", "--out=x", "--num_shard=2"], "Did you mean: num_shards"),
        (["--out=x"], "--source is missing: KIND:PATH, or --merge where all parts are prepared"),
        (["--merge", "--out=x", "--pixels=8", "--part=0/2"], "--merge has no use for --part, --pixels: its"),
    ],
)
def test_command_errors_are_one_line(arguments, message):
    done = run_command(*arguments)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr
