"""What model cards show, as plain values and Markdown tables: from configurations, logs and evaluations.

Templates hold sentences, this module numbers, none of which is typed here: they come from a model's configuration, a
training log, an evaluation or the paper's results. The price is a small vocabulary of tables that templates must know.
"""

import math
import textwrap
from collections.abc import Sequence

import torch

from modeling_encodec.bitstream.container import CHECKSUM, SEGMENT_HEAD
from modeling_encodec.models.configuration_encodec import EncodecConfig, EncodecLMConfig
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.models.modeling_lm_encodec import EncodecLM
from modeling_encodec.streaming.streams import StreamingDecoder, StreamingEncoder


# Of an evaluation's metrics: how each is called, and how many digits of it mean something.
METRICS = {
    "si_snr": ("SI-SNR (dB)", 2),
    "si_snr_windowed": ("SI-SNR in windows (dB)", 2),
    "mel_distance": ("mel distance", 3),
    "visqol_audio": ("ViSQOL audio", 2),
    "visqol_speech": ("ViSQOL speech", 2),
    "pesq": ("PESQ", 2),
    "stoi": ("STOI", 3),
}
LOWER_IS_BETTER = ("mel_distance",)
# Of those, the ones the paper reports: (metric, how the sentences call it, unit).
COMPARED = (("si_snr", "SI-SNR", " dB"), ("visqol_audio", "ViSQOL", ""))
SYSTEMS = {"opus": "Opus", "mp3": "MP3", "identity": "the clips themselves", "original": "released EnCodec"}
STRATEGIES = (
    ("chance_of_music", "one clip of music"),
    ("chance_of_other", "one clip of speech or other sound"),
    ("chance_of_two", "the sum of two clips of any kind"),
    ("chance_of_three", "the sum of three clips, none of music"),
)


# ---- words and tables --------------------------------------------------------------------------------------------


def fixed(value: float | None, digits: int = 0) -> str:
    """A number with so many decimals and commas between thousands; nothing for none."""
    if value is None:
        return ""
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return f"{value:,.{digits}f}"


def short(value: float | None) -> str:
    """A number as short as it goes: 1.5, 6, 14,851,810."""
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def percent(fraction: float, digits: int = 0) -> str:
    """0.405 as 40.5 % or 41 %, as many decimals as asked for."""
    return f"{100 * fraction:.{digits}f} %"


