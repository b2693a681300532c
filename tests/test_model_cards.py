"""Model cards: the committed ones are what the tool writes, their numbers come from JSON, and their code runs."""

import dataclasses
import hashlib
import json
import re
from pathlib import Path

import pytest
from conftest import make_model
from huggingface_hub import ModelCard

from modeling_encodec.checkpoints import BUNDLED, BUNDLED_LM, bundled_checkpoint, bundled_lm_checkpoint
from modeling_encodec.conversion.card_values import margin, table, tidy
from modeling_encodec.conversion.checkpoint_files import read_json
from modeling_encodec.conversion.model_card import (
    PAPER,
    TEMPLATES,
    card_for,
    main,
    own_cards,
    own_curves,
    released_card,
)
from modeling_encodec.evaluation.plots import read_log
from modeling_encodec.models.configuration_encodec import EncodecConfig, EncodecLMConfig
from modeling_encodec.models.modeling_lm_encodec import EncodecLM
from modeling_encodec.training.configuration import TrainingConfig


CARDS = Path(__file__).parents[1] / "model_cards"
RELEASED = ("encodec_24khz", "encodec_48khz", "encodec_lm_24khz", "encodec_lm_48khz")
NAMES = (*RELEASED, BUNDLED, BUNDLED_LM)
SECTIONS = ("Intended use", "Use", "Training", "Evaluation", "Limits", "Licence", "Citation")
# What has digits in a template and is no result: names and formats, indices, factors between units.
NO_RESULTS = ("Apache-2.0", "c16_debian", "float16", "float32", "bf16", "md5", "s1", "Debian 12", "sha256")
INDICES = ("parents[1]", "[:-1]", "codec)[0]")
UNITS = ("0.001", "100", "1000", "3600")


@pytest.fixture(scope="module")
def cards() -> dict[Path, str]:
    return own_cards(CARDS)


@pytest.fixture(scope="module")
def texts(cards) -> dict[str, str]:
    return {path.stem: text for path, text in cards.items() if path.parent == CARDS}


# ---- the committed cards -----------------------------------------------------------------------------------------


def test_committed_cards_are_what_the_tool_writes(cards):
    assert {path.name for path in cards if path.parent == CARDS} == {f"{name}.md" for name in NAMES}
    assert {bundled_checkpoint() / "README.md", bundled_lm_checkpoint() / "README.md"} < set(cards)
    for path, text in cards.items():
        assert path.read_bytes() == text.encode(), f"{path} is not what model_card writes: make cards"


def test_the_command_writes_them_and_says_where(tmp_path, monkeypatch, capsys, texts):
    for path in CARDS.iterdir():
        if path.suffix in (".json", ".jsonl", ".png"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    for name in ("bundled_checkpoint", "bundled_lm_checkpoint"):  # what it writes beside weights stays in this folder
        copy = tmp_path / name
        copy.mkdir()
        source = bundled_checkpoint() if name == "bundled_checkpoint" else bundled_lm_checkpoint()
        for file in ("config.json", "model.safetensors"):
            (copy / file).symlink_to(source / file)
        monkeypatch.setattr(f"modeling_encodec.conversion.model_card.{name}", lambda copy=copy: copy)
    assert main([str(tmp_path)]) == 0
    assert str(tmp_path / f"{BUNDLED}.md") in capsys.readouterr().out.splitlines()
    assert (tmp_path / f"{BUNDLED}.md").read_text() == texts[BUNDLED]
    assert (tmp_path / "bundled_checkpoint" / "README.md").read_text().startswith(f"# {BUNDLED}\n")

    (tmp_path / f"{BUNDLED}.json").unlink()
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"model_card: {tmp_path / BUNDLED}.json: no such file\n"


def test_templates_hold_no_results():
    paths = list(TEMPLATES.iterdir())
    assert len(paths) > 10
    for path in paths:
        text = path.read_text()
        for allowed in (*NO_RESULTS, *INDICES):
            text = text.replace(allowed, "")
        expressions = " ".join(re.findall(r"{[{%].*?[%}]}", text))
        assert set(re.findall(r"(?<![\w.])[\d.]*\d\d[\d.]*|\d\.\d+", expressions)) <= set(UNITS), path
        words = re.sub(r"{[{%].*?[%}]}", "", text)
        assert not re.search(r"\d", words), (path, re.search(r".*\d.*", words)[0])


def numbers(value) -> list[float]:
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers(item)]
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def is_shown(number: float, text: str) -> bool:
    forms = {f"{number:g}", f"{number:,}", *(f"{number:.{digits}f}" for digits in range(4))}
    if abs(number) <= 1:
        forms |= {f"{100 * number:.{digits}f} %" for digits in (0, 1)}
    return any(re.search(rf"(?<![\d.,]){re.escape(form)}(?!\d)", text) for form in forms)


