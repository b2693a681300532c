"""Speed of encode and decode beside Transformers' model and the `encodec` package, in one run."""

import torch
from models import bandwidth_of, codec, mask_of, noise, original, stock
from work import allow


def measure(bench) -> None:
    """24 and 48 kHz: one clip, a batch, a batch of unequal clips, a large batch, a long clip, long clips."""
    bench.measure_limits()
    for name in ("24khz", "48khz"):
        small = bench.rehearse and name != "24khz"  # `encodec` has but the released sizes
        model = codec(name, small)
        peers = {"transformers": stock(model).to(bench.device)}
        if small:
            bench.note(f"{name}: encodec", "not rehearsed")
        elif isinstance(package := original(model), str):
            bench.note(f"{name}: encodec", f"not run: {package}")
        else:
            package.set_target_bandwidth(bandwidth_of(model.config))
            peers["encodec"] = package.to(bench.device)
        second = 0.1 if bench.rehearse else 10
        cases = {
            "1 x 10 s": [second],
            "16 x 10 s": [second] * (2 if bench.rehearse else 16),
            "16 x 5 to 15 s": [second * (0.5 + row / 15) for row in range(0, 16, 8 if bench.rehearse else 1)],
        }
        if not bench.rehearse:
            cases |= {"64 x 10 s": [10] * 64, "1 x 10 min": [600], "16 x 10 min": [600] * 16}
        model = model.to(bench.device)
        for label, seconds in cases.items():
            with torch.no_grad():
                _case(bench, f"{name}, {label}", model, peers if sum(seconds) <= 200 else {}, seconds)
            bench.free()


def _case(bench, label: str, model, peers: dict, seconds: list[float]) -> None:
    if not bench.wanted(f"{label}, decode"):
        return
    config, lengths = model.config, [int(one * model.config.sampling_rate) for one in seconds]
    audio = noise(lengths, config.audio_channels).to(bench.device)
    mask = mask_of(lengths).to(bench.device)
    ragged, bandwidth = len(set(lengths)) > 1, bandwidth_of(config)
    given = mask if ragged else None

    def ours(precision: str, step):
        def call():
            model.precision = precision
            return step()

        return call

    def theirs(precision: str, step):
        def call():
            allow(precision)
            try:
                return step()
            finally:
                allow("tf32")

        return call

    encode = {kind: ours(kind, lambda: model.encode(audio, given, bandwidth)) for kind in ("exact", "fast")}
    coded = encode["exact"]()
    decode = {kind: ours(kind, lambda: model.decode(**coded)) for kind in ("exact", "fast")}
    kinds = {"exact": "ieee", "fast": "bf16"}
    if (peer := peers.get("transformers")) is not None:
        all_ones = torch.ones_like(mask) if not ragged else mask
        answer = peer.encode(audio, all_ones, bandwidth=bandwidth)
        options = {} if config.chunk_length is None else {"last_frame_pad_length": answer.last_frame_pad_length}
        for kind in ("tf32", "ieee"):
            side = f"transformers {kind}"
            kinds[side] = kind
            encode[side] = theirs(kind, lambda: peer.encode(audio, all_ones, bandwidth=bandwidth))
            decode[side] = theirs(
                kind, lambda: peer.decode(answer.audio_codes, answer.audio_scales, all_ones, **options)
            )
    if (package := peers.get("encodec")) is not None and not ragged:
        kinds["encodec tf32"] = "tf32"
        frames = package.encode(audio)
        encode["encodec tf32"] = theirs("tf32", lambda: package.encode(audio))
        decode["encodec tf32"] = theirs("tf32", lambda: package.decode(frames))
    for step, sides in {"encode": encode, "decode": decode}.items():
        bench.compare(f"{label}, {step}", sides, seconds=sum(seconds), kinds=kinds, count=sum(seconds) <= 200)
    model.precision = "exact"
