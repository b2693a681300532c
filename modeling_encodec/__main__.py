"""`python -m modeling_encodec`: the command line."""

import sys

from modeling_encodec.cli import main


sys.exit(main())
