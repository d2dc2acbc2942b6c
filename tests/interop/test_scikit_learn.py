"""SoundNetFeatures: what scikit-learn expects of a transformer, and what the product does of a feature."""

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
from soundnet_port.interop import scikit_learn
from soundnet_port.learning import evaluation
from soundnet_port.learning.datasets import read_labeled
from soundnet_port.network.weights import WeightsError, write_weights

PITCHES = {"low": 300, "high": 5000}


def write_net(path, name):
    net = NETS[name]
    state = {name: t for name, t in model_of(net).state_dict().items() if "batches" not in name}
    write_weights(path, net.architecture, state, {})
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_net(tmp_path_factory.mktemp("weights") / "small.safetensors", "n8_d8")


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Files of two tones, six of each, and their labels."""
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
def make(weights, tmp_path):
    """SoundNetFeatures with a cache of its own."""
    return lambda **options: SoundNetFeatures(weights, **{"cache": tmp_path / "cache", **options})


# ---- scikit-learn's own checks

# conv1 has a frame for one sample, and the checks' tables have few columns
CHECKED = SoundNetFeatures("demo", "conv1", cache=False)
SAY_NOTHING = "columns are samples: sounds may have any lengths, and others in transform than in fit"
NOT_FOR_SOUNDS = {
    "check_n_features_in": SAY_NOTHING,
    "check_n_features_in_after_fitting": SAY_NOTHING,
    "check_transformer_general": SAY_NOTHING,
}


@pytest.mark.filterwarnings("ignore:all samples are within")
@parametrize_with_checks([CHECKED], expected_failed_checks=lambda _: NOT_FOR_SOUNDS)
def test_scikit_learn_accepts_it(estimator, check, monkeypatch):
    monkeypatch.delenv("SOUNDNET_WEIGHTS")  # so that it can be found by name here
    check(estimator)


# ---- features


def test_features_are_what_embed_gives(make, paths, weights):
    model = sp.load_pretrained(weights)
    for layer, pool in ((None, "mean"), ("conv5", "max"), ("conv4", "mean+std"), (18, "mean")):
        made = make(layer=layer, pool=pool).fit_transform(paths)
        for path, row in zip(paths, made, strict=True):
            assert np.array_equal(row, sp.embed(model, path, layer=layer or "pool5", pool=pool).numpy())


def test_edge_frames_are_left_out_unless_they_are_wanted(make, weights):
    model = sp.load_pretrained(weights)
    waves = [100 * np.sin(np.arange(n) / 10) for n in (20_000, 40_000)]
    for layer in ("conv7", 22):
        for edge_frames in (False, True, False):  # again, from the cache
            made = make(layer=layer, edge_frames=edge_frames).fit_transform(waves)
            for wave, row in zip(waves, made, strict=True):
                sound = torch.from_numpy(wave).float()
                expected = sp.embed(model, sound, layer=layer, edge_frames=edge_frames)
                assert np.array_equal(row, expected.numpy())
    with pytest.raises(ValueError, match=r"^sound 0: 9,000 samples \(0.408 s\) give conv7 edge frames alone"):
        make(layer="conv7").fit_transform([np.ones(9_000) * 9])


def test_what_was_pickled_before_there_was_a_choice_goes_on_with_edge_frames(make):
    waves = [100 * np.sin(np.arange(20_000) / 10)]
    features = make(layer="conv7", edge_frames=True).fit(waves)
    again = pickle.loads(pickle.dumps(features))
    assert again.edge_frames
    state = {name: value for name, value in features.__getstate__().items() if name != "edge_frames"}
    old = SoundNetFeatures.__new__(SoundNetFeatures)
    old.__setstate__(state)
    assert np.array_equal(old.transform(waves), features.transform(waves))


def test_with_5_layers_the_layer_is_conv4(tmp_path, paths):
    features = SoundNetFeatures(write_net(tmp_path / "five.safetensors", "n5_d8"), cache=False)
    assert features.fit(paths).layer_ == "conv4"


def test_sounds_may_be_given_in_many_ways(make, paths):
    features = make(full_scale=1).fit(paths)
    expected = features.transform(paths)
    waves = [soundfile.read(path, dtype="float32")[0] for path in paths]
    for given in (
        [str(path) for path in paths],
        np.array([str(path) for path in paths]),
        np.array([str(path) for path in paths], object)[:, None],
        waves,
        [wave.astype(np.float64) for wave in waves],
        [torch.from_numpy(wave) for wave in waves],
        np.array([*waves, None], object)[:-1],
    ):
        assert np.array_equal(features.transform(given), expected)
    table = np.stack([wave[:11_025] for wave in waves])
    for given in (table, torch.from_numpy(table), table.tolist()):
        assert np.array_equal(features.transform(given), features.transform(list(table)))


def test_full_scale_says_at_which_scale_arrays_are(make, paths):
    expected = make().fit_transform(paths)
    integers = [soundfile.read(path, dtype="int16")[0] for path in paths]
    # 16-bit files: their integers are the samples, exactly
    assert np.array_equal(make(full_scale=32_768).fit_transform(integers), expected)
    assert np.array_equal(make().fit_transform([sp.load_audio(path) for path in paths]), expected)


def test_arrays_at_another_scale_do_not_go_unnoticed(make):
    loud = np.sin(np.arange(10_000))[None].astype(np.float32)
    with pytest.raises(ValueError, match="sound 0 goes up to 32767; full_scale is 256"):
        make().fit(32_767 * np.sign(loud))
    with pytest.raises(ValueError, match=r"sound 0 goes up to 255\.9.*; full_scale is 1"):
        make(full_scale=1).fit(256 * loud)
    with pytest.warns(
        UserWarning, match=r"within \[-1, 1\] and full_scale is 256: all but silence; full_scale=1"
    ):
        make().fit(loud)


def test_features_have_names(make, paths):
    features = make(layer="pool5", pool="mean+std").fit(paths)
    names = features.get_feature_names_out()
    assert len(names) == len(set(names)) == features.transform(paths[:1]).shape[1]
    assert (names[0], names[-1]) == ("pool5_mean_0", f"pool5_std_{len(names) // 2 - 1}")
    assert make(layer=22).fit(paths).get_feature_names_out()[0] == "module22_mean_0"


# ---- in pipelines


def test_a_search_over_layers_computes_each_sound_once_for_each_layer(make, sounds, paths, monkeypatch):
    computed = []
    real = evaluation.Listening._computed
    monkeypatch.setattr(
        evaluation.Listening, "_computed", lambda self, sound: computed.append(sound) or real(self, sound)
    )
    pipeline = make_pipeline(make(), StandardScaler(), LogisticRegression())
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


def test_a_pickled_pipeline_is_small_and_gives_the_same(make, sounds, paths):
    pipeline = make_pipeline(make(), StandardScaler(), LogisticRegression()).fit(paths, sounds.targets)
    pickled = pickle.dumps(pipeline)
    assert len(pickled) < 10_000  # no network
    assert np.array_equal(pickle.loads(pickled).decision_function(paths), pipeline.decision_function(paths))


def test_weights_that_were_exchanged_are_noticed(tmp_path, paths):
    path = write_net(tmp_path / "mine.safetensors", "n8_d8")
    features = SoundNetFeatures(path, cache=False).fit(paths)
    features.transform(paths[:1])
    write_net(path, "n8_d16")
    with pytest.raises(ValueError, match="are not those that this was fitted with"):
        features.transform(paths[:1])
    clone(features).fit(paths).transform(paths[:1])


def test_several_jobs_give_the_same_in_the_same_order(make, paths, threads):
    threads(1)  # with more, the products of several sounds at once may add in another order
    expected = make().fit_transform(paths)
    with parallel_config(backend="threading"):  # processes take seconds to start
        assert np.array_equal(make(n_jobs=2, cache=False).fit_transform(paths), expected)


# ---- the cache


def test_features_are_kept_under_the_content_of_sounds(make, paths, tmp_path, monkeypatch):
    first = make().fit_transform(paths)
    monkeypatch.setattr(evaluation.Listening, "_computed", lambda *_: pytest.fail("computed again"))
    renamed = [shutil.copy(path, tmp_path / f"{number}.wav") for number, path in enumerate(paths)]
    assert np.array_equal(make().fit_transform(renamed), first)
    assert np.array_equal(make(pool="mean").fit_transform(renamed[::-1]), first[::-1])
    with pytest.raises(BaseException, match="computed again"):
        make(pool="max").fit_transform(renamed)


def test_evaluate_and_the_transformer_share_what_is_kept(make, sounds, paths, weights, tmp_path, monkeypatch):
    evaluation.evaluate(str(weights), sounds, pool="mean", cache=tmp_path / "cache")
    monkeypatch.setattr(evaluation.Listening, "_computed", lambda *_: pytest.fail("computed again"))
    make().fit_transform(paths)


def test_arrays_are_kept_as_well(make, monkeypatch):
    waves = [100 * np.sin(np.arange(n)) for n in (5_000, 6_000)]
    first = make().fit_transform(waves)
    monkeypatch.setattr(evaluation.Listening, "_computed", lambda *_: pytest.fail("computed again"))
    assert np.array_equal(make().fit_transform(waves), first)


def test_a_cache_that_cannot_be_written_is_a_warning(make, paths, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.warns(UserWarning, match="features are not kept: .*taken"):
        made = make(cache=tmp_path / "taken").fit_transform(paths)
    assert np.array_equal(made, make(cache=False).fit_transform(paths))


# ---- what cannot be used


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("dog.wav", r"must be a list of paths, such as \['dog.wav'\]"),
        ([], "there are no sounds"),
        (["dog.wav", np.zeros(9_000)], "sound 0 is a str of shape"),
        ([np.zeros((2, 9_000))], r"sound 0 is a ndarray of shape \(2, 9000\)"),
        ([np.zeros(9_000), np.zeros(0)], r"sound 1 is a ndarray of shape \(0,\)"),
        ([np.zeros(9_000), np.full(9_000, np.nan)], "sound 1 holds NaN or infinity"),
        (np.full((2, 9_000), np.inf), "contains infinity"),
        (np.zeros(9_000), r"(?s)Expected 2D array, got 1D array instead.*a single sample"),
    ],
)
def test_what_is_no_list_of_sounds_is_an_error(make, given, message):
    with pytest.raises(ValueError, match=message):
        make().fit(given)


def test_a_sound_that_cannot_be_used_is_named(make, paths, tmp_path):
    features = make().fit(paths)
    (tmp_path / "notes.txt").write_text("no sound")
    soundfile.write(tmp_path / "short.wav", np.ones(100) / 2, 22_050)
    for name, reason in (
        ("missing.wav", "No such file or directory"),
        ("notes.txt", "cannot be decoded"),
        ("short.wav", r"100 samples \(0.005 s\) are too short: pool5"),
    ):
        for cached in (features, make(cache=False).fit(paths)):
            with pytest.raises(ValueError, match=f"^{tmp_path / name}: {reason}"):
                cached.transform([*paths, tmp_path / name])
    with pytest.raises(ValueError, match=r"^sound 1: 100 samples \(0.005 s\) are too short"):
        features.transform([np.ones(9_000), np.ones(100) * 9])


def test_unknown_settings_are_errors_that_list_the_choices(make, paths):
    with pytest.raises(ValueError, match="unknown pooling 'sum'; choose from mean, max"):
        make(pool="sum").fit(paths)
    with pytest.raises(ValueError, match="no layer 'conv9'; choose from conv1"):
        make(layer="conv9").fit(paths)
    with pytest.raises(WeightsError, match="no weights named 'nothing'"):
        SoundNetFeatures("nothing").fit(paths)


def test_without_scikit_learn_an_error_names_the_extra():
    code = "import sys; sys.modules['sklearn'] = None\nimport soundnet_port as sp; sp.SoundNetFeatures"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.endswith("scikit-learn is not installed: pip install 'soundnet-port[learn]'\n")


def test_the_network_is_read_once_for_many_calls(make, paths, monkeypatch):
    features = make().fit(paths)
    monkeypatch.setattr(scikit_learn, "read_weights", lambda path: pytest.fail("read again"))
    clone(features).fit(paths).transform(paths)
