"""A process with a pretended GPU, of several: `python pretended_process.py` and what follows `modeling-encodec`."""

import sys

from pretended import pretended_device

from modeling_encodec.cli import main


if __name__ == "__main__":
    with pretended_device():
        sys.exit(main(sys.argv[1:]))
