"""Model files that are damaged, or a stranger's: one line that names the file and the field."""

import dataclasses
import json
import os
import re
import shutil
import zipfile

import numpy as np
import pytest
import safetensors.numpy
import torch
from etils import epath

import clipmoe_jax
from clipmoe_jax.convert import convert
from clipmoe_jax.core import checks, trees
from clipmoe_jax.interop import huggingface, openclip, released, tensor_files
from clipmoe_jax.interop.load import read_model
from clipmoe_jax.models.clip import ClipConfig, TextConfig, VisionConfig, abstract_params
from clipmoe_jax.models.model_folder import save_model
from clipmoe_jax.models.transformer import MoeConfig

DENSE = ClipConfig(
    embed_dim=8,
    vision=VisionConfig(image_size=8, patch_size=4, width=64, num_layers=1),
    text=TextConfig(vocab_size=20, context_length=77, width=64, num_layers=1),
)
MOE = dataclasses.replace(DENSE, moe=MoeConfig(4, 2))


def zeros(config):
    return trees.unflatten(
        {
            name: np.zeros(leaf.shape, np.float32)
            for name, leaf in trees.flatten(abstract_params(config)).items()
        }
    )


def write_config(path, content):
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same architecture in each format, as a folder."""
    root = tmp_path_factory.mktemp("models")
    write_config(root / "huggingface" / "config.json", huggingface.export_config(MOE, "float32"))
    tensor_files.write_safetensors(
        epath.Path(root / "huggingface"), huggingface.export_state_dict(zeros(MOE))
    )
    write_config(root / "openclip" / openclip.CONFIG_FILE, openclip.export_config(DENSE))
    tensor_files.write_safetensors(
        epath.Path(root / "openclip"), released.export_state_dict(zeros(DENSE)), openclip.WEIGHTS_STEM
    )
    write_config(root / "released" / "clipmoe.json", {"num_selected_experts": 2, "activation": "gelu"})
    tensor_files.write_torch(
        epath.Path(root / "released" / "model.pt"), released.export_state_dict(zeros(MOE))
    )
    save_model(epath.Path(root / "run"), MOE, zeros(MOE))
    return root


def copied(folders, tmp_path, kind):
    return shutil.copytree(folders / kind, tmp_path / kind)


FILES = {
    "huggingface": "config.json",
    "openclip": openclip.CONFIG_FILE,
    "released": "clipmoe.json",
    "run": "model.json",
}


@pytest.mark.parametrize("kind", FILES)
def test_honest_twin_is_read(folders, kind):
    found = read_model(str(folders / kind))
    assert found.config.vision == DENSE.vision and len(trees.flatten(found.params)) > 20


# Format, dotted field, its value; None takes it out.
SIZES = [
    *[("huggingface", "vision_config.num_hidden_layers", v) for v in (10**6, 0, -1, 1.0, "1", [1], None, {})],
    *[("huggingface", "text_config.hidden_size", v) for v in (True, float("nan"), 10**30, "x" * 10**6)],
    ("huggingface", "vision_config.num_attention_heads", 0),
    ("huggingface", "vision_config.num_attention_heads", 3),
    ("huggingface", "vision_config.image_size", 10**9),
    ("huggingface", "vision_config.patch_size", "4"),
    ("huggingface", "vision_config.layer_norm_eps", float("nan")),
    ("huggingface", "text_config.layer_norm_eps", "small"),
    ("huggingface", "text_config.eos_token_id", "end"),
    ("huggingface", "vision_config.num_experts", "4"),
    ("huggingface", "vision_config.num_experts_per_tok", 2.0),
    ("huggingface", "projection_dim", -8),
    ("huggingface", "vision_config", [1]),
    ("huggingface", "text_config", "x"),
    *[("openclip", "model_cfg.vision_cfg.layers", v) for v in (10**6, "1", 0, 1.5, None)],
    ("openclip", "model_cfg.vision_cfg.image_size", [[8]]),
    ("openclip", "model_cfg.vision_cfg.patch_size", float("inf")),
    ("openclip", "model_cfg.vision_cfg.mlp_ratio", float("inf")),
    ("openclip", "model_cfg.text_cfg.heads", 0),
    ("openclip", "model_cfg.text_cfg.heads", 3),
    ("openclip", "model_cfg.text_cfg.vocab_size", -1),
    ("openclip", "model_cfg.text_cfg.norm_kwargs", [1]),
    ("openclip", "model_cfg.embed_dim", "8"),
    ("openclip", "model_cfg.text_cfg", "x"),
    ("openclip", "model_cfg", [1]),
    ("openclip", "preprocess_cfg", [1]),
    ("released", "num_selected_experts", [2]),
    ("released", "activation", ["gelu"]),
    *[("run", "vision.num_layers", v) for v in (10**6, "1", 1.0, None, True)],
    ("run", "text.width", {}),
    ("run", "moe.num_experts", 10**9),
    ("run", "moe.num_selected_experts", "2"),
    ("run", "moe.num_moe_layers", 0.5),
    ("run", "moe.sequence_share", float("nan")),
    ("run", "activation", {}),
    ("run", "layer_norm_eps", "small"),
    ("run", "embed_dim", None),
    ("run", "vision", [1]),
    ("run", "moe", 4),
]


@pytest.mark.parametrize(("kind", "field", "value"), SIZES, ids=lambda value: str(value)[:40])
def test_odd_field_is_named_with_its_file(folders, tmp_path, kind, field, value):
    folder = copied(folders, tmp_path, kind)
    file = folder / FILES[kind]
    content = json.loads(file.read_text())
    *sections, last = field.split(".")
    inner = content
    for section in sections:
        inner = inner[section]
    inner[last] = value
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(file))}: [^\n]*{last}") as error:
        read_model(str(folder))
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_unknown_and_missing_fields_of_model_json_are_named(folders, tmp_path):
    file = copied(folders, tmp_path, "run") / "model.json"
    content = json.loads(file.read_text())
    for changed, message in (
        (content | {"twist": 1}, "the architecture has unknown fields: 'twist'"),
        (content | {"text": {"twist": 1}}, "text has unknown fields: 'twist'"),
        ({"vision": content["vision"]}, "the architecture has no field text"),
    ):
        file.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=f"^{file}: {message}$"):
            read_model(str(file.parent))


EXPERTS = {
    "one that is not stored": [0, 1, 1, 5],
    "a gap": [0, 0, 2, 2],
    "too few": [0, 1],
    "a string": [0, 0, "1", 1],
    "a list": [0, 0, [1], 1],
}


@pytest.mark.parametrize("stored", EXPERTS.values(), ids=EXPERTS)
def test_damaged_experts_json_is_named(folders, tmp_path, stored):
    """An index that is out of range would be clamped in silence."""
    file = copied(folders, tmp_path, "run") / "experts.json"
    file.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=f"^{file}: "):
        read_model(str(file.parent))


WIDE = dataclasses.replace(  # 1.6 million params
    DENSE,
    vision=dataclasses.replace(DENSE.vision, width=256),
    text=dataclasses.replace(DENSE.text, width=256),
)


def test_zeros_that_expand_far_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "EXPANDED", 2**20)
    save_model(epath.Path(tmp_path / "zeros"), WIDE, zeros(WIDE))
    with pytest.raises(ValueError, match=r"zeros/params: its [\d,]+ bytes expand to 6,\d+,\d+ bytes, more"):
        read_model(str(tmp_path / "zeros"))


def test_holes_of_files_do_not_count_as_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "EXPANDED", 2**20)
    save_model(epath.Path(tmp_path / "zeros"), WIDE, zeros(WIDE))
    (tmp_path / "zeros" / "params" / "pad").touch()
    os.truncate(tmp_path / "zeros" / "params" / "pad", checks.SPARSE)
    with pytest.raises(ValueError, match=r"zeros/params: its [\d,]+ bytes expand to 6,\d+,\d+ bytes, more"):
        read_model(str(tmp_path / "zeros"))


@pytest.mark.parametrize("kind", ["run", "released", "huggingface"])
def test_large_files_of_holes_are_not_read(folders, tmp_path, kind):
    folder = copied(folders, tmp_path, kind)
    weights = max((f for f in folder.rglob("*") if f.is_file()), key=lambda file: file.stat().st_size)
    os.truncate(weights, 2**26)
    with pytest.raises(ValueError, match=rf"{weights} has 67,108,864 bytes and only [\d,]+ of them on"):
        read_model(str(folder))


@pytest.mark.parametrize("kind", ["a link", "a pipe or a device"])
def test_params_are_plain_files(folders, tmp_path, kind):
    folder = copied(folders, tmp_path, "run")
    file = folder / "params" / "_METADATA"
    if kind == "a link":
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    else:
        os.mkfifo(folder / "params" / "pipe")
    with pytest.raises(ValueError, match=rf"run/params/.* is {kind}: "):
        read_model(str(folder))


def test_one_tensor_under_many_names_is_not_read_as_many(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "EXPANDED", 2**20)
    deep = dataclasses.replace(DENSE, vision=dataclasses.replace(DENSE.vision, num_layers=200))
    state = {n: torch.from_numpy(array) for n, array in released.export_state_dict(zeros(deep)).items()}
    largest = torch.zeros(max(tensor.numel() for tensor in state.values()))
    torch.save({n: largest[: t.numel()].view(t.shape) for n, t in state.items()}, tmp_path / "one.pt")
    with pytest.raises(ValueError, match=r"one.pt: its [\d,]+ bytes expand to"):
        read_model(str(tmp_path / "one.pt"))


def test_files_beside_the_one_that_is_read_do_not_count_as_its_bytes(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "EXPANDED", 2**20)
    deep = dataclasses.replace(DENSE, vision=dataclasses.replace(DENSE.vision, num_layers=200))
    write_config(tmp_path / "deep" / "config.json", huggingface.export_config(deep, "float32"))
    state = {n: torch.from_numpy(a) for n, a in huggingface.export_state_dict(zeros(deep)).items()}
    largest = torch.zeros(max(tensor.numel() for tensor in state.values()))
    one = {name: largest[: tensor.numel()].view(tensor.shape) for name, tensor in state.items()}
    torch.save(one, tmp_path / "deep" / "pytorch_model.bin")
    (tmp_path / "deep" / "other.safetensors").write_bytes(os.urandom(2**23))
    with pytest.raises(ValueError, match=r"deep: its [\d,]+ bytes expand to"):
        read_model(str(tmp_path / "deep"))


def with_tensor(folders, tmp_path, name, tensor):
    """The released model's state dict, one of its tensors another."""
    state = torch.load(folders / "released" / "model.pt", weights_only=True)
    torch.save(state | {name: tensor}, tmp_path / "odd.pt")
    return str(tmp_path / "odd.pt")


