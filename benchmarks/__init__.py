"""Programs that measure the library; `results/` holds what they recorded and the tables and plots made from it."""
