"""What file names tell, and a look at headers: which files are of which case and channel."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from pathlib import Path

from volseg.errors import DataError
from volseg.images import IMAGE_SUFFIXES, read_header

_CHANNEL = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")


def split_suffix(name: str) -> tuple[str, str]:
    """Split a file name into its stem and its image suffix, empty for any other file.

    >>> split_suffix("case_1.5mm.nii.gz")
    ('case_1.5mm', '.nii.gz')
    """
    suffix = next((known for known in IMAGE_SUFFIXES if name.lower().endswith(known)), "")
    return name[: len(name) - len(suffix)], name[len(name) - len(suffix) :]


def list_images(folder: Path, suffix: str | None = None) -> dict[str, Path]:
    """Image files in `folder` by stem, sorted; hidden files (macOS writes ``._*``) left out.

    Args:
        folder: not searched below.
        suffix: only files with this ending; by default every image format.

    Raises:
        DataError: two files have the same stem.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        stem, ending = split_suffix(path.name)
        if suffix is not None:
            stem, ending = path.name.removesuffix(suffix), suffix * path.name.endswith(suffix)
        if not ending or path.name.startswith("."):
            continue
        if stem in found:
            raise DataError(
                f"{found[stem]} and {path.name} have the same stem; expected one file for each. "
                "Remove one."
            )
        found[stem] = path
    return found


def group_channels(files: Mapping[str, Path]) -> dict[str, dict[int, Path]]:
    """Files named ``CASE_0000``, ``CASE_0001``, ... by case and by channel number.

    Raises:
        DataError: a file without channel number.
    """
    groups: dict[str, dict[int, Path]] = {}
    for stem, path in files.items():
        match = _CHANNEL.fullmatch(stem)
        if match is None:
            raise DataError(
                f"{path} has no channel number; expected a name such as "
                f"{stem}_0000{split_suffix(path.name)[1]}. Rename the file."
            )
        groups.setdefault(match["case"], {})[int(match["channel"])] = path
    return groups


def order_channels(
    case_id: str,
    found: Mapping[int, Path],
    channels: Sequence[str],
    folder: Path,
    suffix: str,
    optional: Container[str] = (),
) -> tuple[Path | None, ...]:
    """One file per channel, in the order of `channels`; None for one that is not there.

    Or the one file that holds all of them, as nnU-Net has it for coloured pictures.

    Args:
        case_id: for the message.
        found: file of each channel number.
        channels: channel names.
        folder: where a missing file is expected.
        suffix: its ending.
        optional: names of the channels that may be missing, but not all of them.

    Raises:
        DataError: a channel is missing, or there are more than declared.
    """
    may_be_alone = all(name in optional for name in channels[1:])
    if found.keys() == {0} and holds_all(found[0], len(channels), unless_read=not may_be_alone):
        return (found[0],)
    for number, name in enumerate(channels):
        if number not in found and (not found or name not in optional):
            raise DataError(
                f"case '{case_id}' has no image of channel {number} ({name}); expected "
                f"{folder / case_id}_{number:04d}{suffix}. {cure_absence(name)}"
            )
    if len(found) > len(channels):
        raise DataError(
            f"case '{case_id}': {found[max(found)]} is of channel {max(found)}; expected only "
            f"{len(channels)} channels ({', '.join(channels)}). Declare the channel or remove it."
        )
    return tuple(found.get(number) for number in range(len(channels)))


def holds_all(path: Path, num_channels: int, unless_read: bool = True) -> bool:
    """Whether a file has all channels, by its header.

    Args:
        path: the file.
        num_channels: of a case.
        unless_read: the answer where it cannot be read, as is told of its case later.
    """
    try:
        return num_channels > 1 and read_header(path)[1] == num_channels
    except (DataError, OSError):
        return unless_read


def cure_absence(channel: str) -> str:
    """What to do where a case lacks a channel."""
    return (
        "Add the file, remove the case, or train a network that can do without: "
        f'--set "data.optional_channels=[{channel}]".'
    )
