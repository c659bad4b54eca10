"""The command line, `rbfast COMMAND`: arguments in, results on stdout, progress on stderr. Nobody imports it."""
