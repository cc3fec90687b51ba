
J
4
ed0e56ab8b2a0ecb 0eaf762b33c06094dc1f7e4fd78ec43f
fe9062d0fff82a66
	
€€€13.0.0