def test_every_number_of_the_json_files_is_in_a_card(texts):
    everything = "\n".join(texts.values())
    for path, text in [
        (PAPER, everything),
        *((CARDS / f"{name}.json", texts[name]) for name in (BUNDLED, BUNDLED_LM)),
    ]:
        facts = json.loads(path.read_text())
        for key in ("objective", "architectures"):
            (facts.get(key) or {}).pop("sampling_rate", None)
        if "architectures" in facts:
            facts["architectures"].pop("rows")  # shown beside an evaluation of such a model
        missing = [number for number in numbers(facts) if not is_shown(number, text)]
        assert not missing, (path.name, missing)


@pytest.mark.parametrize("name", NAMES)
def test_markdown_is_whole(name, texts):
    text = texts[name].split("---\n", 2)[2]
    titles = re.findall(r"^## (\w+(?: use)?)", text, flags=re.MULTILINE)
    assert set(SECTIONS) <= set(titles), titles
    assert "two set-ups" in text and "non-streamable" in text
    assert "\n\n\n" not in text and not re.search(r"[ \t]$|\t", text, flags=re.MULTILINE)
    assert "{" + "{" not in text and "undefined" not in text.lower() and not re.search(r"\bNone\b(?!])", text)
    assert text.count("```") % 2 == 0
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1, block
        assert re.fullmatch(r"\|(---\|)+", block.splitlines()[1])
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert target.startswith("https://") or (CARDS / target).exists(), target


# ---- what they say -----------------------------------------------------------------------------------------------


def test_numbers_of_released_models_follow_from_their_configurations(texts):
    assert "| parameters | 14,851,810, without the codebooks |" in texts["encodec_24khz"]
    assert "| parameters | 14,856,294, without the codebooks |" in texts["encodec_48khz"]
    assert "| parameters | 15,559,768, of the float form |" in texts["encodec_lm_24khz"]
    assert "| parameters | 8,986,584, of the float form |" in texts["encodec_lm_48khz"]
    assert "first 7 frames need 2,240 samples (93 ms)" in " ".join(texts["encodec_24khz"].split())
    assert "costs 1.0 % more codes" in texts["encodec_48khz"] and "2,240" not in texts["encodec_48khz"]
    assert "10,667 hours" in texts["encodec_24khz"] and "17,537 hours" in texts["encodec_24khz"]
    assert "919 hours of music alone" in texts["encodec_48khz"] and "AudioSet" not in texts["encodec_48khz"]


def test_the_papers_figures_are_marked_as_its_own(texts):
    for name in RELEASED:
        assert "**Every figure below is the paper's**" in texts[name].replace(".**", "**")
        assert re.search(r"paper, Table \d", texts[name])
        assert "Whether that covers the weights was" in " ".join(texts[name].split())
    assert "| EnCodec | 6 | 4.1 | 83.1 ± 2.7 | 69.4 ± 2.3 | 92.9 ± 1.8 | 91.3 ± 2.1 |" in texts["encodec_24khz"]
    assert "| EnCodec | 12 | 8.9 | 88.0 ± 2.7 |" in texts["encodec_48khz"]
    assert "| 24 | 19.4 | 19 % |" in texts["encodec_lm_48khz"]
    assert "no listening test at 24 kbps" in texts["encodec_24khz"]


def test_own_cards_keep_curves_and_comparisons(texts):
    assert "| 2000 | 3.16 dB, 0.428 | 5.76 dB, 0.405 | 7.20 dB, 0.386 | 7.50 dB, 0.378 |" in texts[BUNDLED]
    assert "| 11 of music | before | 3.85 dB, 0.838 |" in texts[BUNDLED]
    said = " ".join(texts[BUNDLED].split())
    assert "fell everywhere, by 14 to 31 %. SI-SNR rose, but for music at 1.5 kbps (0.33 dB less)" in said
    assert "| speech | 1.5 | 1.042 | 30.5 % (28.2 % to 32.5 %) | 40 % |" in texts[BUNDLED_LM]
    assert "| 2000 | 0.928 kbps, 38.1 % |" in texts[BUNDLED_LM]
    assert "| music | 1.5 | 0.007 % | 0.000 % | 0.437 % | 3.439 % | -0.189 % |" in texts[BUNDLED_LM]


