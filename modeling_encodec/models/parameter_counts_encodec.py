# Copyright 2026 The modeling-encodec authors. Licensed under the Apache License, Version 2.0.
"""How many weights a configuration asks for, by arithmetic: known before a layer is made or memory taken.

Counted is what grows with the sizes: matrices, convolutions, codebooks and tables; not biases and norms.
"""


def codec_parameters(config) -> int:
    """Of the model of an `EncodecConfig`, buffers included."""
    width, levels = config.num_filters, len(config.upsampling_ratios)
    deepest, total = width << levels, 0
    for outer in (config.kernel_size, config.last_kernel_size):
        total += outer * (config.audio_channels * width + config.hidden_size * deepest)
    total += 2 * config.num_lstm_layers * 8 * deepest**2
    for level, ratio in enumerate(reversed(config.upsampling_ratios)):
        dim = width << level
        narrow = dim // config.compress
        unit = dim * narrow * (config.residual_kernel_size + 1) + (dim * dim if config.use_conv_shortcut else 0)
        total += 2 * (config.num_residual_layers * unit + 2 * dim * dim * 2 * ratio)
    return total + config.num_quantizers * 2 * config.codebook_size * config.hidden_size


def lm_parameters(config) -> int:
    """Of the model of an `EncodecLMConfig`, in the forms that it has."""
    width, codes = config.hidden_size, config.num_codebooks * config.codebook_size
    layer = 4 * width * width + 2 * width * config.intermediate_size
    one_form = (2 * codes + config.num_codebooks) * width + config.num_hidden_layers * layer
    tables = config.max_positions * width if config.has_integer_form else 0
    return one_form * (int(config.has_float_form) + int(config.has_integer_form)) + tables
