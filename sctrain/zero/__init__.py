"""Everything that knows DeepSpeed. No other room imports it."""