@pytest.mark.parametrize("name", NAMES)
def test_metadata_is_read_back(name, texts):
    data = ModelCard(texts[name]).data
    is_lm = "_lm_" in name
    assert data.license == ("mit" if name in RELEASED else "apache-2.0")
    assert data.library_name == "transformers" and {"audio", "encodec"} < set(data.tags)
    assert data.pipeline_tag == (None if is_lm else "feature-extraction")
    results = data.eval_results or []
    assert bool(results) == (name != BUNDLED or (CARDS / f"{BUNDLED}_evaluation.json").exists())
    for result in results:
        assert re.fullmatch(r"[\w.-]+", result.dataset_type) and isinstance(result.metric_value, float)
        if name in RELEASED:
            assert re.fullmatch(r"paper, Table \d", result.source_name)
            assert result.source_url == "https://arxiv.org/abs/2210.13438"


def test_model_index_names_each_figures_table():
    results = {
        result.metric_name: result for result in ModelCard(str(released_card("encodec_24khz"))).data.eval_results
    }
    assert results["SI-SNR at 6 kbps"].metric_value == 6.67
    assert results["SI-SNR at 6 kbps"].source_name == "paper, Table 3"
    assert results["MUSHRA at 6 kbps, noisy speech"].metric_value == 69.4
    assert results["MUSHRA at 6 kbps, noisy speech"].source_name == "paper, Table 1"


# ---- their code --------------------------------------------------------------------------------------------------


def run_code(text: str, folder: Path, monkeypatch, **instead: Path) -> dict:
    """Run a card's one Python block in `folder`, model names replaced by folders; what it defined."""
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    for name, path in instead.items():
        quoted = f'"facebook/{name}"' if f'"facebook/{name}"' in code else f'"{name}"'
        assert quoted in code
        code = code.replace(quoted, repr(str(path)))
    monkeypatch.chdir(folder)
    defined = {}
    exec(compile(code, "card", "exec"), defined)
    return defined


@pytest.mark.parametrize("name", [BUNDLED, "encodec_24khz"])
def test_codec_code_runs(name, texts, tmp_path, monkeypatch, capsys):
    instead = {} if name == BUNDLED else {name: bundled_checkpoint()}
    defined = run_code(texts[name], tmp_path, monkeypatch, **instead)
    assert defined["decoded"].shape == defined["audio"].shape
    assert (tmp_path / "decoded.wav").stat().st_size > 100_000
    assert capsys.readouterr().out == "torch.Size([1, 1, 8, 375])\n"


@pytest.fixture(scope="module")
def random_models(tmp_path_factory) -> dict[str, Path]:
    """Folders of a 48 kHz codec and of language models of it and of the bundled codec, with random weights."""
    folder = tmp_path_factory.mktemp("models")
    codec = make_model(EncodecConfig.preset_48khz(num_filters=2, hidden_size=8, num_lstm_layers=1))
    codec.save_pretrained(folder / "encodec_48khz")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    for name, config in (("24khz", EncodecConfig.from_pretrained(bundled_checkpoint())), ("48khz", codec.config)):
        EncodecLM(EncodecLMConfig.for_codec(config, **small)).save_pretrained(folder / f"encodec_lm_{name}")
    return {path.name: path for path in folder.iterdir()} | {"encodec_24khz": bundled_checkpoint()}


def test_48khz_code_runs(texts, tmp_path, monkeypatch, random_models, capsys):
    instead = {"encodec_48khz": random_models["encodec_48khz"]}
    defined = run_code(texts["encodec_48khz"], tmp_path, monkeypatch, **instead)
    assert defined["rate"] == 48000 and defined["decoded"].shape == defined["audio"].shape == (2, 240000)
    assert capsys.readouterr().out == "torch.Size([6, 1, 4, 150])\n"


