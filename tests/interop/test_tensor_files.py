"""Files of named tensors, apart from any model."""

import json
import os
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from clipmoe_jax.core.json_files import read_json
from clipmoe_jax.interop import tensor_files

ARRAYS = {
    "matrix": np.arange(12, dtype=np.float32).reshape(3, 4),
    "half": np.arange(6, dtype=np.float32).reshape(2, 3).astype(ml_dtypes.bfloat16),
    "scalar": np.array(4.6, np.float16),
    "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
}


def assert_holds(tensors, arrays):
    assert {name: tensor.shape for name, tensor in tensors.items()} == {n: a.shape for n, a in arrays.items()}
    for name, tensor in tensors.items():
        array = tensor.read()
        assert array.dtype == arrays[name].dtype
        np.testing.assert_array_equal(array, arrays[name], err_msg=name)


@pytest.mark.parametrize("write", ["write_safetensors", "write_torch"])
def test_written_tensors_come_back_with_shape_dtype_and_values(tmp_path, write):
    """bfloat16 and scalars included, whatever their layout in memory."""
    if write == "write_safetensors":
        tensor_files.write_safetensors(tmp_path, dict(ARRAYS))
    else:
        tensor_files.write_torch(tmp_path / "model.safetensors", ARRAYS)
    assert_holds(tensor_files.open_tensors(epath.Path(tmp_path / "model.safetensors")), ARRAYS)


def test_safetensors_in_a_bucket_are_read_from_a_local_copy(tmp_path, monkeypatch):
    """Which is deleted before the first tensor is read."""
    monkeypatch.setattr(tensor_files, "in_bucket", lambda path: True)
    monkeypatch.setattr(tensor_files.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    tensor_files.write_safetensors(tmp_path, dict(ARRAYS))
    tensors = tensor_files.open_tensors(epath.Path(tmp_path / "model.safetensors"))
    assert not list((tmp_path / "temporary").iterdir())
    assert_holds(tensors, ARRAYS)


def test_dtype_of_no_parameter_is_refused_by_name(tmp_path):
    safetensors.numpy.save_file({"bytes": np.zeros(2, np.uint8)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="bytes has dtype U8, which no CLIP's parameters have"):
        tensor_files.open_tensors(epath.Path(tmp_path / "model.safetensors"))


def test_shards_are_filled_in_order_and_a_large_tensor_is_alone(tmp_path):
    arrays = {
        name: np.zeros(size, np.uint8).view(bool)
        for name, size in zip("abcd", (40, 40, 300, 40), strict=True)
    }
    tensor_files.write_safetensors(tmp_path, arrays, shard_bytes=100)
    assert not arrays  # taken out as they were written
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = {name: int(file[6:11]) for name, file in index["weight_map"].items()}
    assert shards["a"] == shards["b"] != shards["c"] and shards["c"] != shards["d"]
    assert index["metadata"] == {"total_size": 420}
    assert set(tensor_files.open_sharded(epath.Path(tmp_path / "model.safetensors.index.json"))) == set(
        "abcd"
    )


def test_a_flipped_bit_of_a_pytorch_file_is_told(tmp_path):
    """PyTorch reads past the checksums of its own files."""
    path = epath.Path(tmp_path / "model.pt")
    weights = np.arange(64, dtype=np.float32)
    tensor_files.write_torch(path, {"visual.proj": weights})
    content = bytearray(path.read_bytes())
    content[content.index(weights.tobytes()) + 33] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match="model.pt is damaged .model/data/0 has another checksum.: fetch it"):
        tensor_files.open_tensors(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_a_compressed_pytorch_file_is_refused_before_it_is_expanded(tmp_path, compression):
    path = epath.Path(tmp_path / "model.pt")
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("model/data.pkl", bytes(1 << 20))
    with pytest.raises(ValueError, match="model.pt is damaged .parts are compressed or overlap"):
        tensor_files.open_tensors(path)


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "..", "", "sub/x.safetensors", 7, None, ["x"]]
)
def test_an_index_names_files_of_its_own_folder(tmp_path, name):
    index = epath.Path(tmp_path / "model.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match="index.json names the file .* which is none of its folder"):
        tensor_files.open_sharded(index)


def test_shards_may_be_links_as_in_caches_of_downloads(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots" / "1").mkdir(parents=True)
    tensor_files.write_safetensors(tmp_path / "blobs", dict(ARRAYS), shard_bytes=30)
    files = [*(tmp_path / "blobs").iterdir()]
    assert len(files) > 2
    for file in files:
        (tmp_path / "snapshots" / "1" / file.name).symlink_to(f"../../blobs/{file.name}")
    index = epath.Path(tmp_path / "snapshots" / "1" / "model.safetensors.index.json")
    assert_holds(tensor_files.open_sharded(index), ARRAYS)


@pytest.mark.parametrize("read", [tensor_files.open_tensors, read_json])
def test_pipes_and_devices_are_not_read(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    for name in ("pipe", "zeros"):
        with pytest.raises(ValueError, match=f"{name} is not a plain file"):
            read(epath.Path(tmp_path / name))
