"""What a user would pick instead: losses and adapters, each called as its own documentation calls it."""
