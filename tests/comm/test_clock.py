from clear_dist.comm.clock import Clock


def told(clock: Clock, generation: object, latents: object) -> tuple[bool, int, int]:
    clock.tick(generation, latents)
    return clock.begins, clock.step, clock.turn


def test_steps_passes_and_generations_are_told_apart_by_identity() -> None:
    clock, first, second = Clock(warmup_steps=1), [0], [0]
    latents = [[1], [1], [1]]
    assert told(clock, first, latents[0]) == (True, 0, 0)
    assert told(clock, first, latents[0]) == (False, 0, 1)
    assert told(clock, first, latents[1]) == (False, 1, 0)
    assert told(clock, first, latents[1]) == (False, 1, 1)
    assert told(clock, first, latents[2]) == (False, 2, 0)
    assert told(clock, second, latents[2]) == (True, 0, 0)
    clock.forget()
    assert told(clock, second, latents[2]) == (True, 0, 0)


def test_what_a_layer_holds_may_be_used_after_the_warm_up_and_for_one_step() -> None:
    for warmup_steps, first_stale in ((0, 1), (1, 1), (3, 3), (9, 6)):
        clock, generation = Clock(warmup_steps=warmup_steps), object()
        held = None
        for step in range(6):
            clock.tick(generation, object())
            assert clock.may_lag(held) == (step >= first_stale)
            assert not clock.may_lag(None) and not clock.may_lag(step - 2)
            held = step