PROJ = torch.zeros(64, 8)
TENSORS = {
    "sparse": PROJ.to_sparse(),
    "eight bits": PROJ.to(torch.float8_e4m3fn),
    "complex": PROJ.to(torch.complex64),
    "without data": PROJ.to("meta"),
    "one number for all": torch.zeros(1).expand(64, 8),
}


@pytest.mark.parametrize("tensor", TENSORS.values(), ids=TENSORS)
def test_tensor_that_is_no_plain_array_is_named(folders, tmp_path, tensor):
    path = with_tensor(folders, tmp_path, "visual.proj", tensor)
    with pytest.raises(ValueError, match=f"^{path}: visual.proj is not a tensor that a CLIP's") as error:
        read_model(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(), (64,), (64, 8, 1), (0, 8)], ids=str)
@pytest.mark.parametrize(
    "name", ["visual.proj", "visual.positional_embedding", "transformer.resblocks.0.gate.weight"]
)
def test_tensor_with_other_axes_is_named(folders, tmp_path, name, shape):
    path = with_tensor(folders, tmp_path, name, torch.zeros(shape))
    with pytest.raises(ValueError, match=rf"^{path}: {name} has the shape {re.escape(str(shape))}"):
        read_model(path)


def test_positions_in_two_tables_of_two_shapes_are_refused(folders, tmp_path):
    path = with_tensor(folders, tmp_path, "positional_embedding_res", torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"positional_embedding_res has the shape \(3, 2\)"):
        read_model(path)