@pytest.mark.parametrize("name", [BUNDLED_LM, "encodec_lm_24khz", "encodec_lm_48khz"])
def test_language_model_code_runs(name, texts, tmp_path, monkeypatch, random_models):
    codec = name.replace("_lm", "")
    instead = {} if name == BUNDLED_LM else {codec: random_models[codec], name: random_models[name]}
    defined = run_code(texts[name], tmp_path, monkeypatch, **instead)
    assert defined["lm"].config.has_integer_form
    if name == BUNDLED_LM:
        assert len(defined["data"]) < 800  # 1,055 without


# ---- other people's models ---------------------------------------------------------------------------------------


def evaluation_of(folder: Path) -> dict:
    """An evaluation by hand of the codec in `folder`, as `modeling-encodec evaluate` writes it."""

    def row(system, kbps, category, si_snr, visqol, measured, lm=None):
        metrics = {"si_snr": {"mean": si_snr, "low": si_snr - 1, "high": si_snr + 1, "clips": 3}}
        if visqol is not None:
            metrics["visqol_audio"] = {"mean": visqol, "low": None, "high": None, "clips": 3}
        return {
            **{"system": system, "kbps": kbps, "category": category, "clips": 3, "seconds": 15.0, "lag": 0},
            **{"measured_kbps": measured, "lm_kbps": lm, "metrics": metrics},
        }

    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    return {
        "format": 1,
        "model": {
            **{"name": "mine", "weights_sha256": weights, "fingerprint": "0123", "sampling_rate": 24000},
            **{"audio_channels": 1, "parameters": 3949042, "language_model": {"name": "its", "weights_sha256": "a"}},
        },
        "data": {
            **{"name": "Some clips (mine)", "clips": 3, "seconds": 15.0, "categories": {"speech": 2, "music": 1}},
            **{"selection": "the first three", "sha256": "bc", "failed": {}},
        },
        "method": {
            **{"resampler": "soxr HQ", "alignment": "none", "interval": "Student's t", "bitrate": "of files"},
            "metrics": {"si_snr": "whole clips", "visqol_audio": "audio mode"},
        },
        "versions": {"torch": "2.13.0"},
        "missing": {"pesq": "the package is not installed"},
        "results": [
            row("encodec", 6.0, "all", 4.5, 3.1, 6.19, 4.8),
            row("encodec", 6.0, "speech", 5.5, None, 6.19, 4.7),
            row("opus", 6.0, "all", 1.5, 3.1, 6.9),
            row("identity", None, "all", 100.0, 4.73, None),
        ],
        "codebooks": [{"used": 0.985, "perplexity": 612.3}, {"used": 1.0, "perplexity": 700.0}],
    }


@pytest.fixture
def evaluation(tmp_path) -> Path:
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(evaluation_of(bundled_checkpoint())))
    return path


def test_evaluation_is_told_beside_the_papers(evaluation, tmp_path):
    text = str(card_for(bundled_checkpoint(), name="me/mine", evaluation=evaluation))
    assert "| **mine** | 6 | 6.19 | 4.80 | 3 | 0 | 4.50 (3.50 to 5.50) | 3.10 |" in text
    assert "| **mine** | 6 | 6.19 | 4.70 | 3 | 0 | 5.50 (4.50 to 6.50) |  |" in text.split("### Speech")[1]
    assert "| the clips themselves |  |  |  | 3 | 0 | 100.00 (99.00 to 101.00) | 4.73 |" in text
    said = " ".join(text.split())
    assert (
        "At 6 kbps its SI-SNR is 1.90 dB below the paper's figure for EnCodec, 16 filters (6.40, paper, Table A.3), "
        "2.17 dB below the paper's figure for EnCodec (6.67, paper, Table 3) and 2.05 dB above the paper's figure for "
        "Opus (2.45, paper, Table 3). It is 3.00 dB above that of Opus on the same clips, at 6.90 kbps measured "
        "against 6.19."
    ) in said
    assert "1.25 below the paper's figure for EnCodec (4.35, paper, Table 3)" in said
    assert "It is equal to that of Opus on the same clips" in said
    assert (
        "on 3 clips (15 s) of Some clips (mine): 2 of speech, 1 of music. Of what there is: the first three." in said
    )
    assert "- Missing: PESQ: the package is not installed" in text
    assert "| 1 | 98.5 % | 612 |" in text
    assert "![" not in text
    evaluation.with_suffix(".png").write_bytes(b"")
    assert "](scores.png)" in str(card_for(bundled_checkpoint(), name="mine", evaluation=evaluation))


