"""Finding the picture in a request's body, as a form or bare."""

from __future__ import annotations

import pytest
from urllib3 import encode_multipart_formdata

from workloads.inference.upload import BadUpload, find_image

CONTENT = bytes(range(256)) * 40 + b"\r\n--almost a boundary\r\n"


def form(*fields: tuple[str, object]) -> tuple[str, bytes]:
    body, content_type = encode_multipart_formdata(fields)
    return content_type, body


def test_the_file_of_a_form_comes_out_byte_by_byte():
    assert find_image(*form(("image", ("a.jpg", CONTENT)))) == CONTENT
    fields = (("note", "text"), ("image", ("a b;c.jpg", CONTENT)), ("other", ("b", b"x")))
    assert find_image(*form(*fields)) == CONTENT


def test_any_other_body_is_the_picture_itself():
    assert find_image("image/jpeg", CONTENT) == find_image("", CONTENT) == CONTENT


def test_quoted_boundaries_preambles_and_missing_last_line_ends_are_understood():
    body = (
        b"preamble\r\n--b 1\r\ncontent-disposition: form-data; filename=x; name=image\r\n"
        b"Content-Type: image/png\r\n\r\n" + CONTENT + b"\r\n--b 1--"
    )
    assert find_image('Multipart/Form-Data; charset=x; boundary="b 1"', body) == CONTENT


# How a request goes wrong: its content type, its body, and what the refusal says.
REFUSED = {
    "empty": ("", b"", "no image"),
    "other field": (*form(("picture", ("a.jpg", b"x"))), "fields found: 'picture'"),
    "no file": (*form(("image", "text and no file")), "no file in multipart field 'image'"),
    "two files": (*form(("image", ("a", b"x")), ("image", ("b", b"x"))), "2 fields named 'image'"),
    "many fields": (*form(*[("n", "x")] * 1001), "more than 1000 fields"),
    "no boundary named": ("multipart/form-data", b"x", "no file"),
    "boundary missing": ("multipart/form-data; boundary=b", b"no boundary in here", "no file"),
    "cut off": ("multipart/form-data; boundary=b", b"--b\r\nX: y\r\n\r\nbreaks off", "cut off"),
    "headers cut off": (
        "multipart/form-data; boundary=b",
        b"--b\r\nno end of headers\r\n--b--",
        "cut off",
    ),
}


@pytest.mark.parametrize(("content_type", "body", "said"), REFUSED.values(), ids=REFUSED)
def test_a_body_without_one_picture_is_refused_and_says_why(content_type, body, said):
    with pytest.raises(BadUpload, match=said):
        find_image(content_type, body)
