"""A model folder to a repository on the Hugging Face Hub, in one commit.

What goes up is put together in a temporary folder first, and loaded there: the weights' file byte for byte, the
configuration and the feature extractor's with the classes to load them, those classes' code, a card, a licence, the
discriminators, and the options of the training run, without the paths of the machine that it ran on.

The weights are copied and not saved anew, because loading and saving changes them: the bundled float16 file would come
out as float32, twice as large. The price: names of an older layout stay as they are (they load). And the commit is
made by `create_commit`, for `upload_folder` makes as many as it sees fit, of which the first may be the last. Files
that a repository has and the folder has not are left alone.

Whatever the Hub or the network says is told in one line without the token, by exceptions of our own.
"""

import filecmp
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import transformers
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id

from modeling_encodec.conversion.checkpoint_writing import transformers_loads
from modeling_encodec.models.json_files_encodec import read_json
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.models.modeling_lm_encodec import EncodecLM
from modeling_encodec.processors.feature_extraction_encodec import EncodecFeatureExtractor


CONFIG, WEIGHTS, PREPROCESSOR, CARD = "config.json", "model.safetensors", "preprocessor_config.json", "README.md"
TRAINING = "training_config.json"
# Copied where they are there; discriminators, so that others may train on.
EXTRAS = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "discriminators.safetensors")
MAIN = "main"
CLASSES = {"encodec": EncodecModel, "encodec_lm": EncodecLM}
PICTURE = re.compile(r"!\[[^\]]*\]\(([\w.\- ]+)\)")  # of a card, by its name alone


@dataclass(frozen=True)
class Staging:
    """What is to go up: a folder of files, the model's class, and what of the model's own folder is not among them."""

    folder: Path
    model: str
    left_behind: list[str]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file, by name."""
        return {path.name: path.stat().st_size for path in sorted(self.folder.iterdir())}


@dataclass(frozen=True)
class Pushed:
    """Where the model is now: the commit's page, and whether it is a new commit or the repository had all of it."""

    url: str
    is_new: bool


def push_folder(
    folder: str | Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    evaluation: str | Path | None = None,
    message: str | None = None,
) -> Pushed:
    """Stage a model folder, check it, and upload it in one commit.

    Args:
        folder: a codec or a language model as this project or Transformers saves it, with a card or without.
        repository: OWNER/NAME, made if it is not there.
        private: whether a new repository is (otherwise public, or as its owner chose for new ones).
        revision: the branch, made if it is not there; `main` by default.
        evaluation: JSON of `modeling-encodec evaluate`, from which a card is written.
        message: of the commit.

    Returns:
        The commit's page, and whether it is a new commit.

    Raises:
        FileNotFoundError: if there is no such folder, or no model in it.
        ValueError: for a repository's name that does not do, a model that does not load alike from what is sent, or a
            card that is refused.
        PermissionError: without token, or if the Hub rejects it or does not let it write there.
        ConnectionError: if the Hub is not reached.
        RuntimeError: for an error of the Hub's.

    Examples:
        >>> from modeling_encodec import bundled_checkpoint, push_folder
        >>> push_folder(bundled_checkpoint(), "my-codec")
        Traceback (most recent call last):
        ...
        ValueError: repository is 'my-codec', allowed: OWNER/NAME
    """
    check_repository(repository)
    hub_token()
    with staged(folder, repository, evaluation=evaluation) as staging:
        return upload(staging, repository, private=private, revision=revision, message=message)


# ---- before anything is sent -------------------------------------------------------------------------------------


def check_repository(repository: str) -> None:
    """A repository's name has its owner in it, since the card names it.

    Raises:
        ValueError: for a name that the Hub does not take, or without an owner.
    """
    try:
        validate_repo_id(repository)
    except ValueError as error:
        raise ValueError(f"repository is {repository!r}, allowed: OWNER/NAME ({_line(error)})") from None
    if "/" not in repository:
        raise ValueError(f"repository is {repository!r}, allowed: OWNER/NAME")


def hub_token() -> str:
    """The token in HF_TOKEN, or of the stored login.

    Raises:
        PermissionError: if there is none, or it is none by its characters.
    """
    try:
        token = get_token()
    except Exception as error:  # of the exchange or refreshment of a token, which goes over the network
        raise PermissionError(f"no token to be had: {_line(error)}") from None
    if not token:
        raise PermissionError("no token: log in with `hf auth login`, or set HF_TOKEN")
    if not re.fullmatch(r"[!-~]+", token):  # an error of the HTTP library would quote it, with escapes
        raise PermissionError("the token (HF_TOKEN, or of the stored login) has characters that no token has")
    return token


