"""Listening tests: anonymous, equally loud, the same for the same seed; and analysed as a panel made up says."""

import hashlib
import json
import random
import sys

import numpy as np
import pytest
import soundfile
import yaml
from mushra_panel import MEANS, SYSTEMS, made_clips, rate, write_key, write_results
from scipy.stats import t

from modeling_encodec.commands.mushra import mushra
from modeling_encodec.evaluation.mushra_analysis import analyse_mushra, mushra_table, save_mushra
from modeling_encodec.evaluation.mushra_key import read_key
from modeling_encodec.evaluation.mushra_preparation import prepare_mushra
from modeling_encodec.evaluation.mushra_results import read_ratings
from modeling_encodec.evaluation.mushra_stimuli import find_excerpt, low_pass, low_pass_filter


RATE = 24000
CODERS = {"codec_low": lambda audio: 0.3 * audio, "codec_high": lambda audio: np.tanh(8 * audio)}


def prepare(folder, **options):
    options = {"sampling_rate": RATE, "samples": 4, "seconds": 1.0, "per_listener": 3} | options
    return prepare_mushra(
        options.pop("clips", None) or made_clips(), options.pop("systems", CODERS), folder, **options
    )


def contents(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A test of 8 trials in 3 sessions: its folder and key."""
    folder = tmp_path_factory.mktemp("mushra") / "test"
    return folder, prepare(folder)


# ---- preparation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate_", [16000, 24000, 32000, 44100, 48000])
def test_anchors_filter_as_bs1534_says(rate_):
    for cutoff in (3500, 7000):
        taps = low_pass_filter(cutoff, rate_)
        gains = 20 * np.log10(np.abs(np.fft.rfft(taps, 1 << 17)) + 1e-12)
        frequencies = np.fft.rfftfreq(1 << 17, 1 / rate_)
        assert np.abs(gains[frequencies <= cutoff]).max() < 0.1
        assert gains[frequencies >= cutoff + 500].max() < -25
        assert gains[frequencies >= cutoff + 1000].max(initial=-99) < -50
        np.testing.assert_allclose(taps, taps[::-1], atol=1e-12)  # linear phase


def test_anchors_have_no_delay_and_keep_the_length():
    time = np.arange(RATE) / RATE
    low, high = (0.3 * np.sin(2 * np.pi * hertz * time)[None].astype(np.float32) for hertz in (1000, 5000))
    filtered = low_pass(np.concatenate([low + high, high]), 3500, RATE)
    assert filtered.shape == (2, RATE) and filtered.dtype == np.float32
    np.testing.assert_allclose(filtered[0, 1000:-1000], low[0, 1000:-1000], atol=0.003)
    assert np.abs(filtered[1, 1000:-1000]).max() < 0.001


def test_served_files_are_anonymous(made):
    folder, key = made
    served = folder / "webmushra"
    waves = sorted(served.glob("stimuli/*.wav"))
    assert len(waves) == 8 * 5
    assert len({(path.stat().st_size, path.read_bytes()[:44]) for path in waves}) == 1
    info = soundfile.info(waves[0])
    assert (info.subtype, info.samplerate, info.channels, info.frames) == ("PCM_16", RATE, 1, RATE)
    texts = [str(path.relative_to(served)) for path in served.rglob("*")]
    texts += [path.read_text() for path in served.glob("configs/*")]
    for text in texts:
        text = text.replace("createAnchor", "").lower()
        assert not [secret for secret in ("codec", "anchor", "speech", "music", "hidden") if secret in text]
    assert {path.name for path in folder.iterdir()} == {"key.json", "README.md", "webmushra"}
    behind = [{label: one["system"] for label, one in trial["stimuli"].items()} for trial in key["trials"]]
    assert all(sorted(labels.values()) == sorted([*CODERS, "anchor35", "anchor70"]) for labels in behind)
    assert len({tuple(labels.values()) for labels in behind}) > 4  # another order in other trials


def test_sessions_are_webmushra_files_and_share_the_trials_out(made):
    folder, key = made
    categories = {trial["id"]: trial["category"] for trial in key["trials"]}
    stimuli = {trial["id"]: trial for trial in key["trials"]}
    configs = sorted((folder / "webmushra/configs").iterdir())
    assert [path.name for path in configs] == [session["config"] for session in key["sessions"]]
    seen, files = [], set()
    for path, session in zip(configs, key["sessions"]):
        text = path.read_text()
        assert "- -" not in text  # which webMUSHRA's parser may not know
        config = yaml.safe_load(text)
        assert config["testId"] == key["test_id"] and config["remoteService"] == "service/write.php"
        assert config["bufferSize"] == 2048 and config["stopOnErrors"] is True
        first, (word, *pages), last = config["pages"]
        assert (first["type"], word, last["type"], last["writeResults"]) == ("generic", "random", "finish", True)
        assert last["questionnaire"][0]["name"] == "listener" and last["showResults"] is False
        assert len(pages) <= 3 and [page["id"] for page in pages] == session["trials"] and session["listeners"] == 10
        for page in pages:
            assert (page["type"], page["createAnchor35"], page["createAnchor70"]) == ("mushra", False, False)
            assert page["randomize"] is True and page["reference"] == stimuli[page["id"]]["reference"]
            named = {label: one["file"] for label, one in stimuli[page["id"]]["stimuli"].items()}
            assert page["stimuli"] == named and page["reference"] not in named.values()
            files |= {page["reference"], *named.values()}
        seen += session["trials"]
        counts = [sum(categories[one] == name for one in session["trials"]) for name in ("speech", "music")]
        assert max(counts) - min(counts) <= 1
        assert f"?config={session['config']}` | {len(pages)} | 10 |" in (folder / "README.md").read_text()
    assert sorted(seen) == sorted(categories) and len(set(seen)) == len(seen)
    assert files == {f"stimuli/{path.name}" for path in (folder / "webmushra/stimuli").iterdir()}


def test_files_are_what_the_key_says(made):
    folder, key = made
    clips = {clip.name: clip for clip in made_clips()}
    for trial in key["trials"]:
        start = round(trial["start_seconds"] * RATE)
        reference = clips[trial["clip"]].audio[:, start : start + RATE]
        versions = {one["system"]: one for one in trial["stimuli"].values()}
        expected = {name: code(reference) for name, code in CODERS.items()}
        expected |= {"anchor35": low_pass(reference, 3500, RATE), "anchor70": low_pass(reference, 7000, RATE)}
        for name, audio in expected.items():
            written, _ = soundfile.read(folder / "webmushra" / versions[name]["file"], always_2d=True)
            np.testing.assert_allclose(written.T, audio * 10 ** (versions[name]["gain_db"] / 20), atol=2e-4)


@pytest.mark.parametrize("loudness, scaled", [(0.25, False), (4.0, True)])
def test_every_stimulus_of_a_trial_is_equally_loud_and_none_clips(tmp_path, loudness, scaled):
    clips = made_clips({"speech": 2})
    for clip in clips:
        clip.audio = np.clip(loudness * clip.audio, -0.95, 0.95)
    spiky = {"spiky": lambda audio: audio**3, "soft": lambda audio: 0.01 * audio, "none": lambda audio: 0 * audio}
    key = prepare(tmp_path / "test", clips=clips, systems=spiky, samples=2)
    for trial in key["trials"]:
        files = {one["system"]: one["file"] for one in trial["stimuli"].values()} | {"reference": trial["reference"]}
        audio = {name: soundfile.read(tmp_path / "test/webmushra" / file)[0] for name, file in files.items()}
        assert not audio.pop("none").any()
        levels = {name: np.sqrt(np.mean(one**2)) for name, one in audio.items()}
        assert max(levels.values()) / min(levels.values()) < 1.001
        assert max(np.abs(one).max() for one in audio.values()) < 0.9901
        assert (trial["gain_db"] < -1) == scaled
        if not scaled:
            assert levels["reference"] == pytest.approx(0.025, rel=0.02) and trial["gain_db"] == 0


def test_excerpts_hold_sound():
    audio = np.zeros((1, 10 * RATE), np.float32)
    audio[:, 6 * RATE : 8 * RATE] = 0.1 * np.random.default_rng(0).standard_normal(2 * RATE)
    audio += 1e-5
    starts = [find_excerpt(audio, 2 * RATE, RATE, np.random.default_rng(seed)) for seed in range(40)]
    assert min(starts) >= 5 * RATE and max(starts) <= 7 * RATE and len(set(starts)) > 10
    assert find_excerpt(audio[:, : 5 * RATE], 2 * RATE, RATE, np.random.default_rng(0)) is None  # -100 dBFS
    assert find_excerpt(audio, 10 * RATE + 1, RATE, np.random.default_rng(0)) is None
    whole = audio[:, 6 * RATE : 8 * RATE]
    assert find_excerpt(whole, 2 * RATE, RATE, np.random.default_rng(0)) == 0


def test_the_seed_decides(tmp_path, made):
    folder, key = made
    clips = made_clips()
    assert prepare(tmp_path / "again", clips=clips[::-1]) == key and contents(tmp_path / "again") == contents(folder)
    other = prepare(tmp_path / "other", seed=1)

    def places(test):
        return {(trial["clip"], trial["start_seconds"]) for trial in test["trials"]}

    assert places(other) != places(key)
    assert not contents(tmp_path / "other").keys() & contents(folder).keys() - {"key.json", "README.md"}
    renamed = prepare(tmp_path / "renamed", systems={"a": CODERS["codec_low"], "b": CODERS["codec_high"]})
    assert places(renamed) == places(key) and renamed["test_id"] != key["test_id"]


def test_stereo_at_48_khz_and_no_mid_anchor_at_8_khz(tmp_path):
    clips = made_clips({"music": 1}, rate=48000)
    prepare(tmp_path / "48", clips=clips, samples=1, sampling_rate=48000, channels=2)
    info = soundfile.info(next((tmp_path / "48").rglob("*.wav")))
    assert (info.samplerate, info.channels, info.frames) == (48000, 2, 48000)
    key = prepare(tmp_path / "8", clips=made_clips({"music": 1}, rate=8000), samples=1, sampling_rate=8000)
    assert key["systems"] == ["reference", *CODERS, "anchor35"]
    assert len(list((tmp_path / "8").rglob("*.wav"))) == 4


def test_few_clips_are_an_error_or_taken_on_request(tmp_path):
    clips = made_clips({"music": 6, "speech": 3})
    clips[-1].audio = clips[-1].audio[:, : RATE // 2]
    clips[-2].audio = 0 * clips[-2].audio
    with pytest.raises(ValueError, match=r"samples is 4, allowed for category 'speech': 1 to 1\b.*allow_fewer"):
        prepare(tmp_path / "test", clips=clips)
    assert not list(tmp_path.iterdir())
    key = prepare(tmp_path / "test", clips=clips, allow_fewer=True)
    counts = [sum(trial["category"] == name for trial in key["trials"]) for name in ("music", "speech")]
    assert counts == [4, 1] and len({trial["clip"] for trial in key["trials"]}) == 5
    with pytest.raises(ValueError, match="no clip of 1 s with sound"):
        prepare(tmp_path / "none", clips=clips[-2:], allow_fewer=True)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"samples": 0}, "samples is 0, allowed: 1 or more"),
        ({"per_listener": 0}, "per_listener is 0, allowed"),
        ({"annotations": 0}, "annotations is 0, allowed"),
        ({"seed": -1}, "seed is -1, allowed: 0 or more"),
        ({"seconds": 13.0}, "seconds is 13, allowed: 0.1 to 12"),
        ({"seconds": float("nan")}, "seconds is nan, allowed"),
        ({"sampling_rate": 6000}, "sampling_rate is 6000 Hz, allowed: 8000 or more"),
        ({"systems": {}}, "0 systems, allowed: 1 to 9"),
        ({"systems": {str(n): abs for n in range(10)}}, "10 systems, allowed: 1 to 9"),
        ({"systems": {"anchor35": abs}}, "called 'anchor35', allowed: anything but"),
        (
            {"systems": {"short": lambda audio: audio[:, 1:]}},
            r"'short' gave audio \(1, 23999\), allowed.*\(1, 24000\)",
        ),
        ({"systems": {"bad": lambda audio: audio * np.nan}}, "'bad' gave audio .*allowed: finite"),
    ],
)
def test_what_cannot_be_prepared_leaves_nothing(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path / "test", **options)
    assert not list(tmp_path.iterdir())


def test_only_a_listening_test_is_replaced_and_only_by_force(tmp_path):
    folder = tmp_path / "test"
    prepare(folder, samples=1)
    before = contents(folder)
    with pytest.raises(FileExistsError, match="test exists"):
        prepare(folder, samples=2)
    with pytest.raises(ValueError, match="'short' gave"):
        prepare(folder, systems={"short": lambda audio: audio[:, 1:]}, force=True)
    assert contents(folder) == before
    prepare(folder, samples=2, force=True)
    assert len(list(folder.rglob("*.wav"))) == 2 * 2 * 5 and [path.name for path in tmp_path.iterdir()] == ["test"]
    (folder / "ratings.csv").touch()
    with pytest.raises(FileExistsError, match=r"holds ratings.csv, allowed"):
        prepare(folder, samples=1, force=True)
    assert (folder / "ratings.csv").exists()


# ---- analysis --------------------------------------------------------------------------------------------------

OFFSETS = [-4, -3, -2, -1, 0, 0, 1, 2, 3, 4]  # ten honest annotators, right on average
CHEATERS = {
    # annotator: (scores of the first of ten trials, whether the rule drops them)
    "hides 1": ({"reference": [89]}, False),
    "hides 2": ({"reference": [89, 0]}, True),  # exactly 20 %
    "hides 3": ({"reference": [89, 89, 89]}, True),
    "at 90": ({"reference": [90] * 10}, False),  # not below
    "anchor 5": ({"anchor35": [81] * 5}, False),  # exactly 50 %
    "anchor 6": ({"anchor35": [81] * 6}, True),
    "at 80": ({"anchor35": [80] * 10}, False),  # not above
    "mid anchor": ({"anchor70": [100] * 10}, False),  # of which the rule says nothing
    "both": ({"reference": [0] * 10, "anchor35": [100] * 10}, True),
}
DROPPED = {name for name, (_, dropped) in CHEATERS.items() if dropped}


@pytest.fixture
def panel(tmp_path):
    """Key, its file, and the rows of ten honest annotators and all cheaters."""
    key = write_key(tmp_path / "key.json")
    rows = [row for number, offset in enumerate(OFFSETS) for row in rate(key, f"honest {number}", offset=offset)]
    rows += [row for name, (odd, _) in CHEATERS.items() for row in rate(key, name, odd=odd)]
    return key, tmp_path / "key.json", rows


def independent(key, rows, system, category=None):
    """Mean and t interval of those who are to stay, computed another way."""
    scores = []
    for row in rows:
        trial = next(one for one in key["trials"] if one["id"] == row["trial_id"])
        label = row["rating_stimulus"]
        behind = "reference" if label == "reference" else trial["stimuli"][label]["system"]
        if behind == system and row["listener"] not in DROPPED and category in (None, trial["category"]):
            scores.append(float(row["rating_score"]))
    error = np.std(scores, ddof=1) / np.sqrt(len(scores))
    low, high = t.interval(0.95, len(scores) - 1, loc=np.mean(scores), scale=error)
    return np.mean(scores), low, high, len(scores)


def test_cheaters_are_dropped_and_means_and_intervals_are_right(tmp_path, panel):
    key, key_file, rows = panel
    report = analyse_mushra([write_results(tmp_path / "all.csv", rows)], key_file)
    dropped = {one["annotator"]: one for one in report["annotators"]["dropped"]}
    assert dropped.keys() == DROPPED
    assert report["annotators"]["all"] == 19 and report["annotators"]["kept"] == 15
    assert dropped["hides 2"]["reference_below"] == 0.2 and dropped["anchor 6"]["low_anchor_above"] == 0.6
    assert dropped["hides 2"]["reasons"] == ["hidden reference below 90 in 20% of 10 cases"]
    assert dropped["anchor 6"]["reasons"] == ["low anchor above 80 in 60% of 10 cases"]
    assert len(dropped["both"]["reasons"]) == 2
    assert list(report["systems"]) == SYSTEMS and report["categories"] == ["music", "speech"]
    for system, found in report["systems"].items():
        for category, interval in [(None, found["all"]), *found["categories"].items()]:
            expected = independent(key, rows, system, category)
            np.testing.assert_allclose([interval[name] for name in ("mean", "low", "high", "count")], expected)
    assert report["annotations"] == {
        "needed": 10,
        "minimum": 15,
        "median": 15,
        "samples": 10,
        "samples_with_fewer": [],
    }
    assert report["interval"]["over"] == "ratings" and "20%" in report["screening"]


def test_order_of_rows_and_files_and_spreadsheets_do_not_matter(tmp_path, panel):
    _, key_file, rows = panel
    whole = analyse_mushra([write_results(tmp_path / "all.csv", rows)], key_file)
    random.Random(0).shuffle(rows)
    first = write_results(tmp_path / "first.csv", rows[:300], delimiter=";", encoding="utf-8-sig")
    second = write_results(tmp_path / "second.csv", rows[300:])
    assert analyse_mushra([first, second], key_file) == whole
    assert analyse_mushra([second, first], key_file) == whole
    assert read_ratings([first, second], read_key(key_file)) == read_ratings([second, first], read_key(key_file))
    anonymous = write_results(tmp_path / "uuid.csv", rows, columns=list(dict.fromkeys(rows[0].keys() - {"listener"})))
    report = analyse_mushra([anonymous], key_file)
    assert {one["annotator"] for one in report["annotators"]["dropped"]} == {f"uuid of {name}" for name in DROPPED}
    assert report["systems"] == whole["systems"]
    with_uuid = analyse_mushra([first, second], key_file, annotator="session_uuid")
    assert with_uuid["systems"] == whole["systems"]


def test_intervals_over_samples_and_annotators(tmp_path):
    key = write_key(tmp_path / "key.json")
    rows = [row for number, offset in enumerate(OFFSETS) for row in rate(key, f"honest {number}", offset=offset)]
    file = write_results(tmp_path / "all.csv", rows)

    def good(over):
        return analyse_mushra([file], tmp_path / "key.json", over=over)["systems"]["good"]["all"]

    assert good("ratings")["count"] == 100
    samples = good("samples")  # of which each has the same mean
    assert samples == {"mean": 70, "low": 70, "high": 70, "count": 10}
    annotators = good("annotators")
    half = t.ppf(0.975, 9) * np.std(OFFSETS, ddof=1) / np.sqrt(10)
    assert annotators["count"] == 10 and annotators["high"] == pytest.approx(70 + half)
    assert annotators["high"] - annotators["low"] > good("ratings")["high"] - good("ratings")["low"]
    with pytest.raises(ValueError, match="over is 'x', allowed: ratings, samples, annotators"):
        good("x")


def test_too_few_annotations_after_the_screening(tmp_path):
    key = write_key(tmp_path / "key.json")
    rows = [row for number, offset in enumerate(OFFSETS) for row in rate(key, f"honest {number}", offset=offset)]
    rows = [row for row in rows if (row["listener"], row["trial_id"]) != ("honest 3", "t4")]
    rows += rate(key, "cheater", odd={"reference": [0] * 10})
    file = write_results(tmp_path / "all.csv", rows)
    with pytest.raises(
        ValueError, match=r"1 of 10 samples .*fewer than 10 .*t4 \(speech, clip4\) 9; allowed.*allow_fewer"
    ):
        analyse_mushra([file], tmp_path / "key.json")
    short = analyse_mushra([file], tmp_path / "key.json", allow_fewer=True)["annotations"]
    assert short["samples_with_fewer"] == [{"trial": "t4", "category": "speech", "clip": "clip4", "annotations": 9}]
    assert (short["minimum"], short["median"]) == (9, 10)
    analyse_mushra([file], tmp_path / "key.json", annotations=9)
    only_cheater = write_results(tmp_path / "cheater.csv", rate(key, "cheater", odd={"reference": [0] * 10}))
    with pytest.raises(ValueError, match="all 1 annotators are dropped"):
        analyse_mushra([only_cheater], tmp_path / "key.json", allow_fewer=True)
    speech = [row for row in rate(key, "one") if row["trial_id"] == "t0"]
    report = analyse_mushra([write_results(tmp_path / "one.csv", speech)], tmp_path / "key.json", allow_fewer=True)
    good = report["systems"]["good"]
    assert good == {"all": (one := {"mean": 70, "low": None, "high": None, "count": 1}), "categories": {"speech": one}}
    assert mushra_table(report)[2].split() == ["good", "70.0", "-", "70.0"]
    save_mushra(report, tmp_path / "out")
    assert json.loads((tmp_path / "out/mushra.json").read_text()) == report


def changed(**values):
    return lambda rows: rows[7].update(values)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda rows: rows.append(rows[7]),
            "row 52: annotator 'a' rated .* of trial t1 before .*row 9.*allowed: once",
        ),
        (lambda rows: rows.pop(7), "row 7: annotator 'a' rated 4 of 5 stimuli of trial t1, missing: C0"),
        (changed(rating_score="101"), "row 9: rating_score is '101', allowed: 0 to 100"),
        (changed(rating_score="-1"), "row 9: rating_score is '-1', allowed"),
        (changed(rating_score="nan"), "row 9: rating_score is 'nan', allowed"),
        (changed(rating_score="57,5"), "row 9: rating_score is '57,5', allowed"),
        (changed(trial_id="t99"), "row 9: trial_id is 't99', allowed: one of the key's 10 trials"),
        (changed(rating_stimulus="C77"), "row 9: rating_stimulus is 'C77', allowed: reference, C01"),
        (changed(session_test_id="mushra-0b"), "row 9: is of the test 'mushra-0b', allowed: 'mushra-0a'"),
        (changed(listener=" "), "row 9: listener is empty"),
        (lambda rows: rows.clear(), "holds no ratings"),
    ],
)
def test_wrong_ratings_are_named(tmp_path, change, message):
    key = write_key(tmp_path / "key.json")
    rows = rate(key, "a")
    change(rows)
    with pytest.raises(ValueError, match=message) as error:
        analyse_mushra([write_results(tmp_path / "r.csv", rows)], tmp_path / "key.json", annotations=1)
    assert "r.csv" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "r.csv: holds no ratings"),
        (b"a,b\n1,2\n", "r.csv: has no column 'session_test_id', but a, b"),
        (b"session_test_id,trial_id,rating_stimulus,rating_score\nx,y,z,1\n", "has no column 'listener'"),
        (b"session_test_id,listener,trial_id,rating_stimulus,rating_score\nx,y\n", "row 2: has 2 values, allowed: 5"),
        ("ü,b\n".encode("utf-16"), "r.csv: not readable, allowed: the CSV"),
    ],
)
def test_files_that_are_no_results(tmp_path, content, message):
    write_key(tmp_path / "key.json")
    (tmp_path / "r.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        analyse_mushra([tmp_path / "r.csv"], tmp_path / "key.json")
    for wrong in ("[]", '{"format": 1}', "x"):
        (tmp_path / "key.json").write_text(wrong)
        with pytest.raises(ValueError, match="is no key of a listening test"):
            analyse_mushra([tmp_path / "r.csv"], tmp_path / "key.json")
    (tmp_path / "key.json").write_text('{"format": 9}')
    with pytest.raises(ValueError, match="key of format 9, allowed: 1"):
        analyse_mushra([tmp_path / "r.csv"], tmp_path / "key.json")


def test_without_matplotlib_one_line_and_no_files(tmp_path, panel, monkeypatch):
    _, key_file, rows = panel
    report = analyse_mushra([write_results(tmp_path / "all.csv", rows)], key_file)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="plots need matplotlib: pip install"):
        save_mushra(report, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- both, and the commands ------------------------------------------------------------------------------------


def test_from_clips_to_the_means_that_were_planted(tmp_path, made):
    folder, key = made
    means = dict(MEANS, codec_low=33, codec_high=77)
    rows = [row for n, offset in enumerate(OFFSETS) for row in rate(key, f"p{n}", offset=offset, means=means)]
    file = write_results(tmp_path / "mushra.csv", rows)
    report = analyse_mushra([file], folder / "key.json")
    assert {name: found["all"]["mean"] for name, found in report["systems"].items()} == {
        name: means[name] for name in ("reference", "codec_low", "codec_high", "anchor35", "anchor70")
    }


def test_commands(tmp_path, small_models, capsys):
    model = tmp_path / "model"
    small_models["24khz"].save_pretrained(model)
    for clip in made_clips({"speech": 2, "music": 2}):
        (tmp_path / "data" / clip.category).mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / "data" / clip.category / f"{clip.name}.wav", clip.audio.T, RATE)

    def run(*arguments):
        mushra(args=[str(argument) for argument in arguments], standalone_mode=False)
        return capsys.readouterr()

    arguments = ["prepare", model, tmp_path / "data", tmp_path / "out", "-b", 0.9, "-b", 3.6, "--seconds", 1]
    said = run(*arguments, "--samples", 2, "--systems", "opus@6").out.splitlines()
    assert said[:3] == ["music: 2 samples", "speech: 2 samples", "1 sessions of up to 10 samples, 10 listeners each"]
    with pytest.raises(FileExistsError, match="--force replaces"):
        run(*arguments)
    key = json.loads((tmp_path / "out/key.json").read_text())
    names = [name for name in key["systems"] if "opus" not in name and "original" not in name]
    assert names == ["reference", "encodec@0.9", "encodec@3.6", "anchor35", "anchor70"]

    means = dict.fromkeys(key["systems"], 50) | {"reference": 97, "encodec@0.9": 41, "encodec@3.6": 62, "anchor35": 9}
    rows = [row for n, offset in enumerate(OFFSETS) for row in rate(key, f"p{n}", offset=offset / 2, means=means)]
    rows += rate(key, "cheater", odd={"anchor35": [100] * 4}, means=means)
    file = write_results(tmp_path / "mushra.csv", rows)
    arguments = ["analyse", file, "--key", tmp_path / "out/key.json", "--out", tmp_path / "results"]
    printed = run(*arguments)
    assert printed.err == "dropped cheater: low anchor above 80 in 100% of 4 cases\n"
    half = t.ppf(0.975, 39) * np.std(np.repeat(OFFSETS, 4) / 2, ddof=1) / np.sqrt(40)
    line = next(line for line in printed.out.splitlines() if line.startswith("encodec@3.6"))
    assert line.split()[1:4] == ["62.0", "±", f"{half:.1f}"]
    assert "10 of 11 annotators, 10 to a sample at least" in printed.out
    assert (tmp_path / "results/mushra.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "results/mushra.json").read_text())
    assert report["systems"]["encodec@0.9"]["categories"]["music"]["mean"] == 41
    with pytest.raises(FileExistsError, match="--force overwrites"):
        run(*arguments)
    run(*arguments, "--force")
