"""The engine owns the devices: scheduler, page pool, tick loop, and the process around them."""
