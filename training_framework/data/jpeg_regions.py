"""Decode a region of a JPEG without the rest.

A baseline JPEG is one stream of variable-length codes, so everything before a pixel has to be read.
Still, two parts can be skipped (ITU-T T.81, sections B.2 and F.2):

- Rows below the region: lower the height in the header, and the decoder stops there.
- If the stream has restart markers, at which a decoder starts afresh (`data pack` writes them):
  every segment outside the region. The remaining segments make a smaller JPEG, with its own size in
  the header and renumbered markers.

Either way libjpeg-turbo reads an ordinary JPEG, and the pixels equal those of the whole image.
"""

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray

__all__ = ["Box", "Region", "decode_region"]

_START_OF_IMAGE = b"\xff\xd8"
_END_OF_IMAGE = b"\xff\xd9"
_SEQUENTIAL_FRAMES = (0xC0, 0xC1)  # Huffman-coded; 0xC1 only with 8 bits per sample
_START_OF_SCAN = 0xDA
_RESTART_INTERVAL = 0xDD
# The warning about the data below the lowered height, up to the next marker.
_UNREAD_ROWS = re.compile(r"extraneous bytes before marker 0xd[0-79]\b")


class Box(NamedTuple):
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


class Region(NamedTuple):
    """A decoded region of an image.

    Attributes:
        pixels: (H, W, 3) uint8 RGB, scaled.
        top: Rows above the region in the whole image, at the scale of `pixels`.
        left: Columns to the left of it.
    """

    pixels: NDArray[np.uint8]
    top: int
    left: int


class _Frame(NamedTuple):
    """Fields of the header; sizes in pixels, positions in bytes from the start of the file."""

    height: int
    width: int
    size_position: int
    unit_height: int
    unit_width: int
    is_subsampled: bool
    restart_interval: int
    scan_position: int


def decode_region(data: bytes, box: Box, *, factor: int) -> Region | None:
    """Decode a JPEG around a rectangle, at 1/`factor` of its size.

    Args:
        data: The file's bytes.
        box: The rectangle, in the whole image.
        factor: 1, 2, 4 or 8.

    Returns:
        A region with at least the rectangle (every scaled pixel that touches it), equal to that
        part of the whole image; None if this is impossible (another kind of JPEG, or a damaged one)
        or would save nothing.
    """
    frame = _read_frame(data)
    if frame is None:
        return None
    # Smooth chroma upsampling also reads the next sample on either side, and scaled pixels may
    # cross the edges of the rectangle.
    margin = int(frame.is_subsampled) if factor == 1 else 2 * factor
    bottom = min(box.top + box.height + margin, frame.height)
    right = min(box.left + box.width + margin, frame.width)
    if frame.restart_interval:
        rows, columns = (max(0, box.top - margin), bottom), (max(0, box.left - margin), right)
        region = _decode_segments(data, frame, rows, columns, factor)
        if region is not None:
            return region
    return _decode_upper_rows(data, frame, bottom, factor)


def _read_frame(data: bytes) -> _Frame | None:
    """The header of an 8-bit JPEG, gray or of three components, in one Huffman-coded scan."""
    restart_interval = size_position = height = width = position = 0
    samplings: list[tuple[int, int]] = []
    try:
        for marker, position in _segments(data):
            if marker in _SEQUENTIAL_FRAMES:
                bits, height, width, count = struct.unpack_from(">BHHB", data, position + 4)
                size_position = position + 5
                packed = [data[position + 11 + 3 * index] for index in range(count)]
                samplings = [(value >> 4, value & 15) for value in packed]
                if bits != 8 or count not in (1, 3) or not height or not width:
                    return None
            elif marker == _RESTART_INTERVAL:
                (restart_interval,) = struct.unpack_from(">H", data, position + 4)
        (scan_header,) = struct.unpack_from(">H", data, position + 2)
        if not samplings or data[position + 4] != len(samplings):
            return None  # another kind of frame, or one scan per component
    except (struct.error, IndexError):
        return None
    if len(samplings) == 1:  # then a unit is one block, whatever the sampling factors
        samplings = [(1, 1)]
    across, down = (max(factors) for factors in zip(*samplings, strict=True))
    return _Frame(
        height=height,
        width=width,
        size_position=size_position,
        unit_height=8 * down,
        unit_width=8 * across,
        is_subsampled=len(set(samplings)) > 1,
        restart_interval=restart_interval,
        scan_position=position + 2 + scan_header,
    )


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """The header's segments: marker and position of each, up to the start of the first scan."""
    position, marker = len(_START_OF_IMAGE), 0
    while marker != _START_OF_SCAN:
        prefix, marker, length = struct.unpack_from(">BBH", data, position)
        if prefix != 0xFF:
            raise IndexError("no marker")
        yield marker, position
        position += 2 + length


