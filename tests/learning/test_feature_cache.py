"""The feature cache: what it returns, how large it gets, and what it leaves alone."""

import os

import numpy as np
import pytest

from soundnet_port.errors import SoundNetError
from soundnet_port.learning.feature_cache import FeatureCache, describe_network, open_cache

FEATURES = np.zeros(1000, np.float32)  # about 4.5 kB as a file


def key(number):
    return f"{number:064x}"


def write(cache, number):
    """Write an entry that seems to have been used `number` seconds after 1970."""
    cache.write(key(number), FEATURES, 1.0)
    path = cache.folder / key(number)[:2] / f"{key(number)}.npz"
    os.utime(path, (number, number))
    return path


def test_entries_come_back(tmp_path):
    cache = FeatureCache(tmp_path)
    cache.write(key(1), np.float32([[1, 2]]), 0.5)
    features, seconds = FeatureCache(tmp_path).read(key(1))
    assert (features.tolist(), seconds) == ([[1, 2]], 0.5)
    assert cache.read(key(2)) is None


def test_the_least_recently_used_entries_are_removed_beyond_the_limit(tmp_path):
    size = write(FeatureCache(tmp_path), 1).stat().st_size
    cache = FeatureCache(tmp_path, limit=10 * size)  # which holds an entry of before
    for number in range(2, 11):
        write(cache, number)
    assert all(FeatureCache(tmp_path)._path(key(number)).exists() for number in range(1, 11))
    assert cache.read(key(1)) is not None  # now the most recently used
    write(cache, 11)
    kept = {path.name for path in tmp_path.rglob("*.npz")}
    assert kept == {f"{key(number)}.npz" for number in (1, *range(4, 12))}
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.npz")) <= 9 * size


def test_only_the_caches_own_files_are_removed(tmp_path):
    for name in ("ab/notes.txt", "ab/song.npz", "top.npz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(10_000))
    (tmp_path / "ab/.0123abcd.part").write_bytes(bytes(10_000))  # of a run that was killed
    os.utime(tmp_path / "ab/.0123abcd.part", (1, 1))
    cache = FeatureCache(tmp_path, limit=100)
    cache.write(key(1), FEATURES, 1.0)
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert names == ["ab/notes.txt", "ab/song.npz", "top.npz"]


def test_the_limit_is_2_gb_or_what_the_environment_says(demo_model, tmp_path, monkeypatch):
    monkeypatch.delenv("SOUNDNET_CACHE_SIZE", raising=False)
    assert open_cache(tmp_path, demo_model).limit == 2e9
    monkeypatch.setenv("SOUNDNET_CACHE_SIZE", "0.5")
    assert open_cache(tmp_path, demo_model).limit == 5e8
    assert open_cache(False, demo_model) is None
    for text in ("much", "-1", "nan"):
        monkeypatch.setenv("SOUNDNET_CACHE_SIZE", text)
        with pytest.raises(SoundNetError, match=f"SOUNDNET_CACHE_SIZE: '{text}' is no size"):
            open_cache(True, demo_model)


def test_features_of_networks_with_hooks_are_not_cached(demo_model, tmp_path):
    """A hook may change anything, and no key tells it."""
    handle = demo_model.conv1.register_forward_hook(lambda *_: None)
    assert open_cache(tmp_path, demo_model) is None
    handle.remove()
    assert open_cache(tmp_path, demo_model) is not None


def test_what_changes_features_changes_their_description(demo_model):
    before = describe_network(demo_model)
    assert describe_network(demo_model) == before
    demo_model.bn2.eps *= 2
    assert describe_network(demo_model) != before
