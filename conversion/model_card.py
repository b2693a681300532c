"""Model cards, written from a model's configuration and JSON files of what was measured.

    python -m modeling_encodec.conversion.model_card model_cards/

writes this project's own cards anew: for each checkpoint that comes with the package, `NAME.json` holds what its
training was, with its logs, of which the curves are drawn, `NAME_evaluation.json` (if there) what it is worth, with a
picture of that stem; for the models released
with the paper, `paper_results.json` beside this module holds the paper's figures. `card_for` does it for any folder.

Sentences are in `card_templates/`, without results: a number is typed once, in a JSON file, or computed. A card is
therefore never edited, and a test holds the committed ones against what this module writes.
"""

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import typer
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from modeling_encodec.checkpoints import BUNDLED, BUNDLED_LM, bundled_checkpoint, bundled_lm_checkpoint
from modeling_encodec.checkpoints.released import released_by_name
from modeling_encodec.conversion import card_values
from modeling_encodec.conversion.checkpoint_files import read_json
from modeling_encodec.evaluation.plots import plot_training, read_log, save_figure
from modeling_encodec.models.configuration_encodec import EncodecConfig, EncodecLMConfig
from modeling_encodec.system.atomic import atomic_path


if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = Path(__file__).parent / "paper_results.json"
TEMPLATES = Path(__file__).parent / "card_templates"
EVALUATION_FORMAT = 1
EVALUATION_PARTS = ("model", "data", "method", "versions", "missing", "results", "codebooks")
KINDS = {"encodec": EncodecConfig, "encodec_lm": EncodecLMConfig}
TASK = {"task_type": "audio-to-audio", "task_name": "Audio compression"}


def card_for(
    folder: str | Path,
    *,
    name: str,
    evaluation: str | Path | None = None,
    facts: str | Path | None = None,
    licence: str | None = None,
) -> ModelCard:
    """The card of the model in `folder`, a codec or a language model, for a `README.md` on the Hub.

    Args:
        folder: as `save_pretrained` or a training run leaves it; the run's options are shown if they are there.
        name: of the model. One of the released models' (`encodec_24khz` and so on) adds what the paper says of it.
        evaluation: JSON of `modeling-encodec evaluate`. A picture beside it, `.png` of the same stem, is embedded by
            its name alone: it has to be put beside the card.
        facts: JSON of how this project's own checkpoint was trained, as in `model_cards/`.
        licence: the Hub's identifier, such as `apache-2.0`; a known model's own by default.

    Raises:
        FileNotFoundError: if there is no such folder, configuration, evaluation or facts.
        ValueError: if a file cannot be read, is of another model, or `name` is a released model's and this is none.
    """
    folder = Path(folder)
    config = _read_config(folder)
    known = None if facts is None else _read_facts(Path(facts))
    measured = None if evaluation is None else _read_evaluation(Path(evaluation), folder, config)
    return _card(name, config, folder=folder, evaluation=measured, facts=known, licence=licence)


def released_card(name: str) -> ModelCard:
    """The card of a model released with the paper, of which nothing but its configuration is at hand.

    Raises:
        ValueError: for a name that is none of theirs.
    """
    known = _paper()["models"]
    if name not in known:
        raise ValueError(f"name is {name!r}, allowed: {', '.join(known)}")
    return _card(name, released_by_name(name).make_config())


def own_cards(folder: str | Path) -> dict[Path, str]:
    """The text of every card of this project, by the file it belongs in.

    Args:
        folder: `model_cards/`, with the JSON files and logs of the checkpoints that come with the package.

    Raises:
        FileNotFoundError: if one of those files is missing.
        ValueError: if one of them cannot be read.
    """
    folder = Path(folder)
    cards = {folder / f"{name}.md": str(released_card(name)) for name in _paper()["models"]}
    for name, checkpoint in ((BUNDLED, bundled_checkpoint()), (BUNDLED_LM, bundled_lm_checkpoint())):
        facts, evaluation = folder / f"{name}.json", folder / f"{name}_evaluation.json"
        given = {"facts": facts, "evaluation": evaluation if evaluation.exists() else None}
        cards[folder / f"{name}.md"] = str(card_for(checkpoint, name=name, **given))
        cards[checkpoint / "README.md"] = _note(name, checkpoint, **given)
    return cards


