"""Four times the input takes four times the work, counted in steps of the interpreter and not in seconds."""

import json
import sys
from collections.abc import Callable
from functools import reduce
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from modeling_encodec.bitstream.codes_file import EcdcWriter
from modeling_encodec.commands import coding
from modeling_encodec.evaluation import report
from modeling_encodec.evaluation.clips import Clip, list_clips, select_clips
from modeling_encodec.evaluation.plots import read_log
from modeling_encodec.models.configuration_encodec import EncodecConfig
from modeling_encodec.processors.audio_kinds import list_audio
from modeling_encodec.processors.corpus.clips import file_entries, scan
from modeling_encodec.processors.corpus.reading import list_recordings
from modeling_encodec.processors.corpus.rows import UniqueNames
from modeling_encodec.processors.corpus.shards import ShardFile, token_schema, write_summary
from modeling_encodec.processors.corpus.sources import open_source
from modeling_encodec.streaming import steps as stream_steps
from modeling_encodec.streaming.streams import cut_blocks
from modeling_encodec.training.reporting import Reporter


class Counted(str):
    """Text that counts how often it is compared, which the interpreter does in one step for a whole list."""

    compared = 0

    def __eq__(self, other):
        Counted.compared += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def work(function: Callable) -> int:
    """Steps of the interpreter, and comparisons of `Counted`, that `function()` takes."""
    steps = 0

    def count(frame, event, argument):
        nonlocal steps
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        steps += event == "opcode"
        return count

    before, compared = sys.gettrace(), Counted.compared
    sys.settrace(count)
    try:
        function()
    finally:
        sys.settrace(before)
    return steps + Counted.compared - compared


FEW = 40


def assert_linear(make: Callable[[int], Callable]) -> None:
    """`make(n)` gives the function whose work, with `n` of whatever it is, is counted."""
    make(FEW)()  # what is imported and cached at first
    few, many = work(make(FEW)), work(make(4 * FEW))
    most = 4.4 * few + 100  # the logarithms of sorting, and what is done once
    assert many < most, f"{few} steps for {FEW}, {many} for {4 * FEW}"


def test_the_measure_tells():
    with pytest.raises(AssertionError, match="steps for"):
        assert_linear(lambda n: lambda: [name for name in names(n) if names(n).count(name) > 1])
    with pytest.raises(AssertionError, match="steps for"):
        assert_linear(lambda n: lambda: [sum(range(i) and 1 for _ in range(i)) for i in range(n)])
    assert_linear(lambda n: lambda: sorted(dict.fromkeys(names(n))))


def names(count: int) -> list[str]:
    return [Counted(f"{number:04d}.wav") for number in range(count)]


def test_jobs_of_a_folder(tmp_path, monkeypatch):
    """`encode` and `decode`."""

    def make(n):
        folder = files(tmp_path / str(n), n)
        listed = coding._folder_jobs

        def counted(*arguments):
            return [(source, Counted(target)) for source, target in listed(*arguments)]

        def plan():
            with monkeypatch.context() as patch:
                patch.setattr(coding, "_folder_jobs", counted)
                assert len(coding._plan([str(folder), str(tmp_path / "out")], list_audio, ".ecdc", False)) == n

        return plan

    assert_linear(make)


def files(folder, count):
    folder.mkdir(exist_ok=True)
    for name in names(count):
        (folder / name).touch()
    return folder


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".txt"])
@pytest.mark.parametrize("path", ["one.wav", "{}.wav", "sub/{}.wav"])
def test_sources_of_a_manifest(tmp_path, suffix, path):
    """Of one file again and again too, each with a name of its own."""

    def make(n):
        manifest = tmp_path / f"{n}{suffix}"
        paths = [path.format(number) for number in range(n)]
        lines = [json.dumps({"path": one, "text": "a"}) for one in paths] if suffix == ".jsonl" else paths
        lines = ["path,text", *(f"{one},a" for one in paths)] if suffix == ".csv" else lines
        manifest.write_text("".join(f"{line}\n" for line in lines))

        def listed():
            source = open_source(manifest, keep=["text"] * (suffix != ".txt"), shard_rows=10)
            rows = [row.name for shard in source.shards for row in shard.rows()]
            assert len(set(rows)) == len(rows) == n
            assert len(list_recordings(manifest)) == n and list_clips(manifest)

        return listed

    assert_linear(make)


def test_sources_of_a_folder(tmp_path):
    def make(n):
        folder = files(tmp_path / str(n), n)

        def listed():
            source = open_source(folder, shard_rows=10)
            assert sum(1 for shard in source.shards for _ in shard.rows()) == n
            assert len(list_recordings(folder)) == len(list_clips(folder)) == n

        return listed

    assert_linear(make)


def test_names_that_are_given_again():
    def make(n):
        def add():
            unique = UniqueNames()
            assert len({unique.add(name) for name in ["a", "a (2)", "b"] * n}) == 3 * n

        return add

    assert_linear(make)
    unique = UniqueNames()
    assert [unique.add(name) for name in ("a", "a (2)", "a", "a (2)", "a")] == [
        "a", "a (2)", "a (3)", "a (2) (2)", "a (4)"
    ]  # fmt: skip


