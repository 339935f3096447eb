"""Listening sockets of a server, bound before anything else starts, so that a taken port is noticed at once."""

from __future__ import annotations

import errno
import ipaddress
import socket

from penstock.config import ListenSettings
from penstock.errors import AddressInUse, SetupError, UnsafeBind

BACKLOG = 2048


def check_exposure(listen: ListenSettings) -> None:
    """Raises UnsafeBind if strangers could reach the API without a key."""
    if not listen.api_key and not is_loopback(listen.host):
        raise UnsafeBind(f"--host {listen.host} lets others in without a key: set PENSTOCK_API_KEY, or bind 127.0.0.1")


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name; whatever it resolves to today, it is not certain to be ours alone
        return False


def is_dialable(host: str) -> bool:
    """Whether other hosts can reach this one at this address: neither loopback nor all addresses at once."""
    try:
        return not is_loopback(host) and not ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return True  # a name


def listen_at_both(listen: ListenSettings, processes: int = 1) -> tuple[socket.socket, socket.socket]:
    """The listening sockets for clients and for workers. Raises UnsafeBind, AddressInUse or SetupError.

    For several processes the first one does not listen: each of them does, beside it.
    """
    check_exposure(listen)
    http = listen_at(listen.host, listen.port, "--port")
    if processes > 1:
        http = _share(http)
    try:
        join_port = listen.join_port_after(port_of(http))
        return http, listen_at(listen.join_host, join_port, "--join-port")
    except BaseException:
        http.close()
        raise


def listen_at(host: str, port: int, flag: str) -> socket.socket:
    """`flag` is the one that chooses the port, for the message of AddressInUse."""
    if not 0 <= port < 1 << 16:
        raise SetupError(f"{port} is no port: choose one below 65536 with {flag}")
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        # Connections that ended a minute ago do not keep a new server from its port.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno != errno.EADDRINUSE:
            raise SetupError(f"cannot listen at {host} port {port}: {error.strerror}") from error
        raise AddressInUse(
            f"port {port} of {host} is in use: stop who listens there, or choose another with {flag}"
        ) from error
    return listener


def _share(listener: socket.socket) -> socket.socket:
    """Holds the address of a listening socket, which showed that nobody else listens there, and ends that."""
    address = listener.getsockname()
    listener.close()
    return _bind_shared(listener.family, address)


def listen_beside(holder: socket.socket) -> socket.socket:
    """A listening socket of one of several processes, at the address that their parent holds.

    The kernel deals connections out among those that listen, so none waits for a process that died.
    """
    listener = _bind_shared(holder.family, holder.getsockname())
    listener.listen(BACKLOG)
    return listener


def _bind_shared(family: int, address: tuple[object, ...]) -> socket.socket:
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    bound.bind(address)
    return bound


def adopt(descriptor: int) -> socket.socket:
    """A listening socket that the launcher made. Raises SetupError if it is none."""
    try:
        return socket.socket(fileno=descriptor)
    except OSError as error:
        raise SetupError(f"file descriptor {descriptor} is no socket: {error.strerror}") from error


def port_of(listener: socket.socket) -> int:
    port: int = listener.getsockname()[1]
    return port


def address_of(listener: socket.socket) -> str:
    """HOST:PORT at which a process on this machine reaches a listening socket."""
    host: str = listener.getsockname()[0]
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{reachable}]:{port_of(listener)}" if ":" in reachable else f"{reachable}:{port_of(listener)}"


def split_address(address: str) -> tuple[str, int]:
    """Host and port of HOST:PORT. Raises SetupError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise SetupError(f"{address!r} is no address: write HOST:PORT")
    return host.strip("[]"), int(port)


def address_towards(there: str) -> str:
    """Our address on the way to HOST:PORT, at which it can reach us too; loopback for an empty `there`.

    Nothing is sent. Raises SetupError.
    """
    if not there:
        return "127.0.0.1"
    host, port = split_address(there)
    try:
        family, kind, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(where)
            ours: str = probe.getsockname()[0]
            return ours
    except OSError as error:
        raise SetupError(f"there is no way to {there}: {error.strerror or error}") from error
