
J
4
ed0e56ab8b2a0ecb c165758dc552fc7327f50daba45a764b
fe9062d0fff82a66
	
€€€13.0.0