"""Feature extractor, processor, audio files and tokenised corpora."""

import sys

from modeling_encodec.models import inputs_encodec, json_files_encodec


# One module each, though their files are here too: for the Hub, where they travel with the files beside them.
sys.modules[f"{__name__}.inputs_encodec"] = inputs_encodec
sys.modules[f"{__name__}.json_files_encodec"] = json_files_encodec
