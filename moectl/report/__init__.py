"""One way to show things: the result on stdout, everything else on stderr."""
