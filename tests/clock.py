"""Time of a lease in tests: nobody sleeps."""


class Clock:
    """Seconds that pass when a test says so, or when somebody waits; `meanwhile` happens at each wait."""

    def __init__(self):
        self.now = 0.0
        self.meanwhile = lambda: None

    def __call__(self):
        return self.now

    def pause(self, seconds):
        self.now += seconds
        self.meanwhile()