def test_index_of_audio_files(tmp_path):
    def make(n):
        folder = files(tmp_path / str(n), n)

        def index():
            entries, _ = file_entries(folder.iterdir())
            found, _ = scan(entries, lambda name, location: [1, 2], tmp_path / f"{n}.jsonl", 1)
            assert len(found) == len(scan(entries, None, tmp_path / f"{n}.jsonl", 1)[0]) == n

        return index

    assert_linear(make)


@pytest.mark.parametrize("categories", [2, 1000])
def test_choice_and_report_of_an_evaluation(categories):
    """With as many categories as clips too."""

    def make(n):
        clips = [Clip(str(number), f"kind {number % categories}", 1.0, "") for number in range(n)]
        row = {"scores": {"si_snr": 1.0}, "bytes": 10, "lm_bytes": 5, "lag": 0}
        records = [
            {"clip": clip.name, "category": clip.category, "samples": 24000, "sha256": "", "rows": [row, row]}
            | {"counts": np.ones((1, 4))}
            for clip in clips
        ]
        systems = [SimpleNamespace(name=name, kbps=6.0) for name in "ab"]
        evaluation = SimpleNamespace(
            model=SimpleNamespace(config=SimpleNamespace(sampling_rate=24000)),
            systems=systems, metrics=["si_snr"], other_files={},
            describe=lambda: {"data": {}, "systems": [], "clips_sha256": "", "method": {"metrics": ["si_snr"]}},
        )  # fmt: skip

        def choose_and_sum_up():
            assert select_clips(clips, most=10**6) == clips
            results = report.summarise(evaluation, records)
            assert sum(results["data"]["categories"].values()) == n
            report.table(results)

        return choose_and_sum_up

    assert_linear(make)


def test_shards_and_their_summary(tmp_path):
    """With as many shards, and skipped rows, as there are."""

    def make(n):
        schema = token_schema("uint16", False, {})
        description = {"shards": n, "split": "train", "columns": {}, "source": {"name": "s"}}
        provenance = dict.fromkeys(
            ("sampling_rate", "hop_length", "num_quantizers", "codebook_size", "bandwidth_kbps"), 1
        )
        description["provenance"] = provenance | {"model": "m"}
        place = SimpleNamespace(number=0, name="a", kept={})
        tokens = SimpleNamespace(codes=np.zeros((1, 2), np.uint16), audio_length=5, scales=None)
        for number in range(n):
            file = ShardFile(tmp_path / str(n) / "data" / f"train-{number:05d}-of-{n:05d}.parquet", schema)
            file.add(place, tokens)
            file.close_window()
            file.skip(SimpleNamespace(number=1, name="b"), "silent")
            file.finish({}, 2, 5)
        (tmp_path / str(n) / "run.json").write_text("{}")
        return lambda: write_summary(tmp_path / str(n), description, {})

    assert_linear(make)


def test_log_and_skipped_files_of_a_run(tmp_path):
    def make(n):
        config = SimpleNamespace(trackers=[])
        accelerator = SimpleNamespace(process_index=0, is_main_process=True, log=lambda *_, **__: None)
        folder = tmp_path / str(n)

        def report_all():
            reporter = Reporter(folder, config, accelerator)
            for update in range(n):
                reporter.skipped([(f"{update}.wav", "silent"), ("0.wav", "silent")])
                reporter.write(update, {"loss": 1.0})
            reporter.update = n
            reporter._drop_lines()
            assert len(read_log(folder / "log.jsonl")) == n
            (folder / "log.jsonl").unlink()
            (folder / "skipped_files.jsonl").unlink()

        return report_all

    assert_linear(make)


@pytest.mark.parametrize("length", [1, 100, 10**6])
def test_blocks_cut_anew(length, monkeypatch):
    """And what is copied grows with the signal alone: blocks of one sample into ones of any length."""
    copied = 0
    cat = torch.cat

    def counted(parts, dim):
        nonlocal copied
        copied += sum(part.shape[-1] for part in parts)
        return cat(parts, dim=dim)

    def cut(n):
        nonlocal copied
        copied = 0
        with monkeypatch.context() as patch:
            patch.setattr(torch, "cat", counted)
            blocks = [block for block, _ in cut_blocks(torch.arange(n).split(1), length)]
        assert torch.equal(cat(blocks), torch.arange(n)) and max(map(len, blocks)) <= length
        return copied

    few, many = cut(500), cut(2000)
    assert many <= 4.5 * few


def test_segments_of_a_stream(small_models):
    """Frame by frame into long segments."""

    def make(n):
        config = small_models["24khz"].config
        frames = [np.zeros((2, 1), np.int64)] * n

        def write():
            file = SimpleNamespace(write=len, seekable=lambda: False)
            writer = EcdcWriter(file, small_models["24khz"], num_codebooks=2, model_name="m", segment_seconds=800)
            for frame in frames:
                writer.write(frame)
            writer.close(n * config.hop_length)

        return write

    assert_linear(make)


def test_chunks_of_a_signal(monkeypatch):
    monkeypatch.setattr(stream_steps, "sum", lambda values: reduce(lambda a, b: a + b, values, 0), raising=False)
    config = EncodecConfig.preset_48khz()

    def make(n):
        def split():
            chunks = stream_steps.split_chunks(config, n, 150 * n)
            assert chunks == [(150 * number, 150) for number in range(n)]

        return split

    assert_linear(make)
