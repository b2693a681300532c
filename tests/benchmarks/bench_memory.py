"""Peak memory of coding: of calls with the whole signal, of files on the command line, and of Transformers' model.

    python tests/benchmarks/bench_memory.py [--seconds 60 3600] [--peer-seconds 60 120] [--threads 1]

Every line is a fresh process, in MB: what it held when the model was loaded, the most it held from then on (VmHWM),
and the difference. `in and out` is the share of the tensors that are given and returned, which a call cannot do
without. Calls take the standard 24 kHz size with random weights; the command line takes the bundled checkpoint and
files of noise, and has no signal in memory. 6 kbps. Linux only.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile


RATE = 24000
BANDWIDTH = 6.0
STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, nargs="+", default=[60, 3600])
    parser.add_argument("--peer-seconds", type=int, nargs="+", default=[60, 120])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_child(options.threads, *options.child)
        return
    if not STATUS.exists():
        parser.error("memory is measured by /proc/self/status, which this system has not")
    print(f"{'':24} {'seconds':>8} {'loaded':>8} {'peak':>8} {'above':>8} {'in and out':>11}   MB")
    for seconds in options.seconds:
        for work in ("encode", "decode"):
            measure(f"model.{work}", options.threads, work, seconds)
    for seconds in options.seconds:
        measure_files(options.threads, seconds)
    above = [measure("Transformers' encode", options.threads, "peer", seconds) for seconds in options.peer_seconds]
    if len(above) > 1:
        grown = (above[-1] - above[0]) / (options.peer_seconds[-1] - options.peer_seconds[0])
        print(f"Transformers' encode takes {grown:.1f} MB a second of audio")


def measure(label: str, threads: int, *work: str | int) -> float:
    """Print a line of what a child process that does this `work` needs; MB above the loaded model."""
    command = [sys.executable, __file__, "--threads", str(threads), "--child", *map(str, work)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    loaded, peak, tensors = map(float, done.stdout.split()[-3:])
    share = f"{tensors:11.0f}" if tensors else f"{'-':>11}"
    print(f"{label:24} {work[1]:8} {loaded:8.0f} {peak:8.0f} {peak - loaded:8.0f} {share}", flush=True)
    return peak - loaded


def measure_files(threads: int, seconds: int) -> None:
    """The command line on a file of noise, there and back."""
    with tempfile.TemporaryDirectory() as folder:
        audio, coded, decoded = (str(Path(folder) / name) for name in ("in.wav", "a.ecdc", "out.wav"))
        rng = np.random.default_rng(0)
        with soundfile.SoundFile(audio, "w", RATE, 1, "PCM_16") as file:
            for _ in range(seconds):
                file.write(0.1 * rng.standard_normal(RATE, dtype=np.float32))
        measure("command line, encode", threads, "command", seconds, "encode", audio, coded)
        measure("command line, decode", threads, "command", seconds, "decode", coded, decoded)


# ---- in the child process ----------------------------------------------------------------------------------------


def run_child(threads: int, work: str, seconds: str, *paths: str) -> None:
    """Do the work and print MB: when the model is loaded, at the peak, and of tensors given and returned."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if work == "command":
        loaded, tensors = run_command(paths), 0
    else:
        with torch.inference_mode():
            loaded, tensors = run_call(work, int(seconds))
    print(loaded, status("VmHWM"), tensors / 1e6)


def run_call(work: str, seconds: int) -> tuple[float, int]:
    """A call with a whole signal of noise: MB before it, and bytes of what is given and returned."""
    import torch

    from modeling_encodec.models.configuration_encodec import EncodecConfig
    from modeling_encodec.models.modeling_encodec import EncodecModel

    with torch.inference_mode(False):
        model = EncodecModel(EncodecConfig.preset_24khz()).eval()
        if work == "peer":
            sys.path.insert(0, str(Path(__file__).parents[1]))
            from peers import stock_model

            model = stock_model(model)
    loaded = mark()
    if work == "decode":
        shape = (1, 1, model.resolve_quantizers(BANDWIDTH, None), seconds * model.config.frame_rate)
        given = torch.randint(model.config.codebook_size, shape)
        return loaded, given.nbytes + model.decode(given)[0].nbytes
    given = torch.randn(1, 1, seconds * RATE).mul_(0.1)
    return loaded, given.nbytes + model.encode(given, bandwidth=BANDWIDTH)[0].nbytes


def run_command(paths: tuple[str, ...]) -> float:
    """The command line's own main, in this process; MB that it takes to load the bundled model."""
    import transformers

    from modeling_encodec.bitstream import compression  # noqa: F401
    from modeling_encodec.checkpoints import bundled_checkpoint
    from modeling_encodec.cli import main as command_line
    from modeling_encodec.models.modeling_encodec import EncodecModel

    transformers.logging.disable_progress_bar()
    model = EncodecModel.from_pretrained(bundled_checkpoint()).eval()
    for parameter in model.parameters():  # they may still lie in the file
        parameter.sum()
    loaded = mark()
    del model
    if code := command_line(list(paths)):
        raise SystemExit(code)
    return loaded


def mark() -> float:
    """MB now held, from where on the peak counts anew."""
    CLEAR.write_text("5")
    return status("VmRSS")


def status(field: str) -> float:
    """A field of the process's status, in MB."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


if __name__ == "__main__":
    main()
