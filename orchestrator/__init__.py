"""Time, place and record of training: settings, data, stages, the loop, evaluation, export, tracking."""