def listing(items: Sequence, last: str = "and") -> str:
    """Items as words: "a, b and c"."""
    words = [item if isinstance(item, str) else short(item) for item in items]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def tidy(text: str, width: int = 119) -> str:
    """Markdown with its prose wrapped and no two empty lines on end; code, tables, headings and pictures stay."""
    lines, prose, code = [], [], False

    def wrap() -> None:
        indent = "  " if prose and prose[0].startswith("- ") else ""
        options = {"subsequent_indent": indent, "break_long_words": False, "break_on_hyphens": False}
        lines.extend(textwrap.wrap(" ".join(prose), width, **options))
        prose.clear()

    for line in map(str.rstrip, text.strip("\n").split("\n")):
        fence = line.startswith("```")
        if code or fence or line[:1] in ("", "#", "|", "!"):
            wrap()
            if line or code or lines[-1]:
                lines.append(line)
            code ^= fence
            continue
        if line.startswith("- "):
            wrap()
        prose.append(line.strip())
    wrap()
    return "\n".join(lines) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A Markdown table. Cells are text or numbers; none is an empty cell."""

    def text(cell) -> str:
        return " ".join(cell.split()).replace("|", "\\|") if isinstance(cell, str) else short(cell)

    lines = ["| " + " | ".join(map(text, row)) + " |" for row in [header, *rows]]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def margin(value: float, other: float, digits: int = 2, unit: str = "") -> str:
    """Where a value stands beside another, as rounded in the card: "0.90 below", "1.20 dB above" or "equal to"."""
    difference = round(value, digits) - round(other, digits)
    if not round(difference, digits):
        return "equal to"
    return f"{fixed(abs(difference), digits)}{unit} {'above' if difference > 0 else 'below'}"


# ---- configurations ----------------------------------------------------------------------------------------------


def codec_facts(config: EncodecConfig) -> dict:
    """What follows from a codec's configuration. Its weights are counted without being made."""
    with torch.device("meta"):
        model = EncodecModel(config).eval()
    chunked = config.chunk_length is not None
    facts = {
        "khz": config.sampling_rate / 1000,
        "channels": {1: "mono", 2: "stereo"}.get(config.audio_channels, f"{config.audio_channels}-channel"),
        "setup": _setup(config),
        "sees": _sees(config),
        "span": _span(config),
        "kbps": list(config.target_bandwidths),
        "default_kbps": min(config.target_bandwidths, key=lambda kbps: abs(kbps - 6)),
        "codebooks": [config.num_quantizers_for_bandwidth(kbps) for kbps in config.target_bandwidths],
        "frame_rate": config.sampling_rate / config.hop_length,
        "parameters": _parameters(model),
        "segment_bytes": SEGMENT_HEAD.size + CHECKSUM.size,
        "overlap": config.chunk_length / config.chunk_stride - 1 if chunked else None,
    }
    if not config.needs_whole_signal:
        exact, low = StreamingEncoder(model), None
        if not chunked:
            low = StreamingEncoder(model, mode="low_latency") if config.use_causal_conv else None
        facts["latency"] = exact.latency
        facts["start_latency"] = exact.start_latency
        facts["start_frames"] = StreamingDecoder(model).start_frames
        facts["low_latency"] = low and low.start_latency
    return facts


def lm_facts(config: EncodecLMConfig) -> dict:
    """What follows from a language model's configuration, whichever of its forms a checkpoint holds."""
    float_form = EncodecLMConfig(**{name: getattr(config, name) for name in _sizes(config)})
    with torch.device("meta"):
        model = EncodecLM(float_form)
    return {
        "parameters": _parameters(model),
        "context_frames": config.context_frames,
        "paper_width": EncodecLMConfig().hidden_size,
        "segment_bytes": SEGMENT_HEAD.size + CHECKSUM.size,
    }


def setups() -> str:
    """The paper's two set-ups side by side, as the released models' configurations have them."""
    configs = EncodecConfig.preset_24khz(), EncodecConfig.preset_48khz()
    facts = [codec_facts(config) for config in configs]

    def row(name: str, of) -> list[str]:
        return [name, *(of(config, fact) for config, fact in zip(configs, facts))]

    rows = [
        row("released for", lambda config, fact: f"{short(fact['khz'])} kHz {fact['channels']}"),
        row("convolutions see", lambda config, fact: fact["sees"]),
        row("normalisation", lambda config, fact: _norm(config)),
        row("signal is coded", lambda config, fact: fact["span"]),
        row("loudness", lambda config, fact: "taken out of each chunk" if config.normalize else "left as it is"),
        row("a frame of codes after", lambda config, fact: _time(fact["latency"], config)),
        row("frames a second", lambda config, fact: short(fact["frame_rate"])),
        row("kbps", lambda config, fact: listing(fact["kbps"])),
        row("codebooks", lambda config, fact: listing(fact["codebooks"])),
    ]
    return table(["", "streamable", "non-streamable"], rows)


def codec_table(config: EncodecConfig, facts: dict) -> str:
    """The numbers of one codec."""
    rows = [
        ["audio", f"{short(facts['khz'])} kHz {facts['channels']}"],
        ["set-up of the paper", facts["setup"]],
        ["kbps", listing(facts["kbps"])],
        ["codebooks for these", f"{listing(facts['codebooks'])}, of {short(config.codebook_size)} entries each"],
        ["frames a second", f"{short(facts['frame_rate'])}, one for {config.hop_length} samples"],
        ["base filters, latent width", f"{config.num_filters}, {config.hidden_size}"],
        ["normalisation", _norm(config)],
        ["signal is coded", facts["span"]],
        ["parameters", f"{short(facts['parameters'])}, without the codebooks"],
    ]
    return table(["", ""], rows)


