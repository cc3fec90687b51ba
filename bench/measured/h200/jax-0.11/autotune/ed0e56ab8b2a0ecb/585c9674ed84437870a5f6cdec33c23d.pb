
J
4
ed0e56ab8b2a0ecb 585c9674ed84437870a5f6cdec33c23d
fe9062d0fff82a66
	
€€€13.0.0