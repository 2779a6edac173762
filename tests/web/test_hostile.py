"""Hostile traffic: whatever a client sends, it costs a bounded amount and touches nobody else's.

`make test` sends a few thousand requests, `make soak` a hundred thousand to each adapter and grid.
"""

from __future__ import annotations

import asyncio
import base64
import gc
import logging
import os
import random
import sys
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from hashlib import sha256
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import pytest

import gridsession
from gridsession.grids.contract import Claim, Missing
from gridsession.grids.memory import MemoryGrid
from gridsession.identity import HANDLE_BYTES, ID_BYTES, SECRET_BYTES, new_id, rotated_id
from gridsession.testing import ManualClock
from gridsession.web.types import ASGIApp, Message, Receive, Scope, Send
from tests.provider.harness import (
    Spy,
    data_of,
    identity_of,
    in_loop,
    is_free,
    provider_on,
    run,
    stored,
    until,
)
from tests.web.driver import FRAMEWORKS, Asked, Browser, Reply, browsing, plain

ALL = pytest.mark.parametrize("framework", FRAMEWORKS)
SHORT, LONG = 1_000, 100_000  # requests, for each adapter and grid
CACHED = 600  # more than any cache of ours keeps
KEPT_BYTES = 8 * 1024  # that may be left of 166 requests
KEPT_RSS = 4 << 20  # the same of 16,666, as the operating system counts
SRC = str(Path(gridsession.__file__).parent)

Headers = list[tuple[bytes, bytes]]


def cookie(value: str | bytes, name: bytes = b"session") -> tuple[bytes, bytes]:
    return (b"cookie", name + b"=" + (value.encode() if isinstance(value, str) else value))


# -- what is sent -------------------------------------------------------------------------------


def malformed(chance: random.Random, session_id: str) -> Headers:
    """A cookie that cannot be a session id, made of one that is."""
    raw = base64.urlsafe_b64decode(session_id)
    where, byte = chance.randrange(64), bytes([chance.choice(b'\x00\n\r\t "%+/=,.~\x7f\x80\xff')])
    broken = session_id.encode()[:where] + byte + session_id.encode()[where + 1 :]
    values: list[bytes] = [
        b"",
        broken,
        session_id[: chance.randrange(64)].encode(),
        (session_id + session_id[: chance.randrange(1, 64)]).encode(),
        f'"{session_id}"'.encode(),
        f"{session_id} ".encode(),
        f"{session_id}==".encode(),
        f"%{ord(session_id[0]):02x}{session_id[1:]}".encode(),
        raw,
        raw.hex().encode(),
        base64.b85encode(raw),
        chance.randbytes(chance.randrange(200)).replace(b";", b"."),
        "\u0455e\u0455\u0455ion".encode() * 8,
        b"../" * 30,
        b"' OR 1=1 --",
        b"null",
    ]
    return [cookie(chance.choice(values))]


