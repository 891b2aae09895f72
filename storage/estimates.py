"""Which weights of the past the reference policy of a step has."""


def reference_step(step: int, *, base_step: int, refresh_steps: int) -> int:
    """The step after which the reference of a step's batch was the policy.

    The run's beginning, or with `refresh_steps` above 0 the last step before `step` that is a multiple of it, counted
    from there.
    """
    if refresh_steps == 0:
        return base_step
    return base_step + (step - 1 - base_step) // refresh_steps * refresh_steps
