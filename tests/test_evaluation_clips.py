"""Clips to evaluate on: folders, manifests, datasets, categories, choice."""

import io
import json

import numpy as np
import pytest
import soundfile

from modeling_encodec.evaluation.clips import Clip, list_clips, select_clips


def tone(seconds: float, rate: int = 8000) -> np.ndarray:
    return 0.5 * np.sin(np.arange(int(seconds * rate)) / 9).astype(np.float32)


@pytest.fixture
def folder(tmp_path):
    for name, seconds in (("x.wav", 1.0), ("speech/b.flac", 2.0), ("speech/a.wav", 0.5), ("music/deep/c.wav", 3.0)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / name, tone(seconds), 8000)
    (tmp_path / "notes.txt").write_text("no audio")
    return tmp_path


def test_categories_of_a_folder_are_its_folders(folder):
    clips = list_clips(folder)
    found = [(clip.name, clip.category, clip.seconds) for clip in clips]
    assert found == [
        ("music/deep/c.wav", "music", 3.0),
        ("speech/a.wav", "speech", 0.5),
        ("speech/b.flac", "speech", 2.0),
        ("x.wav", "uncategorised", 1.0),
    ]
    audio = clips[0].read(16000, 2)
    assert audio.shape == (2, 48000) and audio.dtype == np.float32


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "txt"])
def test_manifests(folder, suffix):
    rows = [{"path": "x.wav", "kind": "other", "place": "p"}, {"path": "speech/a.wav", "kind": "", "place": "q"}]
    text = {
        "jsonl": "\n".join(json.dumps(row) for row in rows) + "\n\n",
        "csv": "\ufeffpath,kind,place\nx.wav,other,p\nspeech/a.wav,,q\n",
        "txt": "x.wav\nspeech/a.wav\n",
    }[suffix]
    manifest = folder / f"list.{suffix}"
    manifest.write_text(text)
    clips = list_clips(manifest)
    assert [clip.name for clip in clips] == ["speech/a.wav", "x.wav"]
    assert [clip.category for clip in clips] == ["uncategorised", "uncategorised" if suffix == "txt" else "other"]
    if suffix != "txt":
        assert [clip.category for clip in list_clips(manifest, category="place")] == ["q", "p"]
        with pytest.raises(ValueError, match="category is 'colour', allowed: kind, path, place"):
            list_clips(manifest, category="colour")


def test_manifests_with_places_of_this_machine(folder):
    rows = [{"path": str(folder / "x.wav"), "kind": "a"}, {"path": "speech/../x.wav", "kind": "a"}]
    (folder / "music" / "list.jsonl").write_text(
        "\n".join(map(json.dumps, [rows[0], {"path": "../x.wav", "kind": "a"}]))
    )
    (clip,) = list_clips(folder / "music" / "list.jsonl")  # one file, however it is called
    assert clip.name == "../x.wav" and clip.read(8000, 1).shape == (1, 8000)
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, [rows[0], rows[1] | {"kind": "b"}])))
    with pytest.raises(ValueError, match="x.wav: is listed as 'a' and 'b', allowed: one category"):
        list_clips(folder / "list.jsonl")


def test_odd_categories_of_manifests(folder):
    for value, category in ((0, "0"), (None, "uncategorised"), ("", "uncategorised")):
        (folder / "list.jsonl").write_text(json.dumps({"path": "x.wav", "kind": value}))
        assert list_clips(folder / "list.jsonl")[0].category == category
    for text, message in (
        (json.dumps({"path": "x.wav", "kind": ["x"]}), "x.wav: category is a list, allowed: text"),
        (json.dumps({"path": "x.wav", "kind": "a\nb"}), r"is called 'a\\nb', allowed: printable text"),
    ):
        (folder / "list.jsonl").write_text(text)
        with pytest.raises(ValueError, match=message):
            list_clips(folder / "list.jsonl")
    (folder / "list.csv").write_text("path,kind\nx.wav,a,extra\n")
    with pytest.raises(ValueError, match="more values than there are columns"):
        list_clips(folder / "list.csv", category="nix")


def test_names_that_are_no_text(folder):
    source = str(folder).encode() + b"/\xff.wav"
    try:
        soundfile.write(source, tone(1), 8000, format="WAV")
    except (OSError, soundfile.LibsndfileError):
        pytest.skip("the file system takes no such name")
    with pytest.raises(ValueError, match=r"a clip or category is called '\\udcff.wav', allowed: printable text"):
        list_clips(folder)