def test_dicts_that_contain_themselves_are_refused(tmp_path):
    state = {}
    state["self"] = state
    torch.save(state, tmp_path / "self.pt")
    with pytest.raises(ValueError, match="self.pt is not a state dict: its dicts are nested without end"):
        read_model(str(tmp_path / "self.pt"))


def test_dicts_that_share_others_are_refused(tmp_path):
    state = {"x": torch.zeros(2)}
    for _ in range(30):
        state = {"a": state, "b": state}
    torch.save(state, tmp_path / "shared.pt")
    with pytest.raises(ValueError, match="shared.pt is not a state dict: its .* more than 200,000 names"):
        read_model(str(tmp_path / "shared.pt"))


def test_what_has_no_short_text_for_a_name_is_no_tensor_of_a_model(tmp_path):
    state = {"x": torch.zeros(2), 3: torch.zeros(2), ("a", 1): torch.zeros(2), "k" * 1001: torch.zeros(2)}
    torch.save(state, tmp_path / "odd.pt")
    assert list(tensor_files.open_tensors(epath.Path(tmp_path / "odd.pt"))) == ["x"]


@pytest.mark.parametrize("old", [False, True], ids=["archive", "of before PyTorch 1.6"])
def test_tuples_that_share_others_are_refused(tmp_path, old):
    pair = ()
    for _ in range(20):  # 40 take years
        pair = (pair, pair)
    path = tmp_path / "shared.pt"
    torch.save({"x": torch.zeros(2), "y": pair}, path, _use_new_zipfile_serialization=not old)
    with pytest.raises(ValueError, match="shared.pt cannot be read .*: it holds more than tensors"):
        tensor_files.open_tensors(epath.Path(path))


