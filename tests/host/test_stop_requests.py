"""A signal asks a run to stop, from the moment it is listened for."""

import signal

from srft_jax.host.stop_requests import stop_requests


def test_a_signal_may_come_as_soon_as_it_is_listened_for(monkeypatch):
    install, before = signal.signal, signal.getsignal(signal.SIGTERM)

    def install_and_raise(number, handler):
        previous = install(number, handler)
        if number == signal.SIGTERM and handler is not before:
            signal.raise_signal(number)
        return previous

    monkeypatch.setattr(signal, "signal", install_and_raise)
    with stop_requests() as requested:
        assert requested()
        assert signal.getsignal(signal.SIGTERM) is before  # a second one acts at once
