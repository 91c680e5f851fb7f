"""PCI functions and the bus they sit on (floor 4); knows no device type and no engine."""
