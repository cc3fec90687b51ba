
J
4
ed0e56ab8b2a0ecb 374850ad47fa4c3f1a690b7301a069c5
fe9062d0fff82a66

€€€13.0.0