"""Making Transformers' Auto classes return this project's classes, on request."""

import transformers
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioTokenization,
    AutoProcessor,
)

from modeling_encodec.models.configuration_encodec import EncodecConfig, EncodecLMConfig
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.models.modeling_lm_encodec import EncodecLM
from modeling_encodec.processors.feature_extraction_encodec import EncodecFeatureExtractor
from modeling_encodec.processors.processing_encodec import EncodecProcessor
from modeling_encodec.processors.upstream_encodec import native_extractors


_removed: dict[str, str] = {}  # what was taken out of Transformers' table by the first call


def register_auto_classes() -> None:
    """From now on, in this process, `AutoConfig`, `AutoModel`, `AutoModelForAudioTokenization` and
    `AutoFeatureExtractor` return these classes for EnCodec checkpoints, and for language models of their codes;
    `AutoProcessor` returns `EncodecProcessor` where one was saved.

    That holds for models with an EnCodec inside (MusicGen) too, which is why importing the package does not do it.

    Raises:
        ImportError: if this version of Transformers looks feature extractors up in a way that is not known here.

    Examples:
        >>> import subprocess, sys
        >>> code = (  # for a process of its own, since it cannot be undone
        ...     "from transformers import AutoModel\\n"
        ...     "from modeling_encodec import bundled_checkpoint, register_auto_classes\\n"
        ...     "register_auto_classes()\\n"
        ...     "print(type(AutoModel.from_pretrained(bundled_checkpoint())))"
        ... )
        >>> print(subprocess.run([sys.executable, "-c", code], stdout=-1, stderr=-3, text=True, check=True).stdout)
        <class 'modeling_encodec.models.modeling_encodec.EncodecModel'>
    """
    AutoConfig.register("encodec_lm", EncodecLMConfig, exist_ok=True)
    AutoModel.register(EncodecLMConfig, EncodecLM, exist_ok=True)
    AutoConfig.register("encodec", EncodecConfig, exist_ok=True)
    AutoModel.register(EncodecConfig, EncodecModel, exist_ok=True)
    AutoModelForAudioTokenization.register(EncodecConfig, EncodecModel, exist_ok=True)
    AutoFeatureExtractor.register(EncodecConfig, EncodecFeatureExtractor, exist_ok=True)
    # Under its own class, since it is found by its name: under EncodecConfig, `AutoProcessor` would no longer give the
    # feature extractor of a folder that has no processor, as it does for stock checkpoints.
    AutoProcessor.register(EncodecProcessor, EncodecProcessor, exist_ok=True)
    # Feature extractors are looked up by class name, native classes first: the native entry of that name has to go.
    names = native_extractors()
    native = [key for key, value in names.items() if value == EncodecFeatureExtractor.__name__]
    if not native and not _removed:  # otherwise the stock class would be returned, and nobody told
        raise ImportError(
            f"transformers {transformers.__version__} looks feature extractors up in another way, which "
            "register_auto_classes does not know, allowed: a version such as 5.23"
        )
    for model_type in native:
        _removed[model_type] = names.pop(model_type)
