"""Hours of audio tokenised an hour: `tokenize` and `CodecTokenizer.map` beside the `datasets.map` script that people
write with Transformers' model, one clip at a time or eight padded, on the same files, by turns in one run.

    python tests/benchmarks/bench_tokenize.py [--minutes 6] [--rounds 3] [--processes 2] [--clips FOLDER] [--model DIR]

Without --clips: FLAC files at 44.1 kHz of 1 to 20 s, cut from the demo clips by a fixed seed. Without --model: the
released 24 kHz size with random weights. 6 kbps. All sides read with libsndfile and resample with soxr. The script has
all threads of the machine, each of our processes one. Loading of models, and starting of processes, is left out.
Memory is that of all processes of a side together (PSS), sampled. What stock and we code alone must be equal.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import soundfile
import torch
import transformers
from datasets import Dataset, disable_caching, disable_progress_bars

from modeling_encodec.demo.table import demo_clips
from modeling_encodec.models.configuration_encodec import EncodecConfig
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.processors.audio import read_audio
from modeling_encodec.processors.dataset_tokenization import CodecTokenizer, load_tokens
from modeling_encodec.processors.feature_extraction_encodec import EncodecFeatureExtractor


BANDWIDTH = 6.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--clips", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    disable_caching()
    disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        clips = options.clips or write_clips(place / "clips", options.minutes)
        model = options.model or write_model(place / "model")
        run_sides(place, clips, model, options)


def write_clips(folder: Path, minutes: float) -> Path:
    """Clips of speech and music of uneven lengths."""
    rng, rate = np.random.default_rng(0), 44100
    sounds = [np.tile(read_audio(path, rate, 1)[0][0], 5) for path in demo_clips()]
    folder.mkdir()
    left, number = minutes * 60, 0
    while left > 0:
        seconds = float(np.clip(rng.lognormal(np.log(7), 0.6), 1, 20))
        sound = sounds[number % len(sounds)]
        start = int(rng.integers(len(sound) - int(seconds * rate)))
        soundfile.write(folder / f"{number:05d}.flac", sound[start : start + int(seconds * rate)], rate)
        left, number = left - seconds, number + 1
    return folder


def write_model(folder: Path) -> Path:
    torch.manual_seed(0)
    config = EncodecConfig.preset_24khz()
    model = EncodecModel(config).eval()
    with torch.no_grad():  # spread over what the encoder puts out, so that codes differ
        latents = model.encoder(torch.randn(1, 1, 48000) * 0.1)
        for layer in model.quantizer.layers:
            layer.codebook.embed.copy_(torch.randn_like(layer.codebook.embed) * latents.std())
    model.save_pretrained(folder)
    EncodecFeatureExtractor.for_model(config).save_pretrained(folder)
    return folder


class Script:
    """What people write: Transformers' model in `datasets.map`."""

    def __init__(self, model: Path, device: str, batch: int):
        self.extractor = transformers.EncodecFeatureExtractor.from_pretrained(model)
        self.model = transformers.EncodecModel.from_pretrained(model).eval().to(device)
        self.device, self.batch = device, batch

    def __call__(self, rows: dict) -> dict:
        audio = [read_audio(path, 24000, 1)[0][0] for path in rows["path"]]
        inputs = self.extractor(audio, sampling_rate=24000, return_tensors="pt").to(self.device)
        with torch.no_grad():
            coded = self.model.encode(inputs["input_values"], inputs["padding_mask"], BANDWIDTH)
        return {"codes": coded.audio_codes[0].tolist()}

    def run(self, paths: list[str]) -> tuple[float, Dataset]:
        began = time.perf_counter()
        made = Dataset.from_dict({"path": paths}).map(self, batched=True, batch_size=self.batch)
        return time.perf_counter() - began, made