def lm_table(config: EncodecLMConfig, facts: dict) -> str:
    """The numbers of one language model."""
    rows = [
        ["layers, width, heads", f"{config.num_hidden_layers}, {config.hidden_size}, {config.num_attention_heads}"],
        ["feed-forward width", config.intermediate_size],
        ["context", f"{short(config.context_seconds)} s, {facts['context_frames']} frames"],
        ["codebooks", f"{config.num_codebooks}, of {short(config.codebook_size)} entries each"],
        ["parameters", f"{short(facts['parameters'])}, of the float form"],
        ["forms in the checkpoint", _forms(config)],
    ]
    return table(["", ""], rows)


def strategies(chances: dict) -> str:
    """The four ways to make a training example, and how often each is taken."""
    rows = [[f"s{number}", what, chances[name]] for number, (name, what) in enumerate(STRATEGIES, 1)]
    return table(["strategy", "an example is", "chance"], rows)


def _parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _sizes(config: EncodecLMConfig) -> list[str]:
    """Fields that say how large the float form is."""
    return [name for name in EncodecLMConfig.__annotations__ if not name.startswith(("has_", "codec_"))]


def _setup(config: EncodecConfig) -> str:
    if config.use_causal_conv and config.chunk_length is None:
        return "streamable"
    return "non-streamable" if config.chunk_length is not None and not config.use_causal_conv else "neither"


def _sees(config: EncodecConfig) -> str:
    return "the past" if config.use_causal_conv else "both sides"


def _norm(config: EncodecConfig) -> str:
    names = {"weight_norm": "of weights", "time_group_norm": "of activations, over channels and time"}
    return names[config.norm_type]


def _span(config: EncodecConfig) -> str:
    if config.chunk_length_s is None:
        return "without chunks"
    overlap = fixed(1000 * config.overlap * config.chunk_length_s)
    return f"in chunks of {short(config.chunk_length_s)} s that overlap by {overlap} ms"


def _time(samples: int, config: EncodecConfig) -> str:
    seconds = samples / config.sampling_rate
    return f"{short(seconds)} s" if seconds >= 1 else f"{fixed(1000 * seconds, 1)} ms"


def _forms(config: EncodecLMConfig) -> str:
    forms = [name for name, has in (("float", config.has_float_form), ("integer", config.has_integer_form)) if has]
    return listing(forms)


# ---- training ----------------------------------------------------------------------------------------------------


def curve(log: list[dict], *columns: tuple[str, float, int, str]) -> str:
    """Validations of a run by update, a column for each bandwidth.

    Args:
        columns: of each value in a cell, its name before the slash, factor, decimals and unit.
    """
    first = columns[0][0]
    rows = [line for line in log if any(key.startswith(f"{first}/") for key in line)]
    kbps = [key.split("/")[1] for key in rows[0] if key.startswith(f"{first}/")]

    def cell(line: dict, bandwidth: str) -> str:
        return ", ".join(
            f"{fixed(factor * line[f'{name}/{bandwidth}'], digits)}{unit}" for name, factor, digits, unit in columns
        )

    body = [[str(line["update"]), *(cell(line, bandwidth) for bandwidth in kbps)] for line in rows]
    return table(["update", *(f"{bandwidth} kbps" for bandwidth in kbps)], body)


def before_and_now(comparison: dict) -> str:
    """SI-SNR and mel distance of two checkpoints on the same clips, by kind of clip."""

    def cells(scores: dict) -> list[str]:
        pairs = zip(scores["si_snr"], scores["mel_distance"])
        return [f"{fixed(si_snr, 2)} dB, {fixed(mel, 3)}" for si_snr, mel in pairs]

    rows = []
    for group in comparison["groups"]:
        clips = f"{group['clips']} of {group['kind']}"
        rows += [[clips, "before", *cells(group["before"])], [clips, "**now**", *cells(group["now"])]]
    return table(["clips", "", *(f"{short(kbps)} kbps" for kbps in comparison["kbps"])], rows)


