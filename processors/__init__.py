"""Feature extractor, processor, audio files and tokenised corpora."""

import sys

from modeling_encodec import inputs_encodec


# One module, though its file is here too: for the Hub, where it travels with the files beside it.
sys.modules[f"{__name__}.inputs_encodec"] = inputs_encodec
