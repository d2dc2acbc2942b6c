"""Labels over time and tables, read back by other parsers: FFmpeg's for subtitles, csv's for tables.

Audacity's labels are read by the rules of its manual: a line each of start, end and text, separated by tabs.
"""

import csv
import html
import io
import json
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.budget import budget
from support.networks import NETS, model_of

from soundnet_port.inference.prediction import Category, Frame, HeadPrediction, Prediction, predict
from soundnet_port.inference.prediction_formats import (
    apply_threshold,
    find_labels,
    format_prediction,
    format_wide_header,
    format_wide_row,
)
from soundnet_port.network.categories import original_categories, read_category_table

NAMES = {"objects": ["dog", "cat", "crane", "crane"], "scenes": ["/b/beach", "/s/sky"]}


def build(objects, scenes=None, seconds=20.0, top=1, repeats=1, names=NAMES):
    """A prediction with these probabilities, a row per frame; frames see 14 s, one every 3 s from -2 s on."""
    rows = {"objects": objects} | ({"scenes": scenes} if scenes else {})
    tensors = {head: torch.tensor(values, dtype=torch.float64).T for head, values in rows.items()}

    def rank(head, values):
        values, indices = values.sort(descending=True, stable=True)
        return [
            Category(index, names[head][index], value)
            for index, value in list(zip(indices.tolist(), values.tolist(), strict=True))[:top]
        ]

    frames = [
        Frame(
            3.0 * t - 2, 3.0 * t + 5, 3.0 * t + 12, {head: rank(head, v[:, t]) for head, v in tensors.items()}
        )
        for t in range(len(objects))
    ]
    return Prediction(
        heads={head: HeadPrediction(rank(head, v.mean(1)), v, v.mean(1)) for head, v in tensors.items()},
        frames=frames,
        middle=tuple(frames[(len(frames) - 1) // 2].top[head][0] for head in tensors),
        seconds=seconds,
        repeats=repeats,
    )


DOG, CAT = [0.7, 0.2, 0.1, 0.0], [0.3, 0.5, 0.1, 0.1]
BEACH, SKY = [0.8, 0.2], [0.4, 0.6]
STORY = build([DOG, DOG, CAT, DOG], [BEACH, BEACH, BEACH, SKY])  # centers at 5, 8, 11 and 14 s


# ---- parsers


def read_subtitles(text, file_format):
    """Return (start, end, text) of each subtitle, as FFmpeg reads them."""
    av = pytest.importorskip("av", reason="needs the extra [av]")
    cues = []
    with av.open(io.BytesIO(text.encode("utf-8", "backslashreplace")), format=file_format) as container:
        (stream,) = container.streams.subtitles
        for packet in container.demux(stream):
            if packet.size:
                start, length = packet.pts * packet.time_base, packet.duration * packet.time_base
                cues.append((float(start), float(start + length), bytes(packet).decode()))
    return cues


def read_srt(text):
    return read_subtitles(text, "srt")


def read_vtt(text):
    return [(start, end, html.unescape(text)) for start, end, text in read_subtitles(text, "webvtt")]


def read_audacity(text):
    """Read labels by the manual's rules; a line that begins with a backslash would hold frequencies."""
    assert text == "" or text.endswith("\n")
    labels = []
    for line in text.split("\n")[:-1]:
        assert not line.startswith("\\")
        start, end, label = line.split("\t")
        assert 0 <= float(start) <= float(end)
        labels.append((float(start), float(end), label))
    return labels


def read_raven(text):
    return list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE))


# ---- what labels say


def test_each_moment_has_the_answer_of_the_frame_with_the_nearest_center():
    assert [(label.start, label.end, label.head, *label.category[:2]) for label in find_labels(STORY)] == [
        (0.0, 9.5, "objects", 0, "dog"),
        (0.0, 12.5, "scenes", 0, "/b/beach"),
        (9.5, 12.5, "objects", 1, "cat"),
        (12.5, 20.0, "objects", 0, "dog"),
        (12.5, 20.0, "scenes", 1, "/s/sky"),
    ]


