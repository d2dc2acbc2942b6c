"""Labeled sounds: every layout that data sets come in, lists with odd names, and invalid ones."""

import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.budget import budget
from support.networks import CHECKOUT

from soundnet_port.learning.datasets import read_labeled
from soundnet_port.learning.errors import LabeledSoundsError
from soundnet_port.learning.labeled_sounds import LabeledSound, Split, natural_sort_key

ESC10 = CHECKOUT.parent / "shared" / "esc10"


def write_files(folder, files):
    """Write files with their texts; sounds are never opened here, so theirs is empty."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def empty_sounds(*names):
    return dict.fromkeys(names, "")


def by_name(labeled):
    return {sound.path.name: (sound.label, sound.fold) for sound in labeled.sounds}


@pytest.fixture
def esc50(tmp_path):
    table = (
        "filename,fold,target,category,esc10,src_file,take\n"
        "1-100-A-1.wav,1,1,rooster,False,100,A\n"
        "1-101-A-0.wav,1,0,dog,True,101,A\n"
        "10-102-B-0.wav,10,0,dog,True,102,B\n"
        "2-103-A-38.wav,2,38,water_drops,True,103,A\n"
    )
    names = ["1-100-A-1.wav", "1-101-A-0.wav", "10-102-B-0.wav", "2-103-A-38.wav"]
    return write_files(
        tmp_path, {"meta/esc50.csv": table} | empty_sounds(*(f"audio/{name}" for name in names))
    )


def test_esc50_has_the_order_of_its_targets_and_its_folds(esc50):
    labeled = read_labeled(esc50)
    assert labeled.classes == ("dog", "rooster", "water_drops")
    assert labeled.targets == (1, 0, 0, 2)
    assert labeled.folds == ("1", "2", "10")
    assert labeled.splits[1] == Split("2", train=(0, 1, 2), test=(3,))
    assert labeled.sounds[0] == LabeledSound(esc50 / "audio/1-100-A-1.wav", "rooster", "1")
    assert read_labeled(esc50 / "meta/esc50.csv", root=esc50 / "audio") == labeled


def test_esc10_is_the_marked_part_of_esc50(esc50):
    labeled = read_labeled(esc50, esc10=True)
    assert labeled.classes == ("dog", "water_drops")
    assert len(labeled.sounds) == 3


def test_esc_as_first_released_has_its_folds_in_the_names_and_its_order_in_the_folders(tmp_path):
    write_files(
        tmp_path, empty_sounds("101 - Dog/1-10-A.ogg", "101 - Dog/2-11-A.ogg", "002 - Rain/2-1-A.ogg")
    )
    write_files(tmp_path, {"README.md": "", ".git/x.ogg": ""})
    labeled = read_labeled(tmp_path)
    assert labeled.classes == ("Rain", "Dog")
    assert by_name(labeled)["2-11-A.ogg"] == ("Dog", "2")
    assert labeled.folds == ("1", "2")


def test_the_esc10_folder_with_authors_and_licenses_is_read():
    if not ESC10.is_dir():
        pytest.skip("ESC-10 is not part of the project, and ../shared is not there")
    labeled = read_labeled(ESC10)
    assert labeled.classes[:2] == ("dog_bark", "rain")
    assert [len(split.test) for split in labeled.splits] == [80] * 5


TUT = {
    "meta.txt": "audio/a1.wav\tbeach\ta\naudio/a2.wav\tbeach\ta\n"
    "audio/b1.wav\tbus\tb\naudio/b2.wav\tbus\tb\n",
    "evaluation_setup/fold1_train.txt": "audio/a1.wav\tbeach\naudio/b1.wav\tbus\n",
    "evaluation_setup/fold1_test.txt": "audio/a2.wav\naudio/b2.wav\n",
    "evaluation_setup/fold1_evaluate.txt": "audio/a2.wav\tbeach\naudio/b2.wav\tbus\n",
    "evaluation_setup/fold2_train.txt": "audio/b2.wav\tbus\n",  # lists may omit sounds
    "evaluation_setup/fold2_test.txt": "audio/a1.wav\n",
} | empty_sounds("audio/a1.wav", "audio/a2.wav", "audio/b1.wav", "audio/b2.wav")


def test_tut_scenes_keep_the_listed_training_and_test_sets(tmp_path):
    labeled = read_labeled(write_files(tmp_path, TUT))
    assert labeled.classes == ("beach", "bus")
    assert labeled.splits == (Split("1", (0, 2), (1, 3)), Split("2", (3,), (0,)))
    assert [sound.fold for sound in labeled.sounds] == ["2", "1", "", "1"]


def test_tau_scenes_are_tables_with_tabs_in_csv_files(tmp_path):
    write_files(
        tmp_path,
        {
            "meta.csv": "filename\tscene_label\tidentifier\naudio/a.wav\tbus\tx\naudio/b.wav\ttram\ty\n",
            "evaluation_setup/fold1_train.csv": "filename\tscene_label\naudio/a.wav\tbus\n",
            "evaluation_setup/fold1_test.csv": "filename\naudio/b.wav\n",
            "evaluation_setup/fold1_evaluate.csv": "filename\tscene_label\naudio/b.wav\ttram\n",
        }
        | empty_sounds("audio/a.wav", "audio/b.wav"),
    )
    assert read_labeled(tmp_path).splits == (Split("1", (0,), (1,)),)


def test_tut_without_setup_has_no_folds_though_its_table_has_a_third_column(tmp_path):
    files = {name: text for name, text in TUT.items() if not name.startswith("evaluation")}
    assert read_labeled(write_files(tmp_path, files)).folds == ()


@pytest.mark.parametrize("inner", ["", "scenes_stereo/"])
def test_dcase_2013_scenes_have_their_class_in_the_name(tmp_path, inner):
    labeled = read_labeled(write_files(tmp_path, empty_sounds(f"{inner}tube01.wav", f"{inner}bus10.wav")))
    assert by_name(labeled) == {"bus10.wav": ("bus", ""), "tube01.wav": ("tube", "")}


def test_dcase_2013_scenes_take_folds_from_lists_of_names(tmp_path):
    write_files(
        tmp_path,
        empty_sounds("scenes_stereo/tube01.wav", "scenes_stereo/bus01.wav", "scenes_stereo/bus02.wav"),
    )
    write_files(tmp_path, {"train.txt": "tube01.wav\nbus01.wav\n", "test.txt": "scenes_stereo/bus02.wav\n"})
    labeled = read_labeled(tmp_path)
    assert labeled.classes == ("bus", "tube")
    assert labeled.splits == (Split("1", (0, 1), (2,)),)


def test_the_lists_of_the_originals_scripts_are_read(tmp_path):
    write_files(tmp_path, empty_sounds("a/x.wav", "a/y.wav", "b/z.wav"))
    write_files(tmp_path, {"splits/train1.txt": "a/x.wav 0\nb/z.wav 10\n", "splits/test1.txt": "a/y.wav 2\n"})
    labeled = read_labeled(tmp_path)
    assert labeled.classes == ("0", "2", "10")
    assert labeled.splits == (Split("1", (0, 1), (2,)),)


def test_a_folder_for_each_class_is_enough(tmp_path):
    labeled = read_labeled(
        write_files(tmp_path, empty_sounds("tram/1.wav", "bus/1.mp3", "bus/2.mp3") | {"x.txt": ""})
    )
    assert labeled.classes == ("bus", "tram")
    assert (labeled.folds, labeled.splits) == ((), ())


@pytest.mark.parametrize(
    "text",
    [
        "# a comment\na.wav\tone\t1\r\nb.wav\ttwo\t2\n\n",
        "Path\tclass\tauthor\tfold\na.wav\tone\tX\t1\nb.wav\ttwo\tY\t2\n",
        'file,label,fold\n"a.wav",one,1\nb.wav,two,2\n',
        "\N{BOM}filename,category,fold,target\na.wav,one,1,3\nb.wav,two,2,7\n",
    ],
)
def test_a_list_may_have_tabs_or_commas_and_a_header(tmp_path, text):
    write_files(tmp_path, empty_sounds("a.wav", "b.wav") | {"list.txt": text})
    assert by_name(read_labeled(tmp_path / "list.txt")) == {"a.wav": ("one", "1"), "b.wav": ("two", "2")}


names = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\t\n\0/"), min_size=1, max_size=30
).filter(lambda name: name.strip() and not name.startswith("#") and name not in (".", ".."))
labels = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\t\n\r\0"), min_size=1, max_size=9
).map(lambda label: label.strip() or "x")


@settings(max_examples=budget(60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    listing=st.dictionaries(names, st.tuples(labels, st.sampled_from("123")), min_size=2, max_size=5).filter(
        lambda listing: (
            len({label for label, _ in listing.values()}) > 1
            and not {"file", "filename", "path"} & {name.strip().lower() for name in listing}
            # a first line that names columns is a header, however odd the list
            and all(len(name.encode()) < 200 for name in listing)
        )
    )
)
def test_reading_a_written_list_gives_the_same_sounds(tmp_path, listing):
    folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
    write_files(folder, empty_sounds(*(f"in/{name}" for name in listing)))
    lines = [f"{name}\t{label}\t{fold}" for name, (label, fold) in listing.items()]
    (folder / "list").write_bytes("\n".join(lines).encode())
    labeled = read_labeled(folder / "list", root=folder / "in")
    assert [(sound.path, sound.label, sound.fold) for sound in labeled.sounds] == [
        (folder / "in" / name, label, fold) for name, (label, fold) in listing.items()
    ]


def test_folds_sort_by_their_numbers():
    assert sorted(["fold10", "fold9", "b", "10", "9"], key=natural_sort_key) == [
        "9",
        "10",
        "b",
        "fold9",
        "fold10",
    ]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"list": ""}, "list: empty"),
        ({"list": "a\tx\nmissing\ty\n"}, r"1 of 2 sounds do not exist: \S*/missing"),
        ({"list": "\n".join(f"m{i}\tx" for i in range(9))}, r"9 of 9 sounds.*m0, \S*m1, \S*m2 and 6 more"),
        ({"list": "a\tx\nb\tx\n"}, "2 sounds of 1 classes; at least two classes"),
        ({"list": "a\tx\nb\ty\n./a\tx\n"}, "a is listed twice"),
        ({"list": "a\tx\t1\nb\ty\t1\na\tx\t2\n"}, "a is listed as x in fold 1 and as x in fold 2"),
        ({"list": "a\tx\t1\nb\ty\n"}, r"1 of 2 sounds have no fold: \S*/b; give all"),
        ({"list": "a\tx\t1\t5\n"}, "sound 1 has 4 columns; expected path<TAB>label"),
        ({"list": "a\tx\nb\n"}, r"sound 2 \(b\) has no label"),
        ({"list.csv": "a.wav,dog\nb.wav,cat\n"}, "first line must name the columns.*it has a.wav, dog"),
        ({"list": "file\tkind\na\tx\n"}, "no column for the class.*it has file, kind"),
        ({"list": "file\tlabel\ttarget\na\tx\t0\nb\tx\t1\nc\ty\t2\n"}, "x has the targets 0 and 1"),
        ({"list": "file\tlabel\ttarget\na\tx\t0\nb\ty\t0\n"}, "targets must be one number per class"),
        ({"list": "file\tlabel\ttarget\na\tx\tdog\nb\ty\t0\n"}, "targets must be one number per class"),
    ],
)
def test_invalid_lists_are_refused(tmp_path, files, message):
    write_files(tmp_path, files | empty_sounds("a", "b", "c"))
    with pytest.raises(LabeledSoundsError, match=message):
        read_labeled(tmp_path / next(iter(files)))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "neither a known data set nor a folder with a subfolder of sounds per class"),
        (empty_sounds("bus/a.wav", "tram/readme.txt"), "no sounds in tram; remove empty classes"),
        (empty_sounds("1 - Dog/1-a.ogg", "2 - Cat/b.ogg"), "1 of 2 sounds have no fold"),
        (
            TUT | {"evaluation_setup/fold1_train.txt": "audio/a2.wav\tbeach\n"},
            "fold 1 has .*a2.wav in both training and test set",
        ),
        (TUT | {"evaluation_setup/fold1_train.txt": "audio/a1.wav\tbus\n"}, "a1.wav is bus there and beach"),
        (TUT | {"evaluation_setup/fold1_train.txt": "audio/c.wav\tbus\n"}, "c.wav has no label"),
        (TUT | {"evaluation_setup/fold1_train.txt": "audio/a1.wav\naudio/a1.wav\n"}, "a1.wav listed twice"),
        (TUT | {"evaluation_setup/fold3_train.txt": "audio/a1.wav\n"}, "fold 3 has no list of its test"),
    ],
)
def test_invalid_folders_are_refused(tmp_path, files, message):
    with pytest.raises(LabeledSoundsError, match=message):
        read_labeled(write_files(tmp_path, files))


def test_esc10_needs_a_table_that_marks_it(tmp_path):
    write_files(tmp_path, empty_sounds("bus/1.wav", "tram/1.wav") | {"list": "bus/1.wav\ta\ntram/1.wav\tb\n"})
    for source in (tmp_path, tmp_path / "list"):
        with pytest.raises(LabeledSoundsError, match="esc10 column"):
            read_labeled(source, esc10=True)


def test_a_missing_source_is_named(tmp_path):
    with pytest.raises(LabeledSoundsError, match=re.escape(f"{tmp_path / 'nothing'}: No such file")):
        read_labeled(Path(tmp_path / "nothing"))
