"""What is wrong with an `.ecdc` file: it ends too early, or was made with another model."""

from typing import BinaryIO

from modeling_encodec.models.fingerprints import model_fingerprint
from modeling_encodec.models.inputs_encodec import shown
from modeling_encodec.models.modeling_encodec import EncodecModel


READ_BYTES = 1 << 20


class EcdcError(ValueError):
    """A file that is no valid `.ecdc`, or not for this model."""


def read_exactly(file: BinaryIO, size: int, what: str) -> bytes:
    """`size` bytes, read in pieces, so that a false size costs no more memory than the file has bytes.

    Raises:
        EcdcError: if there are fewer, which it calls the `what`.
    """
    data = bytearray()
    while len(data) < size:
        piece = file.read(min(size - len(data), READ_BYTES))
        if not piece:
            raise EcdcError(f"file ends inside the {what}: {size - len(data)} of {size} bytes are missing")
        data += piece
    return bytes(data)


def check_fingerprint(named: str, theirs: str, model: EncodecModel, other_decoder: bool = False) -> None:
    """Refuse a model that a file, made with the model `named` of the fingerprint `theirs`, was not made with.

    Args:
        named: the model's name in the file.
        theirs: the fingerprint in the file.
        model: the one to read the file with.
        other_decoder: whether a decoder or settings of its own are no matter.

    Raises:
        EcdcError: which names both.
    """
    ours = model_fingerprint(model)
    if ours == theirs or (other_decoder and ours[:8] == theirs[:8]):
        return
    message = f"the file was made with {shown(named)} (fingerprint {theirs}), this model's is {ours}"
    if ours[:8] == theirs[:8]:
        message += f": the same codebooks, another decoder or settings (in {model.dtype}); other_decoder allows that"
    raise EcdcError(message)