def test_a_label_has_the_mean_probability_of_its_frames():
    rising = build([[0.4, 0.3, 0.2, 0.1], [0.6, 0.2, 0.1, 0.1], [0.8, 0.2, 0.0, 0.0]])
    (label,) = find_labels(rising)
    assert label.category.probability == pytest.approx(0.6)
    assert label.category.original == "dog"


def test_labels_of_several_categories_overlap_and_each_has_its_own_time():
    labels = find_labels(apply_threshold(build([DOG, CAT, CAT], top=4), 0.3))
    assert [(label.start, label.end, label.category.label) for label in labels] == [
        (0.0, 20.0, "dog"),
        (6.5, 20.0, "cat"),
    ]


def test_a_repeated_clip_has_the_labels_of_the_whole_clip_once():
    """Times of frames are those of the repeated clip, which is longer."""
    (label,) = find_labels(build([DOG, CAT, CAT], seconds=6.0, repeats=3))
    assert label[:3] == (0.0, 6.0, "objects")
    assert (label.category.label, label.category.probability) == ("dog", pytest.approx(1.3 / 3))
    prediction = predict(model_of(NETS["n8_d16"]), torch.zeros(9 * 22_050), top=1)
    assert prediction.repeats == 2
    assert len(prediction.frames) > 1
    assert {label[:2] for label in find_labels(prediction)} == {(0.0, 9.0)}


def test_a_single_frame_stands_for_the_whole_clip():
    assert [label[:2] for label in find_labels(build([DOG], seconds=13.0))] == [(0.0, 13.0)]


def test_frames_centered_after_the_clips_end_have_no_labels():
    """An edge frame may see little but zeros: here the third one's center is at 11 s."""
    labels = find_labels(build([DOG, DOG, CAT], seconds=9.0))
    assert [(label.start, label.end, label.category.label) for label in labels] == [(0.0, 9.0, "dog")]


def test_labels_cover_a_real_networks_clip_without_gaps():
    model = model_of(NETS["n8_d16"])
    prediction = predict(model, torch.randn(30 * 22_050, generator=torch.Generator().manual_seed(0)), top=1)
    for head in ("objects", "scenes"):
        labels = [label for label in find_labels(prediction) if label.head == head]
        assert labels[0].start == 0
        assert labels[-1].end == prediction.seconds
        assert [label.end for label in labels[:-1]] == [label.start for label in labels[1:]]


# ---- files


def test_subtitles_follow_each_other():
    expected = [
        (0.0, 9.5, "dog 70 %\n/b/beach 80 %"),
        (9.5, 12.5, "cat 50 %\n/b/beach 80 %"),
        (12.5, 20.0, "dog 70 %\n/s/sky 60 %"),
    ]
    assert read_srt(format_prediction(STORY, "srt")) == expected
    assert read_vtt(format_prediction(STORY, "vtt")) == expected


def test_subtitles_have_as_many_lines_as_categories():
    two = build([DOG, CAT], [BEACH, BEACH], top=2)
    ((_, _, first), (_, _, second)) = read_srt(format_prediction(two, "srt"))
    assert first.splitlines() == ["dog 70 %", "cat 20 %", "/b/beach 80 %", "/s/sky 20 %"]
    assert second.splitlines() == ["cat 50 %", "dog 30 %", "/b/beach 80 %", "/s/sky 20 %"]


def test_small_probabilities_and_long_clips_in_subtitles():
    """Hours have as many digits as they need; below one percent there is one digit after the point."""
    rows = [[0.004, 0.003, 0.002, 0.001], [0.002, 0.006, 0.001, 0.001]]
    text = format_prediction(build(rows, seconds=400_000.25), "srt")
    assert "111:06:40,250" in text
    assert read_srt(text) == [(0.0, 6.5, "dog 0.4 %"), (6.5, 400_000.25, "cat 0.6 %")]


