
J
4
ed0e56ab8b2a0ecb cc0fb5a6b9b95885d3cb82ffd360e50e
fe9062d0fff82a66
	
€€€13.0.0