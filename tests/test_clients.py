"""Models of stock Transformers that hold an EnCodec do with this one what they do with their own, weights being equal;
and decoders and language models made on its codes."""

import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from client_models import (
    BARK_TEXT,
    MUSICGENS,
    NEW_TOKENS,
    TEXT,
    VocosDecoder,
    generate,
    generate_bark,
    make_bark,
    make_musicgen,
    text_tokenizer,
)
from conftest import noise
from peers import stock_model
from safetensors.torch import load_file, save_file

from modeling_encodec.demo.table import demo_clips
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.processors.audio import read_audio
from modeling_encodec.processors.processing_encodec import EncodecProcessor


HOP, RATE = 640, 32000  # of MusicGen's codec
FRAMES = NEW_TOKENS + 1 - 4  # the last codebook of four comes three steps late, and the first step is the start's
PROMPT = 6500  # samples: 11 frames, the last one not whole
CLOSE = {"rtol": 0, "atol": 5e-6}


@pytest.fixture(scope="module")
def codecs(small_models):
    """Ours and stock's, with the same weights, for MusicGen and for Bark."""
    return {name: (small_models[name], stock_model(small_models[name])) for name in ("32khz", "24khz")}


@pytest.fixture
def musicgens(codecs):
    """`musicgens(name, channels)`: one round our codec and one round stock's, otherwise equal; own copies, since
    training and `generate` leave marks."""
    return lambda name="musicgen", channels=1: [
        make_musicgen(name, copy.deepcopy(codec), channels) for codec in codecs["32khz"]
    ]


@pytest.fixture
def codes_decoded(monkeypatch):
    """`codes_decoded(model)`: a list that gets all codes its codec decodes."""

    def watch(model):
        decoded, decode = [], model.audio_encoder.decode

        def spy(codes, *args, **kwargs):
            decoded.append(codes.clone())
            return decode(codes, *args, **kwargs)

        monkeypatch.setattr(model.audio_encoder, "decode", spy)
        return decoded

    return watch


def assert_equal_codes(ours: list, stocks: list) -> None:
    assert len(ours) == len(stocks) > 0
    assert all(torch.equal(a, b) for a, b in zip(ours, stocks))


# ---- MusicGen -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("name", MUSICGENS)
def test_musicgen_generates_as_with_stock(name, channels, musicgens, codes_decoded):
    ours, stock = musicgens(name, channels)
    assert type(ours.audio_encoder) is EncodecModel
    our_codes, stock_codes = codes_decoded(ours), codes_decoded(stock)
    inputs = {} if name == "musicgen" else {"input_features": torch.eye(12)[torch.arange(60) % 12].expand(2, 60, 12)}
    audio, expected = generate(ours, **inputs), generate(stock, **inputs)
    assert audio.shape == expected.shape == (2, channels, FRAMES * HOP)
    assert_equal_codes(our_codes, stock_codes)
    assert [codes.shape for codes in our_codes] == [(1, 2, 4, FRAMES)] * channels
    assert len(our_codes[0].unique()) > 20
    torch.testing.assert_close(audio, expected, **CLOSE)
    assert expected.abs().mean() > 0.01
    assert not torch.equal(audio, generate(ours, seed=2, **inputs))


@pytest.mark.parametrize("channels", [1, 2])
def test_musicgen_continues_audio(channels, musicgens, codes_decoded):
    ours, stock = musicgens(channels=channels)
    our_codes, stock_codes = codes_decoded(ours), codes_decoded(stock)
    prompt = {"input_values": noise(2, channels, PROMPT), "padding_mask": torch.ones(2, PROMPT, dtype=torch.long)}
    audio, expected = generate(ours, **prompt), generate(stock, **prompt)
    assert_equal_codes(our_codes, stock_codes)
    for channel, codes in enumerate(our_codes):
        prompt_codes = ours.audio_encoder.encode(prompt["input_values"][:, channel : channel + 1]).audio_codes
        assert torch.equal(codes[..., : prompt_codes.shape[3]], prompt_codes)
    assert audio.shape == (2, channels, (11 + FRAMES) * HOP)
    torch.testing.assert_close(audio, expected, **CLOSE)