class Memory(threading.Thread):
    """The most that a process and its children hold together, in MB."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.process, self.most = psutil.Process(pid), 0.0
        self.start()

    def run(self) -> None:
        while True:
            try:
                family = [self.process, *self.process.children(recursive=True)]
                self.most = max(self.most, sum(one.memory_full_info().pss for one in family) / 1e6)
            except psutil.NoSuchProcess:
                if not self.process.is_running():
                    return
            time.sleep(0.3)


def tokenize(place: Path, clips: Path, model: Path, processes: int, *extra: str) -> tuple[float, str, Path]:
    """Hours an hour by the command's own count, what else it tells, and its output."""
    out = Path(tempfile.mkdtemp(dir=place)) / "out"
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    )
    command = [sys.executable, *launch, "-m", "modeling_encodec", "tokenize", clips, out, "-m", model, "-b", BANDWIDTH]
    command += ["--shard-rows", "8", *extra]  # so that a small corpus can be shared
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"ACCELERATE_USE_CPU": "true"} if "cpu" in extra else {})
    words = [str(word) for word in command]
    running = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    memory = Memory(running.pid)
    told, errors = running.communicate()
    if running.returncode:
        raise RuntimeError(errors)
    speed = float(re.search(r"([\d.]+) hours of audio an hour", told)[1])
    waited = re.search(r"waited for audio ([\d.]+ ?%)", told)[1]
    return speed, f"waited {waited}, most memory {memory.most:.0f} MB", out


def run_sides(place: Path, clips: Path, model: Path, options) -> None:
    paths = sorted(str(path) for path in clips.rglob("*") if path.is_file())
    hours = sum(soundfile.info(path).duration for path in paths) / 3600
    print(
        f"{len(paths)} clips, {hours * 60:.1f} min; {torch.get_num_threads()} threads, {options.processes} processes"
    )
    device = ("--device", options.device)
    scripts = {1: Script(model, options.device, 1), 8: Script(model, options.device, 8)}
    tokenizer = CodecTokenizer(model, BANDWIDTH, device=options.device)
    speeds: dict[str, list[float]] = {}
    notes: dict[str, str] = {}
    for script in scripts.values():  # to warm up
        script.run(paths[:2])
    for _ in range(options.rounds):
        for batch, script in scripts.items():
            seconds, made = script.run(paths)
            speeds.setdefault(f"script, batch {batch}", []).append(hours * 3600 / seconds)
            if batch == 1:
                alone = made
        began = time.perf_counter()
        tokenizer.map(Dataset.from_dict({"audio": paths}), num_proc=options.processes, batch_size=8)
        speeds.setdefault("CodecTokenizer.map", []).append(hours * 3600 / (time.perf_counter() - began))
        for name, processes, extra in (
            ("tokenize, 1 process", 1, ()),
            (f"tokenize, {options.processes} processes", options.processes, ()),
            (f"tokenize, {options.processes} processes, fast", options.processes, ("--precision", "fast")),
        ):
            speed, notes[name], out = tokenize(place, clips, model, processes, *device, *extra)
            speeds.setdefault(name, []).append(speed)
            if not extra:
                compare(alone, out)
    report(speeds, notes, alone, out)


def compare(alone: Dataset, out: Path) -> None:
    """Codes of the script, one clip at a time, against ours."""
    ours = load_tokens(out).with_format("numpy")["codes"]
    frames = sum(np.asarray(codes).shape[1] for codes in ours)
    other = sum((np.asarray(a) != np.asarray(b)).any(0).sum() for a, b in zip(alone["codes"], ours))
    print(f"frames with another code than the script's: {other} of {frames}")


def report(speeds: dict, notes: dict, alone: Dataset, out: Path) -> None:
    base = {name: statistics.median(speeds[name]) for name in ("script, batch 1", "script, batch 8")}
    print(f"\n{'':36} hours an hour   to batch 1   to batch 8")
    for name, values in speeds.items():
        speed = statistics.median(values)
        ratios = "   ".join(f"{speed / value:10.2f}" for value in base.values())
        print(f"{name:36} {speed:13.1f}   {ratios}   {notes.get(name, '')}")
    codes = sum(np.asarray(row).size for row in alone["codes"])
    with tempfile.TemporaryDirectory() as folder:
        alone.select_columns("codes").to_parquet(f"{folder}/lists.parquet")
        lists = os.stat(f"{folder}/lists.parquet").st_size
    ours = sum(path.stat().st_size for path in out.glob("data/*"))
    arrow = alone.data.nbytes
    print(f"\nbits a code: ours {8 * ours / codes:.2f}; int64 lists {8 * arrow / codes:.1f} in Arrow, ", end="")
    print(f"{8 * lists / codes:.2f} in Parquet")


if __name__ == "__main__":
    main()
