"""Which steps send statistics."""

from lmcache_ext.offload.metrics import Pace


def test_the_first_step_then_steps_with_news_then_one_per_interval():
    now = [100.0]
    pace = Pace(1.0, clock=lambda: now[0])
    assert [pace.is_due(), pace.is_due()] == [True, False]
    pace.mark()
    now[0] += 0.5
    assert [pace.is_due(), pace.is_due()] == [True, False]
    now[0] += 0.99
    assert not pace.is_due()  # counted from the last time it was due
    now[0] += 0.01
    assert [pace.is_due(), pace.is_due()] == [True, False]