def test_audacity_labels_name_the_head_where_there_are_two():
    assert read_audacity(format_prediction(STORY, "audacity"))[:3] == [
        (0.0, 9.5, "object: dog 0.7000"),
        (0.0, 12.5, "scene: /b/beach 0.8000"),
        (9.5, 12.5, "object: cat 0.5000"),
    ]
    assert read_audacity(format_prediction(build([DOG]), "audacity")) == [(0.0, 20.0, "dog 0.7000")]


def test_raven_selections_have_its_columns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = read_raven(format_prediction(STORY, "raven", "a b.wav"))
    assert [row["Selection"] for row in rows] == list("12345")
    assert rows[2] == {
        "Selection": "3",
        "View": "Spectrogram 1",
        "Channel": "1",
        "Begin Time (s)": "9.500000",
        "End Time (s)": "12.500000",
        "Low Freq (Hz)": "0",
        "High Freq (Hz)": "11025",
        "Head": "object",
        "Category": "cat",
        "Probability": "0.5000",
        "Begin Path": str(tmp_path / "a b.wav"),
        "File Offset (s)": "9.500000",
    }
    assert read_raven(format_prediction(STORY, "raven", "-"))[0]["Begin Path"] == ""


def test_nothing_above_the_threshold_leaves_valid_empty_files():
    none = apply_threshold(STORY, 0.9)
    assert format_prediction(none, "srt") == format_prediction(none, "audacity") == ""
    assert format_prediction(none, "vtt") == "WEBVTT\n"
    assert read_srt("") == read_vtt("WEBVTT\n") == []
    header = format_prediction(none, "raven")
    assert read_raven(header) == []
    assert header.startswith("Selection\tView\tChannel\tBegin Time (s)\tEnd Time (s)\tLow Freq (Hz)\t")
    assert format_prediction(none, "csv").count("\n") == 1
    assert json.loads(format_prediction(none, "json"))["objects"] == []
    assert format_prediction(none, "text", "x").splitlines()[2] == "  (none above the threshold)"


def test_a_threshold_leaves_gaps_and_keeps_what_is_as_probable():
    """Of two heads the one with an answer is shown."""
    kept = apply_threshold(STORY, 0.7)
    assert read_srt(format_prediction(kept, "srt")) == [
        (0.0, 9.5, "dog 70 %\n/b/beach 80 %"),
        (9.5, 12.5, "/b/beach 80 %"),
        (12.5, 20.0, "dog 70 %"),
    ]
    assert kept.objects == []  # the mean over the clip is 0.6
    assert kept.object_probabilities is STORY.object_probabilities
    assert apply_threshold(STORY, 0.0) == STORY
    rows = list(csv.DictReader(io.StringIO(format_prediction(kept, "csv", over_time=True))))
    assert {round(float(row["probability"]), 9) for row in rows} == {0.7, 0.8}


def test_text_has_a_middle_frame_where_frames_are_of_different_times():
    assert "  middle frame: 0.7000  dog | 0.8000  /b/beach\n" in format_prediction(STORY)
    assert "  middle frame: - | 0.8000  /b/beach\n" in format_prediction(apply_threshold(STORY, 0.75))
    assert "middle" not in format_prediction(build([DOG]))
    assert "middle" not in format_prediction(build([DOG, CAT], seconds=6.0, repeats=3))
    assert "middle" not in format_prediction(apply_threshold(STORY, 0.9))


def test_an_unknown_format_is_explained():
    with pytest.raises(ValueError, match="unknown format 'ass'; choose from text, json, csv, srt"):
        format_prediction(STORY, "ass")


# ---- the table with a row per clip


def test_wide_tables_have_a_column_per_category_and_each_name_once():
    text = format_wide_header(NAMES) + format_wide_row("a,b.wav", STORY)
    ((name, row),) = ((row.pop("file"), row) for row in csv.DictReader(io.StringIO(text)))
    assert name == "a,b.wav"
    assert row == {
        "seconds": "20.0",
        "repeats": "1",
        "level": "0.0",
        "object:dog": "0.6",
        "object:cat": "0.275",
        "object:crane (2)": "0.1",
        "object:crane (3)": "0.025",
        "scene:/b/beach": "0.7",
        "scene:/s/sky": "0.3",
    }