def own_curves(folder: str | Path) -> dict[Path, "Figure"]:
    """The training curves of this project's checkpoints, by the picture they belong in; runs follow one another."""
    pictures = {}
    for name in (BUNDLED, BUNDLED_LM):
        records, before = [], 0
        for run in _read_facts(Path(folder) / f"{name}.json")["training"]["runs"]:
            records += [line | {"update": before + line["update"]} for line in run["lines"]]
            before = records[-1]["update"]
        pictures[Path(folder) / f"{name}_training.png"] = plot_training(records)
    return pictures


# ---- one card ----------------------------------------------------------------------------------------------------


def _card(name: str, config, *, folder=None, evaluation=None, facts=None, licence=None) -> ModelCard:
    context = _context(name, config, folder=folder, evaluation=evaluation, facts=facts, licence=licence)
    kind = "codec" if isinstance(config, EncodecConfig) else "language_model"
    body = _render(f"{kind}.md.jinja", context)
    data = ModelCardData(
        license=context["licence"],
        library_name="transformers",
        pipeline_tag="feature-extraction" if kind == "codec" else None,
        tags=["audio", "encodec", "neural-audio-codec", *(["entropy-coding"] if kind != "codec" else [])],
    )
    results = _eval_results(context)
    if results:
        data.model_name, data.eval_results = name, results
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")


def _context(name: str, config, *, folder=None, evaluation=None, facts=None, licence=None) -> dict:
    """All that the templates may use."""
    paper = _paper()
    is_codec = isinstance(config, EncodecConfig)
    released = None
    if name in paper["models"]:
        _check_released(name, config)
        entry = released_by_name(name)
        released = paper["models"][name] | {"file": entry.file, "hub": entry.hub_id}
        if not is_codec:
            released["codec_hub"] = released_by_name(released["codec"]).hub_id
    values = card_values.codec_facts(config) if is_codec else card_values.lm_facts(config)
    default = paper["licence"]["id"] if released else (facts or {}).get("licence")
    return {
        "name": name,
        "config": config,
        "kind": "codec" if is_codec else "lm",
        "facts": values,
        "codec_facts": None if is_codec else _codec_facts(released, facts),
        "paper": paper,
        "url": f"https://arxiv.org/abs/{paper['paper']['arxiv']}",
        "released": released,
        "source": _source(name, released),
        "licence": licence or default,
        "own": facts,
        "training": _training_options(folder),
        "megabytes": _megabytes(folder),
        "evaluation": evaluation,
        "metrics": card_values.METRICS,
        "beside": card_values.beside_the_paper(evaluation, config, paper) if evaluation and is_codec else None,
    }


def _codec_facts(released: dict | None, facts: dict | None) -> dict | None:
    """Of the codec whose codes a known language model knows."""
    if released:
        return card_values.codec_facts(released_by_name(released["codec"]).make_config())
    return card_values.codec_facts(EncodecConfig.from_pretrained(bundled_checkpoint())) if facts else None


def _source(name: str, released: dict | None) -> str:
    """What `from_pretrained` takes, as Python."""
    bundled = {BUNDLED: "bundled_checkpoint()", BUNDLED_LM: "bundled_lm_checkpoint()"}
    return bundled.get(name) or json.dumps((released or {}).get("hub") or name)


def _note(name: str, checkpoint: Path, *, facts: Path, evaluation: Path | None) -> str:
    """The short card that lies beside a bundled checkpoint's weights."""
    config = _read_config(checkpoint)
    measured = None if evaluation is None else _read_evaluation(evaluation, checkpoint, config)
    context = _context(name, config, folder=checkpoint, evaluation=measured, facts=_read_facts(facts))
    return _render(f"note_{name}.md.jinja", context)


