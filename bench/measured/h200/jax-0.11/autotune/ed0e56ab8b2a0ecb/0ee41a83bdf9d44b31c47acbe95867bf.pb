
J
4
ed0e56ab8b2a0ecb 0ee41a83bdf9d44b31c47acbe95867bf
fe9062d0fff82a66

€€€13.0.0