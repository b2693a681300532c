# Copyright 2026 The modeling-encodec authors. Licensed under the Apache License, Version 2.0.
"""What is taken of Transformers that it may take away: each thing is looked up here alone, and where it is gone, one
line says so. Models, streams and files need none of it."""

import importlib

import transformers
from transformers.utils import cached_file


def taken(module: str, name: str):
    """`name` of `transformers.module`.

    Raises:
        ImportError: if this version has it no more.
    """
    try:
        return getattr(importlib.import_module(f"transformers.{module}"), name)
    except (ImportError, AttributeError):
        raise ImportError(
            f"transformers {transformers.__version__} has no {module}.{name}, which modeling-encodec needs here, "
            "allowed: a version that has it, such as 5.23"
        ) from None


def extractor_base() -> type:
    """The class that pads rows and is saved as preprocessor_config.json."""
    return taken("feature_extraction_sequence_utils", "SequenceFeatureExtractor")


def native_extractors() -> dict:
    """Model type -> name of Transformers' own feature extractor, which comes before any that is registered."""
    return taken("models.auto.feature_extraction_auto", "FEATURE_EXTRACTOR_MAPPING_NAMES")


def find_file(folder, name: str, **hub) -> str | None:
    """Where a file of a folder or Hub repository lies; None if that has no such file. `hub`: of `cached_file`.

    Raises:
        OSError: if there is no such repository, or the Hub cannot be reached.
    """
    try:
        return cached_file(str(folder), name, _raise_exceptions_for_missing_entries=False, **hub)
    except TypeError:
        taken("utils.hub.cached_file", "_raise_exceptions_for_missing_entries")
        raise
