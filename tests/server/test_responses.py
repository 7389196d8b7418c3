"""`alignment` in responses and their streams, through the real `openai` client."""

from typing import Any

ALIGNED = {"alignment": {"proxy": "aligned"}}
OPTIONS: Any = {
    "model": "assent-demo",
    "input": "How do I look after my freezer?",
    "max_output_tokens": 16,
}


def test_a_response_has_alignment(client):
    response: Any = client.responses.create(**OPTIONS, extra_body=ALIGNED)
    counts = response.alignment
    assert counts["proxy"] == "aligned" and len(counts["version"]) == 12
    assert counts["accepted"] + counts["forced"] == response.usage.output_tokens
    assert response.output_text
    by_name = client.responses.create(**OPTIONS | {"model": "assent-demo:aligned"})
    assert by_name.alignment == {key: counts[key] for key in ("proxy", "version")}
    assert not hasattr(client.responses.create(**OPTIONS), "alignment")


def test_a_stream_has_it_in_every_whole_response(client):
    with client.responses.stream(**OPTIONS, extra_body=ALIGNED) as stream:
        events: Any = list(stream)
        final: Any = stream.get_final_response()
    whole = [(e.type, e.response.alignment) for e in events if hasattr(e, "response")]
    named = {key: final.alignment[key] for key in ("proxy", "version")}
    assert whole == [
        ("response.created", named),
        ("response.in_progress", named),
        ("response.completed", final.alignment),
    ]
    counts = final.alignment
    assert counts["accepted"] + counts["forced"] == final.usage.output_tokens