def test_files_of_before_pytorch_1_6_are_read(folders, tmp_path):
    state = torch.load(folders / "released" / "model.pt", weights_only=True)
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    found = tensor_files.open_tensors(epath.Path(tmp_path / "old.pt"))
    assert {name: tensor.shape for name, tensor in found.items()} == {n: t.shape for n, t in state.items()}


def test_pickle_with_flipped_bytes_is_one_line(folders, tmp_path):
    """PyTorch raises UnicodeDecodeError, KeyError, AttributeError, … then."""
    content = (folders / "released" / "model.pt").read_bytes()
    begin, rng, raised = content.index(b"data.pkl"), np.random.default_rng(0), 0
    for _ in range(60):
        damaged = bytearray(content)
        damaged[begin + rng.integers(10, 3000)] = rng.integers(256)
        (tmp_path / "damaged.pt").write_bytes(damaged)
        try:
            tensor_files.open_tensors(epath.Path(tmp_path / "damaged.pt"))
        except ValueError as error:
            raised += 1
            assert str(error).startswith(f"{tmp_path}/damaged.pt ") and "\n" not in str(error)
    assert raised > 20


def test_an_index_without_a_map_is_named(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": [1]}))
    with pytest.raises(ValueError, match=f"^{index}: weight_map"):
        tensor_files.open_sharded(epath.Path(index))


def text(value):
    """The code of a text in a pickle."""
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def numbers(values):
    """The codes of whole numbers, each None's key."""
    return b"".join(b"\x8a\x0a" + value.to_bytes(10, "little", signed=True) + b"N" for value in values)


PICKLES = {
    "a slow encoding": b"c_codecs\nencode\n" + text("一丁" * 50) + text("punycode") + b"\x86R",
    "a text encoded often": b"("
    + text("a" * 10_000)
    + b"q\x00"
    + (b"c_codecs\nencode\nh\x00" + text("latin1") + b"\x86R") * 2000
    + b"t",
    "bytes of a number": b"cbuiltins\nbytearray\nK\x09\x85R",
    "bytes of a number, as Python 2 has them": b"c__builtin__\nbytearray\nK\x09\x85R",
    "a tensor by its size": b"ctorch\nFloatTensor\nK\x09\x85R",
    "a storage by its size": b"ctorch\nFloatStorage\nK\x09\x85R",
    "keys of one hash": b"}(" + numbers(k * (2**61 - 1) for k in range(1, 12_000)) + b"u",
    "a set of numbers": b"c__builtin__\nset\n](" + b"".join(b"M\x01\x02" for _ in range(12_000)) + b"e\x85R",
    "a long tuple as a key": b"}(" + b"K\x01" * 11 + b"tNs",
}


@pytest.mark.parametrize("content", PICKLES.values(), ids=PICKLES)
def test_pickles_that_do_what_no_state_dict_does_are_refused(tmp_path, content):
    torch.save({"x": torch.zeros(2)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    pickled = parts["x/data.pkl"]
    assert pickled[:3] == b"\x80\x02}" and pickled[-2:] == b"s."
    parts["x/data.pkl"] = pickled[:-1] + text("y") + content + b"s."
    with zipfile.ZipFile(tmp_path / "odd.pt", "w") as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    with pytest.raises(
        ValueError, match="odd.pt cannot be read .*: it holds more than tensors, or is damaged"
    ):
        tensor_files.open_tensors(epath.Path(tmp_path / "odd.pt"))


def test_what_training_saves_beside_a_model_is_no_obstacle(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 2)).sum().backward()
    optimizer.step()
    beside = {
        "optimizer": optimizer.state_dict(),
        "scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5]).state_dict(),
        "random": torch.get_rng_state(),
        "others": [torch.Size([2]), torch.float16, torch.device("cpu"), {1, 2}, b"\xff", 1j],
        "parameter": torch.nn.Parameter(torch.zeros(2)),
    }
    torch.save({"model": model.state_dict(), **beside}, tmp_path / "all.pt")
    assert {"model.weight", "parameter"} < set(tensor_files.open_tensors(epath.Path(tmp_path / "all.pt")))


@pytest.mark.parametrize("read", [clipmoe_jax.load, lambda path: convert(path, "openclip", f"{path}.new")])
def test_names_in_a_file_reach_no_program_as_they_are(tmp_path, read):
    """A traceback or a notebook prints them as they are, a million characters of them too."""
    tensors = {"visual.\x1b[2J" + 10**6 * "k": np.zeros(1, np.float32)}
    safetensors.numpy.save_file(tensors, tmp_path / "x\x1b[2J.safetensors")
    with pytest.raises(ValueError) as raised:
        read(str(tmp_path / "x\x1b[2J.safetensors"))
    assert len(str(raised.value)) < 5000 and "\x1b" not in str(raised.value)
