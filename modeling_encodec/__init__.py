"""EnCodec, whole and native to the Hugging Face stack. Each name is imported from its module when first used."""

import importlib

from modeling_encodec.models.onednn_encodec import limit_kernels as _limit_kernels


_limit_kernels()

_MODULES = {
    "AudioReader": "modeling_encodec.processors.audio",
    "CodeVocabulary": "modeling_encodec.processors.code_vocabulary",
    "CodecDetokenizer": "modeling_encodec.processors.dataset_tokenization",
    "CodecTokenizer": "modeling_encodec.processors.dataset_tokenization",
    "CodecTrainer": "modeling_encodec.training.trainer",
    "EcdcReader": "modeling_encodec.bitstream.codes_file",
    "EcdcWriter": "modeling_encodec.bitstream.codes_file",
    "EncodecConfig": "modeling_encodec.models.configuration_encodec",
    "EncodecFeatureExtractor": "modeling_encodec.processors.feature_extraction_encodec",
    "EncodecLM": "modeling_encodec.models.modeling_lm_encodec",
    "EncodecLMConfig": "modeling_encodec.models.configuration_encodec",
    "EncodecModel": "modeling_encodec.models.modeling_encodec",
    "EncodecProcessor": "modeling_encodec.processors.processing_encodec",
    "LMTrainer": "modeling_encodec.training.lm_trainer",
    "LMTrainingConfig": "modeling_encodec.training.lm_configuration",
    "StreamState": "modeling_encodec.streaming.steps",
    "StreamingDecoder": "modeling_encodec.streaming.streams",
    "StreamingEncoder": "modeling_encodec.streaming.streams",
    "TrainingConfig": "modeling_encodec.training.configuration",
    "bundled_checkpoint": "modeling_encodec.checkpoints",
    "bundled_lm_checkpoint": "modeling_encodec.checkpoints",
    "codebook_counts": "modeling_encodec.evaluation.plots",
    "compress": "modeling_encodec.bitstream.compression",
    "compress_blocks": "modeling_encodec.bitstream.compression",
    "compress_to_file": "modeling_encodec.bitstream.compression",
    "convert_checkpoint": "modeling_encodec.conversion.convert",
    "decompress": "modeling_encodec.bitstream.compression",
    "decompress_blocks": "modeling_encodec.bitstream.compression",
    "decompress_from_file": "modeling_encodec.bitstream.compression",
    "load_config": "modeling_encodec.training.configuration",
    "load_lm_config": "modeling_encodec.training.lm_configuration",
    "load_tokens": "modeling_encodec.processors.dataset_tokenization",
    "plot_audio": "modeling_encodec.evaluation.plots",
    "plot_codebook_use": "modeling_encodec.evaluation.plots",
    "plot_codes": "modeling_encodec.evaluation.plots",
    "plot_rate_distortion": "modeling_encodec.evaluation.plots",
    "plot_training": "modeling_encodec.evaluation.plots",
    "provenance_of": "modeling_encodec.processors.dataset_tokenization",
    "push_folder": "modeling_encodec.conversion.push_to_hub",
    "read_audio": "modeling_encodec.processors.audio",
    "read_codes": "modeling_encodec.bitstream.compression",
    "read_log": "modeling_encodec.evaluation.plots",
    "register_auto_classes": "modeling_encodec.auto_classes",
    "save_figure": "modeling_encodec.evaluation.plots",
    "write_audio": "modeling_encodec.processors.audio",
    "write_audio_blocks": "modeling_encodec.processors.audio",
}

__version__ = "0.1.0"
__all__ = sorted(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module 'modeling_encodec' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
