"""``gradl1 demo``: twin networks on handwritten digits, one with the penalty, and a report of both."""