@contextmanager
def staged(folder: str | Path, repository: str, *, evaluation: str | Path | None = None) -> Iterator[Staging]:
    """What is to be uploaded, in a folder that lasts as long as the block; makes no connection.

    Args:
        folder: a codec or a language model as this project or Transformers saves it. Its `README.md` is the card if it
            has metadata and no evaluation is given; otherwise a card is written. A codec without feature extractor
            gets the one that its configuration asks for.
        repository: OWNER/NAME, by which the written card calls the model.
        evaluation: JSON of `modeling-encodec evaluate`, for the card. Pictures that a card shows by name alone are
            taken from beside the evaluation, or else from the folder.

    Raises:
        FileNotFoundError: if there is no such folder, or no model in it.
        ValueError: if the model does not load whole and alike from what was put together, if its feature extractor is
            another model's, or if the card's metadata cannot be read.
    """
    folder = Path(folder)
    kind = CLASSES[_model_type(folder)]
    own_card = None if evaluation else _own_card(folder)
    with tempfile.TemporaryDirectory(prefix="modeling_encodec_push_") as temporary:
        target = Path(temporary)
        model = load_strictly(kind, folder)
        card = own_card or _new_card(folder, repository, evaluation)
        model.save_pretrained(target)
        if kind is EncodecModel:
            _save_extractor(folder, target, model.config)
        if (folder / TRAINING).is_file():
            options = _without_places(json.loads((folder / TRAINING).read_text(encoding="utf-8")))
            (target / TRAINING).write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")
        shutil.copyfile(folder / WEIGHTS, target / WEIGHTS)
        (target / CARD).write_bytes(card.encode())
        beside = Path(evaluation).parent if evaluation else folder
        for source in [*(folder / name for name in EXTRAS), *(beside / name for name in PICTURE.findall(card))]:
            if source.is_file() and not (target / source.name).exists():
                shutil.copyfile(source, target / source.name)
        if not filecmp.cmp(folder / WEIGHTS, target / WEIGHTS, shallow=False):
            raise ValueError(f"{folder / WEIGHTS}: changed while it was copied")
        load_strictly(kind, target, folder)
        if kind is EncodecModel and transformers_loads(model.config):  # which plain `AutoModel.from_pretrained` takes
            load_strictly(transformers.EncodecModel, target, folder)
        left = [
            path.name + "/" * path.is_dir() for path in sorted(folder.iterdir()) if not (target / path.name).exists()
        ]
        if own_card is None and (folder / CARD).exists():
            left.append(f"{CARD} (a new card takes its place)")
        yield Staging(target, kind.__name__, left)


def load_strictly(kind: type, folder: Path, named: Path | None = None):
    """The model of class `kind` in `folder`, which errors call `named`.

    Raises:
        ValueError: if it does not load, or weights are missing, of another shape, or more than the model has.
    """
    named = f"{named or folder}: does not load as {kind.__module__.partition('.')[0]}'s {kind.__name__}"
    try:
        model, info = kind.from_pretrained(folder, output_loading_info=True)
    except Exception as error:  # whatever Transformers, torch or safetensors raise for a damaged folder
        raise ValueError(f"{named} ({_line(error)})") from None
    for problem, keys in info.items():
        if keys:
            raise ValueError(f"{named} ({problem.replace('_', ' ')}: {len(keys)}, such as {min(map(str, keys))})")
    return model


def readable_size(size: int) -> str:
    """`size` bytes as people write them: 812 B, 16.3 MB."""
    if size < 1000:
        return f"{size} B"
    power = next((power for power in (1, 2, 3) if size < 999.95 * 1000**power), 4)
    return f"{size / 1000**power:.1f} {' kMGT'[power]}B"


def _model_type(folder: Path) -> str:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: no {name} in it, allowed: a folder written by save_pretrained")
    model_type = read_json(folder / CONFIG).get("model_type")
    if model_type not in CLASSES:
        raise ValueError(f"{folder}: model_type is {model_type!r}, allowed: {', '.join(CLASSES)}")
    return model_type


def _save_extractor(folder: Path, target: Path, config) -> None:
    """Write the feature extractor, with its class, as in `folder` or by the model's configuration."""
    wanted = EncodecFeatureExtractor.for_model(config)
    if not (folder / PREPROCESSOR).is_file():
        wanted.save_pretrained(target)
        return
    extractor = EncodecFeatureExtractor.from_pretrained(folder)
    for name in ("feature_size", "sampling_rate", "chunk_length_s", "overlap"):
        given, value = getattr(extractor, name), getattr(wanted, name)
        if given != value:
            raise ValueError(f"{folder / PREPROCESSOR}: {name} is {given}, allowed: {value}, as in {CONFIG}")
    extractor.save_pretrained(target)


