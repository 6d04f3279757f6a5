"""The mathematics: torch and numpy only, no process group, no engine."""