def huge(chance: random.Random, session_id: str) -> Headers:
    """Far more than a session id, of what one is made of."""
    size = chance.choice((1_000, 8_000, 60_000))
    return chance.choice(
        (
            [cookie("A" * size)],
            [cookie(session_id * (size // 64))],
            [(b"cookie", b"; ".join([b"a=b"] * (size // 5)))],
            [(b"cookie", b"; " * (size // 2))],
            [(b"cookie", b";" + b" " * size + b"session")],
            [(b"cookie", b"x" * size)] * 20,
            [cookie("A" * 64, b"session" * (size // 7) + b"_")],
        )
    )


def duplicated(chance: random.Random, session_id: str) -> Headers:
    """Several cookies of the name, in one header or in several."""
    others = [session_id, new_id(chance.randbytes(ID_BYTES)), "", "x", "A" * 1_000]
    both = [session_id, *chance.choices(others, k=chance.choice((1, 2, 50)))]
    chance.shuffle(both)
    if chance.random() < 0.5:
        return [cookie(value) for value in both]
    return [(b"cookie", "; ".join(f"session={value}" for value in both).encode())]


def of_another_name(chance: random.Random, session_id: str) -> Headers:
    """The victim's own session id, under a name that is not the cookie's."""
    names = (b"Session", b"SESSION", b"xsession", b"session2", b"__Host-session", b"session ")
    return [cookie(session_id, chance.choice(names))]


def invented(chance: random.Random, session_id: str) -> Headers:
    """Well-formed, and known to nobody."""
    return [cookie(new_id(chance.randbytes(ID_BYTES)))]


def handle_without_secret(chance: random.Random, session_id: str) -> Headers:
    """The handle of a session that is there, with one of the wrong secrets."""
    raw = base64.urlsafe_b64decode(session_id)
    handle, secret = raw[:HANDLE_BYTES], bytearray(raw[HANDLE_BYTES:])
    secret[chance.randrange(SECRET_BYTES)] ^= 1 << chance.randrange(8)
    wrong = chance.choice((bytes(secret), chance.randbytes(SECRET_BYTES), bytes(SECRET_BYTES)))
    return [cookie(rotated_id(handle, wrong))]


def secret_without_handle(chance: random.Random, session_id: str) -> Headers:
    raw = bytearray(base64.urlsafe_b64decode(session_id))
    raw[chance.randrange(HANDLE_BYTES)] ^= 1 << chance.randrange(8)
    return [cookie(new_id(bytes(raw)))]


Attack = Callable[[random.Random, str], Headers]
COSTS: dict[Attack, list[str]] = {  # in grid calls
    malformed: [],
    huge: [],
    duplicated: [],
    of_another_name: [],
    invented: ["acquire"],
    handle_without_secret: ["acquire"],
    secret_without_handle: ["acquire"],
}


async def read(asked: Asked) -> Reply:
    return Reply(repr(asked.session.get("n")).encode())


async def add(asked: Asked) -> Reply:
    asked.session["n"] = asked.session.get("n", 0) + 1
    return Reply(str(asked.session["n"]).encode())


# -- the traffic --------------------------------------------------------------------------------


async def attack(browser: Browser, grid: Spy, victim: str, requests: int, *, seed: int) -> None:
    """Hostile requests, one after the other: each is a stranger's, and costs what it may."""
    chance = random.Random(seed)
    kinds = list(COSTS)
    for _ in range(requests):
        kind = chance.choice(kinds)
        grid.calls.clear()
        grid.outcomes.clear()
        answer = await browser.start(headers=kind(chance, victim)).answered()
        assert (answer.status, answer.body, answer.error) == (200, b"None", None), kind
        assert answer.set_cookie is None
        # No wait, no release of what was not taken; the victim's own renewal may come in between.
        assert [name for name in grid.calls if name != "renew"] == COSTS[kind], kind
        assert all(type(x) is Missing for name, x in grid.outcomes if name == "acquire")


class Growth:
    """What hostile traffic leaves behind, by the bytes that are held before and after it.

    Args:
        measure: bytes held.
        most: what may be left of a part of the traffic. Of three parts the one that leaves least
            counts: a cache that is filled or a dict that is resized grows once, a leak each time.
    """

    def __init__(self, measure: Callable[[], int], most: int) -> None:
        self._measure = measure
        self._most = most

    async def of(self, traffic: Callable[[int], Awaitable[None]]) -> None:
        """Args: `traffic` sends the nth part."""
        grown = []
        for part in range(3):
            before = self._measure()
            await traffic(part)
            grown.append(self._measure() - before)
        assert min(grown) < self._most, grown


async def withstand(grid: Spy, framework: str, requests: int, growth: Growth) -> None:
    """Hostile traffic while the victim's lock is free, and while the victim holds it."""
    async with browsing(framework, read, grid, execution_timeout=3600) as browser:
        victim = await stored(browser.provider, n=1)

        async def traffic(part: int) -> None:
            await attack(browser, grid, victim, requests // 6, seed=part)

        chance = random.Random(3)
        for _ in range(CACHED):  # whatever is kept of so many, in turn, is kept by then
            await browser.start(headers=invented(chance, victim)).answered()
        await traffic(4)
        await growth.of(traffic)
        assert await is_free(grid, victim)
        async with browser.provider.open(victim) as session:
            await growth.of(traffic)
            session["n"] += 1
        assert await is_free(grid, victim)
        assert await data_of(browser.provider, victim) == {"n": 2}


def traced() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def resident() -> int:
    gc.collect()
    rss: int = psutil.Process().memory_info().rss
    return rss


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Without the lines about duplicated cookies, which pytest would keep, all of them."""
    caplog.set_level(logging.CRITICAL, logger="gridsession")


@pytest.fixture
def tracing() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.usefixtures("quiet", "tracing")
@ALL
def test_hostile_cookies_cost_little_and_touch_nobody(grid: Spy, framework: str) -> None:
    run(withstand(grid, framework, SHORT, Growth(traced, KEPT_BYTES)))


@pytest.mark.soak
@pytest.mark.usefixtures("quiet")
@ALL
def test_a_hundred_thousand_hostile_requests(real_grid: Spy, framework: str) -> None:
    asyncio.run(withstand(real_grid, framework, LONG, Growth(resident, KEPT_RSS)))


@pytest.mark.usefixtures("quiet")
@in_loop
async def test_many_at_once_do_not_stand_in_the_victims_way(grid: Spy) -> None:
    async with browsing("asgi", add, grid) as browser:
        victim = browser.cookie = await stored(browser.provider, n=0)
        chance = random.Random(3)
        async with browser.provider.open(victim) as session:
            browser.cookie = None
            strangers = [
                browser.start(headers=kind(chance, victim)) for kind in COSTS for _ in range(70)
            ]
            for stranger in strangers:
                assert (await stranger.answered()).body == b"1"  # in a session of its own
            browser.cookie = victim
            grid.calls.clear()
            waiting = browser.start()
            await until(lambda: "wait" in grid.calls)
            await session.release()
            assert (await waiting.answered()).body == b"1"
        assert await data_of(browser.provider, victim) == {"n": 1}


# -- a handle without its secret ----------------------------------------------------------------


ACCESSES = ["exclusive", "read_only", "read_only wait_for_writer"]


@ALL
@pytest.mark.parametrize("access", ACCESSES)
@in_loop
async def test_a_handle_without_its_secret_takes_no_lock_and_no_place_in_the_queue(
    grid: Spy, framework: str, access: str
) -> None:
    limit = 2
    options: dict[str, Any] = {"access": access, "request_queue_limit_per_session": limit}
    async with browsing(framework, read, grid, **options) as browser:
        victim = await stored(browser.provider, n=1)
        chance = random.Random(4)

        async def intrude(times: int = 10) -> None:
            for _ in range(times):
                grid.calls.clear()
                headers = handle_without_secret(chance, victim)
                answer = await browser.start(headers=headers).answered()
                assert (answer.status, answer.body) == (200, b"None")
                assert len(grid.calls) == 1  # one look: it neither waits nor withdraws

        await intrude()
        assert await is_free(grid, victim)
        async with browser.provider.open(victim):
            await intrude()
            browser.cookie = victim
            grid.calls.clear()
            waiting = [browser.start() for _ in range(limit)]  # all places are the owner's
            if access == "read_only":
                await until(lambda: grid.calls.count("read") == limit)
            else:
                await until(lambda: grid.in_line(limit))
            await grid.settle()
            browser.cookie = None
            await intrude()  # nor is it told that the queue is full
        for exchange in waiting:
            assert (await exchange.answered()).body == b"1"
        assert await is_free(grid, victim)


@pytest.mark.parametrize("access", ACCESSES)
@in_loop
async def test_a_handle_without_its_secret_keeps_no_session_alive(
    grid: Spy, clock: ManualClock, access: str
) -> None:
    async with browsing("asgi", read, grid, timeout=100, access=access) as browser:
        victim = await stored(browser.provider, n=1)
        chance = random.Random(5)
        for _ in range(11):
            clock.advance(9)
            grid.calls.clear()
            await browser.start(headers=handle_without_secret(chance, victim)).answered()
            await until(lambda: len(asyncio.all_tasks()) == 1)  # a touch would be one
            assert len(grid.calls) == 1
            assert not await is_gone(grid, victim)
        clock.advance(2)
        assert await is_gone(grid, victim)


async def is_gone(grid: Spy, session_id: str) -> bool:
    """Asked by a read that slides nothing."""
    _, key, secret = identity_of(session_id)
    return isinstance(await grid.inner.read(key, secret), Missing)


@in_loop
async def test_a_secret_that_was_replaced_long_ago_is_a_wrong_one(
    grid: Spy, clock: ManualClock
) -> None:
    async with browsing("asgi", read, grid) as browser:
        old = await stored(browser.provider, n=1)
        async with browser.provider.open(old) as session:
            session.regenerate_id()
        new = session.id
        clock.advance(11)
        async with browser.provider.open(new):
            browser.cookie = old
            grid.calls.clear()
            assert (await browser.ask()).body == b"None"
            assert grid.calls == ["acquire"]
        assert await is_free(grid, new)


# -- constant work ------------------------------------------------------------------------------


def bytecodes(call: Callable[[], object]) -> int:
    """How many of gridsession's own bytecodes are carried out in a call."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(SRC):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


class Meter:
    """Counts the work of a request, up to the handler's answer; the grid must not suspend."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def _receive(self) -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            assert message["status"] == 200

    def work(self, headers: Headers, path: str = "/") -> int:
        scope: Scope = {"type": "http", "method": "GET", "path": path, "headers": headers}

        def call() -> None:
            with pytest.raises(StopIteration):
                self._app(scope, self._receive, self._send).__await__().__next__()

        return bytecodes(call)


def almost(chance: random.Random, session_id: str, size: int) -> str:
    """An id whose secret's hash begins with the same bytes, `size` of them."""
    _, _, wanted = identity_of(session_id)
    handle = base64.urlsafe_b64decode(session_id)[:HANDLE_BYTES]
    while True:
        secret = chance.randbytes(SECRET_BYTES)
        if sha256(secret).digest()[:size] == wanted[:size]:
            return rotated_id(handle, secret)


@pytest.mark.usefixtures("quiet")
@in_loop
async def test_the_work_for_a_cookie_does_not_depend_on_what_it_holds(clock: ManualClock) -> None:
    async with provider_on(MemoryGrid(clock)) as provider:
        meter = Meter(plain(read, provider=provider))
        victim = await stored(provider, n=1)
        meter.work([cookie("x")])  # the first of all keeps things for the next
        meter.work([cookie("x"), cookie("x")])  # the first of them is logged

        none = meter.work([])
        wrong_length = {meter.work([cookie("A" * n)]) for n in (1, 63, 65, 1_000, 100_000)}
        assert len(wrong_length) == 1
        wrong_letters = {
            meter.work([cookie(b"A" * n + byte + b"A" * (63 - n))])
            for n in (0, 31, 63)
            for byte in (b"%", b"\x00", b"\xff", b"+")
        }
        assert len(wrong_letters) == 1
        several = {meter.work([(b"cookie", b"session=A; " * n)]) for n in (2, 3, 1_000, 10_000)}
        assert len(several) == 1
        others = {meter.work([(b"cookie", b"a=b; " * n)]) for n in (1, 1_000, 10_000)}
        assert len(others) == 1
        for counts in (wrong_length, wrong_letters, several, others):
            assert 0 <= min(counts) - none < 100

        chance = random.Random(6)
        for kinds in ((invented, secret_without_handle), (handle_without_secret,)):
            headers = {kind(chance, victim)[0] for kind in kinds for _ in range(20)}
            if handle_without_secret in kinds:  # however much of what is compared is right
                headers |= {cookie(almost(chance, victim, size)) for size in (1, 2)}
            assert len({meter.work([header]) for header in headers}) == 1


@in_loop
async def test_the_work_for_a_stranger_does_not_grow_with_what_is_stored(
    clock: ManualClock,
) -> None:
    grid = MemoryGrid(clock)
    async with provider_on(grid) as provider:
        meter = Meter(plain(read, provider=provider))
        victim = await stored(provider, n=1)
        chance = random.Random(7)
        attacks = (invented, handle_without_secret)
        for kind in attacks:
            meter.work(kind(chance, victim))
        before = [meter.work(kind(chance, victim)) for kind in attacks]
        for n in range(200):
            await stored(provider, n=n)
        async with provider.open(victim) as session:
            session.update({f"key {n}": list(range(50)) for n in range(50)})
        assert [meter.work(kind(chance, victim)) for kind in attacks] == before
        async with provider.open(victim):
            _, key, secret = identity_of(victim)
            for n in range(50):  # a full queue, in which each ticket is looked at
                await grid.acquire(key, secret, Claim(n.to_bytes(16), "waits", 15.0, 50))
            after = [meter.work(kind(chance, victim)) for kind in attacks]
            assert after[0] == before[0]
            assert after[1] < before[1] + 50 * 20


PATHS = {
    "long": lambda n: "/" + "a" * n,
    "deep": lambda n: "/a" * (n // 2),
    "slashes": lambda n: "/" * n,
    "secret": lambda n: "/" + "%" * n,
}


@pytest.mark.parametrize("shape", PATHS.values(), ids=PATHS)
@in_loop
async def test_the_work_for_a_path_does_not_grow_with_it(shape: Callable[[int], str]) -> None:
    rules = {"/static/*": "none", "/*/a*b*c": "none", "GET /x/*": "read_only"}
    async with provider_on(MemoryGrid(), access=rules) as provider:
        meter = Meter(plain(read, provider=provider))
        lengths = (1_000, 10_000, 50_000)
        for n in lengths:
            meter.work([], shape(n))  # the first of its kind
        assert len({meter.work([], shape(n)) for n in lengths}) == 1


@pytest.mark.parametrize(
    "header",
    [b"; " * 4_000_000, b";" + b" " * 8_000_000, b"session" * 1_000_000, b"session=;" * 800_000],
    ids=["semicolons", "spaces", "names", "empty"],
)
@pytest.mark.usefixtures("quiet")
@in_loop
async def test_eight_megabytes_of_cookies_stop_no_worker(header: bytes) -> None:
    async with browsing("asgi", read, Spy(MemoryGrid())) as browser:
        began = time.monotonic()
        answer = await browser.start(headers=[(b"cookie", header)]).answered()
        assert answer.body == b"None"
        assert time.monotonic() - began < 10  # by the square of its length it would take hours


# -- readers that do not read -------------------------------------------------------------------


class NobodyReads:
    """What a server shows of a client whose socket is full: no `send` comes back until it reads."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.reads = asyncio.Event()
        self.stuck = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def slow_send(message: Message) -> None:
            self.stuck += 1
            await self.reads.wait()
            await send(message)

        await self._app(scope, receive, slow_send)


@ALL
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@in_loop
async def test_a_reader_that_does_not_read_holds_no_lock(
    grid: Spy, framework: str, streamed: bool
) -> None:
    async def handler(asked: Asked) -> Reply:
        reply = await add(asked)
        if streamed and asked.path == "/big":

            async def chunks() -> Any:
                for _ in range(100):
                    yield b"x" * 1000

            return Reply(chunks=chunks)
        return reply

    async with browsing(framework, handler, grid) as browser:
        browser.cookie = await stored(browser.provider, n=0)
        quick = browser.app
        browser.app = slow = NobodyReads(quick)
        unread = [browser.start(path="/big") for _ in range(3)]
        await until(lambda: slow.stuck == 3)
        browser.app = quick
        grid.calls.clear()
        assert (await browser.ask()).body == b"4"  # all three are stored
        assert grid.calls == ["acquire", "commit"]  # and nobody was waited for
        slow.reads.set()
        for exchange in unread:
            assert (await exchange.answered()).status == 200
        assert await data_of(browser.provider, browser.cookie) == {"n": 4}


# -- more requests than may wait ----------------------------------------------------------------


@pytest.mark.usefixtures("quiet")
@ALL
@in_loop
async def test_a_thousand_requests_on_one_session_take_no_place_from_others(
    grid: Spy, framework: str
) -> None:
    total, limit = 1_000, 5
    async with browsing(framework, add, grid, request_queue_limit_per_session=limit) as browser:
        greedy, other = await stored(browser.provider, n=0), await stored(browser.provider, n=0)
        async with browser.provider.open(greedy):
            browser.cookie = greedy
            flood = [browser.start() for _ in range(total)]
            await until(lambda: sum(x.task.done() for x in flood) == total - limit)
            browser.cookie = other
            for n in range(1, 21):
                assert (await browser.ask()).body == str(n).encode()
            refused = [x for x in flood if x.task.done()]
            assert {(x.status, *x.header("retry-after")) for x in refused} == {(503, "5")}
            assert len(asyncio.all_tasks()) <= 1 + 4 * limit  # those refused have left nothing
        for exchange in flood:
            await exchange.answered()
        assert sum(x.status == 200 for x in flood) == limit
        assert await data_of(browser.provider, greedy) == {"n": limit}
        assert await is_free(grid, greedy)


@ALL
@in_loop
async def test_a_thousand_that_leave_the_queue_leave_nothing(grid: Spy, framework: str) -> None:
    async with browsing(framework, add, grid) as browser:
        browser.cookie = await stored(browser.provider, n=0)
        async with browser.provider.open(browser.cookie):
            for _ in range(20):
                grid.calls.clear()
                gone = [browser.start() for _ in range(50)]  # as many as may wait
                await until(lambda: grid.in_line(50))
                for exchange in gone:
                    exchange.leave()
                for exchange in gone:
                    assert (await exchange.answered()).sent == []
                await until(lambda: len(asyncio.all_tasks()) == 1)
                assert grid.calls.count("release") == 50
        assert await is_free(grid, browser.cookie)
        assert await data_of(browser.provider, browser.cookie) == {"n": 0}


def test_the_attacks_are_what_they_are_said_to_be() -> None:
    """Held against identity's own rules, so that a slip above does not make them harmless."""
    from gridsession.identity import CookieReader, parse_id

    reader, session_id = CookieReader("session"), new_id(os.urandom(ID_BYTES))
    _, key, secret = identity_of(session_id)
    chance = random.Random(8)
    for _ in range(300):
        for kind in (malformed, huge):
            values = reader.values(kind(chance, session_id))
            assert all(parse_id(value) is None for value in values)
        assert len(reader.values(duplicated(chance, session_id))) > 1
        assert reader.values(of_another_name(chance, session_id)) == []
        for attack_, same in (
            (invented, (False, False)),
            (handle_without_secret, (True, False)),
            (secret_without_handle, (False, True)),
        ):
            (value,) = reader.values(attack_(chance, session_id))
            identity = parse_id(value)
            assert identity is not None
            assert (identity.key == key, identity.secret == secret) == same


@pytest.mark.usefixtures("tracing")
@in_loop
async def test_paths_are_not_kept(grid: Spy) -> None:
    # Without framework: Starlette's `request.url` leaves 128 of them in a cache of urllib's.
    async with browsing("asgi", read, grid) as browser:
        for length in (10, 20_000):  # the first are kept, as those of an application would be
            for n in range(600):
                answer = await browser.start(path=f"/{n}" + "a" * length).answered()
                assert answer.status == 200
            if length == 10:
                before = traced()
        assert traced() - before < 1 << 20


@pytest.mark.usefixtures("tracing")
@ALL
@in_loop
async def test_refusals_for_a_wrong_setting_keep_nothing(framework: str) -> None:
    app = FRAMEWORKS[framework](read, timeout=-1)
    async with provider_on(MemoryGrid()) as nobodys:
        browser = Browser(app, nobodys)
        browser.cookie = "A" * 1_000
        for number in range(400):
            assert (await browser.ask()).status == 500
            if number == 199:
                before = traced()
        assert traced() - before < KEPT_BYTES