@pytest.mark.parametrize("channels", [1, 2])
def test_musicgen_continues_prompts_of_unequal_length(channels, musicgens, codes_decoded):
    """Through MusicGen's own processor, which pads audio on the left, so that all prompts end together."""
    ours, stock = musicgens(channels=channels)
    our_codes, stock_codes = codes_decoded(ours), codes_decoded(stock)
    extractor = transformers.EncodecFeatureExtractor(channels, RATE, padding_side="left")
    processor = transformers.MusicgenProcessor(extractor, text_tokenizer())
    clips = [noise(1, channels, samples, seed=samples)[0].numpy() for samples in (PROMPT, 5000)]
    clips = [clip[0] for clip in clips] if channels == 1 else clips
    texts = ["slow song", "song"]
    inputs = processor(audio=clips, text=texts, sampling_rate=RATE, padding=True, return_tensors="pt")
    assert inputs["padding_mask"].sum(1).tolist() == [PROMPT, 5000] and inputs["padding_mask"][1, 0] == 0
    audio, expected = generate(ours, **inputs), generate(stock, **inputs)
    assert_equal_codes(our_codes, stock_codes)
    torch.testing.assert_close(audio, expected, **CLOSE)
    if channels == 2:
        return  # the processor of Transformers 5.23 does not unpad stereo
    rows = processor.batch_decode(audio, padding_mask=inputs["padding_mask"])
    width = (11 + FRAMES) * HOP
    assert [row.shape for row in rows] == [(1, width), (1, width - (PROMPT - 5000))]
    np.testing.assert_array_equal(rows[1], audio[1, :, PROMPT - 5000 :].numpy())


@torch.no_grad()
def test_left_padding_is_coded_as_silence_whatever_it_holds(codecs):
    ours, stock = codecs["32khz"]
    audio, mask = noise(3, 1, PROMPT), torch.ones(3, PROMPT, dtype=torch.long)
    mask[1, :1300], mask[2, 6000:] = 0, 0  # the third row padded on the right, as everywhere else
    audio[1, :, :1300] = 0.7
    coded = ours.encode(audio, mask)
    assert coded.audio_lengths.tolist() == [PROMPT, PROMPT, 6000]
    assert torch.equal(coded.audio_codes[:, :2], stock.encode(audio, mask).audio_codes[:, :2])
    assert torch.equal(coded.audio_codes[:, 2:, :, :10], ours.encode(audio[2:, :, :6000]).audio_codes)
    assert (coded.audio_codes[:, 2, :, 10:] == 0).all()
    silent = audio.clone()
    silent[1, :, :1300] = 0
    assert torch.equal(coded.audio_codes[:, 1:2], ours.encode(silent[1:2]).audio_codes)
    assert torch.equal(ours(audio, mask).audio_codes, coded.audio_codes)
    assert (audio[1, :, :1300] == 0.7).all()  # the caller's own


@pytest.mark.parametrize("name", MUSICGENS)
def test_musicgen_trains_as_with_stock(name, musicgens):
    losses = []
    for model in musicgens(name):
        model.freeze_audio_encoder()
        with torch.no_grad():
            codes = model.audio_encoder.encode(noise(2, 1, PROMPT)).audio_codes[0]
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(3):
            output = model(input_ids=TEXT, attention_mask=(TEXT > 0).long(), labels=codes.transpose(1, 2))
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
            losses.append(output.loss.item())
        assert all(parameter.grad is None for parameter in model.audio_encoder.parameters())
        assert all(head.weight.grad.abs().max() > 0 for head in model.decoder.lm_heads)
    assert losses[:3] == losses[3:]
    assert losses[2] < losses[0] - 0.05


def test_musicgen_trains_on_what_the_processor_gives(musicgens):
    """Delayed ids and labels, of clips of two lengths: MusicGen's own delay, and the loss over what is no padding."""
    model, _ = musicgens()
    processor = EncodecProcessor.for_model(model.audio_encoder, layout="delay")
    clips = [noise(1, 1, samples, seed=samples)[0, 0].numpy() for samples in (PROMPT, 5000)]
    batch = processor(clips, RATE)
    ids, labels = batch["input_ids"], batch["labels"]
    assert ids.shape == (2, 4, 14) and labels.shape == (2, 14, 4)
    codes = model.audio_encoder.encode(torch.from_numpy(clips[0])).audio_codes[0]
    start = torch.full((4, 1), 64)
    _, pattern = model.decoder.build_delay_pattern_mask(torch.cat([start, codes[0]], 1), 64, max_length=15)
    assert torch.equal(ids[0], pattern[:, :-1]) and torch.equal(labels[0].T[pattern[:, 1:] != 64], codes.flatten())
    inputs = {"decoder_input_ids": ids.flatten(0, 1), "decoder_attention_mask": batch["attention_mask"]}
    output = model(input_ids=TEXT, attention_mask=(TEXT > 0).long(), labels=labels, **inputs)
    logits = output.logits.unflatten(0, (2, 4)).permute(1, 0, 2, 3)
    targets = labels.permute(2, 0, 1)
    assert (targets != -100).sum((1, 2)).tolist() == [11 + 8] * 4
    losses = [torch.nn.functional.cross_entropy(a.flatten(0, 1), b.flatten()) for a, b in zip(logits, targets)]
    torch.testing.assert_close(output.loss, sum(losses) / 4)
    output.loss.backward()
    assert all(head.weight.grad.abs().max() > 0 for head in model.decoder.lm_heads)


