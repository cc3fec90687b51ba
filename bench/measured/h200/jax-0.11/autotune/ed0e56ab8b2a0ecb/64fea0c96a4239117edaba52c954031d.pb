
J
4
ed0e56ab8b2a0ecb 64fea0c96a4239117edaba52c954031d
fe9062d0fff82a66

€€€13.0.0