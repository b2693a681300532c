"""Recipes: those shipped, what a wrong one is told, and the corpora that come from Debian's packages."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile

from modeling_encodec.examples.debian_corpora import (
    DOMAINS,
    PACKAGES,
    TRAINING_ALONE,
    download,
    held_out,
    kind_of,
    main,
    prepare,
    read_packaged_audio,
)
from modeling_encodec.training.configuration import TrainingConfig, load_config
from modeling_encodec.training.options import recipe_names


RATE = 44100
GAME = "usr/share/games/hedgewars/Data"
DEBIAN_MANIFESTS = ["corpora/speech.jsonl", "corpora/words.jsonl", "corpora/music.jsonl", "corpora/sounds.jsonl"]


def test_recipe_names():
    assert recipe_names(TrainingConfig) == [
        "c16_debian",
        "c16_debian_gpu",
        "debian_24khz",
        "paper_24khz",
        "paper_48khz",
    ]


@pytest.mark.parametrize("name", recipe_names(TrainingConfig))
def test_recipes_load_and_take_overrides(name):
    config = load_config(name, seed=7, output="elsewhere")
    assert (config.seed, config.output) == (7, "elsewhere")
    assert config.corpora and all(corpus.licence for corpus in config.corpora)


def test_paper_24khz_holds_the_papers_numbers():
    config = load_config("paper_24khz")
    assert (config.architecture, config.epochs, config.updates_per_epoch, config.updates) == (
        "24khz", 300, 2000, 600_000,
    )  # fmt: skip
    assert (config.batch_size, config.segment_seconds) == (64, 1.0)
    assert (config.learning_rate, config.discriminator_learning_rate, config.beta1, config.beta2) == (
        3e-4, 3e-4, 0.5, 0.9,
    )  # fmt: skip
    weights = (config.waveform_weight, config.mel_weight, config.adversarial_weight, config.feature_weight)
    assert weights == (0.1, 1, 3, 3)
    assert (config.balancer, config.balancer_decay, config.discriminator_chance) == (True, 0.999, 2 / 3)
    chances = (config.chance_of_music, config.chance_of_other, config.chance_of_two, config.chance_of_three)
    assert chances == (0.32, 0.32, 0.24, 0.12)
    assert (config.gain_min, config.gain_max, config.reverberation_chance) == (-10, 6, 0.2)
    assert config.impulse_responses
    assert [(corpus.name, corpus.domain, corpus.weight) for corpus in config.corpora] == [
        ("common_voice_7", "speech", 9096),
        ("dns4_speech", "speech", 2425),
        ("audioset", "general", 4989),
        ("fsd50k", "general", 108),
        ("jamendo", "music", 919),
    ]


def test_paper_48khz_holds_the_papers_numbers():
    config = load_config("paper_48khz")
    assert (config.architecture, config.updates, config.batch_size, config.segment_seconds) == (
        "48khz", 600_000, 64, 1.0,
    )  # fmt: skip
    weights = (config.waveform_weight, config.mel_weight, config.adversarial_weight, config.feature_weight)
    assert weights == (0.1, 1, 4, 4)
    assert (config.learning_rate, config.beta1, config.beta2) == (3e-4, 0.5, 0.9)
    assert (config.balancer_decay, config.discriminator_chance) == (0.999, 0.5)
    assert [(corpus.name, corpus.domain) for corpus in config.corpora] == [("jamendo", "music")]
    assert config.chance_of_music == 1


def test_debian_recipes_name_what_the_command_writes():
    for name in ("c16_debian", "c16_debian_gpu", "debian_24khz"):
        config = load_config(name)
        assert [corpus.source for corpus in config.corpora] == DEBIAN_MANIFESTS
        assert {corpus.name: corpus.domain for corpus in config.corpora} == DOMAINS
        assert config.validation == config.listening == "corpora/held_out.jsonl"
    config = load_config("c16_debian")
    assert (config.architecture, config.batch_size, config.discriminator_filters) == ("c16", 8, 16)
    paper, debian = load_config("paper_24khz"), load_config("debian_24khz")
    for option in ("architecture", "updates", "batch_size", "segment_seconds", "learning_rate", "beta1", "beta2",
                   "waveform_weight", "mel_weight", "adversarial_weight", "feature_weight", "commitment_weight",
                   "balancer_decay", "discriminator_chance", "discriminator_filters", "gain_min", "gain_max",
                   "chance_of_music", "chance_of_other", "chance_of_two", "chance_of_three"):  # fmt: skip
        assert getattr(debian, option) == getattr(paper, option), option


CORPUS = '[[corpora]]\nname = "a"\nsource = "a"\n'
WRONG = {
    "option": ("epoch = 3", "option 'epoch' does not exist, allowed: .*epochs"),
    "type": ('epochs = "many"', "epochs is 'many', allowed: int"),
    "bool for int": ("epochs = true", "epochs is True, allowed: int"),
    "float for int": ("epochs = 2.5", "epochs is 2.5, allowed: int"),
    "value": ("epochs = 0", "epochs is 0, allowed: at least 1"),
    "not a number": ("chance_of_two = nan", "chance_of_two is nan, allowed: a number in"),
    "infinite weight": ("mel_weight = inf", "mel_weight is inf, allowed: a finite number of at least 0"),
    "choice": ('architecture = "16khz"', "architecture is '16khz', allowed: one of 24khz, 48khz, 32khz, c16"),
    "list": ('bandwidths = ["6"]', r"bandwidths is \['6'\], allowed: list"),
    "corpora": ("corpora = 3", "corpora is 3, allowed: a list of corpora"),
    "corpora of numbers": ("corpora = [3]", r"corpora is \[3\], allowed: a list of corpora"),
    "corpus key": (CORPUS + "hours = 3", "corpus 'hours' does not exist, allowed: .*weight"),
    "corpus type": (CORPUS + 'weight = "1"', "weight is '1', allowed: float or none"),
    "corpus kind": (CORPUS + 'kind = "zip"', "kind is 'zip', allowed: one of folder, manifest, dataset"),
    "corpus without source": ('[[corpora]]\nname = "a"', "corpus is incomplete: .*source"),
    "corpora of one name": (CORPUS + CORPUS, r"corpora is \['a', 'a'\], allowed: a name of its own for each"),
    "TOML": ("epochs = = 3", "not a recipe"),
    "text": (b"\xff\xfe", "not a recipe"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_recipes_are_refused_in_one_line(name, tmp_path):
    text, message = WRONG[name]
    path = tmp_path / "mine.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)
    assert "mine.toml" in str(caught.value)


def test_json_recipes(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"epochs": 2, "corpora": [{"name": "a", "source": "b"}]}')
    assert load_config(path).corpora[0].source == "b"
    for text in ("[1]", "{", "3"):
        path.write_text(text)
        with pytest.raises(ValueError, match="not a recipe"):
            load_config(path)


def test_missing_recipe_says_which_there_are(tmp_path):
    with pytest.raises(FileNotFoundError, match="no_such: no such recipe, allowed: a file, .*paper_24khz"):
        load_config("no_such")
    with pytest.raises(FileNotFoundError, match="no such recipe"):
        load_config(tmp_path)


def test_wrong_override_is_refused():
    with pytest.raises(ValueError, match="paper_24khz: batch_size is 0, allowed: at least 1"):
        load_config("paper_24khz", batch_size=0)


def test_held_out_rule_on_known_paths():
    voices = "usr/share/asterisk/sounds"
    assert held_out("asterisk-core-sounds-it-g722", f"{voices}/it_IT_m_Carlo/vm-first.g722")
    assert held_out("asterisk-core-sounds-en-g722", f"{voices}/en_US_f_Allison/screen-callee-options.g722")
    assert held_out("hedgewars-data", f"{GAME}/Music/Sheep.ogg")
    assert not held_out("asterisk-core-sounds-en-g722", f"{voices}/en_US_f_Allison/your.g722")
    assert not held_out("drascula-music", "usr/share/scummvm/drascula/audio/track7.ogg")


def test_what_is_held_out_stays_when_packages_are_added():
    assert set(TRAINING_ALONE) < set(PACKAGES)
    paths = [f"usr/share/games/warzone2100/music/{number}.opus" for number in range(300)]
    assert not any(held_out("warzone2100-music", path) for path in paths)
    assert any(held_out("wesnoth-1.16-music", path) for path in paths)


def test_kinds_of_files():
    assert set(PACKAGES["hedgewars-data"].values()) <= set(DOMAINS)
    assert kind_of("hedgewars-data", f"{GAME}/Sounds/voices/Pirate/Fire.ogg") == "words"
    assert kind_of("hedgewars-data", f"{GAME}/Music/Sheep.ogg") == "music"
    assert kind_of("hedgewars-data", f"{GAME}/Sounds/Drown.ogg") == "sounds"
    stamps = "usr/share/tuxpaint/stamps"
    assert kind_of("tuxpaint-stamps-default", f"{stamps}/animals/birds/blackbird.ogg") == "sounds"
    assert kind_of("tuxpaint-stamps-default", f"{stamps}/animals/birds/blackbird_desc_el.ogg") == "words"
    for kinds in PACKAGES.values():
        assert list(kinds)[-1] == ""  # every file has a kind


def tone(seconds: float, channels: int = 1) -> np.ndarray:
    wave = 0.5 * np.sin(2 * np.pi * 440 / RATE * np.arange(round(seconds * RATE)))
    return np.repeat(wave[:, None], channels, axis=1).astype(np.float32)


@pytest.fixture
def debian_package(tmp_path) -> Path:
    """A .deb that calls itself hedgewars-data: audio of all kinds, and files that are none."""
    if not shutil.which("dpkg-deb"):
        pytest.skip("dpkg-deb is not at hand")
    tree = tmp_path / "source"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(
        "Package: hedgewars-data\nVersion: 9.8-7\nArchitecture: all\nMaintainer: Nobody <nobody@example.org>\n"
        "Description: test\n"
    )
    licence = tree / "usr/share/doc/hedgewars-data/copyright"
    licence.parent.mkdir(parents=True)
    licence.write_text("Format: DEP-5\n\nFiles: *\nLicense: GPL-2\n\nFiles: b\nLicense: MIT\n text\n")
    game = tree / GAME
    for folder in ("Music", "Sounds/voices/British"):
        (game / folder).mkdir(parents=True)
    soundfile.write(game / "Music/Sheep.ogg", tone(2, channels=2), RATE)
    soundfile.write(game / "Sounds/voices/British/hello.WAV", tone(0.2), RATE)
    soundfile.write(game / "Sounds/bang.wav", tone(1), RATE)
    soundfile.write(game / "Sounds/bang.ogg", tone(0.9), RATE)
    soundfile.write(game / "Sounds/click.wav", tone(0.1), RATE)
    soundfile.write(game / "Sounds/silence.wav", 0 * tone(1), RATE)
    shutil.copy(game / "Sounds/bang.wav", game / "Sounds/twice.wav")
    (game / "Sounds/link.wav").symlink_to("bang.wav")
    (game / "Sounds/corrupt.ogg").write_bytes(b"OggS but no more" * 9)
    (game / "Sounds/empty.ogg").touch()
    (game / "Sounds/empty.wav").touch()
    (game / "Sounds/picture.png").write_bytes(b"no audio")
    deb = tmp_path / "hedgewars-data_9.8-7_all.deb"
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", tree, deb], check=True, capture_output=True)
    return deb


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_package_becomes_manifests(debian_package, tmp_path):
    dest = tmp_path / "corpora"
    hours = prepare(dest, ["hedgewars-data"], fetch=lambda package, folder: debian_package)
    assert hours == pytest.approx(
        {
            "train": 2.1 / 3600, "held_out": 2 / 3600,
            "speech": 0, "words": 0.2 / 3600, "music": 0, "sounds": 1.9 / 3600,
        }
    )  # fmt: skip
    assert [line["path_in_package"] for line in lines(dest / "train.jsonl")] == [
        f"{GAME}/Sounds/bang.ogg", f"{GAME}/Sounds/bang.wav", f"{GAME}/Sounds/voices/British/hello.WAV",
    ]  # fmt: skip
    (music,) = lines(dest / "held_out.jsonl")
    assert music == {
        "path": f"audio/hedgewars-data/{GAME}/Music/Sheep.ogg.flac", "package": "hedgewars-data", "version": "9.8-7",
        "path_in_package": f"{GAME}/Music/Sheep.ogg", "seconds": 2.0, "kind": "music", "domain": "music",
    }  # fmt: skip
    audio, rate = soundfile.read(dest / music["path"], always_2d=True)
    assert (rate, audio.shape) == (24000, (48000, 1))
    assert np.abs(audio).max() == pytest.approx(0.5, abs=0.05)
    skipped = {Path(line["path_in_package"]).name: line["skipped"] for line in lines(dest / "skipped.jsonl")}
    for name in ("corrupt.ogg", "empty.ogg", "empty.wav"):  # the words are libsndfile's
        assert skipped.pop(name).startswith(("not readable as audio", "holds no audio", "cut off"))
    assert skipped == {
        "click.wav": "sound of less than 0.3 s",
        "silence.wav": "silent",
        "twice.wav": f"same as {GAME}/Sounds/bang.wav",
    }
    (package,) = json.loads((dest / "packages.json").read_text())
    assert package == {
        "name": "hedgewars-data", "version": "9.8-7", "licence": "GPL-2, MIT", "files": 4, "hours": 0.001,
        "domain": "general, music, speech",
    }  # fmt: skip
    assert "License: GPL-2" in (dest / "licences/hedgewars-data").read_text()
    assert not list(dest.glob(".*"))  # nothing unpacked is left


def test_complete_packages_are_kept(debian_package, tmp_path):
    dest = tmp_path / "corpora"
    hours = prepare(dest, ["hedgewars-data"], fetch=lambda package, folder: debian_package)

    def cannot(package: str, folder: Path) -> Path:
        raise ValueError(f"{package}: gone")

    assert prepare(dest, ["hedgewars-data"], fetch=cannot) == hours
    (dest / "train.jsonl").unlink()
    with pytest.raises(ValueError, match="klettres-data: gone; drascula-music: gone"):
        prepare(dest, ["klettres-data", "drascula-music", "hedgewars-data"], fetch=cannot)
    assert len(lines(dest / "train.jsonl")) == 3
    with pytest.raises(ValueError, match="rate is 48000, allowed: 24000 as"):
        prepare(dest, ["hedgewars-data"], 48000, cannot)


def test_interrupted_package_is_done_again(debian_package, tmp_path):
    dest = tmp_path / "corpora"

    def stop(package: str, folder: Path) -> Path:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(dest, ["hedgewars-data"], fetch=stop)
    assert not list(dest.iterdir())
    prepare(dest, ["hedgewars-data"], 48000, lambda package, folder: debian_package)
    (music,) = lines(dest / "held_out.jsonl")
    audio, rate = soundfile.read(dest / music["path"])
    assert (rate, audio.shape) == (48000, (96000, 2))  # above 24 kHz stereo stays


def test_what_is_no_package_is_refused(tmp_path):
    if not shutil.which("dpkg-deb"):
        pytest.skip("dpkg-deb is not at hand")
    broken = tmp_path / "broken.deb"
    broken.write_bytes(b"no package")
    with pytest.raises(ValueError, match="klettres-data: not readable as a package") as caught:
        prepare(tmp_path / "corpora", ["klettres-data"], fetch=lambda package, folder: broken)
    assert "\n" not in str(caught.value)


def test_download_that_fails_says_why(tmp_path, monkeypatch):
    def refuse(command, **options):
        assert command == ["apt-get", "download", "klettres-data"]
        return subprocess.CompletedProcess(command, 100, "", "W: slow\nE: Unable to locate package klettres-data\n")

    monkeypatch.setattr(subprocess, "run", refuse)
    with pytest.raises(ValueError, match=r"klettres-data: apt-get download failed \(E: Unable to locate") as caught:
        download("klettres-data", tmp_path)
    assert "\n" not in str(caught.value)


def test_command_refuses_in_one_line(tmp_path, capsys):
    assert main([str(tmp_path), "--packages", "bash"]) == 2
    assert main([str(tmp_path), "--rate", "0"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("debian_corpora: package is 'bash', allowed: asterisk-core-sounds-en-g722")
    assert second == "debian_corpora: rate is 0, allowed: at least 1"


def test_g722_is_read_at_its_own_rate(tmp_path):
    if not shutil.which("ffmpeg"):
        pytest.skip("ffmpeg is not at hand")
    wav, coded = tmp_path / "tone.wav", tmp_path / "tone.g722"
    soundfile.write(wav, tone(1), RATE)
    subprocess.run(["ffmpeg", "-v", "error", "-i", wav, "-ar", "16000", "-c:a", "g722", coded], check=True)
    audio = read_packaged_audio(coded, 24000)
    assert audio.shape == (1, 24000)
    assert np.abs(np.fft.rfft(audio[0])).argmax() == 440  # 1 s: bins are Hz
    coded.write_bytes(b"")
    with pytest.raises(ValueError):
        read_packaged_audio(coded, 24000)
