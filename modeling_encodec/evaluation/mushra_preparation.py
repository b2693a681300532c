"""A MUSHRA listening test as the paper made its (4.3), as a folder that webMUSHRA serves and a key that it does not.

    OUT/key.json                     what is behind each anonymous file: stays with the experimenter
    OUT/README.md                    what to do next, and how many listeners each session needs
    OUT/webmushra/configs/*.yaml     one file a listening session
    OUT/webmushra/stimuli/*.wav      16-bit, all of one length, named by chance

webMUSHRA puts the reference among the stimuli itself, under the name "reference"; listed as a stimulus it would be
there twice. The paper does not say which anchor it used; here are both of BS.1534. Names are drawn from the seed and
from what the test is made of: two tests share none, and one command makes the same bytes each time.
"""

import hashlib
import json
import os
import textwrap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import yaml

from modeling_encodec.evaluation.loudness import equalise
from modeling_encodec.evaluation.mushra_key import ANNOTATIONS, FORMAT, LISTENER, LOW_ANCHOR, MID_ANCHOR, REFERENCE
from modeling_encodec.evaluation.mushra_stimuli import TRANSITION, find_excerpt, low_pass
from modeling_encodec.models.inputs_encodec import check_rate, real_number, whole_number
from modeling_encodec.processors.audio import write_audio
from modeling_encodec.system.atomic import atomic_folder


ANCHORS = {LOW_ANCHOR: 3500.0, MID_ANCHOR: 7000.0}
# Trials that one listener rates at a sitting: some two minutes each, and half an hour is what a listener can bear.
PER_LISTENER = 10
# BS.1534: no more signals in a trial, hidden reference and anchors included, and none longer. webMUSHRA checks it.
MOST_SIGNALS = 12
LONGEST_SECONDS = 12.0
CONTENTS = {"key.json", "README.md", "webmushra"}

INTRODUCTION = (
    "<p>On every page you hear a reference and several versions of it, in an order that changes. Rate how good each "
    "version sounds beside the reference, from 0 (bad) to 100 (excellent): any difference that you hear counts.</p>"
    "<p>One of the versions is the reference itself; it deserves 100. Some of the others may sound very different.</p>"
    "<p>Please use headphones in a quiet room, choose a comfortable volume now, and do not change it afterwards.</p>"
)
QUESTION = "Rate every version beside the reference. One of them is the reference itself."


class Clip(Protocol):
    """What a sample is cut from."""

    name: str
    category: str

    def read(self, sampling_rate: int, channels: int) -> np.ndarray:
        """Its audio, float32 (channels, T)."""


def prepare_mushra(
    clips: Iterable[Clip],
    systems: Mapping[str, Callable[[np.ndarray], np.ndarray]],
    folder: str | os.PathLike,
    *,
    sampling_rate: int,
    channels: int = 1,
    samples: int = 50,
    seconds: float = 5.0,
    seed: int = 0,
    per_listener: int = PER_LISTENER,
    annotations: int = ANNOTATIONS,
    allow_fewer: bool = False,
    force: bool = False,
) -> dict:
    """Write a listening test into `folder`, whole or not at all, and return what its key.json holds.

    Args:
        clips: with a name, a category and `read`, such as those of `evaluation.clips`.
        systems: name -> what codes and decodes audio (channels, T) at `sampling_rate` Hz, to the same shape.
        folder: for the test; a new one.
        sampling_rate: of the test, in Hz.
        channels: of the test, 1 or 2.
        samples: samples of each category, one a clip.
        seconds: length of a sample; shorter clips, and clips (nearly) silent throughout, are left out.
        seed: draws samples, places in clips, and names.
        per_listener: trials of a listening session, at most; sessions have equally many of each category, within one.
        annotations: ratings that each sample shall get, so listeners that each session needs.
        allow_fewer: take what there is of a category with fewer clips.
        force: replace a listening test that is there already.

    Raises:
        ValueError: for values that cannot work, a category with too few clips, a system that returns something else
            than finite audio of the shape it was given.
        FileExistsError: if `folder` exists, and with `force` if it holds more than a listening test.
    """
    sampling_rate, seconds = check_rate("sampling_rate", sampling_rate), real_number("seconds", seconds)
    channels = whole_number("channels", channels, 1, 2)
    samples, seed, per_listener, annotations = (
        whole_number(name, value, least, allowed=f"{least} or more")
        for name, value, least in (
            ("samples", samples, 1),
            ("seed", seed, 0),
            ("per_listener", per_listener, 1),
            ("annotations", annotations, 1),
        )
    )
    _check(systems, sampling_rate, seconds)
    _check_place(Path(folder), force)
    with atomic_folder(folder) as place:
        chosen = _choose(clips, round(seconds * sampling_rate), sampling_rate, channels, samples, seed, allow_fewer)
        settings = {
            "seed": seed,
            "sampling_rate": sampling_rate,
            "channels": channels,
            "seconds": seconds,
            "annotations": annotations,
            "systems": [REFERENCE, *systems, *anchors_at(sampling_rate)],
        }
        key = _write_test(place, chosen, systems, settings, per_listener)
    return key


