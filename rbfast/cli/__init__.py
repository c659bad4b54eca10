"""The command line: arguments in, results on stdout, progress on stderr. A module for each kind of work."""
