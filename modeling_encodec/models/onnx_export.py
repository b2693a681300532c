"""The codec as ONNX files (opset 18), for runtimes without PyTorch. Needs `onnx` and `onnxscript`.

`encoder.onnx`: audio (B, C, T) -> codes (B, K, F); `decoder.onnx`: codes -> audio. B and T (F) are free. Audio is what
the networks see: no scale, no chunks. `encoder_step.onnx` and `decoder_step.onnx`: one hop of a signal that has begun,
and the state before -> codes or audio and the state after, of the shapes of `quiet_state`.
"""

import copy
import importlib.util
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from modeling_encodec.models.fingerprints import stream_fingerprint
from modeling_encodec.models.kernels_encodec import Conv1d, ConvTranspose1d
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.system.atomic import atomic_path


OPSET = 18


class Encoder(nn.Module):
    """Audio (B, C, T) and the state before, if it is a step -> codes (B, K, F) and the state after."""

    def __init__(self, model: EncodecModel, num_quantizers: int):
        super().__init__()
        self.net, self.quantizer, self.num_quantizers = model.encoder, model.quantizer, num_quantizers

    def forward(self, audio: Tensor, *state: Tensor):
        """A whole signal without a state, one hop with it."""
        latents, *after = _run(self.net, audio, state)
        return self.quantizer.encode(latents, num_quantizers=self.num_quantizers).transpose(0, 1), *after


class Decoder(nn.Module):
    """Codes (B, K, F) and the state before, if it is a step -> audio (B, C, T) and the state after."""

    def __init__(self, model: EncodecModel):
        super().__init__()
        self.net, self.quantizer = model.decoder, model.quantizer

    def forward(self, codes: Tensor, *state: Tensor):
        """A whole signal without a state, one frame with it."""
        return _run(self.net, self.quantizer.decode(codes.transpose(0, 1)), state)


