"""Text files as documents, by split."""

from raysubset.config import DataConfig
from raysubset.data.files import describe_files, opened
from raysubset.data.finding import TEXT_SUFFIXES, find_files
from raysubset.data.layout import some
from raysubset.data.split import SplitName
from raysubset.events import Note

_BOM = b"\xef\xbb\xbf"


def read_texts(config: DataConfig) -> tuple[dict[SplitName, list[str]], tuple[Note, ...]]:
    """Read the text files that a path stands for, a document each, and notes on which they are.

    A path of a file is read whatever its suffix; of a folder, the .txt files.

    Raises:
        ValueError: if nothing readable is there, or a file is not UTF-8, with the place.
    """
    files = find_files(config)
    if files.kind != "texts" and [*files.listed] != [""]:
        members = [member.path for members in files.layout.values() for member in members]
        raise ValueError(
            f"{config.name} holds {files.kind} ({some(members)}), and text is read from {', '.join(TEXT_SUFFIXES)} "
            "files: give data.name a folder of those, or leave the others out with --data.ignored"
        )
    texts: dict[SplitName, list[str]] = {}
    notes: list[Note] = []
    for split, members in files.layout.items():
        texts[split] = []
        for member in members:
            path = files.full_path(member)
            with opened(files.system, path) as file:
                texts[split].append(_decoded(file.read(), path))
        num = sum(map(len, texts[split]))
        notes.append(Note(f"{split} split: {num} characters of {describe_files(files, members)}"))
    return texts, (*notes, *files.notes)


def _decoded(data: bytes, path: str) -> str:
    data = data.removeprefix(_BOM)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"byte {error.start} of {path}, in line {line}, is not UTF-8 (0x{data[error.start]:02x}): write it as UTF-8"
        ) from error
