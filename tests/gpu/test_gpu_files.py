"""Files between CPU and GPU: bytes made on either decode on the other, with the language model anywhere."""

import copy
import io

import pytest
import torch
from conftest import clip
from devices import REAL, assert_near, assert_on
from ecdc_files import make_lm

from modeling_encodec.bitstream.compression import compress, compress_blocks, decompress
from modeling_encodec.bitstream.live import decode_live, encode_live
from modeling_encodec.evaluation.metrics import mel_distance, si_snr, windowed_si_snr
from modeling_encodec.evaluation.scoring import count_codes
from modeling_encodec.evaluation.systems import Codec
from modeling_encodec.models.fingerprints import codebook_fingerprint, stream_fingerprint


pytestmark = [pytest.mark.usefixtures("device"), pytest.mark.parametrize("name", ["24khz", "48khz"])]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def here(small_models, lms, name):
    return small_models[name], lms[name]


@pytest.fixture
def there(here):
    return tuple(copy.deepcopy(one).to("cuda") for one in here)


@pytest.fixture
def audio(here):
    return clip(here[0], 1.4)


@pytest.mark.parametrize(
    ("lm_where", "version"),
    [(None, 1), ("cpu", 1), ("cuda", 1)]
    + [pytest.param(where, 0, marks=pytest.mark.slow) for where in (None, "cpu", "cuda")],
)
def test_bytes_are_those_of_the_cpu(here, there, audio, lm_where, version):
    (model, lm), (moved, _) = here, there
    if lm_where is None:
        lm = given = None
    else:
        lm = make_lm(model, audio, zero_past_key=True) if version == 0 else lm
        given = copy.deepcopy(lm).to(lm_where)
    options = {"version": version} | ({"segment_seconds": 0.5} if version else {})
    mine = compress(moved, audio.to("cuda"), lm=given, **options)
    expected = compress(model, audio, lm=lm, **options)
    assert REAL or mine == expected
    assert compress(moved, audio, lm=given, **options) == mine  # audio from the CPU
    sound, _ = decompress(expected, model, lm)
    decoded, _ = decompress(expected, moved, given)  # made on the CPU, decoded there
    assert_on("cuda:0", decoded)
    assert_near(decoded, sound)
    back, _ = decompress(mine, model, lm)  # and the other way
    assert back.shape == sound.shape
    if mine == expected:
        assert torch.equal(back, sound)


def test_coded_by_one_form_and_read_by_the_other(here, there, audio):
    """The language model's integers decide: a GPU reads what the CPU wrote, and the other way, bit for bit."""
    (model, lm), (moved, moved_lm) = here, there
    for writer, reader in ((lm, moved_lm), (moved_lm, lm)):
        codec, other = (model, moved) if writer is lm else (moved, model)
        data = compress(codec, audio.to(codec.device), lm=writer, segment_seconds=0.25)
        plain = compress(codec, audio.to(codec.device), segment_seconds=0.25)
        assert_near(decompress(data, other, reader)[0], decompress(plain, other)[0], 1e-6)


def test_fingerprints(here, there):
    assert stream_fingerprint(there[0]) == stream_fingerprint(here[0])
    assert codebook_fingerprint(there[0]) == codebook_fingerprint(here[0])


@pytest.mark.parametrize("conceal", ["repeat", pytest.param("silence", marks=pytest.mark.slow)])
def test_damage(here, there, audio, conceal):
    data = bytearray(compress(here[0], audio, lm=here[1], segment_seconds=0.25))
    data[len(data) // 2] ^= 255
    found = []
    for model, lm in (here, there):
        damage = []
        sound, _ = decompress(bytes(data), model, lm, conceal=conceal, on_damage=damage.append)
        found.append((sound, damage))
    assert found[0][1] == found[1][1] != []
    assert_near(found[1][0], found[0][0])


@pytest.mark.slow
def test_blocks(here, there, audio):
    written = []
    for model, lm in (here, there):
        file = io.BytesIO()
        compress_blocks(model, iter(audio.split(7000, dim=1)), file, lm=lm)
        written.append(file.getvalue())
    assert REAL or written[0] == written[1]


@pytest.mark.slow
def test_the_live_link(here, there, audio):
    pcm = (audio.T.clamp(-1, 1) * 32767).numpy().astype("<i2").tobytes()
    sent = []
    for model, lm in (here, there):
        coded = io.BytesIO()
        about = {"num_quantizers": 2, "model_name": "m", "lm_name": "l", "segment_seconds": 0.5}
        if model.config.chunk_length is not None:
            about["segment_seconds"] = 1.0
        encode_live(model, io.BytesIO(pcm), coded, lm=lm, **about)
        sent.append(coded.getvalue())
    assert REAL or sent[0] == sent[1]
    heard = []
    for model, lm in (here, there):
        sound = io.BytesIO()
        decode_live(lambda header: (model, lm), io.BytesIO(sent[0]), sound, on_damage=pytest.fail)  # noqa: B023
        samples = torch.frombuffer(bytearray(sound.getvalue()), dtype=torch.int16)
        heard.append(samples.float() / (1 << 15))
    assert_near(heard[1], heard[0], 1e-3)  # of 16 bits


def test_metrics(here, there, audio):
    rate, noisy = here[0].config.sampling_rate, audio + 0.01
    for metric in (lambda a, b: mel_distance(a, b, rate), si_snr, lambda a, b: windowed_si_snr(a, b, rate)):
        assert_near(metric(audio.to("cuda"), noisy.to("cuda")), metric(audio, noisy), 1e-3)


@pytest.mark.slow
def test_evaluated_systems(here, there, audio):
    kbps = here[0].config.target_bandwidths[0]
    ours, theirs = (Codec(model, kbps, lm).code(audio.numpy()) for model, lm in (there, here))
    for mine, expected in ((ours.bytes, theirs.bytes), (ours.lm_bytes, theirs.lm_bytes)):
        assert mine == pytest.approx(expected, rel=0.02 if REAL else 0)
    assert_near(ours.audio, theirs.audio, 1.0 if REAL else None)
    ours, theirs = (count_codes(audio.numpy(), model) for model in (there[0], here[0]))
    assert REAL or (torch.as_tensor(ours) == torch.as_tensor(theirs)).all()