def _decode_upper_rows(data: bytes, frame: _Frame, bottom: int, factor: int) -> Region | None:
    if bottom == frame.height:
        return None
    cut = bytearray(data)
    struct.pack_into(">H", cut, frame.size_position, bottom)
    size = _scaled(bottom, factor), _scaled(frame.width, factor)
    pixels = np.empty((*size, 3), dtype=np.uint8)
    try:
        simplejpeg.decode_jpeg(cut, min_height=size[0], min_width=size[1], buffer=pixels)
    except ValueError as error:
        # By then the pixels are decoded, and the error is the decoder's first complaint: one about
        # the rows that were read, or about a missing end of the file, would have come before it.
        if not _UNREAD_ROWS.search(str(error)):
            return None
    return Region(pixels, 0, 0)


def _decode_segments(
    data: bytes,
    frame: _Frame,
    rows: tuple[int, int],
    columns: tuple[int, int],
    factor: int,
) -> Region | None:
    """Keep the segments between restart markers that contain any of these rows and columns."""
    interval = frame.restart_interval
    units_across = -(-frame.width // frame.unit_width)
    if units_across % interval and interval % units_across:
        return None  # a segment would extend into the next row, at another width
    segments_across = max(1, units_across // interval)
    segment_width = min(interval, units_across) * frame.unit_width
    segment_height = max(1, interval // units_across) * frame.unit_height
    first_row, last_row = rows[0] // segment_height, -(-rows[1] // segment_height)
    first, last = columns[0] // segment_width, -(-columns[1] // segment_width)
    spans = _segment_spans(data, frame, -(-frame.height // segment_height) * segments_across)
    if spans is None:
        return None
    kept = spans.reshape(-1, segments_across, 2)[first_row:last_row, first:last]
    top, left = first_row * segment_height, first * segment_width
    height = min(last_row * segment_height, frame.height) - top
    width = min(last * segment_width, frame.width) - left
    small = _joined(data, frame, kept, height, width)
    try:
        pixels = simplejpeg.decode_jpeg(
            small, min_height=_scaled(height, factor), min_width=_scaled(width, factor)
        )
    except ValueError:
        return None
    return Region(pixels, top // factor, left // factor)


def _segment_spans(data: bytes, frame: _Frame, count: int) -> NDArray[np.int64] | None:
    """Start and end of each segment: (count, 2); None if markers are missing."""
    scan = np.frombuffer(data, dtype=np.uint8, offset=frame.scan_position)
    prefixes = np.flatnonzero(scan[:-1] == 0xFF)
    markers = prefixes[scan[prefixes + 1] & 0xF8 == 0xD0] + frame.scan_position
    end = data.rfind(_END_OF_IMAGE)
    if len(markers) != count - 1 or end < (markers[-1] if count > 1 else frame.scan_position):
        return None
    spans = np.empty((count, 2), dtype=np.int64)
    spans[0, 0], spans[-1, 1] = frame.scan_position, end
    spans[1:, 0], spans[:-1, 1] = markers + 2, markers
    return spans


def _joined(
    data: bytes, frame: _Frame, kept: NDArray[np.int64], height: int, width: int
) -> bytearray:
    """A JPEG of the segments `kept`, shape (rows, segments of a row, 2)."""
    parts = [data[: frame.scan_position]]
    for start, end in zip(kept[:, 0, 0].tolist(), kept[:, -1, 1].tolist(), strict=True):
        parts += (data[start:end], _END_OF_IMAGE)
    joined = bytearray(b"".join(parts))
    struct.pack_into(">HH", joined, frame.size_position, height, width)
    ends = frame.scan_position + np.cumsum(kept[:, :, 1] - kept[:, :, 0] + 2)[:-1]
    numbers = np.arange(len(ends)) % 8
    # Including the ends of rows of segments, where the whole image has a marker further on.
    view = np.frombuffer(joined, dtype=np.uint8)
    view[ends - 1] = 0xD0 + numbers
    return joined


def _scaled(pixels: int, factor: int) -> int:
    return -(-pixels // factor)
