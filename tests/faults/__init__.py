"""What goes wrong around a node, on the real kernel and the real bus: nothing is lost without its number."""