def test_where_opus_is_better_is_said(evaluation):
    content = json.loads(evaluation.read_text())
    content["results"][2]["metrics"]["mel_distance"] = {"mean": 0.3004, "low": None, "high": None, "clips": 3}
    content["results"][0]["metrics"]["mel_distance"] = {"mean": 0.3996, "low": None, "high": None, "clips": 3}

    def said() -> str:
        evaluation.write_text(json.dumps(content))
        return " ".join(str(card_for(bundled_checkpoint(), name="mine", evaluation=evaluation)).split())

    worse_by = "At 6 kbps **Opus is better** by mel distance (0.300 against 0.400)"
    assert f"{worse_by}; this model is not worse by SI-SNR and ViSQOL audio." in said()
    content["results"][2]["metrics"] = {"si_snr": {"mean": 9.0, "low": 8.0, "high": 10.0, "clips": 3}}
    assert "**Opus is better** by SI-SNR (9.00 against 4.50), so by every metric." in said()
    content["results"][2]["metrics"]["si_snr"]["mean"] = 1.0
    assert "At 6 kbps Opus is better by none of the metrics." in said()
    del content["results"][2]
    assert "Beside Opus" not in said()


def test_evaluation_is_in_the_metadata(evaluation):
    data = card_for(bundled_checkpoint(), name="me/mine", evaluation=evaluation, licence="cc0-1.0").data
    assert data.license == "cc0-1.0" and data.model_name == "me/mine"
    assert [(result.metric_type, result.metric_value) for result in data.eval_results] == [
        ("si_snr", 4.5),
        ("visqol_audio", 3.1),
    ]
    assert {result.dataset_type for result in data.eval_results} == {"some-clips-mine"}
    assert data.eval_results[0].metric_name == "SI-SNR (dB), at 6 kbps"
    assert data.eval_results[0].source_name is None


def test_card_of_a_trained_folder(small_models, tmp_path):
    small_models["32khz"].save_pretrained(tmp_path)
    plain = str(card_for(tmp_path, name="me/mine"))
    assert "`training_config.json`, which a run of `modeling-encodec train` leaves" in " ".join(plain.split())
    corpora = [
        {"name": "talks", "source": "/secret/talks", "domain": "speech", "licence": "CC0-1.0"},
        {"name": "songs", "source": "songs", "domain": "music", "weight": 2.0},
    ]
    config = TrainingConfig(corpora=corpora, batch_size=7, chance_of_two=0.11, gain_min=-3.0)
    (tmp_path / "training_config.json").write_text(json.dumps(dataclasses.asdict(config)))
    card = card_for(tmp_path, name="me/mine")
    text = str(card)
    assert card.data.license is None and "Not stated. Who publishes these weights should say." in text
    assert "| audio | 32 kHz mono |" in text and "| set-up of the paper | neither |" in text
    assert 'from_pretrained("me/mine")' in text and "bandwidth=1.2" in text
    assert "| `batch_size` | 7 |" in text and "| s3 | the sum of two clips of any kind | 0.11 |" in text
    assert "| talks | speech | its hours | CC0-1.0 |" in text and "| songs | music | 2 | not stated |" in text
    assert "gain of -3 to 6 dB" in text and "No reverberation is added." in text and "secret" not in text
    assert "Not measured. `modeling-encodec evaluate` does it." in text
    assert ModelCard(text).data.eval_results is None


def test_card_of_a_language_model(tmp_path):
    config = EncodecLMConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_codebooks=4)
    EncodecLM(config).save_pretrained(tmp_path)
    text = str(card_for(tmp_path, name="me/lm", licence="mit"))
    assert "| layers, width, heads | 1, 16, 2 |" in text and "| codebooks | 4, of 1,024 entries each |" in text
    assert 'EncodecLM.from_pretrained("me/lm")' in text and "`modeling-encodec train-lm`" in text
    assert ModelCard(text).data.license == "mit"


def test_converted_release_gets_the_papers_sections(tmp_path):
    EncodecConfig.preset_48khz().save_pretrained(tmp_path)
    assert str(card_for(tmp_path, name="encodec_48khz")) == str(released_card("encodec_48khz"))
    EncodecConfig.preset_48khz(num_filters=16).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^num_filters is 16, allowed: 32 in encodec_48khz, or another name$"):
        card_for(tmp_path, name="encodec_48khz")
    with pytest.raises(ValueError, match=r"^encodec_lm_48khz is a encodec_lm, allowed: another name for a encodec$"):
        card_for(tmp_path, name="encodec_lm_48khz")
    with pytest.raises(ValueError, match=r"^name is 'x', allowed: encodec_24khz, encodec_48khz, "):
        released_card("x")