def changes(comparison: dict) -> dict:
    """By how much the mel distance fell (least, most; fractions), and where SI-SNR fell, as words."""
    falls, losses = [], []
    for group in comparison["groups"]:
        before, now = group["before"], group["now"]
        falls += [1 - new / old for old, new in zip(before["mel_distance"], now["mel_distance"])]
        for kbps, old, new in zip(comparison["kbps"], before["si_snr"], now["si_snr"]):
            if new < old:
                losses.append(f"{group['kind']} at {short(kbps)} kbps ({fixed(old - new, 2)} dB less)")
    return {"least": min(falls), "most": max(falls), "losses": losses}


# ---- evaluations -------------------------------------------------------------------------------------------------


def score(metric: dict | None, digits: int) -> str:
    """A mean with its interval, as far as they are known."""
    if metric is None or metric.get("mean") is None:
        return ""
    mean, low, high = (metric.get(name) for name in ("mean", "low", "high"))
    interval = "" if low is None or high is None else f" ({fixed(low, digits)} to {fixed(high, digits)})"
    return fixed(mean, digits) + interval


def evaluation_tables(evaluation: dict) -> list[tuple[str, str]]:
    """(category, table of systems, rates and metrics), all clips first."""
    results = evaluation["results"]
    used = [name for name in METRICS if any(name in row["metrics"] for row in results)]
    header = ["", "kbps", "measured", "with LM", "clips", "lag", *(METRICS[name][0] for name in used)]
    made = []
    for category in sorted({row["category"] for row in results}, key=lambda name: (name != "all", name)):
        rows = [
            [
                system_name(row["system"], evaluation),
                row["kbps"],
                fixed(row["measured_kbps"], 2),
                fixed(row["lm_kbps"], 2),
                row["clips"],
                row.get("lag"),
                *(score(row["metrics"].get(name), METRICS[name][1]) for name in used),
            ]
            for row in results
            if row["category"] == category
        ]
        made.append((category, table(header, rows)))
    return made


def system_name(system: str, evaluation: dict) -> str:
    """How a card calls a system of an evaluation."""
    return f"**{evaluation['model']['name']}**" if system == "encodec" else SYSTEMS.get(system, system)


def codebook_table(evaluation: dict) -> str:
    """How many entries of each codebook were used, and how evenly."""
    rows = [
        [number, percent(book["used"], 1), fixed(book["perplexity"], 0)]
        for number, book in enumerate(evaluation["codebooks"], 1)
    ]
    return table(["codebook", "entries used", "perplexity"], rows)


def beside_the_paper(evaluation: dict, config: EncodecConfig, paper: dict) -> dict | None:
    """The evaluated codec beside the paper's figures at the bandwidth it gives: a table, and sentences of margins.

    None where there is nothing to compare: another sampling rate, or no result at that bandwidth.
    """
    objective = paper["objective"]
    kbps = objective["kbps"]
    ours = _overall(evaluation, "encodec", kbps)
    if config.sampling_rate != objective["sampling_rate"] or ours is None:
        return None
    opus = _overall(evaluation, "opus", kbps)
    measured = [(system_name(row["system"], evaluation), "measured here", row) for row in (ours, opus) if row]
    rows = [
        [name, source, *(score(row["metrics"].get(metric), METRICS[metric][1]) for metric, *_ in COMPARED)]
        for name, source, row in measured
    ]
    theirs = _paper_rows(config, paper)
    for name, source, row in theirs:
        rows.append([name, source, *(fixed(row[metric], METRICS[metric][1]) for metric, *_ in COMPARED)])
    sentences = [sentence for metric in COMPARED for sentence in _margins(metric, ours, opus, theirs, kbps)]
    header = ["", "source", *(METRICS[metric][0] for metric, *_ in COMPARED)]
    return {"kbps": kbps, "table": table(header, rows), "sentences": sentences}


