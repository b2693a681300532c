"""`push`: models to the Hub and back from it, against a server on this machine."""

import json
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from conftest import noise
from fake_hub import Account, FakeHub
from huggingface_hub import ModelCard, constants
from lm_models import make_codes, make_lm
from safetensors.torch import load_file, save_file
from without_package import WITHOUT_THE_PACKAGE

from modeling_encodec.checkpoints import bundled_checkpoint, bundled_lm_checkpoint
from modeling_encodec.conversion import model_card
from modeling_encodec.conversion.push_to_hub import make_repository, readable_size
from modeling_encodec.models.configuration_encodec import EncodecConfig
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.models.modeling_lm_encodec import EncodecLM
from modeling_encodec.processors.feature_extraction_encodec import EncodecFeatureExtractor


TOKEN, READER, STRANGER = "hf_writerWriterWriter", "hf_readerReaderReader", "hf_strangerStranger"
CARD = "---\nlicense: mit\ntags:\n- audio\n---\n\n# Mine\n"
CODE = {
    f"{name}_encodec.py"
    for name in (
        *("batching", "checked_config", "configuration", "inputs", "json_files", "kernels", "layers", "loading"),
        *("modeling", "onednn", "outputs", "parameter_counts", "pickling", "precision", "quantization", "seanet"),
        *("upstream", "weight_cache", "chunks", "training_kernels"),
    )
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with FakeHub({TOKEN: Account("me"), READER: Account("me", may_write=False), STRANGER: Account("you")}) as server:
        server.use(monkeypatch, tmp_path / "home", TOKEN)
        yield server


@pytest.fixture
def codec(small_models, tmp_path):
    """Folder of a codec as a training run leaves it, with a card."""
    folder = tmp_path / "codec"
    config = small_models["24khz"].config
    small_models["24khz"].save_pretrained(folder)
    EncodecFeatureExtractor(config.audio_channels, config.sampling_rate).save_pretrained(folder)
    options = {"output": "/home/somebody/runs/c16", "updates": 5, "corpora": [{"name": "a", "source": "/data/speech"}]}
    (folder / "training_config.json").write_text(json.dumps(options))
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.fixture
def lm(tmp_path):
    """Folder of a language model with a card: what is quickest to push."""
    make_lm().save_pretrained(tmp_path / "lm")
    (tmp_path / "lm" / "README.md").write_text(CARD)
    return tmp_path / "lm"


def states_equal(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


# ---- there and back ----------------------------------------------------------------------------------------------

ELSEWHERE = (
    WITHOUT_THE_PACKAGE
    + """
import torch
from transformers import AutoFeatureExtractor, AutoModel, EncodecModel
torch.set_num_threads(1)
given = torch.load("given.pt")
extractor = AutoFeatureExtractor.from_pretrained("me/codec", trust_remote_code=True)
inputs = extractor(given["audio"].numpy(), sampling_rate=extractor.sampling_rate, return_tensors="pt")
found = {}
for name, model in {
    "remote": AutoModel.from_pretrained("me/codec", trust_remote_code=True),
    "stock": EncodecModel.from_pretrained("me/codec"),
    "plain": AutoModel.from_pretrained("me/codec"),
}.items():
    codes = model.eval().encode(**inputs, bandwidth=3.6).audio_codes
    found[name] = type(model).__module__, codes, model.state_dict()
lm = AutoModel.from_pretrained("me/lm", trust_remote_code=True)
found["lm"] = type(lm).__module__, lm.eval()(given["codes"]).logits.detach(), lm.state_dict()
found["extractor"] = type(extractor).__module__
torch.save(found, "found.pt")
"""
)


def test_pushed_models_load_on_a_machine_without_this_package(hub, codec, small_models, run, tmp_path):
    model, lm = small_models["24khz"], make_lm(codec_fingerprint="0123456789abcdef")
    lm.save_pretrained(tmp_path / "lm")
    for folder, name in ((codec, "me/codec"), (tmp_path / "lm", "me/lm")):
        code, out, err = run("push", folder, name)
        assert code == 0, err
        assert out == f"{hub.url}/{name}/commit/{hub.repositories[name].at('main').oid}\n"
    audio, codes = noise(1, 1, 24000)[0, 0], make_codes(lm)
    torch.save({"audio": audio, "codes": codes}, tmp_path / "given.pt")
    command = [sys.executable, "-c", ELSEWHERE]
    environment = hub.environment(tmp_path / "elsewhere")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt")
    assert found["extractor"].startswith("transformers_modules.me.codec")
    expected = model.encode(audio[None, None], bandwidth=3.6).audio_codes
    for name, module in {"remote": "transformers_modules", "stock": "transformers.", "plain": "transformers."}.items():
        where, got, weights = found[name]
        assert where.startswith(module) and torch.equal(got, expected)
        assert weights.keys() == model.state_dict().keys()
        assert all(torch.equal(weights[key], tensor) for key, tensor in model.state_dict().items())
    where, logits, weights = found["lm"]
    assert where.startswith("transformers_modules.me.lm")
    torch.testing.assert_close(logits, lm(codes).logits.detach())
    assert all(torch.equal(weights[key], tensor) for key, tensor in lm.state_dict().items())


def test_pushed_models_load_here(hub, codec, small_models, run, tmp_path):
    assert run("push", codec, "me/codec", "--message", "First")[0] == 0
    repository = hub.repositories["me/codec"]
    names = {"config.json", "preprocessor_config.json", "model.safetensors", "training_config.json", "README.md"}
    assert repository.files().keys() == names | CODE | {"feature_extraction_encodec.py", ".gitattributes"}
    assert [commit.message for commit in repository.branches["main"]] == ["initial commit", "First"]  # one commit
    assert len(hub.blobs) == 1 and repository.files()["model.safetensors"] in hub.blobs.values()  # by LFS
    assert json.loads(repository.files()["config.json"])["auto_map"]["AutoModel"] == "modeling_encodec.EncodecModel"
    options = {"output": "c16", "updates": 5, "corpora": [{"name": "a", "source": "speech"}]}
    assert json.loads(repository.files()["training_config.json"]) == options  # no paths of this machine
    model = EncodecModel.from_pretrained("me/codec", cache_dir=tmp_path / "cache").eval()
    assert states_equal(model, small_models["24khz"])
    extractor = EncodecFeatureExtractor.from_pretrained("me/codec", cache_dir=tmp_path / "cache")
    assert (extractor.sampling_rate, extractor.feature_size) == (24000, 1)
    assert ModelCard.load("me/codec").data.to_dict() == {"license": "mit", "tags": ["audio"]}


def test_the_bundled_checkpoints_are_not_encoded_anew(hub, run):
    for folder, name in ((bundled_checkpoint(), "me/codec"), (bundled_lm_checkpoint(), "me/lm")):
        assert run("push", folder, name)[0] == 0
        files = hub.repositories[name].files()
        assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
        before, after = json.loads((folder / "config.json").read_text()), json.loads(files["config.json"])
        assert after.pop("auto_map")
        assert after | {"transformers_version": before["transformers_version"]} == before  # the one that saved it
        card = ModelCard(files["README.md"].decode())  # the folder's README has no metadata
        assert "encodec" in card.data.tags and f'from_pretrained("{name}")' in card.text


def test_a_codec_without_feature_extractor_gets_one(hub, small_models, run, tmp_path):
    small_models["48khz"].save_pretrained(tmp_path / "codec")
    assert run("push", tmp_path / "codec", "me/codec")[0] == 0
    settings = json.loads(hub.repositories["me/codec"].files()["preprocessor_config.json"])
    config = small_models["48khz"].config
    for name, value in {"feature_size": 2, "sampling_rate": 48000, "chunk_length_s": 1.0, "overlap": 0.01}.items():
        assert settings[name] == value
    assert (config.audio_channels, config.chunk_length_s, config.overlap) == (2, 1.0, 0.01)


# ---- what is there already ---------------------------------------------------------------------------------------


def test_a_codec_that_stock_transformers_cannot_load(hub, run, tmp_path):
    """Its codebooks have 48 entries, and stock wants a power of two."""
    size = {"num_filters": 4, "hidden_size": 16, "num_lstm_layers": 1, "codebook_size": 48}
    model = EncodecModel(EncodecConfig.preset_24khz(**size, target_bandwidths=[0.9])).eval()
    model.save_pretrained(tmp_path / "odd")
    assert run("push", tmp_path / "odd", "me/odd")[0] == 0
    assert states_equal(EncodecModel.from_pretrained("me/odd"), model)


def test_the_same_again_changes_nothing_and_a_change_is_one_commit(hub, lm, run):
    assert run("push", lm, "me/model")[0] == 0
    repository = hub.repositories["me/model"]
    first, stored = repository.at("main"), dict(hub.blobs)
    code, out, err = run("push", lm, "me/model")
    assert code == 0 and out == f"{hub.url}/me/model/commit/{first.oid}\n"
    assert err[-1] == "me/model has all of this already; nothing was changed"
    assert repository.at("main") is first and hub.blobs == stored
    (lm / "README.md").write_text(CARD + "More.\n")
    assert run("push", lm, "me/model")[0] == 0
    assert len(repository.branches["main"]) == 3 and repository.at("main").changed == ["README.md"]
    assert repository.files()["README.md"].decode() == CARD + "More.\n"


def test_files_of_the_repository_that_the_folder_has_not_stay(hub, lm, run):
    make_repository("me/model")
    hub.repositories["me/model"].commit("main", "by hand", {"samples/a.txt": b"kept"})
    assert run("push", lm, "me/model")[0] == 0
    assert hub.repositories["me/model"].files()["samples/a.txt"] == b"kept"


def test_a_branch_is_made(hub, lm, run, tmp_path):
    assert run("push", lm, "me/model", "--revision", "v2/small")[0] == 0
    repository = hub.repositories["me/model"]
    assert repository.files().keys() == {".gitattributes"}
    loaded = EncodecLM.from_pretrained("me/model", revision="v2/small", cache_dir=tmp_path / "cache")
    assert states_equal(loaded, make_lm())
    assert run("push", lm, "me/model", "--revision", "v2/small")[0] == 0  # which is there now
    assert len(repository.branches["v2/small"]) == 2


def test_a_private_repository(hub, lm, run, tmp_path):
    assert run("push", lm, "me/model", "--private")[0] == 0
    assert hub.repositories["me/model"].private
    assert run("push", lm, "me/model")[0] == 0 and hub.repositories["me/model"].private  # not made public
    loaded = EncodecLM.from_pretrained("me/model", cache_dir=tmp_path / "cache")
    assert states_equal(loaded, make_lm())
    for token in (False, STRANGER):
        with pytest.raises(OSError, match="me/model"):
            EncodecLM.from_pretrained("me/model", cache_dir=tmp_path / "other", token=token)
    hub.repositories["me/model"].private = False
    first = hub.repositories["me/model"].at("main")
    code, out, err = run("push", lm, "me/model", "--private")
    assert code == 2 and out == "" and "me/model is public, allowed with private" in err[-1]
    assert hub.repositories["me/model"].at("main") is first


def test_the_stored_login(hub, lm, run, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "home").mkdir(exist_ok=True)
    (tmp_path / "home" / "token").write_text(TOKEN)
    assert run("push", lm, "me/model")[0] == 0


# ---- card and folder ---------------------------------------------------------------------------------------------


def test_an_evaluation_makes_a_new_card_and_its_picture_goes_along(hub, lm, run, tmp_path, monkeypatch):
    def card_for(folder, *, name, evaluation=None):
        assert (folder, name, evaluation) == (lm, "me/model", results / "evaluation.json")
        return ModelCard(
            "---\nlicense: cc0-1.0\n---\n# New\n![](evaluation.png) ![](http://a/b.png) ![](absent.png)\n"
        )

    monkeypatch.setattr(model_card, "card_for", card_for)
    results = tmp_path / "results"
    results.mkdir()
    (results / "evaluation.json").write_text("{}")
    (results / "evaluation.png").write_bytes(b"picture")
    code, _, err = run("push", lm, "me/model", "--evaluation", results / "evaluation.json")
    assert code == 0, err
    files = hub.repositories["me/model"].files()
    assert files["evaluation.png"] == b"picture" and b"# New" in files["README.md"]
    assert {"b.png", "absent.png"}.isdisjoint(files)
    assert f"not uploaded of {lm}: README.md (a new card takes its place)" in err


def test_a_bad_card_is_refused_before_anything_is_sent(hub, lm, run):
    for text in ("---\nlicense: [mit\n---\n# A", "---\nlicense: mit\n# A", "---\n- a\n- b\n---\n# A"):
        (lm / "README.md").write_text(text)
        code, out, err = run("push", lm, "me/model")
        assert code == 2 and out == "" and len(err) == 1 and f"{lm / 'README.md'}: " in err[0] and "metadata" in err[0]
    assert hub.requests == []


def test_a_card_that_the_hub_refuses_leaves_no_repository(hub, lm, run):
    hub.bad_cards = "license: mit"
    code, out, err = run("push", lm, "me/model")
    assert code == 2 and out == "" and "not allowed: license: mit" in err[-1]
    assert hub.repositories == {}


@pytest.mark.parametrize("linked", [False, True])
def test_folders_with_spaces_and_links(hub, codec, run, tmp_path, linked):
    folder = tmp_path / "mein Modell für später"
    if linked:  # as in the Hub's own cache
        folder.mkdir()
        for path in codec.iterdir():
            if not path.name.endswith("_encodec.py"):
                (folder / path.name).symlink_to(path)
        (tmp_path / "link").symlink_to(folder)
        folder = tmp_path / "link"
    else:
        shutil.copytree(codec, folder)
    assert run("push", folder, "me/codec")[0] == 0
    files = hub.repositories["me/codec"].files()
    assert files["model.safetensors"] == (codec / "model.safetensors").read_bytes() and files.keys() >= CODE


# ---- a dry run ---------------------------------------------------------------------------------------------------


def test_a_dry_run_lists_files_and_makes_no_connection(hub, codec, run, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv("HF_TOKEN")
    (codec / "log.jsonl").write_text("{}")
    (codec / "LICENSE").write_text("MIT License")
    save_file({"a": torch.zeros(2)}, codec / "discriminators.safetensors")
    (codec / "samples").mkdir()
    code, out, err = run("push", codec, "me/codec", "--dry-run", "--private", "--revision", "small")
    assert code == 0 and err == [] and hub.requests == []
    *files, total, left, where = out.splitlines()
    sizes = {line.split()[0]: line.split(maxsplit=1)[1] for line in files}
    expected = {"LICENSE", "README.md", "config.json", "discriminators.safetensors"} | CODE
    assert sizes.keys() >= expected and "log.jsonl" not in sizes
    weights = (codec / "model.safetensors").stat().st_size
    assert sizes["LICENSE"] == "11 B" and sizes["model.safetensors"] == f"{weights / 1000:.1f} kB"
    assert total.startswith("total") and total.endswith(f"kB, {len(files)} files")
    assert left == f"not uploaded of {codec}: log.jsonl, samples/"
    assert where == "to me/codec, branch small, visibility: private"


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_950, "1.0 MB")]
    + [(16_340_844, "16.3 MB"), (1_500_000_000, "1.5 GB"), (2 * 10**12, "2.0 TB"), (5 * 10**15, "5000.0 TB")],
)
def test_sizes(size, text):
    assert readable_size(size) == text