def test_the_originals_categories_have_different_columns():
    names = original_categories({"objects": 1000, "scenes": 401})
    (columns,) = csv.reader(io.StringIO(format_wide_header(names)))
    assert len(set(columns)) == len(columns) == 4 + 1401
    table = read_category_table("objects")
    assert {table[134]["label"], table[517]["label"]} == {"crane"}
    assert {"object:crane (134)", "object:crane (517)", "object:tabby, tabby cat"} < set(columns)


def test_wide_rows_hold_what_the_lists_rank():
    """To six digits, and for silence too, whose level is no number of decibels."""
    prediction = predict(model_of(NETS["n8_d16"]), torch.zeros(300_000), top=3)
    cells = next(csv.reader([format_wide_row("x", prediction)]))
    assert float(cells[3]) == -math.inf
    values = [float(cell) for cell in cells[4:]]
    assert len(values) == 16
    for category in prediction.objects:
        assert values[category.index] == pytest.approx(category.probability, rel=1e-5)
    for category in prediction.scenes:
        assert values[10 + category.index] == pytest.approx(category.probability, rel=1e-5)


# ---- any names


ODD = st.text(st.sampled_from("a7 \t\n\r\v\0\x1b\x85\u2028\\<>&{}-,:\"'ö犬\u200d\udcf6") | st.characters())


@settings(max_examples=budget(200), deadline=None)
@given(st.lists(ODD, min_size=4, max_size=4), ODD, st.floats(0.00002, 30), st.integers(1, 3))
@example(["<i>", "00:00:01,000 --> 00:00:02,000", "1\n\n2", "\ufeff"], "a\tb\nc", 20.0, 1)
@example(["dog", "cat", "crane", "x"], "-", 0.00002, 1)  # a clip of one sample
def test_any_label_and_file_name_is_read_back(labels, name, seconds, top):
    """White space and control characters become spaces; nothing else is lost but an arrow in subtitles."""
    names = {"objects": labels}
    prediction = build([DOG, CAT, [0, 0.1, 0.2, 0.7]], seconds=seconds, top=top, names=names)
    expected = find_labels(prediction)
    audacity = read_audacity(format_prediction(prediction, "audacity", name))
    raven = read_raven(format_prediction(prediction, "raven", name))
    assert len(audacity) == len(raven) == len(expected)
    for label, (start, end, text), row in zip(expected, audacity, raven, strict=True):
        assert (start, end) == (pytest.approx(label.start, abs=1e-6), pytest.approx(label.end, abs=1e-6))
        assert (float(row["Begin Time (s)"]), float(row["End Time (s)"])) == (start, end)
        for shown in (text.rpartition(" ")[0], row["Category"]):
            assert letters(shown) == letters(label.category.label)
    for read, file_format in ((read_srt, "srt"), (read_vtt, "vtt")):
        cues = read(format_prediction(prediction, file_format, name))
        assert len(cues) in (1, 2, 3)
        assert cues[0][0] == 0
        assert cues[-1][1] == pytest.approx(max(seconds, 0.001), abs=0.001)
        for (_, end, _), (start, _, _) in pairwise(cues):
            assert start == end
        for start, end, text in cues:
            assert start < end
            assert len(text.split("\n")) == top
            assert all(line.endswith(" %") for line in text.split("\n"))
    for row in csv.DictReader(io.StringIO(format_prediction(prediction, "csv", name), newline="")):
        assert row["file"] == name
        assert row["label"] == labels[int(row["index"])]
    assert json.loads(format_prediction(prediction, "json", name))["file"] == name


def letters(text):
    """What is left of a text without white space, control characters, and letters that no encoding has."""
    text = text.encode("utf-8", "replace").decode()
    return "".join(c for c in text if not c.isspace() and not (ord(c) < 32 or 127 <= ord(c) < 160))
