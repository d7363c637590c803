"""A signal asks a run to stop, from the moment it is listened for."""

import signal

import pytest

from srft_jax.host.stop_requests import stop_requests


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_may_come_as_soon_as_it_is_listened_for(first, monkeypatch):
    """Also where the other one is not listened for yet."""
    install, before = signal.signal, signal.getsignal(first)
    both = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def install_and_raise(number, handler):
        previous = install(number, handler)
        if number == first and handler is not before:
            signal.raise_signal(number)
        return previous

    monkeypatch.setattr(signal, "signal", install_and_raise)
    with stop_requests() as requested:
        assert requested()
        # A second one acts at once.
        assert {number: signal.getsignal(number) for number in both} == both
