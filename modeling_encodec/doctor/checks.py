"""The checks of one device in one precision: each a line that says what was found, and whether that is right.

In `exact`, latents and audio must be the stored ones within float32 rounding, and codes equal or, where two entries
are equally near, a tie, each of which is counted. TF32 or float16 in one layer is ten times what is allowed. `fast`
computes in bfloat16, and must agree as far as is published (docs/speed.md). Frequencies of the language model are
whole numbers and must be equal everywhere, to the bit.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch

from modeling_encodec.doctor.golden import Golden, digests, previous_frames
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.models.modeling_lm_encodec import EncodecLM
from modeling_encodec.models.precision_encodec import thread_count
from modeling_encodec.models.ties import first_apart, is_tie
from modeling_encodec.streaming.streams import StreamingDecoder, StreamingEncoder


# The most that a frame's latent may be off, relative to its length; float32 moves it by 5e-6 or less.
MOST_LATENT_ERROR = 5e-5
# The least dB by which audio must be louder than its difference to the stored one. Float32 gives 110 and more; with
# the LSTM alone in float16 it would be 94.
LEAST_EXACT_DB = 100.0
# Of `fast`: published are 95.6 % of 8 codebooks' codes, 99.7 % of the first one's, and 51 dB.
LEAST_FAST_CODES, LEAST_FAST_FIRST, LEAST_FAST_DB = 0.90, 0.95, 40.0
FAST_CODEBOOKS = 8
# Ties are rare: of 10,000 frames a few. More of them than this share are an error, each of which happens to be small.
MOST_TIES = 0.05


@dataclass
class Check:
    """What one check found: of which `stage`, whether it is right, and a line that says so."""

    stage: str
    right: bool
    found: str


@dataclass
class Checkup:
    """All checks of one device in one precision, and milliseconds of its steps."""

    device: str
    precision: str
    checks: list[Check] = field(default_factory=list)
    times: dict[str, float] = field(default_factory=dict)

    @property
    def right(self) -> bool:
        """Whether every check is."""
        return all(check.right for check in self.checks)


class Checks:
    """What is checked of a codec and a language model that are on the device already.

    Args:
        model: the codec, whose `precision` is set.
        lm: its language model.
        golden: what is stored.
        reference: the codec as it was loaded, on a CPU, by whose codebooks ties are told from errors.
    """

    def __init__(self, model: EncodecModel, lm: EncodecLM, golden: Golden, reference: EncodecModel):
        self.model, self.lm, self.golden, self.reference = model, lm, golden, reference
        self.device = model.device
        self.exact = model.compute_dtype == model.dtype

    def run(self, precision: str) -> Checkup:
        """All checks, and times if all is right."""
        found = Checkup(str(self.device), precision)
        stages = {"codes": self._codes, "codes, streamed": self._stream, "audio": self._audio}
        if precision == "exact":
            stages["LM frequencies"] = self._frequencies
        for stage, check in stages.items():
            try:
                with torch.no_grad():
                    found.checks += list(check())
            except Exception as error:  # whatever a device does, the rest is still to be checked
                line = " ".join(str(error).split())[:300]
                found.checks.append(Check(stage, False, f"{type(error).__name__}: {line}"))
        if found.right:
            found.times = step_times(self.model, self.lm, self.golden)
        return found

    def _codes(self) -> Iterator[Check]:
        """Latents and codes of both clips together: on a CPU with one thread, and with several."""
        golden, model = self.golden, self.model
        mask = torch.arange(golden.audio.shape[2], device="cpu") < golden.lengths[:, None]
        for threads in [1, max(2, torch.get_num_threads())] if self.device.type == "cpu" else [None]:
            with nullcontext() if threads is None else thread_count(threads):
                coded = model.encode(
                    golden.audio.to(self.device),
                    mask.to(self.device),
                    num_quantizers=model.config.num_quantizers,
                    return_latents=True,
                )
            with_threads = "" if threads is None else f", {threads} thread{'s' if threads > 1 else ''}"
            if self.exact:
                yield self._beside_latents(coded.latents[0], f"latents{with_threads}")
            yield self._beside_codes(list(coded.audio_codes[0]), f"codes{with_threads}")

    def _stream(self) -> Iterator[Check]:
        """Codes and audio of the second clip, hop by hop."""
        golden, model = self.golden, self.model
        audio = golden.audio[1:, :, : int(golden.lengths[1])].to(self.device)
        encoder = StreamingEncoder(model, num_quantizers=model.config.num_quantizers)
        hops = audio.split(model.config.hop_length, dim=2)
        codes = torch.cat([encoder.push(piece) for piece in hops] + [encoder.flush()], dim=2)
        yield self._beside_codes([codes[0]], "codes, streamed", first=1)
        decoder, given = StreamingDecoder(model), golden.codes[1:, :, : golden.frames(1)].to(self.device)
        decoded = torch.cat([decoder.push(piece) for piece in given.split(1, dim=2)] + [decoder.flush()], dim=2)
        yield self._beside_audio(decoded[0], 1, "audio, streamed")

    def _audio(self) -> Iterator[Check]:
        """Audio of the stored codes, so that wrong codes are no matter here."""
        golden = self.golden
        lengths = golden.lengths.to(self.device)
        decoded = self.model.decode(golden.codes[None].to(self.device), audio_lengths=lengths).audio_values
        for row, audio in enumerate(decoded):
            yield self._beside_audio(audio, row, f"audio, clip {row + 1}")

    def _frequencies(self) -> Iterator[Check]:
        """Frequencies of the stored codes: all frames at once, and frame by frame."""
        previous = previous_frames(self.golden.codes).to(self.device)
        yield self._beside_frequencies(self.lm.frequencies(previous)[0], "LM frequencies")
        steps, cache = [], None
        for frame in previous.split(1, dim=2):
            counts, cache = self.lm.frequencies(frame, cache)
            steps.append(counts.cpu())
        yield self._beside_frequencies(torch.cat(steps, dim=2), "LM frequencies, frame by frame")

    # ---- beside what is stored --------------------------------------------------------------------------------------

    def _beside_latents(self, latents: torch.Tensor, stage: str) -> Check:
        errors = []
        for row, found in enumerate(latents.cpu().double()):
            theirs = self.golden.latents[row, :, : self.golden.frames(row)].double()
            errors.append((found[:, : theirs.shape[1]] - theirs).norm(dim=0) / theirs.norm(dim=0))
        worst = torch.cat(errors).max().item()  # NaN where any is
        return Check(stage, worst <= MOST_LATENT_ERROR, f"off by {worst:.1e}, allowed {MOST_LATENT_ERROR:.0e}")

    def _beside_codes(self, rows: list[torch.Tensor], stage: str, first: int = 0) -> Check:
        """Codes (K, F) of the clips from the `first` one on."""
        pairs = []
        for row, codes in enumerate(rows, first):
            theirs = self.golden.codes[row, :, : self.golden.frames(row)]
            pairs.append((codes.cpu()[:, : theirs.shape[1]], theirs, row))
        if any(ours.shape != theirs.shape for ours, theirs, _ in pairs):
            return Check(stage, False, "fewer frames than there are")
        if not self.exact:
            return _beside_fast_codes(pairs, stage)
        total, ties, wrong = sum(theirs.shape[1] for _, theirs, _ in pairs), 0, []
        for ours, theirs, row in pairs:
            for frame in (ours != theirs).any(0).nonzero().flatten().tolist():
                sides = ours[:, frame], theirs[:, frame]
                if is_tie(self.reference, self.golden.latents[row, :, frame], *sides):
                    ties += 1
                else:
                    wrong.append(f"frame {frame} of clip {row + 1} from codebook {first_apart(*sides) + 1} on")
        found = f"{total - ties - len(wrong)} of {total} frames equal"
        if wrong:
            return Check(stage, False, f"{found}, {len(wrong)} wrong, such as {wrong[0]}")
        few = ties <= max(1, MOST_TIES * total)
        return Check(stage, few, f"{found}, {ties} ties" + ("" if few else f", allowed {MOST_TIES:.0%}"))

    def _beside_audio(self, audio: torch.Tensor, row: int, stage: str) -> Check:
        """Audio (1, T) of that clip."""
        theirs = self.golden.decoded[row, :, : int(self.golden.lengths[row])].double()
        ours = audio.cpu().double()[:, : theirs.shape[1]]
        if ours.shape != theirs.shape:
            return Check(stage, False, f"{ours.shape[1]} samples, of {theirs.shape[1]}")
        if torch.equal(ours, theirs):
            return Check(stage, True, "equal to the bit")
        ratio = 10 * torch.log10(theirs.square().sum() / (ours - theirs).square().sum()).item()
        least = LEAST_EXACT_DB if self.exact else LEAST_FAST_DB
        return Check(stage, ratio >= least, f"{ratio:.0f} dB above its difference, allowed {least:.0f}")

    def _beside_frequencies(self, counts: torch.Tensor, stage: str) -> Check:
        found, theirs = digests(counts), self.golden.frequencies
        equal = int((found == theirs).sum())
        first = "" if equal == len(theirs) else f", not frame {int((found != theirs).nonzero()[0])}"
        return Check(stage, equal == len(theirs), f"{equal} of {len(theirs)} frames equal to the bit{first}")


def _beside_fast_codes(pairs: list[tuple], stage: str) -> Check:
    equal = torch.cat([(ours == theirs)[:FAST_CODEBOOKS] for ours, theirs, _ in pairs], dim=1).double()
    every, first = equal.mean().item(), equal[0].mean().item()
    right = every >= LEAST_FAST_CODES and first >= LEAST_FAST_FIRST
    found = f"{every:.1%} of {FAST_CODEBOOKS} codebooks equal, {first:.1%} of the first"
    return Check(stage, right, f"{found}, allowed {LEAST_FAST_CODES:.0%} and {LEAST_FAST_FIRST:.0%}")


# ---- times ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def step_times(model: EncodecModel, lm: EncodecLM, golden: Golden, repeats: int = 5) -> dict[str, float]:
    """Milliseconds, medians: `encode` and `decode` of the first clip, a hop through a stream's encoder and decoder, a
    step of the language model, which has but one precision."""
    device = model.device
    audio, codes = golden.audio[:1].to(device), golden.codes[None, :1].to(device)
    hop = audio[..., : model.config.hop_length]
    encoder, decoder = (kind(model, mode="low_latency") for kind in (StreamingEncoder, StreamingDecoder))
    steps = {
        "encode": lambda: model.encode(audio, num_quantizers=FAST_CODEBOOKS),
        "decode": lambda: model.decode(codes[:, :, :FAST_CODEBOOKS]),
        "hop": lambda: decoder.push(encoder.push(hop)),
    }
    if model.precision == "exact":
        _, cache = lm.frequencies(codes[0, :, :, :1])
        steps["LM step"] = lambda: lm.frequencies(codes[0, :, :, 1:2], cache)
    times = {}
    for name, step in steps.items():
        step()
        taken = []
        for _ in range(repeats):
            begin = time.perf_counter()
            step()
            wait_for(device)
            taken.append(1000 * (time.perf_counter() - begin))
        times[name] = statistics.median(taken)
    return times


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
