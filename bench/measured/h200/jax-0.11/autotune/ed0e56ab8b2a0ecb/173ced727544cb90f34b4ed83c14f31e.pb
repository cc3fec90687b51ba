
J
4
ed0e56ab8b2a0ecb 173ced727544cb90f34b4ed83c14f31e
fe9062d0fff82a66

€€€13.0.0