"""Recordings for encoding models: arrays, tables, and what is held out together."""

import numpy as np
import pytest
from support.synthetic_brain import write_melody

import soundnet_port as sp
from soundnet_port.learning.encoding import fit_encoding_models
from soundnet_port.learning.encoding_data import Recording, assign_folds, read_array


def test_repeats_and_parts_of_a_run_are_held_out_together(tmp_path):
    targets = np.zeros((4, 1), np.float32)

    def folds(*names, most=10):
        return assign_folds(
            [Recording(tmp_path / "sound.wav", targets, run, stimulus) for run, stimulus in names], most
        )

    assert folds(("1", "a"), ("2", "b"), ("3", "a")) == ([0, 1, 0], ["1, 3", "2"])
    assert folds(("1", "a"), ("1", "b"), ("2", "b"), ("3", "c"))[0] == [0, 0, 0, 1]
    assert folds(*((str(run), str(run)) for run in range(7)), most=3)[0] == [0, 1, 2, 0, 1, 2, 0]


def test_arrays_of_all_types_are_read(tmp_path):
    h5py = pytest.importorskip("h5py", reason="needs the extra [hdf5]")
    expected = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.save(tmp_path / "a.npy", expected.astype(np.int16))
    np.savez(tmp_path / "one.npz", expected)
    np.savez(tmp_path / "two.npz", bold=expected, mask=expected[0])
    np.savetxt(tmp_path / "plain.csv", expected, delimiter=",")
    np.savetxt(tmp_path / "names.tsv", expected, delimiter="\t", header="v1\tv2\tv3", comments="")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["sub/bold"] = expected
    for name in ("a.npy", "one.npz", "two.npz:bold", "plain.csv", "names.tsv", "a.h5:sub/bold", "a.h5"):
        np.testing.assert_array_equal(read_array(tmp_path, name), expected, err_msg=name)
    (tmp_path / "gaps.csv").write_text("roi\n1\nn/a\n3\n")
    assert np.isnan(read_array(tmp_path, "gaps.csv")).tolist() == [[False], [True], [False]]


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("none.npy", "none.npy: No such file or directory"),
        ("bad.npy", "bad.npy: cannot be read as an array"),
        ("two.npz", "two.npz: name one of its arrays: two.npz:a, two.npz:b"),
        ("cube.npy", r"cube.npy: expected numbers as \(time, outputs\), not float64 of shape \(2, 2, 2\)"),
        ("text.npy", "text.npy: expected numbers"),
        ("scan.nii.gz", "scan.nii.gz: unknown type of array; use .npy"),
    ],
)
def test_arrays_that_cannot_be_used_say_why(name, error, tmp_path):
    (tmp_path / "bad.npy").write_bytes(b"nonsense")
    np.savez(tmp_path / "two.npz", a=np.zeros(3), b=np.zeros(3))
    np.save(tmp_path / "cube.npy", np.zeros((2, 2, 2)))
    np.save(tmp_path / "text.npy", np.array(["a"]))
    with pytest.raises(sp.EncodingError, match=error):
        read_array(tmp_path, name)


TABLES = {
    "empty": ("", "no column 'file'"),
    "no table": ("a,b\r\rc\n", "not a table"),
    "no targets": ("file\trun\nx.wav\t1\n", "no column 'targets'"),
    "no rows": ("file\ttargets\n", "no recordings"),
    "no sound": ("file,targets\nnone.wav,t.npy\n", "1 sounds do not exist"),
    "onset": ("file\ttargets\tonset\nx.wav\tt.npy\tsoon\n", "recording 1: onset 'soon' is not a number"),
    "one run": ("file\ttargets\trun\nx.wav\tt.npy\t1\n", "a single run; at least two are needed"),
    "one sound": ("file\ttargets\nx.wav\tt.npy\nx.wav\tt.npy\n", "a single stimulus; at least two"),
    "outputs": ("file\ttargets\nx.wav\tt.npy\ny.wav\tu.npy\n", "4 outputs, where the first recording has 3"),
    "period": (
        "file\ttargets\nx.wav\tlong.npy\ny.wav\tt.npy\n",
        "run 1: 28 of 30 volumes are before or after the sound of 2.0 s; check tr",
    ),
    "silent": ("file\ttargets\nx.wav\tflat.npy\ny.wav\tflat.npy\n", "all outputs are constant or NaN"),
    "edge": ("file\ttargets\nx.wav\tt.npy\ne.wav\tt.npy\n", "e.wav: .* give conv7 edge frames alone"),
    "short": ("file\ttargets\nx.wav\tt.npy\nz.wav\tt.npy\n", "z.wav: .* too short"),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_that_cannot_be_used_say_why(name, model, tmp_path):
    text, error = TABLES[name]
    for sound, seconds in (("x", 2.0), ("y", 2.0), ("z", 0.1), ("e", 0.5)):
        write_melody(tmp_path / f"{sound}.wav", seconds, 0)
    generator = np.random.default_rng(0)
    for array, shape in (("t", (2, 3)), ("u", (2, 4)), ("long", (30, 3))):
        np.save(tmp_path / f"{array}.npy", generator.normal(size=shape))
    np.save(tmp_path / "flat.npy", np.ones((2, 3)))
    (tmp_path / "runs.tsv").write_bytes(text.encode())
    with pytest.raises(sp.EncodingError, match=error):
        fit_encoding_models(model, tmp_path / "runs.tsv", tr=1.0, cache=False)
