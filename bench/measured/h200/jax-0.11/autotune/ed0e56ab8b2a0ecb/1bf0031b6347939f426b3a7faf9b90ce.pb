
J
4
ed0e56ab8b2a0ecb 1bf0031b6347939f426b3a7faf9b90ce
fe9062d0fff82a66

€€€13.0.0