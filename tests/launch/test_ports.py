from __future__ import annotations

import socket
from pathlib import Path

import pytest

from conf import ports


def test_a_port_is_free_and_no_outgoing_connection_gets_it() -> None:
    first_outgoing = int(ports.OUTGOING.read_text().split()[0])
    for _ in range(50):
        port = ports.free_port()
        assert ports.LOWEST <= port < first_outgoing
        with socket.socket() as server:
            server.bind(("", port))


def test_where_all_ports_are_for_outgoing_connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "range").write_text("1024\t65535\n")
    monkeypatch.setattr(ports, "OUTGOING", tmp_path / "range")
    assert ports.free_port() > 1024


def test_a_port_in_use_is_not_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as server:
        server.bind(("", 0))
        port = server.getsockname()[1]
        (tmp_path / "range").write_text(f"{port + 1} 65535")
        monkeypatch.setattr(ports, "OUTGOING", tmp_path / "range")
        monkeypatch.setattr(ports, "LOWEST", port)
        assert ports.free_port() != port
