"""The two rates that a user sees."""

from repack.rates import Rates, Traffic


class Source:
    """A source whose traffic and clock are set by hand."""

    def __init__(self) -> None:
        self.now = self.waited_s = 0.0
        self.received_bytes = 0

    def traffic(self) -> Traffic:
        return Traffic(self.received_bytes, 0, {}, self.waited_s)

    def clock(self) -> float:
        return self.now


def test_the_link_is_what_came_lately_and_the_encoder_what_it_does_with_bytes() -> None:
    source = Source()
    rates = Rates(source.traffic, jobs=2, clock=source.clock)
    for _ in range(10):
        source.now, source.received_bytes = source.now + 2.0, source.received_bytes + 200
        rates.link()
    assert rates.link() == 100.0
    source.waited_s = 30.0  # of two tasks, in 20 s: each had bytes for 5 s
    assert rates.encoder(done_bytes=1000) == 200.0
    source.now = 120.0
    assert rates.link() < 10.0
    assert rates.overall_link() == 2000 / 120
