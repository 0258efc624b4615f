"""The clock of a generation: which step and pass a forward is. A transformer is told neither, nor where a run ends."""


class Clock:
    """Tells generations, steps and passes apart by which objects arrive; never by their values, nor by length alone."""

    def __init__(self, *, warmup_steps: int) -> None:
        self._warmup_steps = warmup_steps
        self.begins = True
        """Whether the forward under way is the first of its generation."""
        self.step = 0
        """Within the generation, from 0: also in image-to-image, and in each stage of a cascade."""
        self.turn = 0
        """The pass within the step, from 0: classifier-free guidance takes two."""
        self.forget()

    def forget(self) -> None:
        """The next forward begins a generation, whatever it is given."""
        self._generation: object = object()
        self._latents: object = object()

    def tick(self, generation: object, latents: object) -> None:
        """A forward begins.

        Args:
            generation: what a pipeline makes once for each (its ids).
            latents: what it makes once for each step, and gives to all passes of it.
        """
        self.begins = generation is not self._generation
        if self.begins:
            self.step = self.turn = 0
        elif latents is self._latents:
            self.turn += 1
        else:
            self.step, self.turn = self.step + 1, 0
        # Held, so that no later object can be taken for one of them.
        self._generation, self._latents = generation, latents

    def lags_within(self, steps: int) -> bool:
        """Whether anything may lag in a generation of so many steps; the first is never the one after another."""
        return steps > max(1, self._warmup_steps)

    def may_lag(self, step_held: int | None) -> bool:
        """Whether the warm-up is over, and `step_held`, that of which a layer holds something, is the one before."""
        return self.step >= self._warmup_steps and step_held == self.step - 1
