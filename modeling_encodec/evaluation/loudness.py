"""Versions of one clip at one level, to be compared by ear: in listening tests, and on the web page.

Levels are equalised by their RMS over the clip and not by a loudness model: versions of one clip differ little in
spectrum, and the rule is one line. The price is that a version whose power lies elsewhere, such as a 3.5 kHz anchor or
a codec's without the highs, can sound slightly louder or softer than its RMS says.
"""

import numpy as np


# What all are scaled down to if one of them would clip.
PEAK = 0.99
# What is 80 dB below the reference is silence, which no gain makes as loud.
SILENT = 1e-4


def equalise(versions: dict[str, np.ndarray], reference: str) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Every version (channels, T) at the RMS of the one called `reference`, float32, and the gains it took.

    All are scaled down by the same gain, to a peak of 0.99, if one would clip. A silent version stays silent; beside a
    silent reference all stay as they are.

    Examples:
        >>> import numpy as np
        >>> from modeling_encodec.evaluation.loudness import equalise
        >>> equalise({"original": np.array([[0.5, -0.5]]), "decoded": np.array([[0.25, -0.25]])}, "original")[1]
        {'original': 1.0, 'decoded': 2.0}
    """
    levels = {name: float(np.sqrt(np.square(audio, dtype=np.float64).mean())) for name, audio in versions.items()}
    target = levels[reference]
    gains = {name: target / level if target and level > SILENT * target else 1.0 for name, level in levels.items()}
    peak = max(gains[name] * float(np.abs(audio).max()) for name, audio in versions.items())
    shared = min(1.0, PEAK / peak) if peak > 0 else 1.0
    gains = {name: shared * gain for name, gain in gains.items()}
    return {name: (gains[name] * audio).astype(np.float32) for name, audio in versions.items()}, gains