# ---- the token ---------------------------------------------------------------------------------------------------

LOUD = """
import logging, sys, warnings
logging.basicConfig(level=logging.DEBUG)
from modeling_encodec.cli import main
folder = sys.argv[1]
assert main(["push", folder, "me/codec"]) == 0
from huggingface_hub.utils import logging as hub_logging
from modeling_encodec.conversion.push_to_hub import push_folder
hub_logging.set_verbosity_debug()
hub_logging.enable_propagation()
push_folder(folder, "me/second")
try:
    push_folder(folder, "you/codec")
except PermissionError:
    logging.exception("refused")
"""


def test_the_token_is_nowhere_but_in_requests(hub, lm, tmp_path):
    environment = hub.environment(tmp_path / "elsewhere", TOKEN) | {"HF_DEBUG": "1"}
    command = [sys.executable, "-c", LOUD, lm]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "DEBUG" in done.stderr and "PermissionError: you/codec" in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert not any(TOKEN.encode() in data for one in hub.repositories.values() for data in one.files().values())
    assert {path: token for method, path, token in hub.requests if "/commit/" in path} == {
        "/api/models/me/codec/commit/main": TOKEN,
        "/api/models/me/second/commit/main": TOKEN,
    }
    assert not any(TOKEN in path for _, path, _ in hub.requests)


