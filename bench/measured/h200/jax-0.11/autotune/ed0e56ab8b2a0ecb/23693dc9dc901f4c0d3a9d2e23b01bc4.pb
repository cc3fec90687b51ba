
J
4
ed0e56ab8b2a0ecb 23693dc9dc901f4c0d3a9d2e23b01bc4
fe9062d0fff82a66
	
€€€13.0.0