
J
4
ed0e56ab8b2a0ecb b6397910dadda2f31bd174e3d4416e9b
fe9062d0fff82a66

€€€13.0.0