"""SoundNetFeatures: scikit-learn's estimator checks, parity with `embed`, pipelines, the cache."""

import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from support.networks import NETS, model_of

pytest.importorskip("sklearn", reason="needs the extra [learn]")

from joblib import parallel_config
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import soundnet_port as sp
from soundnet_port import SoundNetFeatures
from soundnet_port.errors import WaveformScaleWarning
from soundnet_port.interop import scikit_learn
from soundnet_port.learning.datasets import read_labeled
from soundnet_port.learning.protocol_features import PooledFeatures
from soundnet_port.network.weights import WeightsError, write_weights

PITCHES = {"low": 300, "high": 5000}


def write_network(path, name):
    net = NETS[name]
    state = {name: t for name, t in model_of(net).state_dict().items() if "batches" not in name}
    write_weights(path, net.architecture, state, {})
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_network(tmp_path_factory.mktemp("weights") / "small.safetensors", "n8_d8")


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Labeled files of two tones, six of each."""
    folder = tmp_path_factory.mktemp("sounds")
    for label, pitch in PITCHES.items():
        (folder / label).mkdir()
        for take in range(6):
            time = np.arange(11_025 + 100 * take) / 22_050
            samples = np.sin(2 * np.pi * (pitch + 10 * take) * time) / 2
            soundfile.write(folder / label / f"{take}.wav", samples, 22_050)
    return read_labeled(folder)


@pytest.fixture
def paths(sounds):
    return [sound.path for sound in sounds.sounds]


@pytest.fixture
def create(weights, tmp_path):
    """Create SoundNetFeatures with a cache for this test."""
    return lambda **options: SoundNetFeatures(weights, **{"cache": tmp_path / "cache", **options})


# ---- scikit-learn's own checks

# the checks' tables have few columns, and conv1 has a frame for one sample
CHECKED = SoundNetFeatures("demo", "conv1", cache=False)
REASON = "columns are samples: lengths may differ between sounds, and between fit and transform"
EXPECTED_FAILURES = {
    "check_n_features_in": REASON,
    "check_n_features_in_after_fitting": REASON,
    "check_transformer_general": REASON,
}


@pytest.mark.filterwarnings("ignore:all samples are within")
@parametrize_with_checks([CHECKED], expected_failed_checks=lambda _: EXPECTED_FAILURES)
def test_estimator_checks(estimator, check, monkeypatch):
    monkeypatch.delenv("SOUNDNET_WEIGHTS")  # which hides the demonstration network
    check(estimator)


# ---- features


def test_features_equal_embed(create, paths, weights):
    model = sp.load_pretrained(weights)
    for layer, pool in ((None, "mean"), ("conv5", "max"), ("conv4", "mean+std"), (18, "mean")):
        features = create(layer=layer, pool=pool).fit_transform(paths)
        for path, row in zip(paths, features, strict=True):
            assert np.array_equal(row, sp.embed(model, path, layer=layer or "pool5", pool=pool).numpy())


def test_edge_frames_are_left_out_by_default(create, weights):
    model = sp.load_pretrained(weights)
    waves = [100 * np.sin(np.arange(n) / 10) for n in (20_000, 40_000)]
    for layer in ("conv7", 22):
        for edge_frames in (False, True, False):  # again, from the cache
            features = create(layer=layer, edge_frames=edge_frames).fit_transform(waves)
            for wave, row in zip(waves, features, strict=True):
                sound = torch.from_numpy(wave).float()
                expected = sp.embed(model, sound, layer=layer, edge_frames=edge_frames)
                assert np.array_equal(row, expected.numpy())
    with pytest.raises(ValueError, match=r"^sound 0: 9,000 samples \(0.408 s\) give conv7 edge frames alone"):
        create(layer="conv7").fit_transform([np.ones(9_000) * 9])


def test_older_pickles_use_edge_frames(create):
    waves = [100 * np.sin(np.arange(20_000) / 10)]
    features = create(layer="conv7", edge_frames=True).fit(waves)
    loaded = pickle.loads(pickle.dumps(features))
    assert loaded.edge_frames
    state = {name: value for name, value in features.__getstate__().items() if name != "edge_frames"}
    old = SoundNetFeatures.__new__(SoundNetFeatures)
    old.__setstate__(state)
    assert np.array_equal(old.transform(waves), features.transform(waves))


def test_the_default_layer_with_5_layers_is_conv4(tmp_path, paths):
    features = SoundNetFeatures(write_network(tmp_path / "five.safetensors", "n5_d8"), cache=False)
    assert features.fit(paths).layer_ == "conv4"


def test_accepted_forms_of_sounds(create, paths):
    features = create(full_scale=1).fit(paths)
    expected = features.transform(paths)
    waves = [soundfile.read(path, dtype="float32")[0] for path in paths]
    for sounds in (
        [str(path) for path in paths],
        np.array([str(path) for path in paths]),
        np.array([str(path) for path in paths], object)[:, None],
        waves,
        [wave.astype(np.float64) for wave in waves],
        [torch.from_numpy(wave) for wave in waves],
        np.array([*waves, None], object)[:-1],
    ):
        assert np.array_equal(features.transform(sounds), expected)
    table = np.stack([wave[:11_025] for wave in waves])
    for sounds in (table, torch.from_numpy(table), table.tolist()):
        assert np.array_equal(features.transform(sounds), features.transform(list(table)))


def test_full_scale_of_arrays(create, paths):
    expected = create().fit_transform(paths)
    integers = [soundfile.read(path, dtype="int16")[0] for path in paths]
    # the files are 16-bit, so this is exact
    assert np.array_equal(create(full_scale=32_768).fit_transform(integers), expected)
    assert np.array_equal(create().fit_transform([sp.load_audio(path) for path in paths]), expected)


def test_arrays_at_another_scale_are_detected(create):
    loud = np.sin(np.arange(10_000))[None].astype(np.float32)
    with pytest.raises(ValueError, match="sound 0 goes up to 32767; full_scale is 256"):
        create().fit(32_767 * np.sign(loud))
    with pytest.raises(ValueError, match=r"sound 0 goes up to 255\.9.*; full_scale is 1"):
        create(full_scale=1).fit(256 * loud)
    message = r"no sample is beyond \+-1 with full_scale 256: nearly silence; use full_scale=1"
    with pytest.warns(WaveformScaleWarning, match=message):
        create().fit(np.tile(loud, 3))
    create().fit(loud)  # less than a second may be silence before a sound
    features = create()
    with pytest.warns(WaveformScaleWarning) as caught:
        features.fit_transform(np.tile(loud, 5))  # by fit and by transform, not by the network again
    assert [warning.filename for warning in caught] == [__file__] * 2  # a line, so Python shows one


def test_feature_names(create, paths):
    features = create(layer="pool5", pool="mean+std").fit(paths)
    names = features.get_feature_names_out()
    assert len(names) == len(set(names)) == features.transform(paths[:1]).shape[1]
    assert (names[0], names[-1]) == ("pool5_mean_0", f"pool5_std_{len(names) // 2 - 1}")
    assert create(layer=22).fit(paths).get_feature_names_out()[0] == "module22_mean_0"


# ---- in pipelines


def test_a_grid_search_computes_each_sound_once_per_layer(create, sounds, paths, monkeypatch):
    computed = []
    compute = PooledFeatures._compute
    monkeypatch.setattr(
        PooledFeatures, "_compute", lambda self, sound: computed.append(sound) or compute(self, sound)
    )
    pipeline = make_pipeline(create(), StandardScaler(), LogisticRegression())
    search = GridSearchCV(
        pipeline,
        {"soundnetfeatures__layer": ["pool2", "pool5"], "logisticregression__C": [0.1, 1]},
        cv=3,
        error_score="raise",
    )
    search.fit(paths, sounds.targets)
    assert search.best_score_ == 1  # tones of 300 and 5,000 Hz
    assert list(search.predict(paths)) == list(sounds.targets)
    assert len(computed) == 2 * len(paths)


def test_a_pickled_pipeline_is_small_and_equivalent(create, sounds, paths):
    pipeline = make_pipeline(create(), StandardScaler(), LogisticRegression()).fit(paths, sounds.targets)
    pickled = pickle.dumps(pipeline)
    assert len(pickled) < 10_000  # no network
    assert np.array_equal(pickle.loads(pickled).decision_function(paths), pipeline.decision_function(paths))


def test_changed_weights_are_detected(tmp_path, paths):
    path = write_network(tmp_path / "mine.safetensors", "n8_d8")
    features = SoundNetFeatures(path, cache=False).fit(paths)
    features.transform(paths[:1])
    write_network(path, "n8_d16")
    with pytest.raises(ValueError, match="not the weights that this was fitted with"):
        features.transform(paths[:1])
    clone(features).fit(paths).transform(paths[:1])


def test_results_do_not_depend_on_the_number_of_jobs(create, paths, threads):
    threads(1)  # with more, sums may be in another order
    expected = create().fit_transform(paths)
    with parallel_config(backend="threading"):  # processes take seconds to start
        assert np.array_equal(create(n_jobs=2, cache=False).fit_transform(paths), expected)


# ---- the cache


def test_the_cache_is_keyed_by_the_content_of_sounds(create, paths, tmp_path, monkeypatch):
    first = create().fit_transform(paths)
    monkeypatch.setattr(PooledFeatures, "_compute", lambda *_: pytest.fail("computed again"))
    renamed = [shutil.copy(path, tmp_path / f"{number}.wav") for number, path in enumerate(paths)]
    assert np.array_equal(create().fit_transform(renamed), first)
    assert np.array_equal(create(pool="mean").fit_transform(renamed[::-1]), first[::-1])
    with pytest.raises(BaseException, match="computed again"):
        create(pool="max").fit_transform(renamed)


def test_arrays_are_cached(create, monkeypatch):
    waves = [100 * np.sin(np.arange(n)) for n in (5_000, 6_000)]
    first = create().fit_transform(waves)
    monkeypatch.setattr(PooledFeatures, "_compute", lambda *_: pytest.fail("computed again"))
    assert np.array_equal(create().fit_transform(waves), first)


def test_a_failing_cache_is_a_warning(create, paths, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.warns(UserWarning, match="features are not cached: .*taken"):
        features = create(cache=tmp_path / "taken").fit_transform(paths)
    assert np.array_equal(features, create(cache=False).fit_transform(paths))


# ---- errors


@pytest.mark.parametrize(
    ("sounds", "message"),
    [
        ("dog.wav", r"must be a list of paths, such as \['dog.wav'\]"),
        ([], "no sounds"),
        (["dog.wav", np.zeros(9_000)], "sound 0 is a str of shape"),
        ([np.zeros((2, 9_000))], r"sound 0 is a ndarray of shape \(2, 9000\)"),
        ([np.zeros(9_000), np.zeros(0)], r"sound 1 is a ndarray of shape \(0,\)"),
        ([np.zeros(9_000), np.full(9_000, np.nan)], "sound 1 holds NaN or infinity"),
        (np.full((2, 9_000), np.inf), "contains infinity"),
        (np.zeros(9_000), r"(?s)Expected 2D array, got 1D array instead.*a single sample"),
    ],
)
def test_invalid_sounds_raise_an_error(create, sounds, message):
    with pytest.raises(ValueError, match=message):
        create().fit(sounds)


def test_errors_name_the_sound(create, paths, tmp_path):
    features = create().fit(paths)
    (tmp_path / "notes.txt").write_text("no sound")
    soundfile.write(tmp_path / "short.wav", np.ones(100) / 2, 22_050)
    for name, reason in (
        ("missing.wav", "No such file or directory"),
        ("notes.txt", "cannot be decoded"),
        ("short.wav", r"100 samples \(0.005 s\) are too short: pool5"),
    ):
        for transformer in (features, create(cache=False).fit(paths)):
            with pytest.raises(ValueError, match=f"^{tmp_path / name}: {reason}"):
                transformer.transform([*paths, tmp_path / name])
    with pytest.raises(ValueError, match=r"^sound 1: 100 samples \(0.005 s\) are too short"):
        features.transform([np.ones(9_000), np.ones(100) * 9])


def test_errors_list_the_choices(create, paths):
    with pytest.raises(ValueError, match="unknown pooling 'sum'; choose from mean, max"):
        create(pool="sum").fit(paths)
    with pytest.raises(ValueError, match="no layer 'conv9'; choose from conv1"):
        create(layer="conv9").fit(paths)
    with pytest.raises(WeightsError, match="no weights named 'nothing'"):
        SoundNetFeatures("nothing").fit(paths)


def test_a_missing_extra_is_named():
    code = "import sys; sys.modules['sklearn'] = None\nimport soundnet_port as sp; sp.SoundNetFeatures"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.stderr.endswith("scikit-learn is not installed: pip install 'soundnet-port[learn]'\n")


def test_the_network_is_cached(create, paths, monkeypatch):
    features = create().fit(paths)
    monkeypatch.setattr(scikit_learn, "read_weights", lambda path: pytest.fail("read again"))
    clone(features).fit(paths).transform(paths)
