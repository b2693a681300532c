"""Models, peers and audio that the parts share. Only torch and transformers must be there."""

from pathlib import Path

import torch
from bench import one_line


SMALL = {"num_filters": 8, "hidden_size": 16, "codebook_size": 64}


def preset(name: str, small: bool):
    """The released configuration of this name, or a small one of its kind, with the same bandwidths' names."""
    from modeling_encodec import EncodecConfig

    return getattr(EncodecConfig, f"preset_{name}")(**(SMALL if small else {}))


@torch.no_grad()
def codec(name: str, small: bool):
    """A codec of random weights, with codebooks that fit what its encoder gives; on the CPU."""
    from modeling_encodec import EncodecModel

    torch.manual_seed(0)
    model = EncodecModel(preset(name, small)).eval()
    audio = noise([model.config.sampling_rate] * 4, model.config.audio_channels)
    residual = model.encoder(audio).transpose(1, 2).flatten(0, 1)
    for layer in model.quantizer.layers:
        size = model.config.codebook_size
        vectors = residual.mean(0) + residual.std(0) * torch.randn(size, residual.shape[1])
        layer.codebook.start(vectors, torch.ones(size))
        residual = residual - layer.codebook.decode(layer.codebook.encode(residual))
    return model


def bandwidth_of(config) -> float:
    """6 kbps, or what a small model has that is nearest."""
    return min(config.target_bandwidths, key=lambda kbps: abs(kbps - 6))


def stock(model):
    """Transformers' own model with the same weights."""
    import transformers

    fields = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "transformers_version")}
    peer = transformers.EncodecModel(transformers.EncodecConfig(**fields)).eval()
    peer.load_state_dict(model.state_dict())
    return peer


def original(model):
    """The `encodec` package's model with the same weights, or why there is none."""
    try:
        from peers import import_encodec, original_model

        if import_encodec() is None:
            return "encodec is not installed"
        return original_model(model)
    except Exception as error:  # another version of it, or of what it imports
        return f"encodec does not work here: {one_line(error)}"


def bundled():
    """The bundled codec and its language model; on the CPU."""
    from modeling_encodec import EncodecLM, EncodecModel, bundled_checkpoint, bundled_lm_checkpoint

    model = EncodecModel.from_pretrained(bundled_checkpoint()).eval()
    return model, EncodecLM.from_pretrained(bundled_lm_checkpoint()).eval()


def real_clips(rate: int, channels: int) -> dict[str, torch.Tensor]:
    """Real audio (channels, T) by name: the bundled clips and what lies beside the tree. Where libsndfile is missing,
    the second that `doctor` keeps, at 24 kHz mono alone."""
    try:
        from modeling_encodec.demo.table import demo_clips
        from modeling_encodec.processors.audio import read_audio
    except ImportError:
        from modeling_encodec.doctor.golden import load_golden

        golden = load_golden()
        return {f"doctor's clip {row + 1}": golden.audio[row, :, : int(golden.lengths[row])] for row in range(2)}
    beside = Path(__file__).parents[4] / "shared" / "audio"
    paths = [*demo_clips(), *sorted(beside.glob("*.flac"))]
    return {path.name: torch.from_numpy(read_audio(path, rate, channels)[0]) for path in paths}


def noise(lengths: list[int], channels: int) -> torch.Tensor:
    """Noise (B, channels, longest), the same each time."""
    generator = torch.Generator("cpu").manual_seed(1)
    return 0.3 * torch.randn(len(lengths), channels, max(lengths), generator=generator)


def mask_of(lengths: list[int]) -> torch.Tensor:
    """1 on each row's samples, (B, longest)."""
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