def _render(template: str, context: dict) -> str:
    return card_values.tidy(_environment().get_template(template).render(context))


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for value in (card_values.fixed, card_values.short, card_values.percent, card_values.listing):
        environment.filters[value.__name__] = value
    tables = ("table", "setups", "codec_table", "lm_table", "strategies", "curve", "before_and_now", "changes")
    for value in (*tables, "evaluation_tables", "codebook_table", "beside_opus", "of_category"):
        environment.globals[value] = getattr(card_values, value)
    return environment


# ---- metadata ----------------------------------------------------------------------------------------------------


def _eval_results(context: dict) -> list[EvalResult]:
    """The model index: what was measured here, or the paper's figures, with the paper as their source."""
    if context["evaluation"]:
        return _measured_results(context["evaluation"])
    if context["released"]:
        return _paper_results(context)
    saving = (context["own"] or {}).get("saving")
    return _savings(saving["rows"], "held-out recordings of free audio packages") if saving else []


def _measured_results(evaluation: dict) -> list[EvalResult]:
    data = evaluation["data"]["name"]
    rows = [row for row in evaluation["results"] if row["system"] == "encodec" and row["category"] == "all"]
    return [
        _result(metric, f"{card_values.METRICS[metric][0]}, at {row['kbps']:g} kbps", score["mean"], data)
        for row in rows
        for metric, score in row["metrics"].items()
        if metric in card_values.METRICS and score and score.get("mean") is not None
    ]


def _paper_results(context: dict) -> list[EvalResult]:
    paper, config = context["paper"], context["config"]
    codec = context["released"].get("codec", context["name"])
    listening = paper["mushra_24khz" if codec == "encodec_24khz" else "mushra_48khz"]
    source = _paper_source(context, listening["table"])
    rows = [row for row in listening["rows"] if row["system"] == "EnCodec"]
    if isinstance(config, EncodecLMConfig):
        coded = [{"kind": "all", "kbps": row["kbps"], "coded_kbps": row["lm_kbps"]} for row in rows if row["lm_kbps"]]
        return _savings(coded, "the paper's listening test", **source)
    results = [
        _result("mushra", f"MUSHRA at {row['kbps']:g} kbps, {kind}", mean, "the paper's listening test", **source)
        for row in rows
        for kind, (mean, _) in zip(listening["categories"], row["mushra"])
    ]
    objective = paper["objective"]
    if config.sampling_rate == objective["sampling_rate"]:
        figures = next(row for row in objective["rows"] if row["system"] == "EnCodec" and row["streamable"])
        source = _paper_source(context, objective["table"])
        for metric, word, _ in card_values.COMPARED:
            named = f"{word} at {objective['kbps']:g} kbps"
            # One data set for each source: the Hub's format has one source for all results on a data set.
            results.append(_result(metric, named, figures[metric], "the paper's mix of speech and music", **source))
    return results


def _savings(rows: list[dict], data: str, **source) -> list[EvalResult]:
    return [
        _result(
            "bitrate_saving",
            f"bits saved at {row['kbps']:g} kbps, {row['kind']}",
            round(1 - row["coded_kbps"] / row["kbps"], 3),
            data,
            **source,
        )
        for row in rows
    ]


def _result(metric: str, name: str, value: float, data: str, **source) -> EvalResult:
    kind = re.sub(r"[^A-Za-z0-9_.]+", "-", data).strip("-").lower()  # of a data set's id, the characters the Hub takes
    return EvalResult(
        **TASK,
        dataset_type=kind or "clips",
        dataset_name=data,
        metric_type=metric,
        metric_name=name,
        metric_value=value,
        **source,
    )


