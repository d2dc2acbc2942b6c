"""Training data from videos: exact frames, the classifier's numbers, and failures."""

import json
import shutil
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.video_fixtures import frame_color, write_classifier, write_video

import soundnet_port as sp
from soundnet_port.cli.main import main

pytest.importorskip("av", reason="needs the extra [videos]")
transformers = pytest.importorskip("transformers", reason="needs the extra [videos]")

from soundnet_port.corpus.errors import CorpusError  # noqa: E402
from soundnet_port.learning import video_frames, video_labeling  # noqa: E402
from soundnet_port.learning.errors import VideoError  # noqa: E402
from soundnet_port.learning.image_classifiers import ImageClassifier  # noqa: E402
from soundnet_port.learning.video_frames import read_frames  # noqa: E402
from soundnet_port.learning.video_labeling import label_videos  # noqa: E402

TENTHS = [number / 10 for number in range(300)]


@pytest.fixture(scope="module", autouse=True)
def _offline():
    """Keep tests away from the hub."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr("transformers.utils.hub.is_offline_mode", lambda: True)
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_classifier(folder / "things")
    write_classifier(folder / "more-things", seed=1, size=24)
    write_classifier(folder / "places", seed=2, labels=("beach", "street", "hall", "wood"))
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films") / "videos"
    (folder / "deep").mkdir(parents=True)
    write_video(folder / "a.mp4", TENTHS)
    write_video(folder / "deep" / "b.mkv", TENTHS[:130])
    write_video(folder / "c.mov", TENTHS[40:70])
    (folder / "notes.txt").write_text("not looked at")
    return folder


@pytest.fixture(scope="module")
def labeled(videos, models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("labeled") / "labels"
    summary = label_videos(
        [videos], folder, {"objects": models / "things", "scenes": models / "places"}, batch=4
    )
    return folder, summary


def frame_numbers(images, first=0):
    """Return which frames of `write_video` these are, by their lower half."""
    frames = []
    for image in images:
        pixels = np.asarray(image)
        mean = pixels[-pixels.shape[0] // 3 :].mean((0, 1))
        distances = [np.abs(mean - frame_color(number)).max() for number in range(first, 300)]
        assert min(distances) < 8  # yuv420p and the codec lose that, neighbors differ by twice as much
        frames.append(first + int(np.argmin(distances)))
    return frames


def classify(folder, images):
    """Compute the classifier's probabilities with transformers alone."""
    model = transformers.AutoModelForImageClassification.from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    with torch.no_grad():
        return model(**processor(images=images, return_tensors="pt")).logits.softmax(-1).numpy()


# ---- frames


@pytest.mark.parametrize(
    ("name", "first", "options"),
    [
        ("a.mp4", 25, {}),
        ("one-key-frame.mp4", 25, {"gop": 1000}),
        ("long-groups.mp4", 25, {"gop": 70}),
        ("a.mkv", 25, {}),
        # these keep the audio encoder's padding: the sound begins 46 ms before the pictures
        ("a.ts", 24, {}),  # cannot be sought in
        ("a.avi", 24, {"codec": "mpeg4"}),
    ],
)
def test_frames_are_those_shown_in_the_middle_of_each_5_s(tmp_path, name, first, options):
    write_video(tmp_path / name, TENTHS, **options)
    # at a time that is a frame's own, the frame has just appeared
    assert frame_numbers(read_frames(tmp_path / name)) == [first + 50 * step for step in range(6)]


def test_a_frame_is_shown_until_the_next_one(tmp_path):
    times = [0, 0.3, 2.499, 2.501, 7.4, 7.6, 11.0, 18.0, 18.1]
    write_video(tmp_path / "slides.mp4", times, sound=18.2)
    write_video(tmp_path / "slides.mkv", times, sound=18.2, gop=3)
    assert frame_numbers(read_frames(tmp_path / "slides.mp4")) == [2, 4, 6, 7 - 1]
    assert frame_numbers(read_frames(tmp_path / "slides.mkv")) == [2, 4, 6, 7 - 1]


def test_times_count_from_the_beginning_of_the_sound(tmp_path):
    write_video(tmp_path / "late-sound.mkv", TENTHS, sound_start=1.5, sound=20)
    assert frame_numbers(read_frames(tmp_path / "late-sound.mkv"))[:3] == [40, 90, 140]


def test_the_first_frame_stands_for_the_time_before_it(tmp_path):
    write_video(tmp_path / "late-pictures.mkv", [seconds + 4 for seconds in TENTHS[:100]], sound=14)
    assert frame_numbers(read_frames(tmp_path / "late-pictures.mkv")) == [0, 35, 85]


