"""The router alone, in front of servers that know nothing of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from random import Random

import httpx
import pytest
from openai import AsyncOpenAI

from penstock.cluster import Role
from penstock.policy.kv_feed import FeedCounts
from penstock.policy.routing import pairs
from penstock.serve.attached import Attached, parse_address
from penstock.serve.http_server import serve_http
from penstock.serve.prompts import Prompts
from penstock.serve.proxy import Proxy, ProxyOptions
from penstock.serve.upstream import Upstream
from penstock.wire.zmq_events import ZmqEvents
from tests.serve.fake_servers import MODEL, Answer, FakeServer, Switch, listener, publishers
from tests.support import run

LONG = "a prompt of some length that is worth keeping: " * 8
STREAM = "text/event-stream; charset=utf-8"
JSON = {"content-type": "application/json"}


@dataclass
class Front:
    """A router that runs, and a client of it."""

    attached: Attached
    client: httpx.AsyncClient
    url: str
    switches: list[Switch]

    async def wait(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self.attached.wait_change()

    async def complete(self, prompt: object, **fields: object) -> httpx.Response:
        return await self.client.post("/v1/completions", json={"model": MODEL, "prompt": prompt, **fields})

    def indexed(self, server: FakeServer) -> int:
        return self.attached.servers[server.name].indexed_blocks

    def counts(self, server: FakeServer) -> FeedCounts:
        return self.attached.servers[server.name].counts


@asynccontextmanager
async def front(
    servers: Sequence[FakeServer], roles: Sequence[Role] = (), options: ProxyOptions = ProxyOptions(), extra: str = ""
) -> AsyncIterator[Front]:
    """All servers are up, and the router knows."""
    here = listener()
    url = f"http://127.0.0.1:{here.getsockname()[1]}"
    async with AsyncExitStack() as stack:
        switches = [Switch(server) for server in servers]
        for switch in switches:
            await switch.on()
            stack.push_async_callback(switch.off)
        known = [parse_address(server.url + extra) for server in servers]
        upstream = await stack.enter_async_context(Upstream())
        prompts = Prompts(None, upstream)
        given = list(zip(known, roles or ["any"] * len(known), strict=True))
        attached = await stack.enter_async_context(Attached(given, upstream, ZmqEvents, prompts.tokenizes))
        proxy = Proxy(attached, upstream, prompts, pairs.route, Random(1), options)
        await stack.enter_async_context(proxy)
        await stack.enter_async_context(serve_http(proxy, here, lambda: 0.0))
        client = await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=20))
        found = Front(attached, client, url, switches)
        await found.wait(lambda: len(attached.standings()) == len(servers))
        for server in servers:
            if server.publisher is not None:
                await server.publisher.wait_subscriber()
        yield found


def answered_by(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.headers["x-penstock-server"]


# What passes


def test_streams_pass_byte_for_byte() -> None:
    async def main() -> None:
        server = FakeServer()
        async with front([server]) as here:
            response = await here.complete("hello", stream=True)
            assert response.content == b"".join(server.answer.parts)
            assert response.headers["content-type"] == STREAM
            assert server.calls[0].body == {"model": MODEL, "prompt": "hello", "stream": True}

    run(main())


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/completions", {"prompt": [1, 2, 3]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("/v1/embeddings", {"input": "x"}),
    ],
)
def test_answers_pass_byte_for_byte(path: str, body: dict[str, object]) -> None:
    async def main() -> None:
        whole = b'{ "odd":  "spaces", "big": 12345678901234567890123 }'
        server = FakeServer(answer=Answer((whole,), b"application/json", headers=[(b"x-own", b"7")]))
        async with front([server]) as here:
            response = await here.client.post(path, json={"model": MODEL, **body})
            assert response.content == whole
            assert response.headers["x-own"] == "7"
            assert server.calls[0].path == path

    run(main())


def test_the_openai_client_sees_what_the_server_said() -> None:
    def event(text: str) -> bytes:
        choice = f'{{"index":0,"delta":{{"content":"{text}"}},"finish_reason":null}}'
        return f'data: {{"id":"1","object":"chat.completion.chunk","choices":[{choice}]}}\n\n'.encode()

    async def main() -> None:
        server = FakeServer(answer=Answer((event("Hel"), event("lo"), b"data: [DONE]\n\n")))
        async with front([server]) as here, AsyncOpenAI(base_url=f"{here.url}/v1", api_key="theirs") as client:
            stream = await client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "x"}], stream=True
            )
            said = [chunk.choices[0].delta.content async for chunk in stream]
            assert said == ["Hel", "lo"]
            assert server.calls[0].headers["authorization"] == "Bearer theirs"
            assert [model.id async for model in client.models.list()] == [MODEL]

    run(main())


def test_with_a_key_of_its_own_it_keeps_that_to_itself() -> None:
    async def main() -> None:
        server = FakeServer()
        async with front([server], options=ProxyOptions(api_key="ours")) as here:
            assert (await here.complete("x")).status_code == 401
            here.client.headers["authorization"] = "Bearer ours"
            assert answered_by(await here.complete("x")) == server.name
            assert "authorization" not in server.calls[0].headers

    run(main())


def test_what_cannot_be_routed_is_refused() -> None:
    async def main() -> None:
        async with front([FakeServer()]) as here:
            assert (await here.client.post("/v1/completions", content=b"{", headers=JSON)).status_code == 400
            assert (await here.complete("x", model="other")).status_code == 404
            assert (await here.client.get("/v1/completions")).status_code == 405
            assert (await here.client.get("/nothing")).status_code == 404

    run(main())


# Where it goes


def test_a_prefix_goes_to_its_holder() -> None:
    async def main() -> None:
        async with publishers(3) as told:
            servers = [FakeServer(publisher=each) for each in told]
            async with front(servers) as here:
                first = answered_by(await here.complete(LONG))
                holder = next(server for server in servers if server.name == first)
                await here.wait(lambda: here.indexed(holder) == len(LONG) // 4)
                for number in range(6):
                    assert answered_by(await here.complete(f"{LONG} and then {number}")) == first

    run(main())


def test_what_a_server_evicted_does_not_count() -> None:
    async def main() -> None:
        async with publishers(2) as told:
            servers = [FakeServer(publisher=each) for each in told]
            async with front(servers) as here:
                first = answered_by(await here.complete(LONG))
                holder, other = sorted(servers, key=lambda server: server.name != first)
                await here.wait(lambda: here.indexed(holder) > 0)
                for prefix in list(holder.held):
                    await holder.evict(prefix)
                await here.wait(lambda: here.indexed(holder) == 0)
                await other.cache(LONG.encode())
                await here.wait(lambda: here.indexed(other) > 0)
                assert answered_by(await here.complete(LONG + "!")) == other.name

    run(main())


def test_lost_messages_are_asked_for_again() -> None:
    async def main() -> None:
        async with publishers(1) as told:
            server = FakeServer(publisher=told[0])
            async with front([server]) as here:
                await here.complete("aaaa")
                await here.wait(lambda: here.indexed(server) == 1)
                told[0].loses = 2
                await here.complete("bbbb")
                await here.complete("cccc")
                await here.complete("dddd")
                await here.wait(lambda: here.indexed(server) == 4)
                assert here.counts(server).gaps == 1

    run(main())


def test_a_restarted_engine_is_forgotten() -> None:
    async def main() -> None:
        async with publishers(1) as told:
            server = FakeServer(publisher=told[0])
            async with front([server]) as here:
                await here.complete(LONG)
                await here.wait(lambda: here.indexed(server) > 1)
                told[0].begin()
                server.held.clear()
                await server.cache(b"abcd")
                await here.wait(lambda: here.indexed(server) == 1)
                assert here.counts(server).restarts == 1

    run(main())


def test_an_adapter_goes_where_it_is_loaded_and_has_prefixes_of_its_own() -> None:
    async def main() -> None:
        plain, tuned = FakeServer(), FakeServer(adapters=("sql",), running=20)
        async with front([plain, tuned]) as here:
            for _ in range(3):
                assert answered_by(await here.complete("x", model="sql")) == tuned.name
            listed = (await here.client.get("/v1/models")).json()["data"]
            assert [card["id"] for card in listed] == [MODEL, "sql"]

    run(main())


def test_one_of_several_engines_is_asked_for_by_its_rank() -> None:
    async def main() -> None:
        server = FakeServer()
        async with front([server], extra=",rank=0") as here:
            assert answered_by(await here.complete("x")) == f"{server.name}#0"
            assert server.calls[0].headers["x-data-parallel-rank"] == "0"

    run(main())


# What goes wrong


def test_who_is_full_passes_it_on_and_the_last_word_is_the_servers() -> None:
    async def main() -> None:
        busy = Answer((b'{"error":"full"}',), b"application/json", 429, [(b"retry-after", b"7")])
        full, free = FakeServer(answer=busy), FakeServer()
        async with front([full, free]) as here:
            for _ in range(4):
                assert answered_by(await here.complete("x")) == free.name
            free.answer = busy
            response = await here.complete("x")
            assert (response.status_code, response.headers["retry-after"]) == (429, "7")
            assert response.content == busy.parts[0]

    run(main())


def test_the_clients_mistakes_are_the_servers_to_explain() -> None:
    async def main() -> None:
        wrong = Answer((b'{"error":{"message":"no"}}',), b"application/json", 422)
        servers = [FakeServer(answer=wrong), FakeServer(answer=wrong)]
        async with front(servers) as here:
            response = await here.complete("x")
            assert (response.status_code, response.content) == (422, wrong.parts[0])
            assert sum(len(server.calls) for server in servers) == 1

    run(main())


def test_before_its_first_byte_a_request_can_go_elsewhere() -> None:
    async def main() -> None:
        dying, sound = FakeServer(answer=Answer(dies_after=0)), FakeServer()
        async with front([dying, sound]) as here:
            for _ in range(4):
                assert answered_by(await here.complete("x", stream=True)) == sound.name
            sound.answer = Answer(dies_after=0)
            assert (await here.complete("x")).status_code == 502

    run(main())


def test_after_its_first_byte_a_stream_ends_with_an_error_event() -> None:
    async def main() -> None:
        server = FakeServer(answer=Answer(dies_after=1))
        async with front([server]) as here:
            response = await here.complete("x", stream=True)
            assert response.content.startswith(server.answer.parts[0])
            assert b'data: {"error":' in response.content
            assert b"[DONE]" not in response.content

    run(main())


def test_a_client_that_leaves_takes_its_request_along() -> None:
    async def main() -> None:
        server = FakeServer(answer=Answer((b"data: 1\n\n", b"wait")))
        async with front([server]) as here:
            body = {"model": MODEL, "prompt": "x", "stream": True}
            async with here.client.stream("POST", "/v1/completions", json=body) as response:
                await anext(response.aiter_raw())
            await server.hung_up.wait()

    run(main())


def test_servers_die_and_come_back_with_empty_caches() -> None:
    async def main() -> None:
        async with publishers(2) as told:
            dying, other = (FakeServer(publisher=each) for each in told)
            async with front([dying, other]) as here:
                await dying.cache(LONG.encode())
                await here.wait(lambda: here.indexed(dying) > 0)
                assert answered_by(await here.complete(LONG + "?")) == dying.name
                await here.switches[0].off()
                assert answered_by(await here.complete(LONG + "!")) == other.name
                await here.wait(lambda: len(here.attached.standings()) == 1)
                dying.held.clear()
                told[0].begin()
                await here.switches[0].on()
                await here.wait(lambda: len(here.attached.standings()) == 2)
                assert here.attached.servers[dying.name].epoch == 2
                assert here.indexed(dying) == 0
                assert answered_by(await here.complete(LONG + "!")) == other.name

    run(main())


def test_a_server_whose_counters_begin_anew_was_restarted() -> None:
    async def main() -> None:
        server = FakeServer(prompt_tokens=100)
        async with front([server]) as here:
            known = here.attached.servers[server.name]
            known.doubt()
            await here.wait(lambda: known.standing is not None and known.standing.load.prompt_tokens == 100)
            server.prompt_tokens = 3
            known.doubt()
            await here.wait(lambda: known.epoch == 2)

    run(main())


# Prefill and decode


def test_vllm_is_called_twice() -> None:
    async def main() -> None:
        params = {"remote_engine_id": "e", "remote_block_ids": [[1, 2]]}
        prefill, decode = FakeServer(transfer=params), FakeServer(running=1)
        async with front([prefill, decode], ["prefill", "decode"]) as here:
            response = await here.complete(LONG * 20, stream=True, max_tokens=9, stream_options={"include_usage": True})
            assert response.content == b"".join(decode.answer.parts)
            assert response.headers["x-penstock-prefill"] == prefill.name
            (first,), (second,) = prefill.calls, decode.calls
            assert (first.body["max_tokens"], first.body["stream"]) == (1, False)
            assert "stream_options" not in first.body
            assert first.body["kv_transfer_params"]["do_remote_decode"] is True  # type: ignore[index]
            assert second.body == {
                "model": MODEL,
                "prompt": LONG * 20,
                "stream": True,
                "max_tokens": 9,
                "stream_options": {"include_usage": True},
                "kv_transfer_params": params,
            }

    run(main())


def test_where_no_prefill_helps_decode_does_it_alone() -> None:
    async def main() -> None:
        prefill, decode = FakeServer(answer=Answer(dies_after=0)), FakeServer(running=1)
        async with front([prefill, decode], ["prefill", "decode"]) as here:
            response = await here.complete(LONG * 20)
            assert answered_by(response) == decode.name
            assert len(prefill.calls) == 1
            assert "kv_transfer_params" not in decode.calls[0].body
            assert "x-penstock-prefill" not in response.headers

    run(main())


def test_sglang_gets_one_room_at_both() -> None:
    async def main() -> None:
        prefill, decode = FakeServer(kind="sglang"), FakeServer(kind="sglang")
        async with front([prefill, decode], ["prefill", "decode"], extra=",bootstrap=9001") as here:
            response = await here.complete("x", stream=True)
            assert response.content == b"".join(decode.answer.parts)
            (first,), (second,) = prefill.calls, decode.calls
            assert first.body == second.body
            assert (first.body["bootstrap_host"], first.body["bootstrap_port"]) == ("127.0.0.1", 9001)
            assert isinstance(first.body["bootstrap_room"], int)
            await here.complete(["a", "b"])
            assert len(set(prefill.calls[1].body["bootstrap_room"])) == 2  # type: ignore[arg-type]

    run(main())


def test_if_sglangs_prefill_fails_so_does_the_request() -> None:
    async def main() -> None:
        prefill = FakeServer(kind="sglang", answer=Answer((b"{}",), b"application/json", 500))
        decode = FakeServer(kind="sglang", waits_for=prefill.hung_up)
        async with front([prefill, decode], ["prefill", "decode"]) as here:
            response = await here.complete("x", stream=True)
            assert response.status_code == 502
            assert "answers 500 to a prefill" in response.text

    run(main())


def test_another_of_sglangs_prefill_servers_is_tried() -> None:
    async def main() -> None:
        dying = FakeServer(kind="sglang", answer=Answer(dies_after=0))
        sound = FakeServer(kind="sglang")
        decode = FakeServer(kind="sglang", waits_for=sound.called)
        async with front([dying, sound, decode], ["prefill", "prefill", "decode"]) as here:
            here.attached.avoid(sound.name)
            response = await here.complete("x", stream=True)
            assert response.content == b"".join(decode.answer.parts)
            assert response.headers["x-penstock-prefill"] == sound.name
            assert (len(dying.calls), len(sound.calls)) == (1, 1)

    run(main())


def test_without_a_pair_sglang_cannot_serve() -> None:
    async def main() -> None:
        dying = FakeServer(kind="sglang", answer=Answer(dies_after=0))
        decode = FakeServer(kind="sglang", waits_for=asyncio.Event())
        async with front([dying, decode], ["prefill", "decode"]) as here:
            assert (await here.complete("x", stream=True)).status_code == 502
            await here.attached.wait_change()  # it was looked at, and nobody is connecting while it closes
            await here.switches[0].off()
            await here.wait(lambda: len(here.attached.standings()) == 1)
            assert (await here.complete("x")).status_code == 503

    run(main())


# What people see


def test_pages() -> None:
    async def main() -> None:
        async with publishers(1) as told:
            server = FakeServer(publisher=told[0], running=3)
            async with front([server]) as here:
                await here.complete(LONG)
                await here.wait(lambda: here.indexed(server) > 0)
                shown = (await here.client.get("/health")).json()["servers"][server.name]
                assert (shown["up"], shown["kind"], shown["running"]) == (True, "vllm", 3)
                page = (await here.client.get("/metrics")).text
                assert f'penstock_server_up{{worker="{server.name}"}} 1.0' in page
                assert f'penstock_server_answers_total{{worker="{server.name}"}} 1.0' in page
                assert f'penstock_prefix_index_blocks{{worker="{server.name}"}} {len(LONG) // 4}.0' in page

    run(main())