def test_classes_and_nothing_in_a_dataset(folder):
    datasets = pytest.importorskip("datasets")
    encoded = {"bytes": (folder / "x.wav").read_bytes(), "path": None}
    features = datasets.Features(
        {"audio": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
         "kind": datasets.ClassLabel(names=["talk", "song"])}
    )  # fmt: skip
    rows = {"audio": [encoded, encoded, None], "kind": [1, None, 0]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(folder / "saved")
    clips = list_clips(folder / "saved")
    assert [clip.category for clip in clips] == ["song", "uncategorised", "talk"]
    with pytest.raises(ValueError, match=r"^saved, row 000002: audio is a "):
        clips[2].read(8000, 1)


def test_a_dataset_is_read_without_its_own_decoder(folder):
    datasets = pytest.importorskip("datasets")
    encoded = []
    for name in ("x.wav", "speech/a.wav"):
        encoded.append({"bytes": (folder / name).read_bytes(), "path": None})
    rows = {"audio": encoded, "domain": ["speech", "music"]}
    made = datasets.DatasetDict({"test": datasets.Dataset.from_dict(rows), "train": datasets.Dataset.from_dict(rows)})
    made.save_to_disk(folder / "saved")
    clips = list_clips(folder / "saved")
    assert [(clip.name, clip.category, clip.seconds) for clip in clips] == [
        ("saved, row 000000", "speech", 1.0),
        ("saved, row 000001", "music", 0.5),
    ]
    expected, _ = soundfile.read(io.BytesIO(encoded[1]["bytes"]), dtype="float32")
    np.testing.assert_array_equal(clips[1].read(8000, 1)[0], expected)
    with pytest.raises(ValueError, match="split is 'validation', allowed: test, train"):
        list_clips(folder / "saved", split="validation")
    with pytest.raises(ValueError, match="column is 'sound', allowed: audio, domain"):
        list_clips(folder / "saved", column="sound")


def test_the_middle_of_long_clips(folder):
    (clip,) = select_clips([clip for clip in list_clips(folder) if clip.category == "music"], most_seconds=1.0)
    whole = list_clips(folder)[0].read(8000, 1)
    np.testing.assert_array_equal(clip.read(8000, 1), whole[:, 8000:16000])
    assert clip.seconds == 1.0 and clip.read(24000, 1).shape == (1, 24000)


def test_choice_is_by_seed_and_category_alone():
    clips = [Clip(f"{kind}{number}", kind, 1.0 + number, "") for kind in "abc" for number in range(20)]
    chosen = select_clips(clips, most=5, least_seconds=3.0)
    assert [sum(clip.category == kind for clip in chosen) for kind in "abc"] == [5, 5, 5]
    assert all(clip.seconds >= 3 for clip in chosen) and chosen == [clip for clip in clips if clip in chosen]
    of_a = [clip for clip in chosen if clip.category == "a"]
    assert select_clips([clip for clip in clips if clip.category == "a"], most=5, least_seconds=3.0) == of_a
    assert select_clips(clips, most=5, least_seconds=3.0, seed=1) != chosen
    assert len(select_clips(clips, most=None)) == 60


def test_refusals(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder, manifest or dataset"):
        list_clips(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no clips, allowed: at least one"):
        list_clips(tmp_path / "empty")
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "all").mkdir()
    soundfile.write(tmp_path / "all" / "all" / "a.wav", tone(1), 8000)
    with pytest.raises(ValueError, match="category is 'all', allowed: other names"):
        list_clips(tmp_path / "all")
    for content in ('{"file": "x.wav"}', "[1]", "{", '{"path": 3}'):
        (folder / "bad.jsonl").write_text(content)
        with pytest.raises(ValueError, match="no manifest .*allowed: a path in every row"):
            list_clips(folder / "bad.jsonl")
    with pytest.raises(ValueError, match="notes.md: no manifest, allowed: .jsonl, .csv, .txt"):
        (folder / "notes.md").write_text("")
        list_clips(folder / "notes.md")


def test_a_clip_that_is_gone_is_named_without_its_place(folder):
    clip = list_clips(folder)[0]
    (folder / clip.name).unlink()
    with pytest.raises(ValueError, match=r"^music/deep/c.wav: no such file$"):
        clip.read(8000, 1)