def test_musicgen_takes_audio_in_place_of_codes(musicgens):
    audio, mask = noise(2, 1, PROMPT), torch.ones(2, PROMPT, dtype=torch.long)
    ours, stock = (
        model(input_ids=TEXT, attention_mask=(TEXT > 0).long(), input_values=audio, padding_mask=mask).logits
        for model in musicgens()
    )
    assert ours.shape == (8, 11, 64) and torch.equal(ours, stock)


def test_musicgen_in_half_precision_keeps_the_codebooks(musicgens):
    ours, _ = musicgens()
    codes = torch.randint(64, (1, 1, 4, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = ours.audio_encoder.decode(codes, audio_scales=[None]).audio_values
        prompt = ours.audio_encoder.encode(noise(1, 1, PROMPT)).audio_codes
        ours = ours.to(torch.bfloat16)
        audio = ours.audio_encoder.decode(codes, audio_scales=[None]).audio_values
        half = ours.audio_encoder.encode(noise(1, 1, PROMPT)).audio_codes
    assert (
        audio.dtype == torch.bfloat16 and ours.audio_encoder.quantizer.layers[0].codebook.embed.dtype == torch.float32
    )
    torch.testing.assert_close(audio.float(), expected, rtol=0, atol=0.05)
    assert (half == prompt).float().mean() > 0.8
    assert generate(ours).shape == (2, 1, FRAMES * HOP)


def test_text_to_audio_pipeline(musicgens):
    ours, stock = musicgens()
    options = {"generate_kwargs": {"max_new_tokens": NEW_TOKENS, "do_sample": False}}
    results = []
    for model in (ours, stock):
        pipeline = transformers.pipeline("text-to-audio", model=model, tokenizer=text_tokenizer())
        results.append(pipeline("slow song", **options))
    assert results[0]["sampling_rate"] == RATE
    assert results[0]["audio"].shape == (FRAMES * HOP,)
    np.testing.assert_allclose(results[0]["audio"], results[1]["audio"], rtol=0, atol=5e-6)


# ---- Bark -----------------------------------------------------------------------------------------------------------


def test_bark_generates_as_with_stock(codecs):
    ours, stock = codecs["24khz"]
    bark = make_bark(stock.config)
    assert type(bark.codec_model) is transformers.EncodecModel
    results = []
    for codec in (ours, stock):
        bark.codec_model = codec
        results.append(generate_bark(bark))
    assert results[0].shape[0] == len(BARK_TEXT) and results[0].shape[1] % 320 == 0 and results[0].shape[1] >= 3200
    torch.testing.assert_close(*results, **CLOSE)
    assert results[1].abs().mean() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_bark_decodes_rows_of_unequal_length(dtype, codecs):
    ours, stock = codecs["24khz"]
    bark = make_bark(stock.config)
    codes = torch.randint(64, (2, 8, 30), generator=torch.Generator().manual_seed(0))
    bark.codec_model = stock
    expected, whole = bark.codec_decode(codes, [30, 12]), bark.codec_decode(codes)
    bark.codec_model = copy.deepcopy(ours).to(dtype)
    rows = bark.codec_decode(codes, [30, 12])
    assert [row.shape for row in rows] == [(30 * 320,), (12 * 320,)]
    assert all(row.dtype == dtype for row in rows)
    tolerance = {"rtol": 0, "atol": 5e-6 if dtype == torch.float32 else 0.05}
    for row, alone in zip(rows, expected):
        torch.testing.assert_close(row.float(), alone, **tolerance)
    torch.testing.assert_close(bark.codec_decode(codes).float(), whole, **tolerance)
    torch.testing.assert_close(rows[1].float(), ours.decode(codes[None, 1:, :, :12])[0][0, 0], **tolerance)


# ---- through the Auto classes ---------------------------------------------------------------------------------------


REGISTERED = """
import sys
sys.path.insert(0, sys.argv[1])
import torch, transformers
import modeling_encodec
from client_models import MUSICGENS, generate, generate_bark

modeling_encodec.register_auto_classes()
results = {}
for name in ("musicgen", "musicgen_old_keys", "musicgen_melody"):
    model, info = MUSICGENS[name.removesuffix("_old_keys")][0].from_pretrained(name, output_loading_info=True)
    assert not any(info.values()), (name, info)
    assert type(model.audio_encoder) is modeling_encodec.EncodecModel, type(model.audio_encoder)
    results[name] = generate(model.eval())
bark = transformers.BarkModel.from_pretrained("bark").eval()
assert type(bark.codec_model) is modeling_encodec.EncodecModel, type(bark.codec_model)
results["bark"] = generate_bark(bark)
torch.save(results, "results.pt")
"""


def test_saved_models_load_with_our_codec_once_registered(codecs, tmp_path):
    """Folders that a stock model wrote, also with the names that weight norm had in the checkpoints on the Hub."""
    expected = {}
    for name in MUSICGENS:
        model = make_musicgen(name, copy.deepcopy(codecs["32khz"][1]))
        model.save_pretrained(tmp_path / name)
        expected[name] = generate(model)
        if name == "musicgen":
            model.save_pretrained(tmp_path / "musicgen_old_keys")
            rename_to_old_keys(tmp_path / "musicgen_old_keys" / "model.safetensors")
    expected["musicgen_old_keys"] = expected["musicgen"]
    bark = make_bark(codecs["24khz"][1].config)
    bark.codec_model = codecs["24khz"][1]
    bark.save_pretrained(tmp_path / "bark")
    expected["bark"] = generate_bark(bark)
    command = [sys.executable, "-c", REGISTERED, os.path.dirname(__file__)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = torch.load(tmp_path / "results.pt")
    assert results.keys() == expected.keys()
    for name, audio in results.items():
        torch.testing.assert_close(audio, expected[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def rename_to_old_keys(path) -> None:
    state = load_file(path)
    for new, old in (("original0", "weight_g"), ("original1", "weight_v")):
        state = {key.replace(f"parametrizations.weight.{new}", old): tensor for key, tensor in state.items()}
    assert any(key.endswith("weight_g") for key in state)
    save_file(state, path, metadata={"format": "pt"})


# ---- another decoder on the codes -----------------------------------------------------------------------------------


@torch.no_grad()
def test_embed_is_what_both_decoders_decode(codecs):
    ours, stock = codecs["24khz"]
    codes = torch.randint(64, (2, 8, 40), generator=torch.Generator().manual_seed(0))
    latents = ours.embed(codes)
    tables = [layer.codebook.embed for layer in ours.quantizer.layers]
    summed = sum(table[codes[:, stage]] for stage, table in enumerate(tables)).transpose(1, 2)
    assert latents.shape == (2, 16, 40)
    torch.testing.assert_close(latents, summed, rtol=0, atol=1e-5)
    assert torch.equal(latents, stock.quantizer.decode(codes.transpose(0, 1)))
    torch.testing.assert_close(ours.decoder(latents), ours.decode(codes).audio_values, rtol=0, atol=1e-6)
    torch.testing.assert_close(stock.decoder(latents), ours.decode(codes).audio_values, **CLOSE)


def test_vocos_decoder_learns_from_embed(bundled_model):
    """Real speech, coded; the decoder takes nothing but the codes."""
    audio = torch.from_numpy(read_audio(demo_clips()[0], 24000, 1)[0])[None, :, 24000:48000]
    with torch.no_grad():
        codes = bundled_model.encode(audio, bandwidth=6.0).audio_codes[0]
    torch.manual_seed(0)
    vocos = VocosDecoder(bundled_model.config.hidden_size, bundled_model.config.hop_length)
    optimizer = torch.optim.AdamW(vocos.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        decoded = vocos(bundled_model.embed(codes))
        assert decoded.shape == audio.shape == (1, 1, 24000)
        loss = spectral_distance(decoded, audio)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad.abs().max() > 0 for parameter in vocos.parameters())
    assert not any(parameter.grad is not None for parameter in bundled_model.parameters())
    assert losses[-1] < 0.6 * losses[0], losses
    with torch.no_grad():
        own, others = (spectral_distance(vocos(bundled_model.embed(c)), audio) for c in (codes, codes.flip(2)))
    assert others > 1.1 * own  # it listens to the codes


def spectral_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean distance of logarithmic spectra."""
    spectra = [
        torch.stft(x[:, 0], 1024, 256, window=torch.hann_window(1024), return_complex=True).abs() for x in (a, b)
    ]
    return (torch.log(spectra[0] + 1e-3) - torch.log(spectra[1] + 1e-3)).abs().mean()
