"""Records from files and from the Hub, checked before anything is computed."""