def _without_places(value):
    """JSON in which absolute paths are cut to their last part."""
    if isinstance(value, dict):
        return {name: _without_places(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_without_places(one) for one in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _new_card(folder: Path, name: str, evaluation: str | Path | None) -> str:
    from modeling_encodec.conversion.model_card import card_for

    return card_for(folder, name=name, evaluation=None if evaluation is None else Path(evaluation)).content


def _own_card(folder: Path) -> str | None:
    """The folder's `README.md`, if it begins with metadata. Raises ValueError for metadata that are none."""
    readme = folder / CARD
    if not readme.is_file():
        return None
    text = _text(readme)
    if not text.lstrip().startswith("---"):
        return None
    if not REGEX_YAML_BLOCK.search(text):
        raise ValueError(f"{readme}: metadata begin with --- and do not end, allowed: YAML between two lines of ---")
    try:
        return text if ModelCard(text).data.to_dict() else None
    except Exception as error:  # of the YAML reader, or of values that are not what the Hub's library expects
        raise ValueError(f"{readme}: not the metadata of a model card ({_line(error)})") from None


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8") from None


# ---- over the network --------------------------------------------------------------------------------------------


def make_repository(repository: str, *, private: bool = False, branch: str = MAIN) -> None:
    """Make a repository and a branch of it, if they are not there; either way the token may write to it then.

    Raises:
        ValueError: for a name that does not do, or if the repository is to be private and is public: that can be
            changed in its settings alone.
        PermissionError: without token, or if the Hub rejects it or does not let it write there.
        ConnectionError: if the Hub is not reached.
        RuntimeError: for an error of the Hub's.
    """
    check_repository(repository)
    token = hub_token()
    api = HfApi(token=token)
    with _plain_errors(repository, token):
        api.create_repo(repository, private=private or None, exist_ok=True)
        is_public = not api.model_info(repository).private
    if private and is_public:
        raise ValueError(f"{repository} is public, allowed with private: a new repository, or a private one")
    with _plain_errors(repository, token):
        try:
            # The library's `exist_ok` also passes over a branch that is there and may not be written to.
            api.create_branch(repository, branch=branch)
        except HfHubHTTPError as error:
            if error.response.status_code != 409:
                raise


def upload(
    staging: Staging,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
) -> Pushed:
    """Make the repository, if it is not there, and a commit of all staged files that it does not have.

    Args:
        staging: what `staged` gives.
        repository: OWNER/NAME.
        private: whether a new repository is (otherwise public, or as its owner chose for new ones).
        revision: the branch, made if it is not there.
        message: of the commit.

    Raises:
        ValueError: for a card that the Hub refuses, and as `make_repository`.
        PermissionError: as `make_repository`; one of the commit says what has become of the repository.
        ConnectionError: in the same way.
        RuntimeError: in the same way.
    """
    check_repository(repository)
    token, branch = hub_token(), revision or MAIN
    with _plain_errors(repository, token):
        ModelCard(_text(staging.folder / CARD)).validate()
    make_repository(repository, private=private, branch=branch)
    api = HfApi(token=token)
    with _plain_errors(repository, token):
        before = api.model_info(repository, revision=branch).sha
    try:
        commit = api.create_commit(
            repository,
            [CommitOperationAdd(name, staging.folder / name) for name in staging.sizes],
            commit_message=message or f"Upload {staging.model} with modeling-encodec",
            revision=branch,
        )
    except Exception as error:  # whatever it is, it is told with what has become of the repository
        plain = _plain(error, repository, token)
        raise type(plain)(f"{plain}; {_state(api, repository, branch, before)}") from None
    return Pushed(commit.commit_url, commit.oid != before)


def _state(api: HfApi, repository: str, branch: str, before: str) -> str:
    """What a commit that failed has left. An answer that is lost may have been that of a commit made."""
    try:
        now = api.model_info(repository, revision=branch).sha
    except Exception:  # the error that led here is the one to be told
        return f"whether {repository} was changed is not known: push again"
    if now == before:
        return f"no file of {repository} was changed"
    return f"{repository} has a new commit, {now[:12]}, all the same: push again to be sure"


@contextmanager
def _plain_errors(repository: str, token: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # all of them: any message may quote a request
        raise _plain(error, repository, token) from None


def _plain(error: BaseException, repository: str, token: str) -> Exception:
    """An exception of one line without the token, for one of the Hub's library or of the network."""
    while not isinstance(error, HTTPError) and error.__cause__ is not None:
        error = error.__cause__
    hub = HfApi().endpoint
    if not isinstance(error, HfHubHTTPError):
        if isinstance(error, (HTTPError, OSError)):
            return ConnectionError(f"no answer from {hub}: {_line(error, token)}")
        return (ValueError if isinstance(error, ValueError) else RuntimeError)(f"{hub}: {_line(error, token)}")
    status = error.response.status_code
    said = f": {_line(error.server_message, token)}" if error.server_message else ""
    if status == 401:
        return PermissionError(f"{hub} rejects the token (401{said}): `hf auth login`, or another HF_TOKEN")
    if status == 403:
        return PermissionError(f"{repository}: the token may not write there (403{said})")
    if status == 404:
        return ValueError(f"{repository}: not there, or not for this token (404{said})")
    return (ValueError if status == 400 else RuntimeError)(f"{hub} answers {status} for {repository}{said}")


def _line(text, token: str | None = None) -> str:
    """One line, not too long, and without the token."""
    line = " ".join(str(text).split()) or type(text).__name__
    return (line.replace(token, "(token)") if token else line)[:300]
