"""`alignment` in a header, and misspelt, without a server."""

import pytest

from server.alignment_field import check_names, take_header
from server.engine import VLLMValidationError


def test_a_header_takes_the_place_of_the_body():
    body = {"model": "llm"}
    take_header('{"proxy": "a"}', body)
    take_header('{"proxy": "a"}', body)  # the same once more
    assert body == {"model": "llm", "alignment": {"proxy": "a"}}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("proxy=a", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("null", "no JSON object"),
        ('["a"]', "no JSON object"),
        ('{"proxy": "\\ud800"}', "half of a surrogate pair"),
        ('{"proxy": "b"}', "differs from the body's"),
    ],
)
def test_headers_that_are_refused(header, reason):
    with pytest.raises(VLLMValidationError, match=reason):
        take_header(header, {"alignment": {"proxy": "a"}})


@pytest.mark.parametrize(
    "name", ["aligment", "alignement", "alignments", "Alignment", "allignment", "alignmnet"]
)
def test_a_misspelt_name(name):
    with pytest.raises(VLLMValidationError, match="did you mean `alignment`"):
        check_names({name: {}}, takes_best_of=False)


@pytest.mark.parametrize(
    "name",
    ["proxy", "strength", "max_rejections", "trace", "best_of", "judge", "sample_timeout"],
)
def test_a_field_beside_alignment(name):
    body = {"alignment": {}, name: 2}
    with pytest.raises(VLLMValidationError, match=f'"alignment": {{"{name}": 2}}'):
        check_names(body, takes_best_of=False)
    check_names(body | {name: None}, takes_best_of=False)


def test_fields_that_pass():
    body = {"alignment": {}, "assignment": 1, "align": 1, "metadata": {"proxy": "a"}, "tools": []}
    check_names(body | {"best_of": 1, "extra_body": {"top_k": 1}}, takes_best_of=False)
    check_names(body | {"best_of": 5}, takes_best_of=True)
    with pytest.raises(VLLMValidationError, match="extra_body: is an option of a client"):
        check_names({"extra_body": {"alignment": {}}}, takes_best_of=False)