def beside_opus(evaluation: dict) -> list[str]:
    """Sentences that say by which metrics Opus is better than the codec over all clips, at each rate of both, and by
    which it is not."""
    sentences = []
    for ours in of_category(evaluation, "all"):
        opus = _overall(evaluation, "opus", ours["kbps"])
        if opus is None:
            continue
        better, other = [], []
        for name in METRICS.keys() & ours["metrics"].keys() & opus["metrics"].keys():
            theirs, mean = (round(row["metrics"][name]["mean"], METRICS[name][1]) for row in (opus, ours))
            ahead = theirs < mean if name in LOWER_IS_BETTER else theirs > mean
            (better if ahead else other).append(name)
        words = {name: METRICS[name][0].removesuffix(" (dB)") for name in METRICS}
        said = [
            f"{words[name]} ({fixed(opus['metrics'][name]['mean'], METRICS[name][1])} against "
            f"{fixed(ours['metrics'][name]['mean'], METRICS[name][1])})"
            for name in METRICS
            if name in better
        ]
        rest = [words[name] for name in METRICS if name in other]
        rate = f"At {short(ours['kbps'])} kbps"
        if not better + other:
            continue
        if not said:
            sentences.append(f"{rate} Opus is better by none of the metrics.")
        else:
            end = f"; this model is not worse by {listing(rest)}" if rest else ", so by every metric"
            sentences.append(f"{rate} **Opus is better** by {listing(said)}{end}.")
    return sentences


def of_category(evaluation: dict, category: str) -> list[dict]:
    """The codec's own rows of a category, by rate."""
    return [row for row in evaluation["results"] if (row["system"], row["category"]) == ("encodec", category)]


def _overall(evaluation: dict, system: str, kbps: float) -> dict | None:
    rows = [row for row in evaluation["results"] if row["category"] == "all" and row["system"] == system]
    return next((row for row in rows if row["kbps"] == kbps), None)


def _paper_rows(config: EncodecConfig, paper: dict) -> list[tuple[str, str, dict]]:
    """(system, source, figures) of the paper's that a codec like this is to be held against."""
    sizes, objective = paper["architectures"], paper["objective"]
    found = [
        (f"EnCodec, {row['num_filters']} filters", f"paper, Table {sizes['table']}", row)
        for row in sizes["rows"]
        if row["num_filters"] == config.num_filters
    ]
    wanted = [row for row in objective["rows"] if row["system"] in ("EnCodec", "Opus") and row["streamable"]]
    return found + [(row["system"], f"paper, Table {objective['table']}", row) for row in wanted]


def _margins(metric: tuple[str, str, str], ours: dict, opus: dict | None, theirs: list, kbps: float) -> list[str]:
    """Sentences that say by how much the codec falls short of the paper's figures, or goes beyond."""
    name, word, unit = metric
    digits = METRICS[name][1]
    mean = (ours["metrics"].get(name) or {}).get("mean")
    if mean is None:
        return []
    stands = []
    for system, source, row in theirs:
        figure = f"the paper's figure for {system} ({fixed(row[name], digits)}, {source})"
        stands.append(f"{margin(mean, row[name], digits, unit)} {figure}")
    sentences = [f"At {short(kbps)} kbps its {word} is {listing(stands)}."]
    measured = opus and (opus["metrics"].get(name) or {}).get("mean")
    if measured is not None:
        stand = margin(mean, measured, digits, unit)
        rates = f"{fixed(opus['measured_kbps'], 2)} kbps measured against {fixed(ours['measured_kbps'], 2)}"
        sentences.append(f"It is {stand} that of Opus on the same clips, at {rates}.")
    return sentences
