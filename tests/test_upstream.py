"""Where Transformers no longer has what we take from inside it, one line says so, and the rest works on."""

import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from modeling_encodec.processors import upstream_encodec as upstream


ROOT = Path(__file__).parents[1]
GONE = """
import sys

import transformers
from transformers import feature_extraction_sequence_utils as module
from transformers.models.auto import feature_extraction_auto as auto

{removed}
import torch
from modeling_encodec import EncodecConfig, EncodecModel, compress, decompress

model = EncodecModel(EncodecConfig(num_filters=2, hidden_size=16, num_lstm_layers=1)).eval()
assert decompress(compress(model, torch.rand(1, 3200)), model)[0].shape == (1, 3200)
try:
    {used}
except ImportError as error:
    print(error)
"""
CASES = {
    "the base class": (
        "del module.SequenceFeatureExtractor",
        "from modeling_encodec import EncodecFeatureExtractor",
        "feature_extraction_sequence_utils.SequenceFeatureExtractor",
    ),
    "its module": (
        "sys.modules['transformers.feature_extraction_sequence_utils'] = None",
        "from modeling_encodec import EncodecProcessor",
        "feature_extraction_sequence_utils.SequenceFeatureExtractor",
    ),
    "native feature extractors": (
        "del auto.FEATURE_EXTRACTOR_MAPPING_NAMES",
        "import modeling_encodec; modeling_encodec.register_auto_classes()",
        "models.auto.feature_extraction_auto.FEATURE_EXTRACTOR_MAPPING_NAMES",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_gone_is_said_in_one_line(case):
    removed, used, name = CASES[case]
    code = GONE.format(removed=removed, used=used)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [
        f"transformers {transformers.__version__} has no {name}, which modeling-encodec needs here, "
        "allowed: a version that has it, such as 5.23"
    ]


def test_another_signature_is_said_too(monkeypatch):
    def without(folder, name, **hub):
        raise TypeError(f"unexpected keyword argument {sorted(hub)[0]}")

    monkeypatch.setattr(upstream, "cached_file", without)
    with pytest.raises(ImportError, match="_raise_exceptions_for_missing_entries"):
        upstream.find_file("folder", "config.json")


def test_private_names_of_transformers_are_in_one_place():
    private = (
        "audio_utils",
        "feature_extraction_auto",
        "AUDIO_TOKENIZER_KWARGS",
        "_raise_exceptions",
        "SequenceFeature",
    )
    for folder in ("modeling_encodec", "processors", "conversion"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name != "upstream_encodec.py":
                assert not any(name in path.read_text() for name in private), path


def test_another_way_to_look_feature_extractors_up_is_not_taken_for_done(monkeypatch):
    """Entries of another form would match nothing, and the stock class would be returned without a word."""
    from modeling_encodec import auto_classes

    monkeypatch.setattr(auto_classes, "_removed", {})
    monkeypatch.setattr(auto_classes, "native_extractors", lambda: {"encodec": {"torch": "EncodecAudioProcessor"}})
    for name in ("AutoConfig", "AutoModel", "AutoModelForAudioTokenization", "AutoFeatureExtractor", "AutoProcessor"):
        monkeypatch.setattr(getattr(auto_classes, name), "register", lambda *_, **__: None)
    with pytest.raises(ImportError, match=r"another way.*allowed"):
        auto_classes.register_auto_classes()