def anchors_at(sampling_rate: int) -> dict[str, float]:
    """The anchors that audio at `sampling_rate` Hz can have, name -> cut-off in Hz."""
    return {name: cutoff for name, cutoff in ANCHORS.items() if sampling_rate >= 2 * (cutoff + TRANSITION)}


def _check(systems, sampling_rate: int, seconds: float) -> None:
    if not 0.1 <= seconds <= LONGEST_SECONDS:
        raise ValueError(f"seconds is {seconds:g}, allowed: 0.1 to {LONGEST_SECONDS:g}")
    anchors = anchors_at(sampling_rate)
    if LOW_ANCHOR not in anchors:
        lowest = 2 * (ANCHORS[LOW_ANCHOR] + TRANSITION)
        raise ValueError(f"sampling_rate is {sampling_rate} Hz, allowed: {lowest:g} or more, for the 3.5 kHz anchor")
    most = MOST_SIGNALS - len(anchors) - 1
    if not 1 <= len(systems) <= most:
        raise ValueError(f"{len(systems)} systems, allowed: 1 to {most} beside reference and anchors (BS.1534)")
    reserved = [name for name in systems if name in (REFERENCE, *ANCHORS) or not name]
    if reserved:
        raise ValueError(
            f"a system is called {reserved[0]!r}, allowed: anything but '', {REFERENCE}, {', '.join(ANCHORS)}"
        )


def _check_place(folder: Path, force: bool) -> None:
    """Refuse a folder that exists, or with `force` one that holds more than a listening test."""
    if not folder.exists():
        return
    if not force:
        raise FileExistsError(f"{folder} exists, allowed: a new folder, or to replace a listening test by force")
    strange = sorted({path.name for path in folder.iterdir()} - CONTENTS) if folder.is_dir() else [folder.name]
    if strange:
        raise FileExistsError(f"{folder} holds {strange[0]}, allowed: to replace a listening test and nothing else")


def _choose(
    clips: Iterable[Clip], length: int, sampling_rate: int, channels: int, samples: int, seed: int, allow_fewer: bool
) -> list[tuple[Clip, int]]:
    """(clip, first sample) of every sample, category after category."""
    chosen = []
    clips = sorted(clips, key=lambda clip: clip.name)
    for category in sorted({clip.category for clip in clips}):
        pool = [clip for clip in clips if clip.category == category]
        rng = np.random.default_rng([seed, *category.encode()])  # other categories change nothing in this one
        found = []
        for index in rng.permutation(len(pool)):
            start = find_excerpt(pool[index].read(sampling_rate, channels), length, sampling_rate, rng)
            if start is not None:
                found.append((pool[index], start))
            if len(found) == samples:
                break
        if len(found) < samples and not allow_fewer:
            raise ValueError(
                f"samples is {samples}, allowed for category {category!r}: 1 to {len(found)}, its clips with "
                f"{length / sampling_rate:g} s of sound, or fewer than asked (allow_fewer)"
            )
        chosen += found
    if not chosen:
        raise ValueError(f"no clip of {length / sampling_rate:g} s with sound, needed: at least one")
    return chosen


