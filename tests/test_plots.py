"""Figures show the numbers they are given, and refuse what cannot be shown."""

import json
from pathlib import Path

import numpy as np
import pytest

from modeling_encodec.demo.table import demo_clips
from modeling_encodec.evaluation.plots import (
    codebook_counts,
    mel_spectrogram_db,
    plot_audio,
    plot_codebook_use,
    plot_codes,
    plot_rate_distortion,
    plot_training,
    read_log,
    save_figure,
)


CARDS = Path(__file__).parents[1] / "model_cards"
RATE = 24000


def tone(frequency: float, samples: int = RATE) -> np.ndarray:
    return np.sin(2 * np.pi * frequency * np.arange(samples) / RATE).astype(np.float32)


def shown(figure) -> list:
    return [axis for axis in figure.axes if axis.get_visible()]


def test_a_tone_lies_in_its_band_and_a_louder_one_is_brighter():
    low, high = mel_spectrogram_db(tone(200), RATE), mel_spectrogram_db(tone(6000), RATE)
    assert low.shape == high.shape == (80, 1 + RATE // 256)
    assert low.mean(1).argmax() < 10 and high.mean(1).argmax() > 50
    louder = mel_spectrogram_db(10 * tone(200), RATE)
    assert louder.max() - low.max() == pytest.approx(20, abs=0.01)


def test_versions_stand_side_by_side_to_one_scale():
    clips = {
        "a": {"original": tone(300), "coded": 0.1 * tone(300)},
        "b": {"original": np.stack([tone(500), tone(500)])},
    }
    figure = plot_audio(clips, RATE)
    titles = [axis.get_title() for axis in shown(figure) if axis.get_title()]
    assert titles == ["a: original", "a: coded", "b: original"]
    images = [axis.images[0] for axis in shown(figure) if axis.images]
    assert len(images) == 3 and images[0].get_clim() == images[1].get_clim()
    waves = [axis for axis in shown(figure) if axis.get_ylabel() == "amplitude"]
    assert len(waves) == 2 and waves[0].get_ylim()[1] == pytest.approx(1.05, abs=0.01)  # the loudest of the clip
    assert waves[0].get_xlim() == (0, 1)
    assert len([axis for axis in shown(plot_audio(clips, RATE, waveforms=False)) if axis.images]) == 3


def test_a_waveform_of_many_samples_keeps_its_peaks():
    audio = np.zeros(500_000, np.float32)
    audio[123_456], audio[400_000] = 0.9, -0.7
    figure = plot_audio({"": {"click": audio}}, RATE)
    (path,) = figure.axes[0].collections[0].get_paths()
    assert path.vertices[:, 1].max() == pytest.approx(0.9) and path.vertices[:, 1].min() == pytest.approx(-0.7)


@pytest.mark.parametrize("audio", [np.zeros(1), np.zeros(3000), np.full((2, 700), 0.5), tone(100, 1023)])
def test_silence_and_tiny_clips_can_be_shown(audio, tmp_path):
    save_figure(plot_audio({"clip": {"only": audio}}, RATE), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("clips", [{}, {"a": {}}, {"a": {"x": np.zeros(0)}}, {"a": {"x": np.zeros((1, 2, 3))}}])
def test_what_is_no_audio_is_refused(clips):
    with pytest.raises(ValueError, match="allowed: "):
        plot_audio(clips, RATE)


def test_codes_are_the_pixels():
    codes = np.array([[0, 5, 63, -1], [1, 2, 3, 4]])
    figure = plot_codes(codes, 64, frame_rate=2)
    (image,) = figure.axes[0].images
    assert np.ma.allequal(image.get_array(), np.ma.masked_less(codes, 0)) and image.get_array().mask.sum() == 1
    assert image.get_clim() == (0, 63) and list(image.get_extent()) == [0, 2, 0.5, 2.5]
    assert image.origin == "lower"  # the first codebook is at the bottom
    assert plot_codes(np.zeros((8, 0), int), 64).axes[0].images


@pytest.mark.parametrize(
    "codes, line", [(np.zeros((1, 2, 3), int), "allowed"), (np.zeros((2, 3)), "allowed"), (np.full((2, 3), 64), "64")]
)
def test_what_are_no_codes_is_refused(codes, line):
    for function in (plot_codes, codebook_counts):
        with pytest.raises(ValueError, match=line):
            function(codes, 64)


def test_counts_add_up_and_their_entropy_is_drawn():
    codes = np.array([[0, 0, 1, 1, -1], [3, 3, 3, 3, 3]])
    counts = codebook_counts(codes, 4)
    assert counts.tolist() == [[2, 2, 0, 0], [0, 0, 0, 5]]
    left, right = plot_codebook_use(2 * counts).axes
    assert [bar.get_height() for bar in right.patches] == [1, 0]  # bits
    assert "25% to 50%" in right.get_title()
    assert np.nanmax(left.lines[0].get_ydata()) == 0.5 and np.isfinite(left.lines[0].get_ydata()).sum() == 2
    with pytest.raises(ValueError, match="codes in every codebook"):
        plot_codebook_use(np.array([[1, 2], [0, 0]]))


@pytest.mark.parametrize("log", sorted(path.name for path in CARDS.glob("*.jsonl")))
def test_every_number_of_a_log_is_a_point(log):
    records = read_log(CARDS / log)
    points = sum(
        isinstance(value, int | float) for record in records for name, value in record.items() if name != "update"
    )
    figure = plot_training(records)
    assert sum(len(line.get_xdata()) for axis in figure.axes for line in axis.lines) == points
    assert all(axis.lines for axis in shown(figure))


def test_curves_are_in_the_order_of_their_numbers_and_warnings_are_marked():
    records = [
        {"update": 10, "si_snr/12": 3.0, "si_snr/1.5": 1.0, "train/loss": None, "warnings": {}},
        {"update": 20, "si_snr/12": 4.0, "si_snr/1.5": 2.0, "train/loss": 0.5, "warnings": {"silent_output": "…"}},
    ]
    by_title = {axis.get_title(): axis for axis in plot_training(records).axes}
    assert set(by_title) == {"si_snr", "train/loss"}
    labels = [text.get_text() for text in by_title["si_snr"].get_legend().get_texts()]
    assert labels == ["1.5", "12"]
    assert by_title["si_snr"].lines[0].get_ydata().tolist() == [1.0, 2.0]
    assert by_title["train/loss"].lines[-1].get_xdata() == [20, 20]
    with pytest.raises(ValueError, match="no number"):
        plot_training([{"update": 1, "train/loss": None}])


def test_logs_are_read_up_to_where_a_kill_cut_them(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"update": 1, "a": 1}\n{"update": 2, "a"')
    assert read_log(log) == [{"update": 1, "a": 1}]
    for text in ('{"update": 1}\nno\n{"update": 2}\n', "[1]\n", '{"a": 1}\n', '{"update": 1}\nno\n'):
        log.write_text(text)
        with pytest.raises(ValueError, match="is no record of a training run"):
            read_log(log)


def test_scores_by_bitrate_are_those_of_the_evaluation():
    results = json.loads((CARDS / "encodec_24khz_c16_evaluation.json").read_bytes())
    figure = plot_rate_distortion(results)
    assert [axis.get_ylabel().split(",")[0].split(" (")[0] for axis in figure.axes] == [
        "SI-SNR",
        "ViSQOL",
        "mel distance",
    ]
    rows = [row for row in results["results"] if row["system"] == "encodec" and row["category"] == "all"]
    curve = figure.axes[0].containers[0].lines[0]
    assert curve.get_xdata().tolist() == sorted(row["measured_kbps"] for row in rows)
    means = [row["metrics"]["si_snr"]["mean"] for row in sorted(rows, key=lambda row: row["measured_kbps"])]
    assert curve.get_ydata().tolist() == means
    with pytest.raises(ValueError, match="category is 'birds', allowed: all, "):
        plot_rate_distortion(results, "birds")


def test_the_same_figure_gives_the_same_bytes(tmp_path):
    for name in "ab":
        save_figure(plot_codes(np.arange(12).reshape(2, 6), 16), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


class TestCommand:
    @pytest.fixture
    def sources(self, tmp_path, run):
        assert run("encode", demo_clips()[0], tmp_path / "a.ecdc", "--lm")[0] == 0
        assert run("tokenize", demo_clips()[0].parent, tmp_path / "tokens", "-b", "1.5")[0] == 0
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "log.jsonl").write_bytes((CARDS / "encodec_24khz_c16_second.jsonl").read_bytes())
        return [
            [*demo_clips()],
            [tmp_path / "a.ecdc"],
            [tmp_path / "tokens"],
            [tmp_path / "run"],
            [CARDS / "encodec_24khz_c16_second.jsonl"],
            [CARDS / "encodec_24khz_c16_evaluation.json"],
        ]

    def test_draws_what_it_finds(self, sources, tmp_path, run):
        pictures = []
        for paths in sources:
            out = tmp_path / "picture.png"
            code, printed, errors = run("plot", *paths, "-o", out, "--force")
            assert (code, printed.strip(), errors) == (0, str(out), [])
            pictures.append(out.read_bytes())
        assert all(picture.startswith(b"\x89PNG") for picture in pictures)
        assert pictures[3] == pictures[4]  # a run's folder, and its log
        assert len(set(pictures)) == 5

    def test_refuses_the_rest_in_one_line(self, tmp_path, run):
        (tmp_path / "empty").mkdir()
        (tmp_path / "text.wav").write_text("no audio")
        (tmp_path / "text.json").write_text("[]")
        (tmp_path / "bad.ecdc").write_bytes(b"ECDC\x01")
        (tmp_path / "old.png").write_text("keep")
        clip = demo_clips()[0]
        for arguments, line in [
            (["missing.wav", "-o", "new.png"], "no such file"),
            (["empty", "-o", "new.png"], "holds none of log.jsonl"),
            (["text.wav", "-o", "new.png"], "text.wav"),
            (["text.json", "-o", "new.png"], "is not what `evaluate` writes"),
            (["bad.ecdc", "-o", "new.png"], "header"),
            ([clip, "-o", "old.png"], "exists; --force"),
            (["bad.ecdc", clip, "-o", "new.png"], "2 paths were given, allowed: one, or audio files"),
        ]:
            code, _, errors = run("plot", *(tmp_path / name if name != "-o" else name for name in arguments))
            assert code == 2 and len(errors) == 1 and line in errors[0], errors
        assert (tmp_path / "old.png").read_text() == "keep" and not (tmp_path / "new.png").exists()
