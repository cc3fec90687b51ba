
J
4
ed0e56ab8b2a0ecb c0aee11f7ea472e66b32328b94e63c0c
fe9062d0fff82a66
	
€€€13.0.0