def _write_test(
    place: Path,
    chosen: list[tuple[Clip, int]],
    systems: Mapping[str, Callable[[np.ndarray], np.ndarray]],
    settings: dict,
    per_listener: int,
) -> dict:
    made_of = [*settings.values(), per_listener, [(clip.category, clip.name, start) for clip, start in chosen]]
    names = np.random.default_rng(list(hashlib.sha256(json.dumps(made_of).encode()).digest()))
    test_id = f"mushra-{names.bytes(4).hex()}"
    rate, length = settings["sampling_rate"], round(settings["seconds"] * settings["sampling_rate"])
    coders = dict(systems) | {name: _anchor(cutoff, rate) for name, cutoff in anchors_at(rate).items()}
    served = place / "webmushra"
    (served / "stimuli").mkdir(parents=True)
    trials = []
    for clip, start in chosen:
        audio = clip.read(rate, settings["channels"])[:, start : start + length]
        trial = {"id": f"t{names.bytes(6).hex()}", "category": clip.category, "clip": clip.name}
        trial |= {"start_seconds": start / rate}
        trials.append(trial | _write_trial(audio, coders, served, rate, names))
    sessions = _write_sessions(trials, test_id, served, per_listener, settings["annotations"])
    key = {"format": FORMAT, "test_id": test_id, **settings, "sessions": sessions, "trials": trials}
    (place / "key.json").write_text(json.dumps(key, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (place / "README.md").write_text(_readme(key), encoding="utf-8")
    return key


def _anchor(cutoff: float, sampling_rate: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda audio: low_pass(audio, cutoff, sampling_rate)


def _write_trial(
    audio: np.ndarray,
    coders: Mapping[str, Callable[[np.ndarray], np.ndarray]],
    served: Path,
    sampling_rate: int,
    names: np.random.Generator,
) -> dict:
    """Code one sample with everything and write it; the trial's part of the key."""
    stimuli = {REFERENCE: audio}
    for system, code in coders.items():
        decoded = np.asarray(code(audio.copy()), dtype=np.float32)
        if decoded.shape != audio.shape or not np.isfinite(decoded).all():
            raise ValueError(f"system {system!r} gave audio {decoded.shape}, allowed: finite audio {audio.shape}")
        stimuli[system] = decoded
    stimuli, gains = equalise(stimuli, REFERENCE)
    files = {system: f"stimuli/s{names.bytes(8).hex()}.wav" for system in stimuli}
    for system in sorted(files, key=files.get):  # times of writing tell nothing either
        write_audio(served / files[system], stimuli[system], sampling_rate)
    labelled = {
        f"C{index + 1:02}": {"system": system, "file": files[system], "gain_db": _decibels(gains[system])}
        for index, system in enumerate(names.permutation(list(coders)).tolist())
    }
    return {"reference": files[REFERENCE], "gain_db": _decibels(gains[REFERENCE]), "stimuli": labelled}


def _decibels(gain: float) -> float:
    return round(20 * float(np.log10(gain)), 3)


def _write_sessions(trials: list[dict], test_id: str, served: Path, per_listener: int, annotations: int) -> list[dict]:
    """Deal the trials, which are in order of category, out to sessions, and write webMUSHRA's file for each."""
    (served / "configs").mkdir()
    count = -(-len(trials) // per_listener)
    sessions = []
    for number in range(count):
        dealt = sorted(trials[number::count], key=lambda trial: trial["id"])
        name = f"{test_id}_{number + 1:0{len(str(count))}}.yaml"
        (served / "configs" / name).write_text(_session_yaml(test_id, dealt), encoding="utf-8")
        sessions.append({"config": name, "listeners": annotations, "trials": [trial["id"] for trial in dealt]})
    return sessions


def _session_yaml(test_id: str, trials: list[dict]) -> str:
    """A configuration in webMUSHRA's format. Its parser is a small one: lists in lists are written as in its own
    examples, and no text is folded."""
    head = {
        "testname": "Listening test",
        "testId": test_id,
        "bufferSize": 2048,
        "stopOnErrors": True,
        "showButtonPreviousPage": True,
        "remoteService": "service/write.php",
    }
    first = {"type": "generic", "id": "introduction", "name": "Listening test", "content": INTRODUCTION}
    pages = [
        {
            "type": "mushra",
            "id": trial["id"],
            "name": "Rating",
            "content": QUESTION,
            "showWaveform": True,
            "enableLooping": True,
            "randomize": True,
            "reference": trial["reference"],
            "createAnchor35": False,
            "createAnchor70": False,
            "stimuli": {label: stimulus["file"] for label, stimulus in trial["stimuli"].items()},
        }
        for trial in trials
    ]
    last = {
        "type": "finish",
        "name": "Thank you",
        "content": "Please give the name or number by which you take part, and send your ratings.",
        "popupContent": "Your ratings were sent. Thank you!",
        "showResults": False,
        "writeResults": True,
        "questionnaire": [{"type": "text", "label": "Name or number", "name": LISTENER, "optional": False}],
    }
    return (
        f"{_yaml(head)}pages:\n{_indented([first], 2)}  -\n    - random\n{_indented(pages, 4)}{_indented([last], 2)}"
    )


def _yaml(value) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=10**6)


def _indented(value, spaces: int) -> str:
    return textwrap.indent(_yaml(value), " " * spaces)


def _readme(key: dict) -> str:
    sessions = "\n".join(
        f"| `?config={session['config']}` | {len(session['trials'])} | {session['listeners']} |"
        for session in key["sessions"]
    )
    return f"""# Listening test {key["test_id"]}

{len(key["trials"])} samples of {key["seconds"]:g} s, {len(key["systems"])} versions of each.

1. Copy what is in `webmushra/` into the folder of a webMUSHRA installation. Keep `key.json` away from it: it says
   which file is which.
2. Let each listener take a session, at that address of the installation. Every sample needs {key["annotations"]}
   ratings by listeners who pass the screening; for those who are dropped, others have to listen.
3. `modeling-encodec evaluate mushra analyse results/{key["test_id"]}/mushra.csv --key key.json`

| session | samples | listeners |
|---|---|---|
{sessions}
"""
