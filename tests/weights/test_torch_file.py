"""The reader of .pt files: files of torch, bit for bit, and malicious files."""

import json
import subprocess
import sys
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from hnet.errors import ConfigError
from hnet.weights.tensors import TensorFile
from tests.torch_archives import (
    dictionary,
    number,
    several,
    storage,
    tensor,
    text,
    write_archive,
    write_state_dict,
)

SMALL = np.arange(6, dtype=np.float32).reshape(2, 3)
RECORD = {"version": b"3\n", "data/0": SMALL.tobytes()}


def described(shape=(2, 3), strides=(3, 1), offset=0, size=6, kind="FloatStorage", key="0"):
    return dictionary({"w": tensor(storage(key, kind, size), shape, strides, offset)})


WELL = described()


def test_tensors_are_read_as_they_are_described(tmp_path):
    arrays = {"a": SMALL, "b": np.float64([[1.5]]), "c": SMALL.astype(ml_dtypes.bfloat16)}
    found = TensorFile(write_state_dict(tmp_path / "m.pt", arrays))
    assert found.shapes == {name: array.shape for name, array in arrays.items()}
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and found[name].tobytes() == array.tobytes()
    views = dictionary(
        {
            "row": tensor(storage("0", "FloatStorage", 6), (3,), (1,), 3),
            "transposed": tensor(storage("0", "FloatStorage", 6), (3, 2), (1, 3)),
            "parameter": b"ctorch._utils\n_rebuild_parameter\n"
            + several(tensor(storage("0", "FloatStorage", 6), (6,), (1,)), b"\x88") + b"R",
            "empty": tensor(storage("0", "FloatStorage", 6), (0, 4), (4, 1), 6),
        }
    )  # fmt: skip
    found = TensorFile(write_archive(tmp_path / "views.pt", views, RECORD))
    np.testing.assert_array_equal(found["row"], SMALL[1])
    np.testing.assert_array_equal(found["transposed"], SMALL.T)
    np.testing.assert_array_equal(found["parameter"], SMALL.ravel())
    assert found["empty"].shape == (0, 4)


@pytest.mark.parametrize("protocol", [2, 4])
def test_what_torch_saved_is_what_torch_had(tmp_path, protocol):
    torch = pytest.importorskip("torch", reason="the extra `torch` is missing")
    state = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LSTM(2, 3)).state_dict()
    state |= {"half": torch.ones(2, 3).half(), "t": torch.arange(6.0).reshape(2, 3).T}
    state["parameter"] = torch.nn.Parameter(torch.zeros(2, 1))
    torch.save(state, tmp_path / "m.pt", pickle_protocol=protocol)
    found = TensorFile(tmp_path / "m.pt")
    assert set(found) == set(state)
    for name, values in state.items():
        np.testing.assert_array_equal(found[name], values.detach().numpy(), strict=True)


def test_torch_is_not_needed(tmp_path):
    path = write_state_dict(tmp_path / "m.pt", {"w": SMALL})
    code = "import sys; sys.modules['torch'] = None; from hnet.weights.tensors import TensorFile; "
    code += f"print(TensorFile({str(path)!r})['w'].sum())"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert answer.stdout == "15.0\n", answer.stderr


# Each instruction below would do something if the pickle were run, or gives a wrong description.
PICKLED = {
    "short record": described((2, 4), (4, 1), size=8),
    "short record of a whole file": described((1 << 40,), (1,), size=1 << 40),
    "beyond its storage": described((2, 3), (3, 1), offset=1),
    "strides beyond its storage": described((2, 3), (4, 1)),
    "many times the same number": described((1 << 33,), (0,)),
    "negative stride": described((2, 3), (-3, 1)),
    "negative shape": described((-2, -3), (3, 1)),
    "shape of fewer numbers": described((2, 3), (1,)),
    "missing record": described(key="1"),
    "complex numbers": described(kind="ComplexFloatStorage"),
    "a call": dictionary({"w": b"cposix\nsystem\n" + several(text("touch was-here")) + b"R"}),
    "a call by name": dictionary(
        {"w": text("posix") + text("system") + b"\x93" + several(text("touch was-here")) + b"R"}
    ),
    "a call of what is a text": dictionary({"w": text("system") + several() + b"R"}),
    "an instance": b"(" + text("touch was-here") + b"iposix\nsystem\n",
    "an object": b"(cposix\nsystem\n" + text("touch was-here") + b"o",
    "a new object": b"cposix\nsystem\n" + several(text("x")) + b"\x81",
    "an extension": b"\x82\x01",
    "a name that is no text": b"}" + number(3) + number(4) + b"s",
    "a name that takes for ever": b"}" + text("x") + 60 * b"q\x00h\x00\x86" + number(1) + b"s",
    "no tensor": dictionary({"w": number(3)}),
    "no dictionary": b"]",
    "empty": b"}",
    "nothing": b"",
    "too few on the stack": b"R",
    "a mark that is missing": b"t",
    "an index that is missing": b"h\x07",
    "no storage": dictionary({"w": several(text("storage"), number(1)) + b"Q"}),
    "no end": b"\x8c\xff",
    "numbers without end": b"I" + b"1" * 5000 + b"\n",
}


@pytest.mark.parametrize("kind", PICKLED)
def test_files_that_mean_harm_are_refused(tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_archive(tmp_path / "m.pt", PICKLED[kind], {**RECORD, "data/other": bytes(4096)})
    with pytest.raises(ConfigError, match="cannot be read safely|holds no|plain state dict") as e:
        dict(TensorFile(path))
    assert "\n" not in str(e.value) and len(str(e.value)) < 500
    assert not (tmp_path / "was-here").exists()


def test_archives_that_are_wrong_are_refused(tmp_path):
    def refused(says, pickled=WELL, records=RECORD, **settings):
        path = write_archive(tmp_path / "m.pt", pickled, records, **settings)
        with pytest.raises(ConfigError, match=says):
            dict(TensorFile(path))

    refused("has 24 bytes, its tensor says", compression=8)  # torch stores records as they are
    refused("byte order", records={**RECORD, "byteorder": b"big"})
    refused("larger than", pickled=text("x" * (1 << 22)))
    refused("a tensor without a shape", pickled=described((1,) * 65, (1,) * 65))
    refused("a tensor without a shape", pickled=described((0, 1 << 63), (1, 1)))
    with pytest.warns(UserWarning, match="Duplicate name"):
        refused("no archive that torch.save wrote", records={"data.pkl": b""})
    wide = {**RECORD, "byteorder": bytes(1 << 26)}  # 64 kB in the file
    path = write_archive(tmp_path / "m.pt", WELL, wide, compression=8)
    tracemalloc.start()
    with pytest.raises(ConfigError, match="byte order"):
        TensorFile(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 25
    tracemalloc.stop()
    path = write_archive(tmp_path / "m.pt", described(), RECORD)
    content = path.read_bytes()
    path.write_bytes(content.replace(SMALL.tobytes(), (SMALL + 1).tobytes()))
    with pytest.raises(ConfigError, match="CRC"):
        dict(TensorFile(path))


def test_a_model_is_loaded_from_it(tmp_path):
    from flax import nnx

    from hnet.interop import load, to_official
    from tests.networks import official_network, random_params

    content, arrays = to_official(nnx.merge(*random_params(official_network((32, "t1")))))
    path = write_state_dict(tmp_path / "m.pt", arrays)
    path.with_suffix(".json").write_text(json.dumps(content))
    again = to_official(load(path))[1]
    assert all(again[name].tobytes() == array.tobytes() for name, array in arrays.items())