def test_a_server_that_quotes_the_token(hub, lm, run, monkeypatch):
    monkeypatch.setattr(FakeHub, "injected", f"no, {TOKEN}")
    hub.failures["POST", "create"] = 418
    code, out, err = run("push", lm, "me/model")
    assert code == 2 and err[-1].endswith("answers 418 for me/model: no, (token)")
    assert TOKEN not in "".join(err)


@pytest.mark.parametrize("token", ["hf_with space", "hf_\x01", "hf_ü"])
def test_a_token_that_no_header_can_hold(hub, lm, run, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    code, out, err = run("push", lm, "me/model")
    assert code == 2 and len(err) == 1 and "characters that no token has" in err[0]
    assert token not in err[0] and hub.requests == []


# ---- what goes wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["codec", "a/b/c", "me/co dec", "me/-codec", "me/co--dec", "me/codec.git", "", "me/" + 97 * "x"]
)
def test_bad_repository_names(hub, lm, run, name):
    code, out, err = run("push", lm, name, "--dry-run")
    assert code == 2 and len(err) == 1 and f"repository is {name!r}, allowed: OWNER/NAME" in err[0]
    with pytest.raises(ValueError, match="allowed: OWNER/NAME"):
        make_repository(name)
    assert hub.requests == []


def replace(folder, name, **values):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


