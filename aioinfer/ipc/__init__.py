"""What processes share: sockets, memory, descriptors and pickles. Nothing here knows of inference."""
