
J
4
ed0e56ab8b2a0ecb b44bb8e2cb706e2b6de398e54743d937
fe9062d0fff82a66

€€€13.0.0