"""Where a server listens, and who may know."""

from __future__ import annotations

import os
import socket

import pytest

from penstock.cli import sockets
from penstock.config import ListenSettings
from penstock.errors import AddressInUse, SetupError, UnsafeBind


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    sockets.check_exposure(ListenSettings(host=host))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", ""])
def test_anything_else_does(host: str) -> None:
    with pytest.raises(UnsafeBind, match="PENSTOCK_API_KEY"):
        sockets.check_exposure(ListenSettings(host=host))
    sockets.check_exposure(ListenSettings(host=host, api_key="key"))


def test_both_sockets_listen_and_tell_where() -> None:
    http, registry = sockets.listen_at_both(ListenSettings(port=0))
    with http, registry:
        for listener in (http, registry):
            host, port = sockets.split_address(sockets.address_of(listener))
            socket.create_connection((host, port)).close()


def test_a_wildcard_is_reached_over_loopback() -> None:
    with sockets.listen_at("0.0.0.0", 0, "--port") as listener:
        assert sockets.address_of(listener) == f"127.0.0.1:{sockets.port_of(listener)}"


def test_a_host_that_is_not_ours_is_refused() -> None:
    with pytest.raises(SetupError, match=r"cannot listen at 192\.0\.2\.1"):
        sockets.listen_at("192.0.2.1", 0, "--port")  # an address for documentation, nobody's


@pytest.mark.parametrize(("text", "parts"), [("h:1", ("h", 1)), ("[::1]:8001", ("::1", 8001))])
def test_addresses_are_split(text: str, parts: tuple[str, int]) -> None:
    assert sockets.split_address(text) == parts


@pytest.mark.parametrize(
    ("host", "is_dialable"),
    [
        ("10.0.0.1", True),
        ("node7", True),
        ("127.0.0.1", False),
        ("localhost", False),
        ("0.0.0.0", False),
        ("::", False),
    ],
)
def test_where_other_hosts_can_reach_this_one(host: str, is_dialable: bool) -> None:
    assert sockets.is_dialable(host) == is_dialable


def test_our_address_on_the_way() -> None:
    assert sockets.address_towards("127.0.0.1:8001") == "127.0.0.1"
    assert sockets.address_towards("") == "127.0.0.1"


def test_a_descriptor_that_is_no_socket_is_refused() -> None:
    reading, writing = os.pipe()
    try:
        with pytest.raises(SetupError, match="no socket"):
            sockets.adopt(reading)
    finally:
        os.close(reading)
        os.close(writing)


def test_several_processes_listen_beside_the_socket_that_holds_their_port() -> None:
    holder, registry = sockets.listen_at_both(ListenSettings(port=0), processes=2)
    port = sockets.port_of(holder)
    with holder, registry:
        with pytest.raises(ConnectionRefusedError):  # it does not listen itself
            socket.create_connection(("127.0.0.1", port))
        with sockets.listen_beside(holder) as survivor:
            with sockets.listen_beside(holder) as other:
                assert sockets.port_of(survivor) == sockets.port_of(other) == port
            for _ in range(20):  # all go to the one that is left
                socket.create_connection(("127.0.0.1", port)).close()
                survivor.accept()[0].close()
            with pytest.raises(AddressInUse):  # another server
                sockets.listen_at_both(ListenSettings(port=port, join_port=0), processes=2)
