"""Finds the picture in the body of a request: a multipart form or the bytes themselves."""

from __future__ import annotations

import re

IMAGE_FIELD = "image"
MAX_PARTS = 1000
_BOUNDARY = re.compile(r';\s*boundary=(?:"([^"]{1,200})"|([^\s;"]{1,200}))', re.IGNORECASE)
_PARAMETER = re.compile(
    rb';\s*(name|filename)\*?=(?:"((?:[^"\\]|\\.)*)"|([^\s;"]*))', re.IGNORECASE
)


class BadUpload(Exception):
    """The body holds no picture where one is expected; the text says what was found."""


def find_image(content_type: str, body: bytes) -> bytes:
    """Return the uploaded file: multipart field ``image``, or else the whole body.

    Args:
        content_type: The header as sent; multipart/form-data makes the body a form (RFC 7578).
        body: The whole body.

    Raises:
        BadUpload: There is no such file, or more than one.
    """
    if content_type.partition(";")[0].strip().lower() != "multipart/form-data":
        if not body:
            raise BadUpload("no image: send it as multipart field 'image' or as the body")
        return body
    found: list[str] = []
    images: list[bytes] = []
    for name, is_file, content in _parts(content_type, body):
        found.append(name)
        if is_file and name == IMAGE_FIELD:
            images.append(content)
    if len(images) == 1:
        return images[0]
    if images:
        raise BadUpload(f"{len(images)} fields named 'image': send one image a request")
    names = ", ".join(repr(name[:40]) for name in found[:5])
    raise BadUpload(f"no file in multipart field 'image' (fields found: {names or 'none'})")


def _parts(content_type: str, body: bytes) -> list[tuple[str, bool, bytes]]:
    """Return (field, whether it is a file, content) of each part of a form."""
    match = _BOUNDARY.search(content_type)
    if match is None:
        return []
    opening = b"--" + (match[1] or match[2]).encode("latin-1")
    delimiter = b"\r\n" + opening
    if body.startswith(opening):
        position = len(opening)
    else:
        position = body.find(delimiter) + len(delimiter)
        if position < len(delimiter):
            return []
    parts: list[tuple[str, bool, bytes]] = []
    while not body.startswith(b"--", position):
        end = body.find(delimiter, position)
        head_end = body.find(b"\r\n\r\n", position, end)
        if end < 0 or head_end < 0:
            raise BadUpload("the multipart form is cut off or damaged; send it whole")
        if len(parts) == MAX_PARTS:
            raise BadUpload(f"more than {MAX_PARTS} fields: send one image a request")
        name, is_file = _disposition(body[position:head_end])
        parts.append((name, is_file, body[head_end + 4 : end]))
        position = end + len(delimiter)
    return parts


def _disposition(head: bytes) -> tuple[str, bool]:
    """Return the field's name and whether a file name is given, from the headers of a part."""
    for line in head.split(b"\r\n"):
        label, _, value = line.partition(b":")
        if label.strip().lower() == b"content-disposition":
            parameters = {
                found[1].lower(): found[2] if found[2] is not None else found[3]
                for found in _PARAMETER.finditer(value)
            }
            return parameters.get(b"name", b"").decode(
                "utf-8", "replace"
            ), b"filename" in parameters
    return "", False
