"""A knob's values one after another: which knobs there are, their runs, what each value gave."""
