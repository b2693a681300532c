"""What only a GPU can tell, in one command: `make gpu`, or from the tree's root

    python tests/gpu/measure [--device cuda:0] [--out build/gpu] [--again] [--rehearse] [PART ...]

Every part is a process of its own and ends within 8 minutes. What it has measured is in its JSON at once: a second
call goes on with what is missing. At the end all parts are in `gpu.json`, and as tables for docs/speed.md in `gpu.md`.
Needs nothing but torch and transformers, and no network; what other packages would add is left out by name.
`--rehearse` runs every part on the CPU in tiny sizes, so that none meets its first run on the card.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))
from bench import Bench, describe, from_the_tree  # noqa: E402
from report import markdown, read_parts  # noqa: E402


PARTS = ("devices", "codes", "files", "kernels", "codec", "streams", "lm", "tokenizing", "training")
MOST_SECONDS = 480


def main() -> int:
    """The parts that are asked for and missing, one after another; 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder of the results")
    parser.add_argument("--again", action="store_true", help="measure parts anew that are there")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, in tiny sizes")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"PART is {sorted(unknown)[0]!r}, allowed: {', '.join(PARTS)}")
    import torch

    if options.rehearse:
        options.device = "cpu"
    elif not torch.cuda.is_available():
        print("not run: no GPU (--rehearse tries every part on the CPU)")
        return 0
    if options.inside:
        return run_part(options.parts[0], options)
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ |= from_the_tree(options.out / "tree")
    codes = [start_part(part, options) for part in options.parts or PARTS]
    found = read_parts(options.out)
    (options.out / "gpu.json").write_text(json.dumps(found, indent=1))
    (options.out / "gpu.md").write_text(markdown(found))
    print(f"{options.out / 'gpu.md'} and gpu.json hold {', '.join(found)}")
    return int(any(codes))


def start_part(part: str, options) -> int:
    """Run one part in a process of its own, if it is not there; 1 if it failed."""
    path = options.out / f"{part}.json"
    if options.again:
        path.unlink(missing_ok=True)
    if path.exists() and json.loads(path.read_text())["done"]:
        print(f"{part}: there already")
        return 0
    words = [sys.executable, __file__, part, "--inside", "--device", options.device, "--out", str(options.out)]
    begin = time.monotonic()
    try:
        code = subprocess.run([*words, *["--rehearse"] * options.rehearse], timeout=MOST_SECONDS).returncode
    except subprocess.TimeoutExpired:
        code = 1
    ended = "done" if code == 0 else "not finished: the same command goes on"
    print(f"{part}: {ended}, {time.monotonic() - begin:.0f} s", flush=True)
    return int(code != 0)


def run_part(part: str, options) -> int:
    """One part, in this process."""
    from transformers import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    module = importlib.import_module(f"part_{part}")
    bench = Bench(part, options.device, options.rehearse, options.out / f"{part}.json", describe(options.device))
    module.measure(bench)
    return 0 if bench.finish() else 1


if __name__ == "__main__":
    sys.exit(main())