class OnnxHop:
    """One hop of a signal that has begun, by onnxruntime on a CPU. Inputs and state before -> codes or audio, and the
    state after. It takes less than half of PyTorch's time, which goes into calls and products of one row."""

    def __init__(self, path: str | Path, kind: str, model: EncodecModel, num_quantizers: int | None = None):
        """The step at `path`, of `kind` "encoder" or "decoder", of this `model` and (of an encoder) `num_quantizers`.

        Raises:
            FileNotFoundError: if there is no such file.
            ImportError: if `onnxruntime` is missing.
            ValueError: if the file is not this model's step.
        """
        if importlib.util.find_spec("onnxruntime") is None:
            raise ImportError("ONNX steps need one more package: pip install onnxruntime")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file")
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        given = self.session.get_modelmeta().custom_metadata_map
        wanted = _about(model, kind, num_quantizers or int(given.get("codebooks", 0)))
        if {name: given.get(name) for name in wanted} != wanted:
            raise ValueError(f"{path} is a step of {given}, allowed: of {wanted}")
        self.codebooks = int(given["codebooks"]) if kind == "decoder" else None
        self.names = [slot.name for slot in self.session.get_inputs()]

    def fits(self, x: Tensor) -> bool:
        """Whether `x` are inputs that it was exported for: a decoder's codes of so many codebooks."""
        return self.codebooks in (None, x.shape[1])

    def __call__(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        given = dict(zip(self.names, (part.contiguous().numpy() for part in (x, *state))))
        output, *after = (torch.from_numpy(part) for part in self.session.run(None, given))
        return output, tuple(after)


def _about(model: EncodecModel, kind: str, codebooks: int) -> dict[str, str]:
    """What an exported step says of itself."""
    return {"kind": kind, "codebooks": str(codebooks), "model": stream_fingerprint(model)}


def _run(net, x: Tensor, state: tuple) -> tuple:
    if not state:
        return (net(x),)
    y, after = net.step(x, state, end=False)
    return y, *after


@torch.no_grad()
def export_onnx(model: EncodecModel, folder: str | Path, num_quantizers: int | None = None) -> list[Path]:
    """Write `model` with `num_quantizers` codebooks (all by default) as ONNX files into `folder`; returns their paths.

    A model with GroupNorm has no steps: its norm looks at the whole signal. Files of these names are written over.

    Raises:
        ImportError: if `onnx` or `onnxscript` is missing.
        ValueError: for a number of codebooks that the model does not have.
    """
    if not all(map(importlib.util.find_spec, ("onnx", "onnxscript"))):
        raise ImportError('ONNX needs two more packages: pip install "modeling-encodec[export]"')
    count = model.config.num_quantizers
    if num_quantizers is not None:
        count = model.resolve_quantizers(None, num_quantizers)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    exact, model = model, copy.deepcopy(model).float().cpu().eval()
    for layer in model.modules():
        if isinstance(layer, (Conv1d, ConvTranspose1d)):
            # Weight norm is computed once, here (removing it would reach the original model).
            layer.ready = partial(_kept, layer.ready(torch.float32))
    config = model.config
    audio = torch.zeros(2, config.audio_channels, 3 * config.hop_length + 1, dtype=torch.float32, device="cpu")
    codes = torch.zeros(2, count, 3, dtype=torch.int64, device="cpu")
    encoder, decoder = Encoder(model, count).eval(), Decoder(model).eval()
    paths = [
        _export(encoder, {"audio": audio}, "codes", folder / "encoder.onnx"),
        _export(decoder, {"codes": codes}, "audio", folder / "decoder.onnx"),
    ]
    if config.norm_type != "time_group_norm":
        hop = {"audio": audio[..., : config.hop_length]}
        state, about = model.encoder.quiet_state(2), _about(exact, "encoder", count)
        paths.append(_export(encoder, hop, "codes", folder / "encoder_step.onnx", state, about))
        frame = {"codes": codes[..., :1]}
        state, about = model.decoder.quiet_state(2), _about(exact, "decoder", count)
        paths.append(_export(decoder, frame, "audio", folder / "decoder_step.onnx", state, about))
    return paths


def _kept(weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return weights


def _export(
    module: nn.Module, inputs: dict[str, Tensor], output: str, path: Path, state: tuple = (), about: dict | None = None
) -> Path:
    (name, value), batch = *inputs.items(), torch.export.Dim("batch")
    free = {0: batch} if state else {0: batch, 2: torch.export.Dim("frames" if name == "codes" else "samples")}
    program = torch.onnx.export(
        module,
        (value, *state),
        dynamo=True,
        opset_version=OPSET,
        input_names=[name, *(f"state_{i}" for i in range(len(state)))],
        output_names=[output, *(f"next_state_{i}" for i in range(len(state)))],
        dynamic_shapes=(free, tuple({0: batch} for _ in state)) if state else (free,),
        custom_translation_table={
            torch.ops.modeling_encodec.lstm.default: _lstm,
            torch.ops.modeling_encodec.convolve.default: _convolve,
        },
        verbose=False,
    )
    program.model.metadata_props.update(about or {})
    with atomic_path(path) as temporary:
        program.save(temporary, external_data=False)
    return path


def _lstm(x, hidden, cell, weights):
    """ONNX knows one layer at a time, with the gates in another order."""
    from onnxscript import opset18 as op

    def gates(*parts):  # (in, forget, cell, out) each
        split = [op.Split(part, axis=0, num_outputs=4) for part in parts]
        return op.Unsqueeze(op.Concat(*(part[i] for part in split for i in (0, 3, 1, 2)), axis=0), [0])

    hiddens, cells = [], []
    for layer in range(len(weights) // 4):
        inner, outer, *biases = weights[4 * layer : 4 * layer + 4]
        before = [op.Gather(part, [layer], axis=0) for part in (hidden, cell)]
        size = inner.shape[0] // 4
        y, *after = op.LSTM(x, gates(inner), gates(outer), gates(*biases), None, *before, hidden_size=size)
        x = op.Squeeze(y, [1])
        hiddens.append(after[0])
        cells.append(after[1])
    return x, op.Concat(*hiddens, axis=0), op.Concat(*cells, axis=0)


def _convolve(x, weight, bias, stride: int, dilation: int):
    from onnxscript import opset18 as op

    return op.Conv(x, weight, bias, strides=[1, stride], dilations=[1, dilation])
