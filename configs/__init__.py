"""One file per data set; each opens with the command that runs it."""
