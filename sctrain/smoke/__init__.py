"""Does a recipe work? Its full network is counted, and a shrunk copy of it lives a whole life on the CPU."""