BAD_FOLDERS = {
    "no such folder": lambda folder: shutil.rmtree(folder),
    "no config.json in it": lambda folder: (folder / "config.json").unlink(),
    "no model.safetensors in it": lambda folder: (folder / "model.safetensors").unlink(),
    "config.json: no JSON (Expecting property": lambda folder: (folder / "config.json").write_text("{"),
    "model_type is 'bert', allowed: encodec, encodec_lm": lambda folder: replace(
        folder, "config.json", model_type="bert"
    ),
    "sampling_rate is 48000, allowed: 24000": lambda folder: replace(
        folder, "preprocessor_config.json", sampling_rate=48000
    ),
    "missing keys: 1, such as encoder.layers.0.conv.bias": lambda folder: change_weights(
        folder, lambda state: state.pop("encoder.layers.0.conv.bias")
    ),
    "unexpected keys: 1, such as more": lambda folder: change_weights(
        folder, lambda state: state.update(more=torch.ones(2))
    ),
    "does not load as modeling_encodec's EncodecModel": lambda folder: (folder / "model.safetensors").write_bytes(
        b"no"
    ),
}


@pytest.mark.parametrize("problem", BAD_FOLDERS)
def test_bad_folders(hub, codec, run, problem):
    BAD_FOLDERS[problem](codec)
    code, out, err = run("push", codec, "me/codec")
    assert code == 2 and out == "" and len(err) == 1 and problem in err[0] and str(codec) in err[0]
    assert hub.requests == []


