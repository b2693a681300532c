"""A small language model of audio: from recordings to sound that it makes itself.

    python -m modeling_encodec.examples.audio_lm --out continued.wav

Clips become tokens, `Trainer` trains a `LlamaForCausalLM` on them, and the model goes on from a clip's beginning.
What is particular to audio is `EncodecProcessor`, tokenizer and detokenizer in one, and `NextCodebook`, which keeps
`generate` to ids that can stand where they are; the rest is as for text. A million weights learn their examples, cut
from two bundled clips of five seconds, by heart, in a minute on a CPU core, and no more. With a folder of hours, a
wider model, and `facebook/encodec_24khz` at more codebooks, the same lines make a real one.
"""

import importlib.util
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor, Trainer, TrainingArguments, set_seed

from modeling_encodec.checkpoints import bundled_checkpoint
from modeling_encodec.demo.table import demo_clips
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.processors.audio import read_audio, write_audio
from modeling_encodec.processors.audio_kinds import AUDIO_SUFFIXES, OtherFiles, list_audio
from modeling_encodec.processors.processing_encodec import EncodecProcessor


NUM_QUANTIZERS = 2  # codebooks: 150 tokens for a second of audio
EXAMPLES, WINDOW = 64, 2.0  # of training, and their seconds
PROMPT = 0.5  # seconds of a clip that the model goes on from, up to WINDOW


class NextCodebook(LogitsProcessor):
    """Leaves only ids of the codebook whose turn it is, the one after the last id's own: of others, and of specials,
    one is sampled now and then, and decoding refuses that."""

    def __init__(self, num_quantizers: int, codebook_size: int):
        self.num_quantizers, self.codebook_size = num_quantizers, codebook_size

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores (B, vocabulary) of what comes after `input_ids` (B, L)."""
        last = input_ids[:, -1:] // self.codebook_size
        turn = torch.where(last < self.num_quantizers, last + 1, 0) % self.num_quantizers  # the first one after BOS
        codebooks = torch.arange(scores.shape[1], device=scores.device) // self.codebook_size
        return scores.masked_fill(codebooks != turn, -torch.inf)


def make_examples(processor: EncodecProcessor, clips: list[np.ndarray], seed: int = 0) -> list[dict]:
    """Windows (samples,) from anywhere in the clips, as ids and labels of one length, padded where a clip is short."""
    generator, width = np.random.default_rng(seed), int(WINDOW * processor.feature_extractor.sampling_rate)
    lengths = np.array([len(clip) for clip in clips])
    windows = []
    for index in generator.choice(len(clips), EXAMPLES, p=lengths / lengths.sum()):
        start = generator.integers(0, max(1, lengths[index] - width + 1))
        windows.append(clips[index][start : start + width])
    batch = processor(windows, processor.feature_extractor.sampling_rate, add_eos=False)  # windows end anywhere
    return [dict(zip(batch, row)) for row in zip(*batch.values())]


def train(processor: EncodecProcessor, examples: list[dict], steps: int) -> tuple[LlamaForCausalLM, float, float]:
    """A model trained for so many batches, and its loss on the examples before and after."""
    size = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    specials = {f"{name}_token_id": getattr(processor, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = LlamaConfig(vocab_size=processor.vocab_size, **size, **specials)
    pace = {"max_steps": steps, "learning_rate": 3e-3, "warmup_steps": 10, "lr_scheduler_type": "constant_with_warmup"}
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False}
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, per_device_train_batch_size=8, logging_steps=20, **pace, **quiet)
        trainer = Trainer(LlamaForCausalLM(config), arguments, train_dataset=examples, eval_dataset=examples)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        return trainer.model.eval(), before, trainer.evaluate()["eval_loss"]


def main(
    out: Annotated[Path, typer.Option(help="Audio file to write: the prompt, and how the model goes on.")],
    clips: Annotated[Path | None, typer.Option(help="Folder of recordings (default: the bundled clips).")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Batches to train for.")] = 200,
    force: Annotated[bool, typer.Option("--force", "-f", help="Overwrite a file that exists.")] = False,
) -> None:
    """Train a small language model on the tokens of clips, and let it go on from the first one's beginning."""
    if importlib.util.find_spec("accelerate") is None:
        raise ImportError('Trainer needs accelerate: pip install "modeling-encodec[train]"')
    if out.exists() and not force:
        raise FileExistsError(f"{out} exists; --force overwrites it")
    other = OtherFiles()
    files = demo_clips() if clips is None else list_audio(clips, other)
    for line in other.lines():
        typer.echo(line, err=True)
    if not files:
        raise FileNotFoundError(f"{clips}: no recordings, allowed: a folder of {', '.join(AUDIO_SUFFIXES)}")
    set_seed(0)
    codec = EncodecModel.from_pretrained(bundled_checkpoint()).eval()
    processor = EncodecProcessor.for_model(codec, num_quantizers=NUM_QUANTIZERS)
    rate, vocabulary = codec.config.sampling_rate, processor.vocabulary
    audio = [read_audio(path, rate, 1)[0][0] for path in files]

    model, before, after = train(processor, make_examples(processor, audio), steps)
    typer.echo(f"loss {before:.3f} before, {after:.3f} after {steps} steps")

    prompt = processor(audio[0][: int(PROMPT * rate)], rate, add_eos=False, return_labels=False).to(model.device)
    ids = model.generate(
        **prompt,
        max_new_tokens=NUM_QUANTIZERS * int((WINDOW - PROMPT) * vocabulary.frame_rate),
        do_sample=True,
        logits_processor=[NextCodebook(NUM_QUANTIZERS, vocabulary.codebook_size)],
    )
    sound = processor.decode(ids)[0]
    write_audio(out, sound.numpy(), rate, rescale=True)
    typer.echo(f"{out}: {sound.shape[1] / rate:.2f} s, of which the first {PROMPT:g} s are the prompt")


if __name__ == "__main__":
    try:
        typer.run(main)
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"audio_lm: {error}", err=True)
        raise SystemExit(2) from None
