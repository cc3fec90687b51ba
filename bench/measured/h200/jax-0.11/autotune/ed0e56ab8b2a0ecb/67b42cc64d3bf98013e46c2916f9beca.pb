
J
4
ed0e56ab8b2a0ecb 67b42cc64d3bf98013e46c2916f9beca
fe9062d0fff82a66
	
€€€13.0.0