def _paper_source(context: dict, table: str) -> dict:
    return {"source_name": f"paper, Table {table}", "source_url": context["url"]}


# ---- files -------------------------------------------------------------------------------------------------------


def _paper() -> dict:
    return json.loads(PAPER.read_text(encoding="utf-8"))


def _read_config(folder: Path) -> EncodecConfig | EncodecLMConfig:
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in KINDS:
        raise ValueError(f"{folder}: model_type is {kind!r}, allowed: {', '.join(KINDS)}")
    return KINDS[kind].from_pretrained(folder)


def _read_facts(path: Path) -> dict:
    """How a checkpoint was trained; with the logs of its runs, and of a language model the facts of its codec."""
    facts = read_json(path)
    for run in facts["training"]["runs"]:
        run["lines"] = read_log(path.with_name(run["log"]))
        run.setdefault("updates", run["lines"][-1]["update"])
    if "codec" in facts:
        facts["of_codec"] = read_json(path.with_name(f"{facts['codec']}.json"))
    return facts


def _read_evaluation(path: Path, folder: Path, config) -> dict:
    """An evaluation that is this model's, with the name of the picture beside it or none."""
    evaluation = read_json(path)
    if evaluation.get("format") != EVALUATION_FORMAT:
        raise ValueError(f"{path}: format is {evaluation.get('format')!r}, allowed: {EVALUATION_FORMAT}")
    absent = [part for part in EVALUATION_PARTS if part not in evaluation]
    if absent:
        raise ValueError(f"{path}: has no {absent[0]!r}, allowed: what `modeling-encodec evaluate` writes")
    if not isinstance(config, EncodecConfig):
        raise ValueError(f"{path}: is an evaluation of a codec, allowed: none for a language model")
    model, weights = evaluation["model"], folder / "model.safetensors"
    for field in ("sampling_rate", "audio_channels"):
        if model[field] != getattr(config, field):
            raise ValueError(f"{path}: {field} is {model[field]}, allowed: {getattr(config, field)}, the model's")
    if weights.is_file():
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        if model["weights_sha256"] not in (None, digest):
            given = model["weights_sha256"][:12]
            raise ValueError(f"{path}: is of the weights {given}…, allowed: {digest[:12]}…, of {weights}")
    picture = path.with_suffix(".png")
    return evaluation | {"picture": picture.name if picture.is_file() else None}


def _training_options(folder: Path | None) -> dict | None:
    """The options of the run that made the model, if it left them."""
    path = folder and folder / "training_config.json"
    return read_json(path) if path and path.is_file() else None


def _megabytes(folder: Path | None) -> float | None:
    weights = folder and folder / "model.safetensors"
    return weights.stat().st_size / 1e6 if weights and weights.is_file() else None


def _check_released(name: str, config) -> None:
    """A model that is called as a released one is built as that one."""
    expected = released_by_name(name).make_config()
    if type(config) is not type(expected):
        raise ValueError(f"{name} is a {expected.model_type}, allowed: another name for a {config.model_type}")
    ours = {"max_positions", "codec_fingerprint", "has_integer_form", "has_float_form"}
    for field in sorted(set(type(config).__annotations__) - ours):
        value, wanted = (_as_list(getattr(one, field)) for one in (config, expected))
        if value != wanted:
            raise ValueError(f"{field} is {value!r}, allowed: {wanted!r} in {name}, or another name")


def _as_list(value):
    return list(value) if isinstance(value, tuple) else value


# ---- the command -------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """The command; errors are one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="model_card", description="This project's model cards, written anew.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="Folder of cards, logs and JSON files.")
    try:
        folder = parser.parse_args(argv).folder
        cards, pictures = own_cards(folder), own_curves(folder)
        for path, text in cards.items():
            with atomic_path(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
        for path, figure in pictures.items():
            save_figure(figure, path)
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"model_card: {' '.join(str(error).split())}", err=True)
        return 2
    for path in [*cards, *pictures]:
        typer.echo(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
