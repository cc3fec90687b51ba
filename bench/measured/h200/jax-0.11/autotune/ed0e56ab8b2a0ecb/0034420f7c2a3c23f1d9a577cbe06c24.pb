
J
4
ed0e56ab8b2a0ecb 0034420f7c2a3c23f1d9a577cbe06c24
fe9062d0fff82a66
	
€€€13.0.0