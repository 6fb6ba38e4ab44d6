"""Ray Tune: space, trial, tuner, controller, results."""