def test_frames_without_times_follow_each_other():
    raw = [SimpleNamespace(pts=None), SimpleNamespace(pts=None), SimpleNamespace(pts=3, time_base=0.5)]
    assert [frame.seconds for frame in video_frames._add_times(raw, 1.0, 0.25, strict=False)] == [
        1.0,
        1.25,
        1.5,
    ]
    with pytest.raises(video_frames._CannotSeek):
        next(video_frames._add_times(raw, 1.0, 0.25, strict=True))


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_frames_are_upright(tmp_path, degrees):
    write_video(tmp_path / "held.mp4", TENTHS[:50], rotation=degrees)
    (upright,) = read_frames(tmp_path / "held.mp4")
    assert upright.size == ((64, 48) if degrees == 180 else (48, 64))
    pixels = np.asarray(upright).astype(float)
    # the film's upper half is dark, and counter-clockwise that goes to the left, down, to the right
    dark = {90: pixels[:, :20], 180: pixels[30:], 270: pixels[:, 28:]}[degrees]
    assert np.abs(dark.mean((0, 1)) - np.array(frame_color(25)) // 2).max() < 6


def test_a_video_of_2_5_s_has_a_frame_and_a_shorter_one_none(tmp_path):
    write_video(tmp_path / "enough.mp4", TENTHS[:26])
    write_video(tmp_path / "short.mp4", TENTHS[:25])
    assert frame_numbers(read_frames(tmp_path / "enough.mp4")) == [25]
    with pytest.raises(VideoError, match=r"short.mp4: too short, 2.50 s; a frame at 2.5 s is needed"):
        list(read_frames(tmp_path / "short.mp4"))


def test_errors_name_the_problem(tmp_path):
    write_video(tmp_path / "silent.mp4", TENTHS[:30], only="frames")
    write_video(tmp_path / "song.mp4", TENTHS[:30], only="sound")
    (tmp_path / "text.mp4").write_text("no film")
    (tmp_path / "empty.mp4").write_bytes(b"")
    write_video(tmp_path / "whole.mp4", TENTHS)
    whole = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    for name, reason in {
        "silent.mp4": "has no audio stream",
        "song.mp4": "has no video stream",
        "text.mp4": "cannot be decoded",
        "empty.mp4": "empty",
        "missing.mp4": "No such file",
        "cut.mp4": "truncated or damaged, its pictures end at ",
    }.items():
        with pytest.raises(VideoError, match=reason) as caught:
            list(read_frames(tmp_path / name))
        assert str(caught.value).startswith(f"{tmp_path / name}: ")


# ---- results


def test_rows_are_the_classifiers_probabilities_for_these_frames(labeled, videos, models):
    folder, summary = labeled
    assert (summary.extracted, summary.already_done, summary.failures) == (3, 0, ())
    for name, steps in {"a.mp4": 6, "deep/b.mkv": 3, "c.mov": 1}.items():
        for head, model in {"objects": "things", "scenes": "places"}.items():
            rows = np.load(folder / head / f"{name}.npy")
            expected = classify(models / model, list(read_frames(videos / name)))
            assert rows.dtype == np.float32
            assert rows.shape == (steps, len(expected[0]))
            # float32 probabilities; other batches add in another order
            np.testing.assert_allclose(rows, expected, rtol=0, atol=1e-6)
            np.testing.assert_allclose(rows.sum(1), 1, rtol=0, atol=1e-6)
    assert np.ptp(np.load(folder / "objects" / "a.mp4.npy"), axis=0).max() > 1e-4  # colours do matter


def test_the_manifest_leads_to_sounds_and_rows(labeled):
    folder, summary = labeled
    header, *rows = [line.split("\t") for line in summary.output.read_text("utf-8").splitlines()]
    assert header == ["sound", "objects", "scenes"]
    assert [row[1] for row in rows] == ["objects/a.mp4.npy", "objects/c.mov.npy", "objects/deep/b.mkv.npy"]
    for sound, objects, scenes in rows:
        steps = len(np.load(folder / objects, allow_pickle=False))
        assert len(np.load(folder / scenes, allow_pickle=False)) == steps
        assert len(sp.load_audio(folder / sound)) > 22_050 * 5 * (steps - 0.5)
    assert (folder / "scenes.categories.txt").read_text("utf-8") == "beach\nstreet\nhall\nwood\n"
    assert not list(folder.rglob("*.part"))


def test_neither_batches_nor_threads_matter(labeled, videos, models, tmp_path):
    for batch, workers in ((1, 1), (100, 3)):
        label_videos(
            [videos], tmp_path / str(batch), {"objects": models / "things"}, batch=batch, workers=workers
        )
        for path in (labeled[0] / "objects").rglob("*.npy"):
            again = np.load(tmp_path / str(batch) / path.relative_to(labeled[0]))
            np.testing.assert_allclose(again, np.load(path), rtol=0, atol=1e-6)


def test_existing_results_are_not_computed_again(labeled, videos, models, tmp_path):
    folder = shutil.copytree(labeled[0], tmp_path / "labels")
    manifest = (folder / "manifest.tsv").read_bytes()
    (folder / "manifest.tsv").unlink()
    lost = folder / "scenes" / "a.mp4.npy"
    row = np.load(lost)
    lost.unlink()
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.npy")}
    teachers = {"objects": models / "things", "scenes": models / "places"}
    summary = label_videos([videos], folder, teachers)
    assert (summary.extracted, summary.already_done) == (1, 2)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    np.testing.assert_allclose(np.load(lost), row, rtol=0, atol=1e-6)
    # the copy is elsewhere, so its paths to the videos change
    (folder / "elsewhere").mkdir()
    write_video(folder / "elsewhere" / "d.mp4", TENTHS[:60])
    label_videos([folder / "elsewhere"], folder, teachers)
    lines = (folder / "manifest.tsv").read_text("utf-8").splitlines()
    assert len(lines) == manifest.count(b"\n") + 1
    assert "elsewhere/d.mp4\tobjects/d.mp4.npy\tscenes/d.mp4.npy" in lines


def test_a_second_teacher_of_a_head_has_a_column_of_its_own(labeled, videos, models, tmp_path):
    folder = shutil.copytree(labeled[0], tmp_path / "labels")
    label_videos([videos], folder, {"objects": [models / "things", models / "more-things"]})
    header, first, *_ = (folder / "manifest.tsv").read_text("utf-8").splitlines()
    assert header == "sound\tobjects\tscenes\tobjects:more-things"
    rows = np.load(folder / first.split("\t")[3])
    expected = classify(models / "more-things", list(read_frames(videos / "a.mp4")))
    np.testing.assert_allclose(rows, expected, rtol=0, atol=1e-6)


def test_a_run_continues_past_bad_videos_and_lists_them_at_the_end(
    videos, models, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(shutil.copytree(videos, tmp_path / "here"))
    (tmp_path / "here" / "bad.mp4").write_text("no film")
    write_video(tmp_path / "here" / "short.mp4", TENTHS[:10])
    command = ["label-videos", ".", "nowhere.mp4", "-o", "out", "--teacher", f"objects={models / 'things'}"]
    assert main(command) == 1
    complaints = capsys.readouterr().err
    assert "3 inputs failed; see out/errors.tsv" in complaints
    assert "bad.mp4: cannot be decoded" in complaints
    assert "short.mp4: too short, 1.00 s" in complaints
    assert len((tmp_path / "here/out/errors.tsv").read_text().splitlines()) == 3
    assert len((tmp_path / "here/out/manifest.tsv").read_text().splitlines()) == 1 + 3
    for name in ("bad.mp4", "short.mp4"):
        (tmp_path / "here" / name).unlink()
    assert main([word for word in command if word != "nowhere.mp4"]) == 0
    assert "3 of 3 files already done" in capsys.readouterr().err
    assert not (tmp_path / "here/out/errors.tsv").exists()


def test_results_from_before_an_interruption_are_in_the_manifest(videos, models, tmp_path):
    def interrupt(progress):
        if progress.done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        label_videos(
            [videos], tmp_path, {"objects": models / "things"}, batch=1, workers=1, progress=interrupt
        )
    assert len((tmp_path / "manifest.tsv").read_text().splitlines()) == 1 + 1


def test_progress_counts_videos_and_says_which_fail(videos, models, tmp_path):
    folder = shutil.copytree(videos, tmp_path / "videos")
    (folder / "bad.mp4").write_text("no film")
    reports = []
    label_videos([folder], tmp_path / "labels", {"objects": models / "things"}, progress=reports.append)
    assert [(report.done, report.total, report.unit) for report in reports] == [
        (done, 4, "video") for done in range(5)
    ]
    (message,) = [report.message for report in reports if report.message]
    assert message.startswith(f"{folder / 'bad.mp4'}: cannot be decoded")


def test_decoding_ends_with_an_interruption(videos, models, tmp_path, monkeypatch):
    closed = threading.Event()

    def endless(path):
        image = next(read_frames(videos / "a.mp4"))
        try:
            while True:
                yield image
        finally:
            closed.set()

    def classify_and_interrupt(classifier, images):
        raise KeyboardInterrupt

    monkeypatch.setattr(video_labeling, "read_frames", endless)
    monkeypatch.setattr(ImageClassifier, "classify", classify_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        label_videos([videos / "a.mp4"], tmp_path, {"objects": models / "things"}, batch=1, workers=1)
    assert closed.is_set()
    assert all("work" not in thread.name for thread in threading.enumerate())


def test_frames_that_are_not_read_leave_no_open_file(videos, monkeypatch):
    opened = []

    def spy(*arguments, **options):
        opened.append(real(*arguments, **options))
        return opened[-1]

    real = open
    monkeypatch.setattr(video_frames, "open", spy, raising=False)
    images = read_frames(videos / "a.mp4")
    next(images)
    assert not opened[0].closed
    images.close()
    assert opened[0].closed


# ---- errors


def test_unsuitable_models_are_refused(models, tmp_path):
    def refused(source, head="objects"):
        with pytest.raises(CorpusError) as caught:
            label_videos([tmp_path / "a.mp4"], tmp_path / "out", {head: source})
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    assert "no such folder" in refused(tmp_path / "nowhere")
    assert "the Hugging Face hub cannot be reached" in refused("microsoft/resnet-50")
    assert "unknown head 'smells'; choose from objects, scenes" in refused(models / "things", "smells")
    # a network without a classifier would get a random one
    trunk = write_classifier(tmp_path / "trunk", cls=transformers.ResNetModel)
    assert "not an image classifier: missing parameters classifier" in refused(trunk)
    many = write_classifier(tmp_path / "many", problem_type="multi_label_classification")
    assert "its categories are not exclusive" in refused(many)
    pickled = shutil.copytree(models / "things", tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "pickled weights are never read" in refused(pickled)
    bare = shutil.copytree(models / "things", tmp_path / "bare")
    (bare / "preprocessor_config.json").unlink()
    assert "it has no preprocessor_config.json" in refused(bare)
    torn = shutil.copytree(models / "things", tmp_path / "torn")
    (torn / "model.safetensors").write_bytes(b"\xff" * 100)
    assert "torn: cannot be loaded" in refused(torn)
    (torn / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert "it is another kind of model" in refused(torn)
    other_order = write_classifier(tmp_path / "other", labels=("dog", "cat", "bus"))
    assert "their categories differ in number or order" in refused([models / "things", other_order])


def test_folders_of_other_teachers_or_files_are_refused(labeled, videos, models, tmp_path):
    folder = shutil.copytree(labeled[0], tmp_path / "labels")
    with pytest.raises(CorpusError, match="its objects are of another model"):
        label_videos([videos], folder, {"objects": models / "more-things"})
    (folder / "teachers.json").unlink()
    with pytest.raises(CorpusError, match=r"has a manifest.tsv of something else"):
        label_videos([videos], folder, {"objects": models / "things"})
    with pytest.raises(CorpusError, match="is a file; name a folder"):
        label_videos([videos], folder / "manifest.tsv", {"objects": models / "things"})
    shutil.copytree(videos, tmp_path / "again")
    with pytest.raises(CorpusError, match=r"would both become a.mp4.npy"):
        label_videos([videos, tmp_path / "again"], tmp_path / "out", {"objects": models / "things"})


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--teacher", "microsoft/resnet-50"], "name its head, as in objects=microsoft/resnet-50"),
        (["--teacher", "objects=THINGS", "--batch", "0"], "must be 1 or more"),
        (["--teacher", "objects=THINGS", "--device", "quantum"], "quantum"),
        (["--teacher", "objects=nowhere/to/be/found"], "no such folder"),
    ],
)
def test_misuse_is_a_line_and_exit_code_2(models, videos, tmp_path, capsys, words, complaint):
    words = [word.replace("THINGS", str(models / "things")) for word in words]
    assert main(["label-videos", str(videos), "-o", str(tmp_path / "out"), *words]) == 2
    assert complaint in capsys.readouterr().err


def test_a_network_trained_on_it_has_the_teachers_categories(labeled, videos, tmp_path):
    pytest.importorskip("lightning_fabric", reason="needs the extra [learn]")
    folder, _ = labeled
    settings = "--iterations 2 --batch 2 --widths 1,1,2,2,2,2,4 --device cpu"
    run = tmp_path / "run"
    assert main(["train", str(folder / "manifest.tsv"), "-o", str(run), *settings.split()]) == 0
    prediction = sp.predict(sp.load_pretrained(run / "weights.safetensors"), videos / "a.mp4")
    assert {category.label for category in prediction.scenes} == {"beach", "street", "hall", "wood"}
    assert len(prediction.objects) == 3
