"""Stock Transformers models that hold an EnCodec, a few thousand random weights each, round any codec."""

import tokenizers
import torch
import transformers
from torch import nn
from transformers.models.musicgen.modeling_musicgen import MusicgenForCausalLM
from transformers.models.musicgen_melody.modeling_musicgen_melody import MusicgenMelodyForCausalLM


NEW_TOKENS = 20
MUSICGENS = {
    "musicgen": (
        transformers.MusicgenForConditionalGeneration,
        transformers.MusicgenDecoderConfig,
        MusicgenForCausalLM,
    ),
    "musicgen_melody": (
        transformers.MusicgenMelodyForConditionalGeneration,
        transformers.MusicgenMelodyDecoderConfig,
        MusicgenMelodyForCausalLM,
    ),
}
# Text of two prompts, the second padded.
TEXT = torch.tensor([[3, 4, 5, 1], [6, 1, 0, 0]])
BARK_TEXT = torch.tensor([[3, 4, 5, 6, 1, 1, 2, 9], [5, 6, 7, 0, 0, 0, 0, 0]])


def make_musicgen(name: str, codec, channels: int = 1):
    """A MusicGen of `channels` round `codec`, whose other weights are always the same."""
    torch.manual_seed(0)
    whole, decoder_config, decoder = MUSICGENS[name]
    text_config = transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    text_encoder = transformers.T5EncoderModel(text_config)
    pad = codec.config.codebook_size
    config = decoder_config(
        vocab_size=pad,
        hidden_size=24,
        ffn_dim=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_codebooks=codec.config.num_quantizers * channels,
        audio_channels=channels,
        pad_token_id=pad,
        bos_token_id=pad,
        decoder_start_token_id=pad,
    )
    model = whole(text_encoder=text_encoder, audio_encoder=codec, decoder=decoder(config)).eval()
    generation = {"pad_token_id": pad, "bos_token_id": pad, "decoder_start_token_id": pad, "eos_token_id": None}
    model.generation_config.update(**generation)
    return model


def generate(model, seed: int = 1, **inputs) -> torch.Tensor:
    """Audio sampled for the two prompts of text, with guidance, as MusicGen is used."""
    torch.manual_seed(seed)
    inputs = {"input_ids": TEXT, "attention_mask": (TEXT > 0).long()} | inputs
    return model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=True, guidance_scale=3.0)


def generate_bark(model, seed: int = 1, **options):
    """Audio sampled for the two prompts of Bark's text."""
    torch.manual_seed(seed)
    return model.generate(BARK_TEXT, attention_mask=(BARK_TEXT > 0).long(), **options)


def make_bark(codec_config) -> transformers.BarkModel:
    """A Bark with a stock codec of this stock configuration (64 codes, 8 codebooks), random as the rest."""
    torch.manual_seed(0)
    sizes = {"block_size": 128, "hidden_size": 16, "num_layers": 1, "num_heads": 2}
    config = transformers.BarkConfig(
        # 100 semantic tokens and an end, text after them; two coarse codebooks after the semantic tokens; 64 codes.
        semantic_config=transformers.BarkSemanticConfig(input_vocab_size=152, output_vocab_size=101, **sizes),
        coarse_acoustics_config=transformers.BarkCoarseConfig(input_vocab_size=230, output_vocab_size=228, **sizes),
        fine_acoustics_config=transformers.BarkFineConfig(
            input_vocab_size=65, output_vocab_size=65, n_codes_total=8, **sizes
        ),
        codec_config=codec_config,
    )
    model = transformers.BarkModel(config).eval()
    model.generation_config = transformers.GenerationConfig(
        semantic_config={
            "eos_token_id": 100,
            "semantic_vocab_size": 100,
            "text_encoding_offset": 101,
            "text_pad_token": 150,
            "semantic_infer_token": 151,
            "max_input_semantic_length": BARK_TEXT.shape[1],
            "max_new_tokens": 24,
            "do_sample": True,
        },
        coarse_acoustics_config={
            "coarse_semantic_pad_token": 228,
            "coarse_infer_token": 229,
            "max_coarse_input_length": 16,
            "max_coarse_history": 60,
            "sliding_window_len": 20,
            "do_sample": True,
        },
        fine_acoustics_config={"max_fine_history_length": 64, "max_fine_input_length": 128, "n_fine_codebooks": 8},
        codebook_size=64,
        sample_rate=24000,
    )
    return model


def text_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Two words and padding."""
    words = tokenizers.models.WordLevel({"<pad>": 0, "slow": 5, "song": 6, "<unk>": 7}, "<unk>")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        model_input_names=["input_ids", "attention_mask"],
    )


class ConvNextBlock(nn.Module):
    """A depthwise convolution over time, then a network of two layers at every frame, beside the input."""

    def __init__(self, dim: int):
        super().__init__()
        self.depthwise = nn.Conv1d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.wide, self.narrow = nn.Linear(dim, 3 * dim), nn.Linear(3 * dim, dim)
        self.scale = nn.Parameter(torch.full((dim,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, D, F) -> (B, D, F)."""
        y = self.norm(self.depthwise(x).transpose(1, 2))
        return x + (self.scale * self.narrow(nn.functional.gelu(self.wide(y)))).transpose(1, 2)


class VocosDecoder(nn.Module):
    """A decoder after Vocos (arXiv 2306.00814) for the latents `embed(codes)`: no upsampling by convolutions, but a
    spectrum for every frame, and the inverse short-time Fourier transform."""

    def __init__(self, latent: int, hop: int, dim: int = 32, blocks: int = 2):
        super().__init__()
        self.hop, self.size = hop, 4 * hop
        self.inlet = nn.Conv1d(latent, dim, 7, padding=3)
        self.blocks = nn.Sequential(*(ConvNextBlock(dim) for _ in range(blocks)))
        self.norm, self.outlet = nn.LayerNorm(dim), nn.Linear(dim, self.size + 2)
        self.window = nn.Buffer(torch.hann_window(self.size))

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, D, F) -> (B, 1, F * hop)."""
        hidden = self.norm(self.blocks(self.inlet(latents)).transpose(1, 2))
        magnitude, phase = self.outlet(hidden).transpose(1, 2).chunk(2, dim=1)
        spectrum = magnitude.clamp(max=5).exp() * torch.exp(1j * phase)
        frames = torch.fft.irfft(spectrum, n=self.size, dim=1) * self.window[:, None]
        return (self._overlap_add(frames) / self._overlap_add(self._squares(frames)))[:, None]

    def _squares(self, frames: torch.Tensor) -> torch.Tensor:
        return self.window.square()[:, None].expand(1, -1, frames.shape[2])

    def _overlap_add(self, frames: torch.Tensor) -> torch.Tensor:
        """Frames (B, size, F), `hop` apart, as signals (B, F * hop): what lies outside is cut."""
        length, edge = frames.shape[2] * self.hop, (self.size - self.hop) // 2
        total = (frames.shape[2] - 1) * self.hop + self.size
        folded = nn.functional.fold(frames, (1, total), (1, self.size), stride=(1, self.hop))
        return folded[:, 0, 0, edge : edge + length]
