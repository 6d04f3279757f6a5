"""Who runs where and when; the only home of ray."""
