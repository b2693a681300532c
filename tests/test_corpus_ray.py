"""`tokenize --engine ray` on a local cluster: what the local run writes, also when actors die."""

import os
import shutil
import sys
import tempfile

import pytest
from corpus_files import write_corpus

from modeling_encodec.processors.audio_tokens import PortableCodec
from modeling_encodec.processors.corpus.sources import open_source
from modeling_encodec.processors.corpus.tokenization import Tokenization, tokenize_corpus


def files_of(out) -> dict[str, bytes]:
    paths = [path for path in sorted(out.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def cluster():
    """Eight cores by name, so that several actors run on any machine."""
    ray = pytest.importorskip("ray", reason="ray is not installed")
    pytest.importorskip("aiohttp", reason="aiohttp is not installed")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # its sockets' names must be short
    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    # Workers import what the tests do, from wherever they stand.
    paths = {"env_vars": {"PYTHONPATH": os.path.dirname(__file__), "OMP_NUM_THREADS": "1"}}
    ray.init(num_cpus=8, object_store_memory=100 << 20, _temp_dir=folder, runtime_env=paths, **options)
    yield ray
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "clips", long_seconds=25)


@pytest.fixture(scope="module")
def codec(small_models):
    return PortableCodec(small_models["24khz"])  # its weights travel to the actors


def run_of(codec, corpus, out, **options) -> Tokenization:
    return Tokenization(open_source(corpus, shard_rows=4), out, codec, 8, batch_seconds=2, **options)


@pytest.fixture(scope="module")
def whole(codec, corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    tokenize_corpus(run_of(codec, corpus, out), workers=0)
    return files_of(out)


def test_ray_writes_what_the_local_run_does_and_goes_on(cluster, codec, corpus, whole, tmp_path, monkeypatch):
    from modeling_encodec.processors.corpus.ray import tokenize_on_ray

    monkeypatch.chdir(tmp_path)
    report = tokenize_on_ray(run_of(codec, corpus, tmp_path / "out"), actors=2)
    assert files_of(tmp_path / "out") == whole and report.hours == pytest.approx(0.0081, abs=5e-4)
    path = tmp_path / "out" / "data" / "train-00002-of-00004.parquet"
    then = {other: other.stat().st_mtime_ns for other in path.parent.iterdir() if other != path}
    path.unlink()
    tokenize_on_ray(run_of(codec, corpus, tmp_path / "out"))
    assert files_of(tmp_path / "out") == whole
    assert all(other.stat().st_mtime_ns == before for other, before in then.items())
    assert cluster.is_initialized()  # it was there before, and stays


class DyingCodec(PortableCodec):
    """Kills the process that it is first used in, once."""

    mark = None

    def on(self, device):
        """The model."""
        if self.mark and not os.path.exists(self.mark):
            open(self.mark, "w").close()
            os._exit(9)
        return super().on(device)


class DeadlyShard:
    """A shard that kills whoever reads it."""

    def __init__(self, shard):
        self.number, self.size = shard.number, shard.size

    def rows(self):
        """Nothing, ever."""
        os._exit(9)


def test_an_actor_that_dies_is_replaced(cluster, small_models, corpus, whole, tmp_path):
    from modeling_encodec.processors.corpus.ray import tokenize_on_ray

    codec = DyingCodec(small_models["24khz"])
    run = run_of(codec, corpus, tmp_path / "out")
    codec.mark = str(tmp_path / "died")
    tokenize_on_ray(run, actors=2)
    assert os.path.exists(codec.mark) and files_of(tmp_path / "out") == whole


@pytest.mark.slow
def test_a_shard_that_kills_its_actors_is_named_and_the_others_are_made(cluster, codec, corpus, whole, tmp_path):
    from modeling_encodec.processors.corpus.ray import tokenize_on_ray

    run = run_of(codec, corpus, tmp_path / "out")
    good, run.source.shards[1] = run.source.shards[1], DeadlyShard(run.source.shards[1])
    with pytest.raises(RuntimeError, match=r"actors died 4 times at shards \[1\]; the same command goes on"):
        tokenize_on_ray(run, actors=2)
    assert len(list((tmp_path / "out" / "data").glob("*.parquet"))) == 3
    run.source.shards[1] = good
    tokenize_corpus(run, workers=0)
    assert files_of(tmp_path / "out") == whole


def test_a_shard_that_breaks_off_is_named_and_the_others_are_made(cluster, codec, corpus, tmp_path):
    import tarfile

    from modeling_encodec.processors.corpus.ray import tokenize_on_ray

    (tmp_path / "tars").mkdir()
    for number in range(2):
        with tarfile.open(tmp_path / "tars" / f"{number}.tar", "w") as tar:
            tar.add(corpus / "a" / "mono.wav", "a.wav")
    data = (tmp_path / "tars" / "0.tar").read_bytes()
    (tmp_path / "tars" / "0.tar").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"^shard 0 breaks off .*0\.tar.*, allowed: whole shards, or keep_broken$"):
        tokenize_on_ray(run_of(codec, tmp_path / "tars", tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out" / "data").iterdir()] == ["train-00001-of-00002.parquet"]


def test_the_command(cluster, run, small_models, corpus, tmp_path):
    small_models["24khz"].save_pretrained(tmp_path / "model")
    command = ("tokenize", corpus, tmp_path / "out", "-m", tmp_path / "model", "-b", 3.6, "--engine", "ray")
    code, told, lines = run(*command, "--shard-rows", 4)
    assert code == 0 and "8 clips" in told, lines


def test_without_ray_one_line_says_what_to_install(run, small_models, corpus, tmp_path, monkeypatch):
    small_models["24khz"].save_pretrained(tmp_path / "model")
    monkeypatch.setitem(sys.modules, "ray", None)
    command = ("tokenize", corpus, tmp_path / "out", "-m", tmp_path / "model", "-b", 3.6, "--engine", "ray")
    code, _, lines = run(*command)
    assert code == 2 and lines[-1].endswith('a Ray cluster needs: pip install "modeling-encodec[ray]"')
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"device": "nowhere"}, "device is 'nowhere', allowed on Ray: cpu, cuda"),
        ({"workers": -1}, "workers is -1, allowed: 0 or more"),
        ({"actors": 0}, "actors is 0, allowed: 1 or more"),
    ],
)
def test_settings_that_cannot_work(codec, corpus, tmp_path, options, message):
    pytest.importorskip("ray", reason="ray is not installed")
    from modeling_encodec.processors.corpus.ray import tokenize_on_ray

    with pytest.raises(ValueError, match=message):
        tokenize_on_ray(run_of(codec, corpus, tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()
