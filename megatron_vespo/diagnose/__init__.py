"""What a run meant: from a run directory to plots, figures and verdicts."""
