# Copyright 2026 The modeling-encodec authors. Licensed under the Apache License, Version 2.0.
"""How many compiled convolutions a process keeps."""

import os


# On a CPU oneDNN compiles a convolution for every length it meets and keeps the last 1024 of them and their like, some
# 600 MB where clips have all lengths. An update of training needs 240, and one length of a model 50.
KERNELS = "384"
SETTINGS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY")


def limit_kernels() -> None:
    """Keep fewer in this process, unless the user has said how many; oneDNN asks at its first convolution."""
    if not any(name in os.environ for name in SETTINGS):
        os.environ[SETTINGS[0]] = KERNELS
