"""Who a user would pick instead: the losses and the adapters, each called as its own documentation calls it."""
