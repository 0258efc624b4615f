"""Step and pass of each forward, worked out from the objects it is given."""


class Clock:
    """Counter of steps and passes by the identity of what arrives, never by values or length."""

    def __init__(self, *, warmup_steps: int) -> None:
        self._warmup_steps = warmup_steps
        self.begins = True
        self.step = 0
        """Step of the generation, from 0; also in image-to-image and in each stage of a cascade."""
        self.turn = 0
        """Pass within the step, from 0; classifier-free guidance takes two."""
        self.forget()

    def forget(self) -> None:
        """Take the next forward for the first of a generation."""
        self._generation: object = object()
        self._latents: object = object()

    def tick(self, generation: object, latents: object) -> None:
        """Begin a forward, given the objects that the pipeline makes once per generation and once per step."""
        self.begins = generation is not self._generation
        if self.begins:
            self.step = self.turn = 0
        elif latents is self._latents:
            self.turn += 1
        else:
            self.step, self.turn = self.step + 1, 0
        # Held, so that no later object can be taken for one of them.
        self._generation, self._latents = generation, latents

    def may_lag(self, step_held: int | None) -> bool:
        """Whether the warm-up is over and what a layer holds is from the previous step."""
        return self.step >= self._warmup_steps and step_held == self.step - 1
