"""The virtio 1.4 device side: rings, state machine, transports and the class authors subclass."""
