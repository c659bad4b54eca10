"""`make demo`: distills worked solutions of five task families into a 135M student and measures the gain."""
