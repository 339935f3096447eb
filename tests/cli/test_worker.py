"""What a worker's process makes of its flags."""

from __future__ import annotations

import pytest

from penstock.cli.worker import publisher_options
from penstock.errors import SetupError
from penstock.wire.zmq_publisher import PublisherOptions


def test_where_events_are_published_is_an_endpoint_and_settings() -> None:
    one, other = "tcp://127.0.0.1:5557", "tcp://127.0.0.1:5558"
    assert publisher_options(one) == PublisherOptions(one)
    assert publisher_options(f"{one},replay={other},repeats=7") == PublisherOptions(one, other, repeats=7)


def test_a_misspelt_setting_of_events_stops_the_start() -> None:
    with pytest.raises(SetupError, match="reply"):
        publisher_options("tcp://127.0.0.1:5557,reply=tcp://127.0.0.1:5558")