def test_files_that_do_not_fit_are_refused(evaluation, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file$"):
        card_for(tmp_path / "nowhere", name="x")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"model_type is 'bert', allowed: encodec, encodec_lm$"):
        card_for(tmp_path, name="x")
    with pytest.raises(ValueError, match="is an evaluation of a codec, allowed: none for a language model$"):
        card_for(bundled_lm_checkpoint(), name="x", evaluation=evaluation)
    for change, message in (
        ({"format": 2}, "format is 2, allowed: 1$"),
        ({"model": {"sampling_rate": 48000}}, "sampling_rate is 48000, allowed: 24000, the model's$"),
        ({"model": {"weights_sha256": "abc"}}, "is of the weights abc…, allowed: [0-9a-f]{12}…, of .*safetensors$"),
    ):
        values = evaluation_of(bundled_checkpoint())
        if "model" in change:
            change = {"model": values["model"] | change["model"]}
        evaluation.write_text(json.dumps(values | change))
        with pytest.raises(ValueError, match=message):
            card_for(bundled_checkpoint(), name="x", evaluation=evaluation)
    evaluation.write_text(json.dumps({"format": 1, "model": {}}))
    with pytest.raises(ValueError, match="has no 'data', allowed: what `modeling-encodec evaluate` writes$"):
        card_for(bundled_checkpoint(), name="x", evaluation=evaluation)
    evaluation.write_text("[")
    with pytest.raises(ValueError, match="no JSON"):
        card_for(bundled_checkpoint(), name="x", evaluation=evaluation)


# ---- words and tables --------------------------------------------------------------------------------------------


def test_margins_are_those_of_the_rounded_numbers():
    assert margin(3.454, 4.346, unit=" dB") == "0.90 dB below"  # 3.45 and 4.35 in the card
    assert margin(2.5, 1.0) == "1.50 above"
    assert margin(1.004, 1.0) == "equal to"


def test_tidy_wraps_prose_alone():
    text = "a b\nc\n\n\n\n| x   y |\n- item of\nwords\n```sh\nlong   code\n\n\nend\n```\n# A  heading\n"
    assert tidy(text, 6) == (
        "a b c\n\n| x   y |\n- item\n  of\n  words\n```sh\nlong   code\n\n\nend\n```\n# A  heading\n"
    )


def test_table_escapes_what_would_end_a_cell():
    assert table(["a", ""], [["x|y", None], [1.50, 2000]]) == "| a |  |\n|---|---|\n| x\\|y |  |\n| 1.5 | 2,000 |"


def test_the_guides_figures_are_the_evaluations():
    results = json.loads((CARDS / f"{BUNDLED}_evaluation.json").read_text())["results"]
    rows = {(row["system"], row["kbps"]): row["metrics"] for row in results if row["category"] == "all"}
    ours, opus = (
        tuple(rows[system, 6.0][name]["mean"] for name in ("si_snr", "visqol_audio")) for system in ("encodec", "opus")
    )
    said = " ".join((CARDS / "docs" / "evaluation.md").read_text().split())
    assert f"at 6 kbps SI-SNR of {ours[0]:.1f} dB and ViSQOL of {ours[1]:.2f}" in said
    assert f"Opus at 6 kbps here {opus[0]:.1f} and {opus[1]:.2f}" in said
    for metric in ("pesq", "stoi"):
        assert rows["opus", 6.0][metric]["mean"] > rows["encodec", 6.0][metric]["mean"]
    for metric, score in rows["opus", 12.0].items():
        better = score["mean"] - rows["encodec", 12.0][metric]["mean"]
        assert better < 0 if metric == "mel_distance" else better > 0


def test_every_card_of_our_own_shows_its_training():
    for path, figure in own_curves(CARDS).items():
        assert f"({path.name})" in path.with_name(path.name.replace("_training.png", ".md")).read_text()
        assert path.read_bytes().startswith(b"\x89PNG")
        log = read_json(path.with_name(path.name.replace("_training.png", ".json")))["training"]["runs"]
        last = max(line.get_xdata().max() for axis in figure.axes for line in axis.lines)
        assert last == sum(read_log(CARDS / run["log"])[-1]["update"] for run in log)
