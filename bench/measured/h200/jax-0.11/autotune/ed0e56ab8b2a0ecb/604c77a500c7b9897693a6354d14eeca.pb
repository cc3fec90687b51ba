
J
4
ed0e56ab8b2a0ecb 604c77a500c7b9897693a6354d14eeca
fe9062d0fff82a66

€€€13.0.0