"""`make demo`: distill worked solutions of five task families into a 135M student and measure the gain."""