def test_no_token(hub, lm, run, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    code, out, err = run("push", lm, "me/model")
    assert code == 2 and err == ["modeling-encodec: no token: log in with `hf auth login`, or set HF_TOKEN"]


@pytest.mark.parametrize(
    ("token", "repository", "problem"),
    [
        ("hf_unknownUnknown", "me/model", "rejects the token (401"),
        (READER, "me/model", "me/model: the token may not write there (403"),
        (READER, "me/there", "me/there: the token may not write there (403"),
        (TOKEN, "you/model", "you/model: the token may not write there (403"),
    ],
)
def test_tokens_without_the_right(hub, lm, run, monkeypatch, token, repository, problem):
    make_repository("me/there")
    before = hub.repositories["me/there"].at("main")
    monkeypatch.setenv("HF_TOKEN", token)
    code, out, err = run("push", lm, repository)
    assert code == 2 and out == "" and problem in err[-1] and token not in "".join(err)
    with pytest.raises(PermissionError):  # as early as before a training run
        make_repository(repository)
    assert hub.repositories.keys() == {"me/there"} and hub.repositories["me/there"].at("main") is before


def test_no_connection(hub, lm, run, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    code, out, err = run("push", lm, "me/model")
    assert code == 2 and err[-1] == f"modeling-encodec: no answer from {nowhere}: [Errno 111] Connection refused"


UNCHANGED = "no file of me/model was changed"


@pytest.mark.parametrize(
    ("request_", "failure", "problem", "state"),
    [
        (("POST", "/preupload/"), 418, "answers 418", UNCHANGED),
        (("PUT", "/lfs/"), 507, "answers 507", UNCHANGED),
        (("POST", "/commit/"), 500, "answers 500", UNCHANGED),
        (("POST", "/commit/"), "cut", "disconnected", UNCHANGED),
        (("POST", "/commit/"), "lost", "disconnected", "me/model has a new commit"),
    ],
)
def test_failures_in_the_middle(hub, lm, run, request_, failure, problem, state):
    make_repository("me/model")
    hub.failures[request_] = failure
    code, out, err = run("push", lm, "me/model")
    assert code == 2 and out == "" and problem in err[-1] and state in err[-1]
    assert len(hub.repositories["me/model"].branches["main"]) == (2 if failure == "lost" else 1)
    hub.failures.clear()
    assert run("push", lm, "me/model")[0] == 0
    assert len(hub.repositories["me/model"].branches["main"]) == 2
    assert set(hub.repositories["me/model"].files()) >= {"modeling_lm_encodec.py", "model.safetensors"}
