"""How many steps a training stage takes, its learning rate, and what it prints on the way."""

import math
import time

PROBE_FROM, PROBE_TO = 40, 120


class Pace:
    """Counts the steps of one stage.

    `seconds` caps the stage: after a short probe of the speed, the number of steps is cut to what fits (the schedule
    of the learning rate is cut with it). Leave it None to reproduce a run exactly.
    """

    def __init__(self, name: str, *, steps: int, peak: float, warmup: int, seconds: float | None) -> None:
        self.name, self.steps, self.peak, self.warmup, self.seconds = name, steps, peak, warmup, seconds
        self.step = 0
        self.started = self.probed = time.monotonic()

    def learning_rate(self) -> float:
        """Linear warm-up, then half a cosine to zero."""
        done = (self.step - self.warmup) / max(1, self.steps - self.warmup)
        ramp = (self.step + 1) / self.warmup
        return self.peak * (ramp if ramp < 1 else 0.5 + 0.5 * math.cos(math.pi * min(1.0, max(0.0, done))))

    def more(self) -> bool:
        """Whether another step is due."""
        return self.step < self.steps

    def advance(self, *, loss: float | None = None) -> None:
        """Count one step; give `loss` on the steps that should print a line (reading it waits for the device)."""
        self.step += 1
        now = time.monotonic()
        if self.step == PROBE_FROM:
            self.probed = now
        if self.step == PROBE_TO and self.seconds is not None:
            rate = (PROBE_TO - PROBE_FROM) / (now - self.probed)
            self.steps = min(self.steps, self.step + max(0, int(rate * (self.seconds - (now - self.started)))))
            print(f"{self.name}: {rate:.2f} steps/s, so {self.steps} steps", flush=True)
        if loss is not None:
            spent = now - self.started
            print(f"{self.name} {self.step}/{self.steps}  loss {loss:.5f}  {spent:.0f} s", flush=True)

    def prints(self) -> bool:
        """Whether the coming step should print; the probe's two ends are among them, so that its clock is honest."""
        coming = self.step + 1
        return coming in (1, PROBE_FROM, PROBE_TO) or coming % 250 == 0 or coming == self.steps
