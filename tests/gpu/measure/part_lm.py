"""The language model of the released size: a step, 128 frames at once, an update; float and in whole numbers."""

import copy
import functools

import torch


def measure(bench) -> None:
    """On the card, and steps on the CPU too: for few rows that may be the faster one."""
    from modeling_encodec import EncodecLM, EncodecLMConfig

    size = {"hidden_size": 16, "num_hidden_layers": 1, "codebook_size": 64} if bench.rehearse else {}
    torch.manual_seed(0)
    lm = EncodecLM(EncodecLMConfig(**size)).eval()
    config = lm.config
    lm.quantize(torch.randint(config.codebook_size, (1, config.num_codebooks, 80)))
    places = {"card": copy.deepcopy(lm).to(bench.device), "CPU": lm}
    books = min(8, config.num_codebooks)
    for rows in (1, 2) if bench.rehearse else (1, 16):
        steps = {}
        for place, model in places.items():
            steps |= _steps(model, place, torch.zeros(rows, books, 1, dtype=torch.int64, device=model.device))
        with torch.no_grad():
            bench.compare(f"LM step of {rows} rows", steps, repeats=20)
            blocks = {}
            for place, model in places.items():
                block = torch.zeros(rows, books, 128, dtype=torch.int64, device=model.device)
                blocks[f"whole numbers, {place}"] = functools.partial(model.frequencies, block)
                blocks[f"float, {place}"] = functools.partial(model, block)
            bench.compare(f"LM, 128 frames of {rows} rows", blocks, seconds=rows * 128 / 75, repeats=3)
    _training(bench, copy.deepcopy(lm).drop_integer_form())


def _steps(model, place: str, step: torch.Tensor) -> dict:
    with torch.no_grad():
        floats, wholes = model.predict(step)[1], model.frequencies(step)[1]
    return {
        f"float, {place}": lambda: model.predict(step, floats),
        f"whole numbers, {place}": lambda: model.frequencies(step, wholes),
    }


def _training(bench, lm) -> None:
    rows, frames = (2, 20) if bench.rehearse else (32, 375)
    lm = lm.to(bench.device).train()
    optimizer = torch.optim.AdamW(lm.parameters(), 1e-4)
    codes = torch.randint(lm.config.codebook_size, (rows, lm.config.num_codebooks, frames), device=bench.device)

    def update(kind: str):
        with torch.autocast(torch.device(bench.device).type, torch.bfloat16, enabled=kind == "bf16"):
            loss = lm(codes, labels=codes, return_logits=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    sides = {"fp32": lambda: update("fp32"), "bf16": lambda: update("bf16")}
    bench.compare(f"LM update, {rows} x {frames} frames", sides, seconds=rows * frames / 75)
