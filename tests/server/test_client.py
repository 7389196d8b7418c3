"""`from assent import ...`, against the real server."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from assent import Alignment, AsyncClient, Client, Judge, JudgeOptions, load_proxy
from assent.results import AlignmentReport, Answer, AssentError, Ranking
from tests.server.conftest import (
    ADMIN_KEY,
    API_KEY,
    DEMO,
    LIMITED_KEY,
    ROUNDING,
    WAIT_SECONDS,
    FeedbackServer,
    Server,
)

PROMPT = "How do I look after my kettle?"
TRACED = Alignment(proxy="aligned", trace=True)


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Client]:
    with Client(server.url, api_key=API_KEY, timeout=WAIT_SECONDS) as client:
        yield client


@pytest.fixture(scope="module")
def admin(server: Server) -> Iterator[Client]:
    with Client(f"{server.url}/v1/", api_key=ADMIN_KEY, timeout=WAIT_SECONDS) as client:
        yield client


def ask(client: Client, alignment: Alignment | None = TRACED, **parameters: object) -> Answer:
    return client.chat(PROMPT, alignment=alignment, seed=3, max_tokens=24, **parameters)


def report_of(answer: Answer) -> AlignmentReport:
    assert answer.alignment is not None
    return answer.alignment


def ranking_of(answer: Answer) -> Ranking:
    ranking = report_of(answer).ranking
    assert ranking is not None
    return ranking


def test_chat_reports_what_the_proxy_did(client: Client) -> None:
    answer = ask(client)
    report, trace = report_of(answer), answer.choices[0].trace
    assert (report.proxy, report.trace_truncated) == ("aligned", False)
    assert report.rejected == sum(len(entry.rejected) for entry in trace) > 0
    assert report.proposed == (report.accepted or 0) + report.rejected
    assert all(0 < candidate.probability <= 1 for entry in trace for candidate in entry.rejected)
    assert "".join(entry.token for entry in trace).startswith(answer.text)
    assert answer.usage == answer.raw["usage"] and answer.id.startswith("chatcmpl")


def test_without_alignment_there_is_no_report(client: Client) -> None:
    answer = ask(client, None)
    assert answer.alignment is None and answer.choices[0].trace == ()
    assert ask(client, Alignment()).text == answer.text
    by_name = ask(client, None, model="assent-demo:aligned")
    assert by_name.text == ask(client).text != answer.text


def test_a_stream_is_the_same_answer_in_pieces(client: Client) -> None:
    whole = ask(client, n=2)
    stream = client.stream(
        PROMPT, alignment=TRACED, seed=3, max_tokens=24, n=2, stream_options={"include_usage": True}
    )
    pieces = list(stream)
    for index, choice in enumerate(whole.choices):
        parts = [piece for piece in pieces if piece.index == index]
        streamed = stream.answer.choices[index]
        assert streamed.text == choice.text == "".join(piece.text for piece in parts)
        assert streamed.trace == sum((piece.trace for piece in parts), ())
        # Probabilities depend on what else is in the batch: they are rounded to bfloat16.
        assert [entry.token_id for entry in streamed.trace] == [
            entry.token_id for entry in choice.trace
        ]
        assert streamed.finish_reason == choice.finish_reason
    report, told = report_of(stream.answer), report_of(whole)
    assert (report.rejected, report.version) == (told.rejected, told.version)
    usages = (each.usage or {} for each in (stream.answer, whole))
    assert len({usage["completion_tokens"] for usage in usages}) == 1


def test_best_of_streams_its_progress(client: Client) -> None:
    judge = JudgeOptions(strategy="round-robin", principles=["overall"])
    alignment = Alignment(best_of=3, judge=judge)
    whole = ask(client, alignment)
    ranking = ranking_of(whole)
    assert sorted(ranking.ranking) == [0, 1, 2] and ranking.strategy == "round-robin"
    stream = client.stream(PROMPT, alignment=alignment, seed=3, max_tokens=24)
    stages = [piece.progress["stage"] for piece in stream if piece.progress]
    assert stages.count("sampling") == 3 and "judging" in stages
    assert stream.answer.text == whole.text
    assert ranking_of(stream.answer).ranking == ranking.ranking


def test_judge_and_rank(client: Client) -> None:
    responses = ["Happy to help. Descale it.", "Go away.", "Happy to help. Descale it."]
    verdict = client.judge(PROMPT, *responses[:2], rationale=True, max_rationale_tokens=8)
    assert verdict.probability == pytest.approx(sum(verdict.orders) / 2)
    assert verdict.winner in ("a", "b", "tie")
    assert verdict.principles["overall"].rationale
    turns = [{"role": "user", "content": PROMPT}]
    assert client.judge(turns, *responses[:2]).orders == pytest.approx(verdict.orders, abs=ROUNDING)
    assert client.judge(PROMPT, responses[0], responses[2]).winner == "tie"
    ranking = client.rank(PROMPT, responses, strategy="round-robin", seed=1)
    assert ranking.winner == ranking.ranking[0] and len(ranking.rounds[0]) == 3


def test_proxies_are_loaded_listed_and_unloaded(admin: Client) -> None:
    loaded = admin.load_proxy("of-client", "v1")
    try:
        assert loaded.state == "serving" and "assent-demo:of-client" in admin.models()
        assert loaded.version in {proxy.version for proxy in admin.proxies()}
    finally:
        assert admin.unload_proxy("of-client").name == "of-client"
    shadow = admin.load_proxy("of-client", "v1", shadow=True)
    assert admin.unload_proxy("of-client", shadow.version).state == "unloaded"


def test_feedback(feedback_server: FeedbackServer) -> None:
    with Client(feedback_server.url, api_key=API_KEY, timeout=WAIT_SECONDS) as client:
        answer = client.chat(PROMPT, n=2, max_tokens=16, seed=1)
        client.feedback(answer.id, 1)
        client.feedback(prompt=PROMPT, response_a="Yes.", response_b="No.", better="b")
        with pytest.raises(AssentError, match="no answer is known by the id 'none'") as caught:
            client.feedback("none", 1)
        assert caught.value.status == 404


@pytest.mark.parametrize(
    ("call", "status", "message"),
    [
        (lambda c: c.chat("x", alignment=Alignment(proxy="nope")), 404, "'nope' is not loaded"),
        (lambda c: c.judge("x", "a", "b", tie_band=9), 400, "tie_band"),
        (lambda c: c.load_proxy("mine", "v1"), 403, "administrator"),
        (lambda c: list(c.stream("x", alignment=Alignment(strength=99))), 400, "strength"),
        (lambda c: c.unload_proxy("no such/name"), 403, "administrator"),
        (lambda c: c.chat("x", n=-1), 400, "n must be at least 1"),
    ],
)
def test_what_the_server_refuses_is_one_error_with_its_message(
    client: Client, call, status, message
) -> None:
    with pytest.raises(AssentError, match=message) as caught:
        call(client)
    assert caught.value.status == status


def test_keys_and_addresses(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASSENT_API_KEY", raising=False)
    with Client(server.url) as client, pytest.raises(AssentError) as caught:
        client.chat("x")
    assert caught.value.status == 401
    monkeypatch.setenv("ASSENT_API_KEY", LIMITED_KEY)
    with Client(server.url) as client:
        assert client.models()
    with Client("http://127.0.0.1:9") as client, pytest.raises(AssentError, match="no answer"):
        client.models()
    with Client(server.url) as client, pytest.raises(AssentError, match="was not read"):
        _ = client.stream("x").answer


def test_the_asynchronous_client_does_the_same(server: Server, client: Client) -> None:
    async def run() -> None:
        async with AsyncClient(server.url, api_key=API_KEY, timeout=WAIT_SECONDS) as other:
            answers = await asyncio.gather(
                *(other.chat(PROMPT, seed=seed, max_tokens=8) for seed in (1, 2))
            )
            assert len({answer.text for answer in answers}) == 2
            stream = other.stream(PROMPT, alignment=TRACED, seed=3, max_tokens=24)
            assert isinstance(aiter(stream), AsyncIterator)
            text = "".join([piece.text async for piece in stream])
            assert text == stream.answer.text == ask(client).text
            assert (await other.judge(PROMPT, "Yes.", "Go away.")).principles
            with pytest.raises(AssentError, match="'nope' is not loaded"):
                await other.chat("x", alignment=Alignment(proxy="nope"))
            with pytest.raises(AssentError, match="strength"):
                _ = [p async for p in other.stream("x", alignment=Alignment(strength=99))]

    asyncio.run(run())


def test_both_clients_have_the_same_methods() -> None:
    def methods(kind: type) -> dict[str, list[str]]:
        found = inspect.getmembers(kind, inspect.isfunction)
        return {n: [*inspect.signature(f).parameters] for n, f in found if not n.startswith("_")}

    assert methods(Client) == methods(AsyncClient)
    assert methods(Client)["judge"][:4] == ["self", "prompt", "response_a", "response_b"]


def test_a_proxy_on_a_model_in_this_process_says_what_the_server_says(client: Client) -> None:
    model = str(DEMO / "model")
    local = load_proxy(DEMO / "proxies" / "aligned", model)
    answer = ask(client)
    assert local.version == report_of(answer).version
    assert local.generate(PROMPT, seed=3, max_new_tokens=24) == [answer.text]
    assert local.generate(PROMPT, seed=3, max_new_tokens=24, strength=0) != [answer.text]
    assert len(set(local.generate(PROMPT, n=3, max_new_tokens=24))) > 1

    trace = answer.choices[0].trace
    first = {candidate.token_id: candidate for candidate in local.candidates(PROMPT)}
    for told in (trace[0], *trace[0].rejected):
        mine = first[told.token_id]
        assert mine.token == told.token
        assert mine.probability == pytest.approx(told.probability, abs=ROUNDING)
        assert mine.accept_probability == pytest.approx(told.accept_probability, abs=ROUNDING)
    next_ids = {candidate.token_id for candidate in local.candidates(PROMPT, trace[0].token)}
    assert trace[1].token_id in next_ids

    good, bad = local.scores(PROMPT, [answer.text, "Go away."])
    assert good > bad


def test_a_judge_in_this_process_says_what_the_server_says(client: Client) -> None:
    local = Judge(str(DEMO / "model"))
    pair = "Happy to help. Descale it.", "Go away."
    mine, told = local.compare(PROMPT, *pair), client.judge(PROMPT, *pair)
    assert mine.mean.orders == pytest.approx(told.orders, abs=ROUNDING)
    responses = ["Yes.", "No.", "Go away.", "Descale it."]
    record = local.rank(PROMPT, responses, seed=5, strategy="final-four")
    assert record.ranking == client.rank(PROMPT, responses, seed=5, strategy="final-four").ranking


def test_a_proxy_for_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        load_proxy(tmp_path, str(DEMO / "model"))
